# SPDX-License-Identifier: Apache-2.0
"""nova-compute's one engine, shared by the driver and the Rbd class."""

from __future__ import annotations

import contextlib
import pathlib
import threading
import time
import uuid
from typing import Optional

import nova.conf
from oslo_log import log as logging

try:
    from nova.virt import node
except ImportError:  # Nova before 27 gives hosts no id
    node = None

from nova_rbd_snap import conf
from nova_rbd_snap.engine.client import EngineClient

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)
conf.register(CONF)

#: A librbd call takes up to five times operation_timeout to fail, and waits about 31 s for a dead lock owner whatever
#: that is (``docs/design/ceph.rst``). An engine that shows no progress for longer is stuck.
_PATIENCE_FACTOR = 5
_LEAST_PATIENCE_SECONDS = 90
#: How long nova-compute may take for its very first start: it waits for the conductor.
_IDENTITY_SECONDS = 600

_lock = threading.Lock()
_client: Optional[EngineClient] = None


def engine() -> EngineClient:
    """The engine of this nova-compute; nothing is started until its first call.

    :raises nova_rbd_snap.conf.BadOption: an option's value cannot be used.
    """
    global _client  # noqa: PLW0603 - one process, one engine
    with _lock:
        if _client is None:
            settings = conf.Settings.read(CONF)
            _client = EngineClient(
                conf.arguments(CONF),
                host=CONF.host,
                machine=_machine(),
                patience_seconds=max(_PATIENCE_FACTOR * settings.operation_timeout, _LEAST_PATIENCE_SECONDS),
            )
        return _client


def stores() -> list[str]:
    """Names of the rbd stores of Glance's that copies go into, the first first."""
    return [store.name for store in conf.Settings.read(CONF).stores]


def await_identity() -> None:
    """Return once Nova has given this host its id, which it does on its very first start, after the driver's.

    Jobs bear that id, and a life that went by another would leave what no later one takes for its own.
    """
    deadline = time.monotonic() + _IDENTITY_SECONDS
    while node is not None and not node.read_local_node_uuid() and time.monotonic() < deadline:
        time.sleep(1)


def _machine() -> str:
    """What tells this machine from another of the same host name, in another cloud or cell on the same pool."""
    found = node.read_local_node_uuid() if node is not None else None
    if found:
        return str(found)
    found = ""
    with contextlib.suppress(OSError):
        found = pathlib.Path("/etc/machine-id").read_text(encoding="ascii").strip()
    if found in ("", "uninitialized"):
        # Better nobody's than also another's: what this life leaves, no later one will take for its own.
        LOG.warning("This machine has no id (/etc/machine-id): jobs that nova-compute leaves stay in the ledger")
        return str(uuid.uuid4())
    return found
