# SPDX-License-Identifier: Apache-2.0
"""nova-compute's one engine, shared by the driver and the Rbd class."""

from __future__ import annotations

import contextlib
import pathlib
import threading
import uuid
from typing import Optional

import nova.conf
from oslo_log import log as logging

from nova_rbd_snap import conf
from nova_rbd_snap.engine.client import EngineClient

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)
conf.register(CONF)

#: A librbd call takes up to five times operation_timeout to fail, and waits about 31 s for a dead lock owner whatever
#: that is (``docs/design/ceph.rst``). An engine that shows no progress for longer is stuck.
_PATIENCE_FACTOR = 5
_LEAST_PATIENCE_SECONDS = 90

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
                _config_arguments(),
                host=CONF.host,
                machine=_machine(),
                patience_seconds=max(_PATIENCE_FACTOR * settings.operation_timeout, _LEAST_PATIENCE_SECONDS),
            )
        return _client


def _config_arguments() -> list[str]:
    """What makes the engine read the configuration that nova-compute read."""
    files = [argument for name in CONF.config_file or () for argument in ("--config-file", name)]
    folders = [argument for name in CONF.config_dir or () for argument in ("--config-dir", name)]
    return files + folders


def _machine() -> str:
    """What tells this machine from another of the same host name, in another cloud or cell on the same pool."""
    found = ""
    with contextlib.suppress(ImportError):  # Nova before 27 has no such id
        from nova.virt import node

        found = node.read_local_node_uuid() or ""
    if found:
        return str(found)
    with contextlib.suppress(OSError):
        found = pathlib.Path("/etc/machine-id").read_text(encoding="ascii").strip()
    if not found:
        # Better nobody's than also another's: what this life leaves, no later one will take for its own.
        LOG.warning("This machine has no id (/etc/machine-id): jobs that nova-compute leaves stay in the ledger")
        return str(uuid.uuid4())
    return found
