# SPDX-License-Identifier: Apache-2.0
"""The daemons of the lab's Ceph: stopped, let go on, and killed by their supervisor."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator

OSDS = ("osd.0", "osd.1", "osd.2")
MONITOR, MANAGER = "mon", "mgr"


def signal(name: str, *daemons: str) -> None:
    """Send them a signal, whatever else they do."""
    command = ["docker", "exec", "nova-rbd-snap-ceph", "supervisorctl", "signal", name, *daemons]
    subprocess.run(command, check=True, capture_output=True, timeout=120)


@contextlib.contextmanager
def frozen(*daemons: str) -> Iterator[None]:
    """Within the block they are there, and do not answer."""
    try:
        signal("STOP", *daemons)
        yield
    finally:
        signal("CONT", *daemons)
