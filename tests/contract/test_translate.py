# SPDX-License-Identifier: Apache-2.0
"""Every exception of the real bindings leaves the border as one of ours."""

from __future__ import annotations

import errno
import inspect
import os
from collections.abc import Iterator
from typing import Any, Optional

import pytest

from nova_rbd_snap import errors
from nova_rbd_snap.ceph import translate

#: The errno each class of the bindings is raised with (``make_ex`` in rados.pyx and rbd.pyx), and what it means to us.
#: None: raised by the binding itself, without one. A class that a new release adds fails here until somebody decides.
MEANING: dict[str, tuple[Optional[int], type[errors.CephError]]] = {
    "rados.ConnectionShutdown": (errno.ESHUTDOWN, errors.Blocklisted),
    "rados.ExtendMismatch": (None, errors.CephError),
    "rados.IOError": (errno.EIO, errors.CephError),
    "rados.InProgress": (errno.EINPROGRESS, errors.CephError),
    "rados.InterruptedOrTimeoutError": (errno.EINTR, errors.CephError),
    "rados.InvalidArgumentError": (errno.EINVAL, errors.CephError),
    "rados.IoctxStateError": (None, errors.CephError),
    "rados.IsConnected": (errno.EISCONN, errors.CephError),
    "rados.LogicError": (None, errors.CephError),
    "rados.NoData": (errno.ENODATA, errors.CephError),
    "rados.NoSpace": (errno.ENOSPC, errors.NoSpace),
    "rados.NotConnected": (errno.ENOTCONN, errors.Unreachable),
    "rados.ObjectBusy": (errno.EBUSY, errors.Busy),
    "rados.ObjectExists": (errno.EEXIST, errors.AlreadyThere),
    "rados.ObjectNotFound": (errno.ENOENT, errors.Missing),
    "rados.ObjectStateError": (None, errors.CephError),
    "rados.PermissionDeniedError": (errno.EACCES, errors.NoPermission),
    "rados.PermissionError": (errno.EPERM, errors.NoPermission),
    "rados.RadosStateError": (None, errors.CephError),
    "rados.TimedOut": (errno.ETIMEDOUT, errors.Unreachable),
    "rbd.ArgumentOutOfRange": (errno.EDOM, errors.CephError),
    "rbd.ConnectionShutdown": (errno.ESHUTDOWN, errors.Blocklisted),
    "rbd.DiskQuotaExceeded": (errno.EDQUOT, errors.NoSpace),
    "rbd.FunctionNotSupported": (errno.ENOSYS, errors.NotSupported),
    "rbd.IOError": (errno.EIO, errors.CephError),
    "rbd.ImageBusy": (errno.EBUSY, errors.Busy),
    "rbd.ImageExists": (errno.EEXIST, errors.AlreadyThere),
    "rbd.ImageHasSnapshots": (errno.ENOTEMPTY, errors.HasSnapshots),
    "rbd.ImageNotFound": (errno.ENOENT, errors.Missing),
    "rbd.IncompleteWriteError": (None, errors.CephError),
    "rbd.InvalidArgument": (errno.EINVAL, errors.CephError),
    "rbd.LogicError": (None, errors.CephError),
    "rbd.NoSpace": (errno.ENOSPC, errors.NoSpace),
    "rbd.ObjectExists": (errno.EEXIST, errors.AlreadyThere),
    "rbd.ObjectNotFound": (errno.ENOENT, errors.Missing),
    "rbd.OperationCanceled": (errno.ECANCELED, errors.CephError),
    "rbd.OperationNotSupported": (errno.EOPNOTSUPP, errors.NotSupported),
    "rbd.PermissionError": (errno.EPERM, errors.NoPermission),
    "rbd.ReadOnlyImage": (errno.EROFS, errors.Unreachable),
    "rbd.Timeout": (errno.ETIMEDOUT, errors.Unreachable),
    # The bases, with numbers that have no class of their own.
    "rados.Error": (None, errors.CephError),
    "rados.OSError": (errno.EDQUOT, errors.NoSpace),
    "rbd.Error": (None, errors.CephError),
    "rbd.OSError": (errno.EACCES, errors.NoPermission),
}

#: What a few want besides a message.
_MORE = {"rados.ExtendMismatch": (0, 0)}


@pytest.fixture(scope="module")
def bindings() -> tuple[Any, Any]:
    """The real modules."""
    try:
        import rados
        import rbd
    except ImportError as error:
        if os.environ.get("NOVA_RBD_SNAP_REAL") == "1":
            pytest.fail(f"NOVA_RBD_SNAP_REAL=1, but {error}")
        pytest.skip(f"no Ceph bindings for this Python: {error}")
    return rados, rbd


def classes(bindings: tuple[Any, Any]) -> Iterator[tuple[str, type[Exception]]]:
    for module in bindings:
        for name, cls in inspect.getmembers(module, inspect.isclass):
            if issubclass(cls, BaseException):
                yield f"{module.__name__}.{name}", cls


@pytest.mark.real
def test_every_class_is_translated(bindings: tuple[Any, Any]) -> None:
    """Each exception the bindings know becomes what it means, with its number and without; the original is its cause,
    and the message says what was being done."""
    rados, rbd = bindings
    for name, cls in classes(bindings):
        number, meaning = MEANING[name]
        original = cls("said Ceph", *_MORE.get(name, ())) if number is None else cls("said Ceph", errno=number)
        with pytest.raises(errors.CephError) as caught, translate.translated("clone a to b", rados.Error, rbd.Error):
            raise original
        assert type(caught.value) is meaning, name
        assert caught.value.__cause__ is original
        assert str(caught.value).startswith(f"clone a to b: {cls.__name__}: ")
        assert "said Ceph" in str(caught.value)


@pytest.mark.real
def test_no_class_left_the_bindings(bindings: tuple[Any, Any]) -> None:
    """The table above names nothing that the bindings no longer have."""
    assert set(MEANING) <= {name for name, _ in classes(bindings)}


@pytest.mark.parametrize(("number", "meaning"), [entry for entry in MEANING.values() if entry[0] is not None])
@pytest.mark.parametrize("sign", [1, -1])
def test_sign_does_not_matter(number: int, meaning: type[errors.CephError], sign: int) -> None:
    """Bindings and commands differ in the sign of an errno."""
    assert translate.class_for(sign * number) is meaning


def test_a_number_without_a_class() -> None:
    """librbd's "bad message" over an rbd image that was open when the cluster fell silent is no answer."""
    assert translate.class_for(-errno.EBADMSG) is errors.Unreachable


def test_what_is_ours_passes() -> None:
    """An error of ours inside the block is not translated again, and a bug stays a bug."""
    for error in (errors.Cancelled("x"), ZeroDivisionError("y")):
        with pytest.raises(type(error)) as caught, translate.translated("do it", OSError):
            raise error
        assert caught.value is error
