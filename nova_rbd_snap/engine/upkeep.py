# SPDX-License-Identifier: Apache-2.0
"""What an engine does that nobody calls for: it looks after what earlier work left, and does what is queued."""

from __future__ import annotations

import contextlib
import logging
import random
import threading
from collections.abc import Sequence
from typing import Callable, Optional

from nova_rbd_snap import errors
from nova_rbd_snap.ceph.interface import Cluster
from nova_rbd_snap.conf import Settings
from nova_rbd_snap.engine.connection import Connection
from nova_rbd_snap.engine.notices import Notices
from nova_rbd_snap.flatten import means, readers
from nova_rbd_snap.flatten.task import Flattening
from nova_rbd_snap.janitor import jobs, parents, purge
from nova_rbd_snap.ledger.job import FLATTEN, INLINE, PROBE, PURGE, Owner
from nova_rbd_snap.ledger.store import Ledger
from nova_rbd_snap.workers import worker

LOG = logging.getLogger(__name__)

#: A lease lasts for so many operation timeouts: one for its renewal, and as much again for what else is slow.
_LEASE_FACTOR = 2
#: The lease of looking for what waits for clones that are gone, and how long it keeps others from looking as well: each
#: opens all the disks in the pool.
_PARENTS_LEASE, _PARENTS_SECONDS = "nova_rbd_snap.parents", 3600


