# SPDX-License-Identifier: Apache-2.0
"""A lease that is kept for as long as work goes on, and the end of the work where it is lost."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

from nova_rbd_snap import errors
from nova_rbd_snap.ceph.interface import Cluster

LOG = logging.getLogger(__name__)

#: How often a lease is renewed while it lasts.
_RENEWALS = 4
#: How long work may go on without asking for its lease before it is taken for stuck in a call that never returns. The
#: longest call that may last is librbd's removal of a disk without object map: 121 s per TiB were measured.
_STUCK_SECONDS = 6 * 3600.0


class Lease:
    """A lease that this client has, and keeps while its work asks for it now and again."""

    def __init__(self, cluster: Cluster, pool: str, name: str, seconds: float) -> None:
        self._cluster, self._pool, self._name, self._seconds = cluster, pool, name, seconds
        self._over, self._lost = threading.Event(), threading.Event()
        self._asked_at = time.monotonic()

    def is_lost(self) -> bool:
        """Whether it may be another's by now; for the work, which is taken for stuck where it does not ask."""
        self._asked_at = time.monotonic()
        return self._lost.is_set()

    def _keep(self, since: float) -> None:
        while not self._over.wait(self._seconds / _RENEWALS):
            asked = time.monotonic()
            if asked - self._asked_at >= _STUCK_SECONDS:
                LOG.error("What is done under the lease %s is stuck, and is left to others", self._name)
                break
            try:
                self._cluster.renew_lease(self._pool, self._name, self._seconds)
                since = asked
            except (errors.LeaseLost, errors.Blocklisted) as error:
                LOG.warning("%s", error)
                break
            except errors.CephError as error:
                LOG.warning("Cannot renew the lease %s, which is tried again: %s", self._name, error)
                if time.monotonic() - since >= self._seconds:
                    break
        else:
            return
        self._lost.set()


@contextlib.contextmanager
def held(cluster: Cluster, pool: str, name: str, seconds: float) -> Iterator[Lease]:
    """Have the lease within the block.

    :raises errors.Busy: somebody else has it.
    """
    asked = time.monotonic()
    cluster.take_lease(pool, name, seconds)
    lease = Lease(cluster, pool, name, seconds)
    keeping = threading.Thread(target=lease._keep, args=[asked], name="nova-rbd-snap-lease", daemon=True)
    keeping.start()
    try:
        yield lease
    finally:
        lease._over.set()
        keeping.join()
        if not lease._lost.is_set():
            with contextlib.suppress(errors.CephError):  # then it runs out
                cluster.end_lease(pool, name)
