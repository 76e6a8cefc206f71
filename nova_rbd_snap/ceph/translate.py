# SPDX-License-Identifier: Apache-2.0
"""One translation in: every exception of ``rados`` and ``rbd`` becomes one of :mod:`nova_rbd_snap.errors`.

Both bindings give their exceptions an ``errno``; where librbd says the same thing with several numbers, or one
number means different things, the facts behind the table are in ``docs/design/ceph.rst``.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from nova_rbd_snap import errors

_BY_ERRNO: dict[int, type[errors.CephError]] = {
    errno.ENOENT: errors.Missing,
    errno.EEXIST: errors.AlreadyThere,
    errno.EBUSY: errors.Busy,
    errno.ENOTEMPTY: errors.HasSnapshots,
    errno.EPERM: errors.NoPermission,
    errno.EACCES: errors.NoPermission,
    errno.ENOSPC: errors.NoSpace,
    errno.EDQUOT: errors.NoSpace,
    errno.EOPNOTSUPP: errors.NotSupported,
    errno.ENOSYS: errors.NotSupported,
    errno.ETIMEDOUT: errors.Unreachable,
    errno.ENOTCONN: errors.Unreachable,
    # A write to an image that we opened for writing: librbd could not get its lock from a cluster that does not answer.
    errno.EROFS: errors.Unreachable,
    # An answer that did not come, taken for one that cannot be read, over an image that was open before.
    errno.EBADMSG: errors.Unreachable,
    errno.ESHUTDOWN: errors.Blocklisted,
    errno.ECANCELED: errors.CephError,
}


def class_for(number: int) -> type[errors.CephError]:
    """The class of ours for an errno; the sign does not matter."""
    return _BY_ERRNO.get(abs(number), errors.CephError)


@contextlib.contextmanager
def translated(doing: str, *bindings: type[Exception]) -> Iterator[None]:
    """Run a block of binding calls; any exception of *bindings* leaves it as ours.

    :param doing: what is being done to what, for the message: "clone vms/a@b to images/c".
    :raises errors.CephError: or the subclass that fits.
    """
    try:
        yield
    except bindings as error:
        number = getattr(error, "errno", None) or 0
        raise class_for(number)(f"{doing}: {type(error).__name__}: {error}") from error