class Upkeep:
    """Of one engine, which says when to stop."""

    def __init__(
        self,
        settings: Settings,
        owner: Callable[[str], Owner],
        connection: Connection,
        connect: Callable[[], Cluster],
        *,
        reclaim: Callable[[], None],
        images: jobs.Images,
        scratch: Optional[readers.ScratchImages],
        notices: Notices,
        clock: Callable[[], float],
    ) -> None:
        """
        :param owner: given the address of a client.
        :param connection: the engine's.
        :param connect: makes a worker's own.
        :param reclaim: ends what earlier requests left.
        :param images: Glance, asked with the service's own credentials.
        :param scratch: the same, to see what it can read; None where nobody asks.
        """
        self._settings, self._owner, self._clock = settings, owner, clock
        self._connection, self._connect = connection, connect
        self._reclaim, self._images, self._scratch = reclaim, images, scratch
        self._notices = notices
        self._state = threading.Condition()
        self._work_due = threading.Condition()
        self._stopping = False
        self._working = 0

    def start(self) -> None:
        """Begin, in threads, until :meth:`stop`."""
        threading.Thread(target=self.keep_reclaiming, name="reclaim", daemon=True).start()
        threading.Thread(target=self.keep_clearing, name="clear", daemon=True).start()
        threading.Thread(target=self._work_at_once, name="purge", daemon=True).start()
        for _ in range(self._settings.flatten_workers):
            threading.Thread(target=self.keep_working, args=[FLATTEN], name="flatten", daemon=True).start()

    def stop(self) -> None:
        """Begin nothing new, and put back what can be; :meth:`wait` waits for that."""
        with self._state:
            self._stopping = True
            self._state.notify_all()
        self.look_for_work()

    def wait(self, timeout_seconds: Optional[float] = None) -> None:
        """Wait, for so long at most, until what was under way has stopped."""
        with self._state:
            self._state.wait_for(lambda: not self._working, timeout_seconds)

    # -- what earlier work left ----------------------------------------------------------------------------------

    def keep_reclaiming(self) -> None:
        """Reclaim now and again, so that what heals is cleared away by itself."""
        while not self._stopping:
            self._reclaim()
            self._pause()

    def keep_clearing(self) -> None:
        """Now and again remove what waits for clones that are gone; a single engine of all does, once in a while."""
        while not self._stopping:
            self._clear_parents()
            self._pause()

    def _pause(self) -> None:
        with self._state:
            self._state.wait_for(lambda: self._stopping, self._settings.reclaim_interval)

    def _clear_parents(self) -> None:
        settings = self._settings
        glance_pools = [settings.glance_pool] if settings.glance_pool else []
        try:
            with self._connection.use() as cluster, contextlib.suppress(errors.Busy):
                cluster.take_lease(settings.pool, _PARENTS_LEASE, _PARENTS_SECONDS)
                for what in parents.clear(cluster, settings.pool, glance_pools, self._images, self._clock()):
                    if what.kept:
                        LOG.info("What %s may be kept for in vain is not cleared away now: %s", what.what, what.kept)
                    else:
                        LOG.info("Removed %s: nothing depended on it any more", what.what)
        except Exception as error:  # it is tried again
            text = f"it is not cleared away now: {errors.known(error).report()}"
            self._notices.tell("what waits for clones", text)
        else:
            self._notices.withdraw("what waits for clones")

    # -- work that any host may do -------------------------------------------------------------------------------

    def _work_at_once(self) -> None:
        """What does not take long, and begins with the question whether Glance can read what is not flat."""
        self.ask_readers()
        self.keep_working(PROBE, PURGE)

    def ask_readers(self) -> None:
        """Have it found out, where the configuration makes that matter."""
        settings = self._settings
        if settings.flatten == INLINE or settings.clone_format == 1 or not settings.glance_pool:
            return
        try:
            with self._connection.use() as cluster, contextlib.suppress(errors.LedgerConflict):
                owner, ledger = self._owner(cluster.address()), Ledger(cluster, settings.pool)
                readers.queue(ledger, settings.pool, settings.glance_pool, owner, self._clock())
        except errors.SnapError as error:  # then it is seen when the first image is registered
            self._notices.tell("whether Glance can read", f"not asked: {error.report()}")

    def keep_working(self, *kinds: str) -> None:
        """Do what is queued in the ledger, one job at a time.

        :param kinds: of jobs, out of ``ledger.job.BACKGROUND_KINDS``, the most urgent first.
        """
        # A purge cannot be stopped, and need not be: whoever takes it over goes on.
        awaited = FLATTEN in kinds
        with self._state:
            self._working += awaited
        try:
            worker.keep_working(
                lambda: self._is_work_due(kinds), lambda: self._worker(kinds), lambda: self._stopping, self._await_work
            )
        finally:
            with self._state:
                self._working -= awaited
                self._state.notify_all()

    def look_for_work(self) -> None:
        """There may be some: whoever waits for it looks now."""
        with self._work_due:
            self._work_due.notify_all()

    def _await_work(self) -> None:
        with self._work_due:
            if not self._stopping:
                # Not in step with all other hosts.
                self._work_due.wait(self._settings.reclaim_interval * random.uniform(0.8, 1.2))

    def _is_work_due(self, kinds: Sequence[str]) -> bool:
        """Whether it is worth a connection of a worker's own."""

        def look(cluster: Cluster) -> bool:
            cloud, now = self._owner(cluster.address()).cloud, self._clock()
            found = Ledger(cluster, self._settings.pool).read().jobs
            due = [job for job in found if worker.is_due(job, kinds, cloud, now)]
            return any(worker.is_free(job, cluster, self._settings.pool) for job in due)

        return self._connection.ask(look)

    def _worker(self, kinds: Sequence[str]) -> worker.Worker:
        cluster = self._connect()
        by = means.of(self._settings.flatten_engine, cluster)
        tasks: dict[str, worker.Task] = {
            FLATTEN: Flattening(cluster, self._images, by, self._clock),
            PURGE: purge.Purge(cluster, self._clock),
        }
        if self._scratch is not None:
            tasks[PROBE] = readers.Probe(cluster, self._scratch, self._clock)
        return worker.Worker(
            cluster,
            self._settings.pool,
            self._owner(cluster.address()),
            [tasks[kind] for kind in kinds if kind in tasks],
            limit=self._settings.flatten_limit,
            lease_seconds=_LEASE_FACTOR * self._settings.operation_timeout,
            clock=self._clock,
        )
