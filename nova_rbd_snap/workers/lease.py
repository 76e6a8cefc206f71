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


class Lease:
    """A lease that this client has. :attr:`lost` is set once it may be another's."""

    def __init__(self, cluster: Cluster, pool: str, name: str, seconds: float) -> None:
        self._cluster, self._pool, self._name, self._seconds = cluster, pool, name, seconds
        self._over = threading.Event()
        self.lost = threading.Event()

    def _keep(self, since: float) -> None:
        while not self._over.wait(self._seconds / _RENEWALS):
            asked = time.monotonic()
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
        self.lost.set()


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
        if not lease.lost.is_set():
            with contextlib.suppress(errors.CephError):  # then it runs out
                cluster.end_lease(pool, name)
