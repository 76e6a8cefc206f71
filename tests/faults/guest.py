# SPDX-License-Identifier: Apache-2.0
"""A guest for ``openstack/guest.py``: with an agent that holds its file systems still, and a Nova driver to reach it.

That module needs three names of Nova's. Where there is no Nova it is given them.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
import types
import uuid
from typing import Any
from unittest import mock

import oslo_log.log  # noqa: F401  # lest it is imported anew below

from tests.faults.sabotage import Saboteur
from tests.waiting import eventually


def guest_module() -> Any:
    """``nova_rbd_snap.openstack.guest``, with Nova or without."""
    try:
        return importlib.import_module("nova_rbd_snap.openstack.guest")
    except ImportError:
        exception = types.ModuleType("nova.exception")
        exception.NovaException = type("NovaException", (Exception,), {})  # type: ignore[attr-defined]
        exception.InstanceNotFound = type("InstanceNotFound", (exception.NovaException,), {})  # type: ignore[attr-defined]
        power_state = types.ModuleType("nova.compute.power_state")
        power_state.RUNNING, power_state.PAUSED = 1, 3  # type: ignore[attr-defined]
        nova, compute = types.ModuleType("nova"), types.ModuleType("nova.compute")
        nova.exception, compute.power_state = exception, power_state  # type: ignore[attr-defined]
        stubs = {module.__name__: module for module in (nova, compute, exception, power_state)}
        with mock.patch.dict(sys.modules, stubs):
            return importlib.import_module("nova_rbd_snap.openstack.guest")


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
        self.has_agent = True
        self.thawed = threading.Event()
        #: Set when a test is over: what hangs comes back.
        self.over = threading.Event()
        self.uuid = str(uuid.uuid4())
        self.image_meta: dict[str, Any] = {}
        #: Whose it is, by the names that ``Guest`` uses.
        self._host = self._domain = self

    def state(self) -> str:
        """What is to be as before, once it is let go. A freeze outlives nova-compute: nobody else could end it."""
        if self._nova.is_alive:
            with contextlib.suppress(AssertionError):
                eventually(lambda: not self.frozen, "the guest is let go", seconds=5, pause=0.01)
        return f"suspended {self.suspended}, frozen {self.frozen and self._nova.is_alive}"

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
