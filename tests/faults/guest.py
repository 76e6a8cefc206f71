# SPDX-License-Identifier: Apache-2.0
"""A guest for ``openstack/guest.py``: with an agent that holds its file systems still, and a Nova driver to reach it.

That module needs some names of Nova's. Where there is no Nova it is given them.
"""

from __future__ import annotations

import contextlib
import importlib
import pathlib
import sys
import tempfile
import threading
import types
import uuid
from typing import Any
from unittest import mock

import oslo_log.log  # noqa: F401  # lest it is imported anew below

from tests.faults.sabotage import Saboteur
from tests.waiting import eventually

_MARKS = tempfile.TemporaryDirectory()


def guest_module() -> Any:
    """``nova_rbd_snap.openstack.guest``, with Nova or without; it keeps its marks in a folder of ours."""
    name = "nova_rbd_snap.openstack.guest"
    try:
        module = importlib.import_module(name)
    except ImportError:
        with mock.patch.dict(sys.modules, _no_nova()):
            module = importlib.import_module(name)
    module._mark = lambda server: pathlib.Path(_MARKS.name, server.uuid)  # type: ignore[attr-defined]
    return module


def _no_nova() -> dict[str, Any]:
    """Modules with the names of Nova's that the guest's needs."""
    nova_exception = type("NovaException", (Exception,), {})
    libvirt = types.SimpleNamespace(
        libvirtError=type("libvirtError", (Exception,), {}), VIR_FROM_REMOTE=7, VIR_FROM_RPC=13
    )
    names: dict[str, dict[str, Any]] = {
        "nova": {},
        "nova.exception": {
            "NovaException": nova_exception,
            "InstanceNotFound": type("InstanceNotFound", (nova_exception,), {}),
        },
        "nova.compute": {},
        "nova.compute.power_state": {"RUNNING": 1, "PAUSED": 3, "SHUTDOWN": 4, "CRASHED": 6, "SUSPENDED": 7},
        "nova.virt": {},
        "nova.virt.libvirt": {},
        "nova.virt.libvirt.driver": {"libvirt": libvirt},
        "nova.virt.libvirt.utils": {},
    }
    modules = {name: types.ModuleType(name) for name in names}
    for name, module in modules.items():
        vars(module).update(names[name])
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    return modules


class FakeGuest:
    """A running guest, as ``Guest`` sees it through Nova's driver and libvirt.

    :ivar frozen: its file systems are held still.
    :ivar suspended: Nova's own copy has stopped it.
    :ivar required: its image requires that it be held still for a snapshot.
    """

    def __init__(self, saboteur: Saboteur, nova: Any, nova_exception: type[Exception], is_on: int) -> None:
        """
        :param nova: the nova-compute that looks after it.
        """
        self._saboteur, self._nova, self._nova_exception, self._is_on = saboteur, nova, nova_exception, is_on
        self.frozen = self.suspended = self.required = False
        self.thawed = threading.Event()
        #: Set when a test is over: what hangs comes back.
        self.over = threading.Event()
        self.uuid = str(uuid.uuid4())
        self.image_meta: dict[str, Any] = {}
        #: Whose it is, by the names that ``Guest`` uses.
        self._host = self._domain = self

    def hold(self) -> str:
        """What keeps it from running as before, if anything does, once it could be let go.

        A freeze outlives nova-compute: nobody else could end it.
        """
        if self.suspended or not self._nova.is_alive:
            return "suspended" if self.suspended else ""
        with contextlib.suppress(AssertionError):
            eventually(lambda: not self.frozen, "the guest is let go", seconds=5, pause=0.01)
        return "frozen" if self.frozen else ""

    # -- mischief ------------------------------------------------------------------------------------------------------

    def refuse(self) -> None:
        raise self._nova_exception("injected")

    def hang(self) -> None:
        self.over.wait(60)
        raise self._nova_exception("the test is over")

    # -- Nova's driver -------------------------------------------------------------------------------------------------

    def _requires_quiesce(self, image_meta: Any) -> bool:
        return self.required

    def _can_quiesce(self, instance: Any, image_meta: Any) -> None:
        self._saboteur.around("can", lambda: None, "quiesce")

    def quiesce(self, context: Any, instance: Any, image_meta: Any) -> None:
        self._saboteur.around("freeze", lambda: self._set(frozen=True), "quiesce")

    def unquiesce(self, context: Any, instance: Any, image_meta: Any) -> None:
        self._saboteur.around("thaw", lambda: self._set(frozen=False), "quiesce")

    def _set(self, *, frozen: bool) -> None:
        if self._nova.is_alive:
            self.frozen = frozen
            if not frozen:
                self.thawed.set()

    # -- libvirt's domain ----------------------------------------------------------------------------------------------

    def get_guest(self, instance: Any) -> FakeGuest:
        return self

    def get_power_state(self, host: Any) -> int:
        return self._is_on

    def get_block_device(self, device: str) -> FakeGuest:
        return self

    def blockStats(self) -> None:
        self._saboteur.around("answer", lambda: None, "quiesce")

    def get_xml_desc(self) -> str:
        return "<domain><devices><disk><target dev='vda'/></disk></devices></domain>"

    def agentSetResponseTimeout(self, seconds: int) -> None:
        """An agent that hangs does so whatever libvirt is told."""
