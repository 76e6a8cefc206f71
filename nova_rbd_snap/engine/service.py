# SPDX-License-Identifier: Apache-2.0
"""The engine as plain calls: what nova-compute and the command line may ask for.

Thread-safe; each call blocks until it is done. Arguments and results are plain data, for they cross a socket.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import random
import threading
import time
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Callable, Optional, TypeVar

from nova_rbd_snap import errors
from nova_rbd_snap.ceph.interface import Cluster, ImageInfo, SnapInfo
from nova_rbd_snap.conf import Settings
from nova_rbd_snap.engine import Report, unheard
from nova_rbd_snap.flatten import means, readers
from nova_rbd_snap.flatten.bounds import policy_within
from nova_rbd_snap.flatten.queue import queue_oldest
from nova_rbd_snap.flatten.task import Flattening
from nova_rbd_snap.janitor import disks, jobs, parents, purge
from nova_rbd_snap.ledger.job import (
    AT_WORK,
    BACKGROUND,
    BACKGROUND_KINDS,
    CLONE,
    FLATTEN,
    FREEZE,
    INLINE,
    NEVER,
    PROBE,
    PURGE,
    QUEUED,
    Job,
    Owner,
)
from nova_rbd_snap.ledger.store import OBJECT, Ledger
from nova_rbd_snap.snapshot import saga, steps
from nova_rbd_snap.specs import ImageSpec
from nova_rbd_snap.workers import worker

LOG = logging.getLogger(__name__)
T = TypeVar("T")

#: A lease lasts for so many operation timeouts: one for its renewal, and as much again for what else is slow.
_LEASE_FACTOR = 2
#: The lease of looking for what waits for clones that are gone, and how long it keeps others from looking as well: each
#: opens all the disks in the pool.
_PARENTS_LEASE, _PARENTS_SECONDS = "nova_rbd_snap.parents", 3600
#: Seconds between two looks at whether work that is waited for goes on.
_LOOK_SECONDS = 1.0

@dataclass
class Work:
    """A job at work in this engine.

    :ivar disk: name of the disk, where the work can be cancelled.
    :ivar cancelled: set once it shall stop.
    :ivar moved: when there last was progress, by the monotonic clock.
    """

    disk: Optional[str] = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    moved: float = field(default_factory=time.monotonic)

    def noting(self, report: Report) -> Report:
        """*report*, with progress noted here as well."""

        def note(step: str, done: int, total: int) -> None:
            self.moved = time.monotonic()
            report(step, done, total)

        return note


class Engine:
    """All work in one cluster for one nova-compute."""

    def __init__(
        self,
        settings: Settings,
        owner: Callable[[str], Owner],
        *,
        held: Iterable[str] = (),
        connect: Callable[[], Cluster],
        connect_to_work: Optional[Callable[[], Cluster]] = None,
        images: jobs.Images,
        scratch: Optional[readers.ScratchImages] = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """
        :param owner: the owner of this engine's jobs, given the address of its client.
        :param held: ids of the jobs of the same nova-compute's earlier engine, which it still has the say about.
        :param connect: makes a new connection to the cluster.
        :param connect_to_work: the same for work in the background, which leaves others more room.
        :param images: Glance, asked with the service's own credentials.
        :param scratch: the same, to see what it can read; None where nobody asks.
        """
        self._settings = settings
        self._owner = owner
        self._connect = connect
        self._connect_to_work = connect_to_work or connect
        self._images = images
        self._scratch = scratch
        self._clock = clock
        self._state = threading.Condition()
        self._work_due = threading.Condition()
        self._working = 0
        self._connecting = threading.Lock()
        self._cluster: Optional[Cluster] = None
        #: When the last attempt to connect failed, and how.
        self._not_connected: tuple[float, Optional[errors.SnapError]] = (0.0, None)
        self._busy: dict[str, Work] = {}
        # Jobs that nova-compute has the say about: it has asked for them, and has not said finish, rollback or leave.
        self._held = set(held)
        # With the connection they were reserved over, whose client their records name.
        self._reserved: dict[str, tuple[Job, Cluster]] = {}
        self._fenced: set[str] = set()
        self._told: dict[str, str] = {}
        self._stopping = False
        self._orphaned = False

    # -- calls ---------------------------------------------------------------------------------------------------

    def check(self) -> list[str]:
        """What in the configuration does not fit the cluster, as sentences that name the option and the remedy."""
        settings = self._settings
        with self._connection() as cluster:
            pools = (
                (settings.pool, "[libvirt] images_rbd_pool"),
                (settings.glance_pool, "[rbd_snap] glance_pool"),
                (settings.glance_data_pool, "[rbd_snap] glance_data_pool"),
            )
            missing = [
                f"{option} names pool {pool!r}, which cluster {cluster.fsid()} does not have; correct the option or "
                "create the pool"
                for pool, option in pools
                if pool and not cluster.has_pool(pool)
            ]
            return missing or list(self._check_rights(cluster))

    def _check_rights(self, cluster: Cluster) -> Iterator[str]:
        try:
            # The key is absent before and after; of a first start the object stays.
            cluster.omap_replace(self._settings.pool, OBJECT, "check", None, None)
        except errors.NoPermission as error:
            user = self._settings.ceph_user or "(librados' default)"
            yield f"[libvirt] rbd_user {user} may not keep the ledger in pool {self._settings.pool!r}: {error.report()}"

    def describe(self, disk: str) -> dict[str, Any]:
        """Where the server's disk *disk* in Nova's pool is, and comes from.

        :returns: ``fsid``, ``pool`` and ``parent_pool`` (None for a disk without a parent).
        :raises errors.Missing: no such disk.
        """
        fsid, info = self._ask(lambda cluster: (cluster.fsid(), cluster.lookup(ImageSpec(self._settings.pool, disk))))
        return {
            "fsid": fsid,
            "pool": self._settings.pool,
            "parent_pool": info.parent.image.pool if info.parent else None,
        }

    def reserve_clone(self, image_id: str, disk: str, dest_pool: str, flatten: Optional[str] = None) -> str:
        """Write down that the server's disk is to be cloned into Glance's pool as *image_id*; :meth:`perform` does it.

        From now on nova-compute has the say about the job, until :meth:`perform` fails, or it says :meth:`finish`,
        :meth:`rollback` or :meth:`leave`.

        :param flatten: one of ``ledger.job.POLICIES``, instead of the configured one.
        :returns: the location's URL.
        :raises errors.Refused: the disk or the destination cannot be cloned; nothing was changed.
        """
        source, dest = ImageSpec(self._settings.pool, disk), ImageSpec(dest_pool, image_id)
        with self._connection() as cluster:
            if not cluster.has_pool(dest_pool):
                raise errors.Refused(
                    f"cluster {cluster.fsid()} has no pool {dest_pool!r}; set [rbd_snap] glance_pool to the pool of "
                    "Glance's rbd store"
                )
            info = cluster.lookup(source)
            _refuse_uncloneable(source, info)
            if cluster.exists(dest):
                raise errors.AlreadyThere(f"{dest} exists already and is left alone")
            data_pool = self._data_pool(cluster, dest, info)
            policy = self._policy(cluster, source, dest, info, flatten or self._settings.flatten)
            job = self._job(cluster, image_id, CLONE, source, dest=dest, data_pool=data_pool, flatten=policy)
            location = jobs.location(job, saga.Run(cluster))  # asked first: once the job is reserved nothing may fail
            self._reserve(cluster, job)
            return location

    def reserve_freeze(self, job_id: str, disk: str) -> str:
        """Write down that a snapshot of the server's disk is to be taken, for a full copy to read.

        As :meth:`reserve_clone`; :meth:`rollback` removes the snapshot.

        :returns: the snapshot's name.
        """
        with self._connection() as cluster:
            job = self._job(cluster, job_id, FREEZE, ImageSpec(self._settings.pool, disk))
            self._reserve(cluster, job)
            return job.snap.name

    def perform(self, job_id: str, snap_before: Optional[float], report: Report) -> None:
        """Do what was reserved. What becomes of it is then said by :meth:`finish`, :meth:`rollback` or :meth:`leave`.

        :param snap_before: when the machine's monotonic clock shows this the snapshot is of no use any more; None for
            one that always is.
        :raises errors.SnapError: a step failed, and all was undone (``undo_failures`` says what could not be).
        """
        try:
            reserved = self._reserved.pop(job_id, None)
            if reserved is None and job_id not in self._held:
                raise errors.Cancelled(f"job {job_id} was given up before it began")
            if reserved is None:
                raise errors.LedgerConflict(f"job {job_id} was reserved by another engine, which is gone")
            job, reserved_over = reserved
            with self._connection() as cluster, self._at_work(job_id, job.disk.name) as work:
                if cluster is not reserved_over:
                    job = self._take_over(job, cluster)

                run = saga.Run(
                    cluster,
                    work.noting(report),
                    cancelled=lambda: self._stopping or work.cancelled.is_set() or job_id not in self._held,
                    orphaned=lambda: self._orphaned,
                    too_late=lambda: snap_before is not None and time.monotonic() > snap_before,
                )
                self._perform(job, self._ledger(cluster), run)
        except BaseException:
            self.leave(job_id)
            raise

    def _perform(self, job: Job, ledger: Ledger, run: saga.Run) -> None:
        try:
            saga.perform(job, steps.sequence(job), steps.READY, ledger, run)
        except errors.Blocklisted as error:
            if error.undo_failures:
                self._undo_anew(job.id, error, run.cluster)
            raise

    def make_flat(self, image_id: str, report: Report) -> bool:
        """Flatten an image that is ready, for Glance does not take it as it is.

        :returns: False where it is flat, and Glance has something else against it.
        :raises errors.SnapError: it could not be; nova-compute still has the say.
        """
        with self._connection() as cluster, self._at_work(image_id) as work:
            ledger = self._ledger(cluster)
            job = self._adopt(ledger.load(image_id), cluster)
            if job.flatten == INLINE:
                return False
            run = saga.Run(cluster, work.noting(report), cancelled=lambda: self._stopping)
            ledger.advance(job, flatten=INLINE, **steps.Flatten().do(job, run))
            cluster.give_object_map(steps.image_of(job))
            return True

    def distrust(self, image_id: str) -> None:
        """Glance took an image once it was flat, and not before: so it is taken to be with others, until it is seen.

        :raises errors.SnapError: that could not be written down.
        """
        with self._connection() as cluster:
            ledger = self._ledger(cluster)
            job = ledger.load(image_id)
            LOG.warning(
                "Snapshots are flattened before they are registered until Glance is seen to read one that is not: it "
                "took image %s only then; as a rule its Ceph user lacks 'profile rbd-read-only' on pool %s, see "
                "'nova-rbd-snap caps'",
                image_id, job.disk.pool,
            )
            readers.distrust(ledger, job.disk.pool, steps.image_of(job).pool, job.owner, self._clock())

    def finish(self, image_id: str) -> None:
        """The image is registered and active: as a rule nothing but its job is left to remove.

        :raises errors.SnapError: something else is, and could not be; the record says what, and it is tried again.
        """
        with self._leaving(image_id), self._connection() as cluster:
            ledger = self._ledger(cluster)
            job = self._adopt(ledger.load(image_id), cluster)
            jobs.finish(job, ledger, saga.Run(cluster))
            if job.flatten != INLINE:
                self._relieve(job, cluster, ledger)
        self._look_for_work()

    def _relieve(self, job: Job, cluster: Cluster, ledger: Ledger) -> None:
        """See that a disk with many snapshots gets fewer."""
        with contextlib.suppress(errors.Missing):  # the server is deleted
            if cluster.lookup(job.disk).snap_count > self._settings.bounds.snapshots_soft:
                queue_oldest(job.disk, cluster, ledger, job.owner, self._clock())

    def rollback(self, job_id: str, report: Report = unheard) -> bool:
        """Undo all of the job, whichever engine of this nova-compute did it; False where there is no such job.

        Never call it for an image that Glance may hold: it removes the rbd image.

        :raises errors.SnapError: something could not be undone; the record says what, and it is tried again later.
        """
        with self._leaving(job_id):
            return self._rollback(job_id, report)

    def leave(self, job_id: str) -> None:
        """nova-compute does nothing more about the job: it is ended by what Glance's record comes to say."""
        with self._state:
            self._held.discard(job_id)
            self._reserved.pop(job_id, None)
            self._state.notify_all()

    def cancel(self, server: str, report: Report = unheard) -> list[str]:
        """Stop what is under way on the disks of a server that is being deleted, and undo it.

        So is what an earlier attempt could not undo, and what another host left, whose client is fenced first: the
        server is here now.

        :param server: uuid, which the names of the disks begin with.
        :returns: ids of the jobs that are undone.
        """
        with self._state:
            running = [job_id for job_id, work in self._busy.items() if work.disk and work.disk.startswith(server)]
            for job_id in running:
                self._busy[job_id].cancelled.set()
        busy = self._await_end(running, report)
        for job_id in busy:
            LOG.warning("Job %s does not stop; it will be undone, but its server's disk may outlive the server", job_id)
        undone, failure = set(running) - busy, None
        for job in self._ask(lambda cluster: self._ledger(cluster).read()).jobs:
            if not job.disk.name.startswith(server) or job.id in busy or steps.lets_go(job):
                continue
            try:
                self._give_up(job.id, report)
                undone.add(job.id)
            except (errors.NoRecord, errors.InDoubt):
                continue  # gone, or left to :meth:`reclaim`: what it needs to know is not worth a wait
            except errors.SnapError as error:  # another job may fare better
                failure = error
        if failure is not None:
            raise failure
        return sorted(undone)

    def _await_end(self, job_ids: Iterable[str], report: Report) -> set[str]:
        """Wait for the end of work for as long as it goes on; returns the jobs that do not come to it."""
        while True:
            report("cancel", 0, 0)
            with self._state:
                busy = self._busy.keys() & job_ids
                moved = max((self._busy[job_id].moved for job_id in busy), default=0.0)
                left = moved + self._settings.operation_timeout - time.monotonic()
                if not busy or left <= 0:
                    return busy
                self._state.wait(min(left, _LOOK_SECONDS))

    def _give_up(self, job_id: str, report: Report) -> None:
        is_held = job_id in self._held
        with self._leaving(job_id), self._connection() as cluster:
            ledger, run = self._ledger(cluster), saga.Run(cluster, report)
            job = self._take_over(ledger.load(job_id), cluster)
            if is_held:
                jobs.undo(job, ledger, run)
            else:
                jobs.conclude(job, ledger, run, jobs.Unasked())

    def remove_disks(self, server: str, report: Report = unheard) -> list[str]:
        """Remove the disks of a server that is being deleted, with the snapshots that we and stock Nova left on them.

        :returns: what is left of them and why, as sentences.
        """
        with self._connection() as cluster:
            ledger, run = self._ledger(cluster), saga.Run(cluster, report)
            recorded = ledger.read().jobs
            at_work = {job.id for job in recorded if self._is_mine(job) and not steps.lets_go(job)}
            kept = {job.snap.name for job in recorded if job.kind == FLATTEN}
            discard = functools.partial(self._discard, run, ledger, kept)
            left = disks.remove_all(self._settings.pool, server, run, discard, at_work=at_work, kept=kept)
        self._look_for_work()
        return left

    def _discard(
        self, run: saga.Run, ledger: Ledger, kept: Container[str], disk: ImageSpec, left: Sequence[SnapInfo]
    ) -> Iterable[str]:
        """See :data:`nova_rbd_snap.janitor.disks.Discard`; what images depend on librbd moves to the trash itself."""
        owner = self._owner(run.cluster.address())

        def trash(disk: ImageSpec) -> None:
            purge.trash(disk, run, ledger, owner, self._clock())

        there = [snap.name for snap in left if not snap.trashed]
        if (there and all(name in kept for name in there)) or (self._settings.delete == "trash" and not left):
            with contextlib.suppress(errors.Missing):  # half-made, or gone
                trash(disk)
                return ()
        return disks.remove_now(run, trash, disk)

    def end(self, job_id: str, cloud: str) -> str:
        """End a job on an operator's word, whoever's it is: exactly the client that worked on it is cut off first.

        One that any worker may do is queued anew, to be done at once.

        :param cloud: whose workers shall do it.
        :returns: what became of it: ended or queued.
        :raises errors.NoRecord: there is no such job.
        :raises errors.Refused: it is another cloud's, and this one's Glance knows nothing of its image.
        :raises errors.InDoubt: as :func:`nova_rbd_snap.janitor.jobs.conclude`, as what follows.
        :raises errors.SnapError: something could not be undone; the record says what.
        """
        with self._at_work(job_id), self._connection() as cluster:
            ledger = self._ledger(cluster)
            theirs = ledger.load(job_id)
            self._refuse_another_clouds(theirs)
            if theirs.kind in BACKGROUND_KINDS:
                if theirs.step == AT_WORK:
                    self._cut_off(theirs, cluster)
                owner = dataclasses.replace(theirs.owner, cloud=cloud)
                ledger.advance(theirs, owner=owner, step=QUEUED, attempts=0, not_before=0.0)
                return "queued"
            job = self._take_over(theirs, cluster)
            try:
                jobs.conclude(job, ledger, saga.Run(cluster), self._images)
            except BaseException:  # the operator's patience has an end, too
                # Its own nova-compute, where there is one, goes on trying.
                with contextlib.suppress(errors.SnapError):
                    ledger.advance(ledger.load(job_id), owner=theirs.owner)
                raise
        return "ended"

    # -- what nobody calls for -----------------------------------------------------------------------------------

    def start_own_work(self) -> None:
        """Start, in the background, :meth:`keep_reclaiming`, and :meth:`keep_working` as configured."""
        threading.Thread(target=self.keep_reclaiming, name="reclaim", daemon=True).start()
        threading.Thread(target=self.keep_clearing, name="clear", daemon=True).start()
        threading.Thread(target=self._work_at_once, name="purge", daemon=True).start()
        for _ in range(self._settings.flatten_workers):
            threading.Thread(target=self.keep_working, args=[FLATTEN], name="flatten", daemon=True).start()

    def _work_at_once(self) -> None:
        """What does not take long, and begins with the question whether Glance can read what is not flat."""
        self._ask_readers()
        self.keep_working(PROBE, PURGE)

    def _ask_readers(self) -> None:
        settings = self._settings
        if settings.flatten == INLINE or settings.clone_format == 1 or not settings.glance_pool:
            return
        try:
            with self._connection() as cluster, contextlib.suppress(errors.LedgerConflict):
                owner = self._owner(cluster.address())
                readers.queue(self._ledger(cluster), settings.pool, settings.glance_pool, owner, self._clock())
        except errors.SnapError as error:  # then it is seen when the first image is registered
            self._tell("whether Glance can read", f"not asked: {error.report()}")

    # -- what earlier work left ----------------------------------------------------------------------------------

    def reclaim(self) -> None:
        """End the jobs of this nova-compute, and of its earlier lives, that nobody has the say about any more.

        Those of others, and those in doubt, stay. Nothing is raised: what stays is told to the log, once.
        """
        try:
            found = self._ask(lambda cluster: self._ledger(cluster).read())
        except Exception as error:
            self._tell("the ledger", f"it cannot be read, so nothing is reclaimed: {errors.known(error).report()}")
            return
        self._told.pop("the ledger", None)
        for key, text in found.strange.items():
            self._tell(f"record {key}", f"left alone: {text}")
        for job in found.jobs:
            if job.kind in BACKGROUND_KINDS:
                self._tell_of_namesake(job)
        for job, failure in self._in_turn(_requests(found.jobs), self._reclaim):
            self._tell(f"job {job.id}", f"stays in the ledger: {failure.report()}")

    def _in_turn(
        self, those: Iterable[Job], end: Callable[[Job, jobs.Images], Optional[errors.SnapError]]
    ) -> Iterator[tuple[Job, errors.SnapError]]:
        """End jobs, those first that need no word of Glance's, for that may keep us waiting; yields what stays."""
        in_doubt = []
        for job in those:
            if job.step == saga.RECORD:  # nothing is left but Glance's word
                in_doubt.append(job)
                continue
            failure = end(job, jobs.Unasked())
            if isinstance(failure, errors.InDoubt):
                in_doubt.append(job)
            elif failure is not None:
                yield job, failure
        for job in in_doubt:
            if (failure := end(job, self._images)) is not None:
                yield job, failure

    def keep_reclaiming(self) -> None:
        """:meth:`reclaim` now and again until the engine is stopped, so that what heals is cleared away by itself."""
        while not self._stopping:
            self.reclaim()
            self._pause()

    def _pause(self) -> None:
        with self._state:
            self._state.wait_for(lambda: self._stopping, self._settings.reclaim_interval)

    def keep_clearing(self) -> None:
        """:meth:`_clear_parents` now and again until the engine is stopped."""
        while not self._stopping:
            self._clear_parents()
            self._pause()

    def _clear_parents(self) -> None:
        """Remove what waits for clones that are gone; a single engine of all does, once in a while."""
        pool = self._settings.pool
        glance_pools = [self._settings.glance_pool] if self._settings.glance_pool else []
        try:
            with self._connection() as cluster, contextlib.suppress(errors.Busy):
                cluster.take_lease(pool, _PARENTS_LEASE, _PARENTS_SECONDS)
                for what in parents.clear(cluster, pool, glance_pools, self._images, self._clock()):
                    if what.kept:
                        LOG.info("What %s may be kept for in vain is not cleared away now: %s", what.what, what.kept)
                    else:
                        LOG.info("Removed %s: nothing depended on it any more", what.what)
        except Exception as error:  # it is tried again
            self._tell("what waits for clones", f"it is not cleared away now: {errors.known(error).report()}")
        else:
            self._told.pop("what waits for clones", None)

    def _reclaim(self, job: Job, images: jobs.Images) -> Optional[errors.SnapError]:
        """End the job if it is to be ended; returns why it stays although it is."""
        if not self._is_mine(job):
            self._tell_of_namesake(job)
            return None
        try:
            if job.id in self._held:  # else its work would be waited for
                return None
            with self._at_work(job.id), self._connection() as cluster:
                ledger = self._ledger(cluster)
                job = ledger.load(job.id)
                if self._stopping or job.id in self._held or not self._is_mine(job):
                    return None
                jobs.conclude(self._take_over(job, cluster), ledger, saga.Run(cluster), images)
        except errors.NoRecord:
            return None
        except Exception as error:  # the next job may fare better
            return errors.known(error)
        self._told.pop(f"job {job.id}", None)
        LOG.info("Job %s, left by earlier work, is ended", job.id)
        return None

    def _tell_of_namesake(self, job: Job) -> None:
        """A job that may well be ours, of before our configuration, or the machine's id, was changed."""
        us, them = self._owner(job.owner.client), job.owner
        if them.host != us.host or (them.machine != us.machine and them.cloud != us.cloud):
            return
        if job.kind not in BACKGROUND_KINDS or them.cloud != us.cloud:
            text = f"left alone: of machine {them.machine} of cloud {them.cloud!r}, not ours; see 'job reclaim'"
            self._tell(f"job {job.id}", text)

    def _tell(self, what: str, text: str) -> None:
        if self._told.get(what) != text:
            LOG.warning("%s: %s", what.capitalize(), text)
        self._told[what] = text

    # -- work that any host may do --------------------------------------------------------------------------------

    def keep_working(self, *kinds: str) -> None:
        """Do what is queued in the ledger, one job at a time, until the engine is stopped.

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

    def _is_work_due(self, kinds: Sequence[str]) -> bool:
        """Whether it is worth a connection of a worker's own."""

        def look(cluster: Cluster) -> bool:
            cloud, now = self._owner(cluster.address()).cloud, self._clock()
            due = [job for job in self._ledger(cluster).read().jobs if worker.is_due(job, kinds, cloud, now)]
            return any(worker.is_free(job, cluster, self._settings.pool) for job in due)

        return self._ask(look)

    def _worker(self, kinds: Sequence[str]) -> worker.Worker:
        cluster = self._connect_to_work()
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

    def _await_work(self) -> None:
        with self._work_due:
            if not self._stopping:
                # Not in step with all other hosts.
                self._work_due.wait(self._settings.reclaim_interval * random.uniform(0.8, 1.2))

    def _look_for_work(self) -> None:
        with self._work_due:
            self._work_due.notify_all()

    # -- the engine's own end ------------------------------------------------------------------------------------

    def stop(self, timeout_seconds: Optional[float] = None) -> None:
        """Take no more work, cancel what runs, and wait until it is undone, for so long at most."""
        with self._state:
            self._stopping = True
            for work in self._busy.values():
                work.cancelled.set()
            self._state.notify_all()
        self._look_for_work()
        with self._state:
            self._state.wait_for(lambda: not self._busy and not self._working, timeout_seconds)

    def orphan(self) -> None:
        """nova-compute is gone: nobody but us looks after the image records of its requests. :meth:`settle` does."""
        self._orphaned = True

    def wait_until_idle(self, timeout_seconds: float) -> bool:
        """Wait until nova-compute has finished or rolled back all that is ready for it; False if it has not."""
        with self._state:
            return self._state.wait_for(lambda: not self._busy and not self._held, timeout_seconds)

    def settle(self) -> None:
        """nova-compute is gone: end what is left of its jobs, as far as that can be known.

        Not what another engine has taken over meanwhile: there is a new nova-compute, and it knows better.
        """
        found = self._ask(lambda cluster: self._ledger(cluster).read()).jobs
        ours = [job for job in _requests(found) if self._is_of_this_life(job)]
        for job, failure in self._in_turn(ours, self._settle):
            LOG.warning("Job %s stays in the ledger: %s", job.id, failure.report())

    def _settle(self, job: Job, images: jobs.Images) -> Optional[errors.SnapError]:
        """End the job; returns why it stays."""
        try:
            with self._connection() as cluster:
                ledger = self._ledger(cluster)
                job = self._adopt(ledger.load(job.id), cluster)
                jobs.conclude(ledger.advance(job, orphaned=True), ledger, saga.Run(cluster), images)
        except errors.NoRecord:
            return None
        except Exception as error:  # the next job may fare better
            return errors.known(error)
        return None

    # -- helpers -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _connection(self) -> Iterator[Cluster]:
        """The one connection, made when first needed and again once this client was cut off."""
        asked = time.monotonic()
        with self._connecting:
            if self._cluster is None:
                self._cluster = self._connected(asked)
            cluster = self._cluster
        try:
            yield cluster
        except errors.Blocklisted:
            self._drop(cluster)
            raise

    def _connected(self, asked: float) -> Cluster:
        """A new connection; whoever has waited for an attempt that failed makes none of their own."""
        failed_at, failure = self._not_connected
        if failure is not None and failed_at > asked:
            raise type(failure)(str(failure)) from failure
        try:
            return self._connect()
        except errors.SnapError as error:
            self._not_connected = time.monotonic(), error
            raise

    def _drop(self, lost: Cluster) -> None:
        """Use the connection *lost* no more; somebody else may have replaced it already."""
        with self._connecting:
            if self._cluster is lost:
                self._cluster = None

    def _ask(self, question: Callable[[Cluster], T]) -> T:
        """The answer to a mere question; asked anew where this client was cut off since it was last used."""
        try:
            with self._connection() as cluster:
                return question(cluster)
        except errors.Blocklisted:
            with self._connection() as cluster:
                return question(cluster)

    def _ledger(self, cluster: Cluster) -> Ledger:
        return Ledger(cluster, self._settings.pool)

    @contextlib.contextmanager
    def _at_work(self, job_id: str, disk: Optional[str] = None) -> Iterator[Work]:
        """Within the block nobody else of this engine works on the job; whoever does is waited for.

        :param disk: of work that can be cancelled.
        :raises errors.LedgerConflict: they do not come to an end.
        """
        work = Work(disk)
        with self._state:
            if not self._state.wait_for(lambda: job_id not in self._busy, self._settings.operation_timeout):
                raise errors.LedgerConflict(f"job {job_id} is at work, and does not stop")
            self._busy[job_id] = work
        try:
            yield work
        finally:
            with self._state:
                del self._busy[job_id]
                self._state.notify_all()

    @contextlib.contextmanager
    def _leaving(self, job_id: str) -> Iterator[None]:
        """Work on a job after which nova-compute has no say about it any more, however it ends."""
        try:
            with self._at_work(job_id):
                yield
        finally:
            self.leave(job_id)

    def _job(self, cluster: Cluster, job_id: str, kind: str, disk: ImageSpec, **more: Any) -> Job:
        return Job(
            id=job_id,
            kind=kind,
            owner=self._owner(cluster.address()),
            created=self._clock(),
            disk=disk,
            clone_format=self._settings.clone_format,
            step=steps.Snap.name,
            **more,
        )

    def _reserve(self, cluster: Cluster, job: Job) -> None:
        with self._state:
            if self._stopping:
                raise errors.Cancelled("the engine is being stopped")
            if job.id in self._reserved or job.id in self._busy:
                raise errors.LedgerConflict(f"job {job.id} is under way already")
            self._held.add(job.id)
        try:
            self._reserved[job.id] = self._ledger(cluster).reserve(job), cluster
        except Exception as cause:
            error = errors.known(cause)
            if not isinstance(error, errors.LedgerConflict):  # else somebody has the say about the one that is there
                self.leave(job.id)
            error.step = "reserve"
            raise error from cause.__cause__ if error is cause else cause

    def _rollback(self, job_id: str, report: Report = unheard) -> bool:
        with self._connection() as cluster:
            ledger = self._ledger(cluster)
            try:
                job = self._adopt(ledger.load(job_id), cluster)
            except errors.NoRecord:
                return False
            jobs.undo(job, ledger, saga.Run(cluster, report))
        return True

    def _undo_anew(self, job_id: str, error: errors.Blocklisted, lost: Cluster) -> None:
        """Undo on a new connection what could not be undone on the *lost* one."""
        self._drop(lost)
        try:
            self._rollback(job_id)
        except errors.SnapError as failure:
            error.undo_failures = failure.undo_failures or [str(failure)]
        else:
            error.undo_failures = []

    def _is_mine(self, job: Job) -> bool:
        us = self._owner(job.owner.client)
        return (job.owner.cloud, job.owner.host, job.owner.machine) == (us.cloud, us.host, us.machine)

    def _refuse_another_clouds(self, job: Job) -> None:
        ours = self._owner(job.owner.client).cloud
        if job.owner.cloud != ours:
            raise errors.Refused(
                f"job {job.id} is of cloud {job.owner.cloud!r}, whose Glance alone knows its image, and this is "
                f"{ours!r}; use that cloud's nova.conf, or --cloud if it is this one under a former address"
            )

    def _is_of_this_life(self, job: Job) -> bool:
        return job.owner == self._owner(job.owner.client)

    def _adopt(self, job: Job, cluster: Cluster) -> Job:
        """Take over a job of an earlier engine of this nova-compute, and of no one else's."""
        if not self._is_of_this_life(job):
            raise errors.LedgerConflict(f"job {job.id} belongs to {job.owner.host} ({job.owner.machine})")
        return self._take_over(job, cluster)

    def _take_over(self, job: Job, cluster: Cluster) -> Job:
        """Make the job ours: exactly the client that worked on it is cut off, then the ledger refuses its writes.

        Where nothing is left in the pools nobody works on it: the ledger's refusal is enough. So it is where an undo
        has come to its end: another may be under way, and two of them do each other no harm.
        """
        us = self._owner(cluster.address())
        if job.owner == us:
            return job
        is_at_rest = job.step == saga.RECORD or bool(job.failures)
        if not is_at_rest and job.owner.client not in (us.client, *self._fenced):
            self._cut_off(job, cluster)
        orphaned = job.orphaned or not self._is_of_this_life(job)
        return self._ledger(cluster).advance(job, owner=us, orphaned=orphaned)

    def _cut_off(self, job: Job, cluster: Cluster) -> None:
        """Blocklist the client that works, or worked, on the job."""
        LOG.log(
            logging.INFO if self._is_mine(job) else logging.WARNING,
            "Job %s of host %s is taken over: the client %s of its engine is blocklisted for a day; no guest is",
            job.id, job.owner.host, job.owner.client,
        )
        cluster.fence(job.owner.client)
        self._fenced.add(job.owner.client)

    def _policy(self, cluster: Cluster, disk: ImageSpec, dest: ImageSpec, info: ImageInfo, wanted: str) -> str:
        """When the clone is flattened; in format 1 it would keep its server from being deleted until then."""
        if wanted == INLINE or self._settings.clone_format == 1:
            return INLINE
        if not readers.are_trusted(self._ledger(cluster), dest.pool):
            return INLINE
        if wanted == NEVER and self._is_full(cluster, disk.pool):
            wanted = BACKGROUND
        depth = 1 + len(cluster.ancestors(disk))
        return policy_within(self._settings.bounds, wanted, depth, info.snap_count)

    def _is_full(self, cluster: Cluster, pool: str) -> bool:
        """Whether disks of deleted servers would be one thing too many in the pool."""
        most = self._settings.never_max_used_percent
        if most == 100:
            return False
        try:
            used = 100 * cluster.used(pool)
        except errors.NoPermission as error:
            self._tell("how full the pool is", f"not known, and so taken for little: {error.report()}")
            return False
        if used < most:
            self._told.pop(f"pool {pool}", None)
            return False
        self._tell(f"pool {pool}", f"[rbd_snap] never_max_used_percent is reached: images are flattened ({most} %)")
        return True

    def _data_pool(self, cluster: Cluster, dest: ImageSpec, disk: ImageInfo) -> Optional[str]:
        if self._settings.glance_data_pool:
            return self._settings.glance_data_pool
        if disk.parent is not None and disk.parent.image.pool == dest.pool:
            with contextlib.suppress(errors.Missing):  # Glance may have moved the base image to the trash
                return cluster.lookup(disk.parent.image).data_pool
        return cluster.usual_data_pool(dest.pool)


def _requests(jobs_found: Iterable[Job]) -> Iterator[Job]:
    """The jobs that somebody asked a snapshot with; the others are their workers'."""
    return (job for job in jobs_found if job.kind not in BACKGROUND_KINDS)


def _refuse_uncloneable(disk: ImageSpec, info: ImageInfo) -> None:
    """:raises errors.Refused: for disks whose clones nobody has tried."""
    if info.mirrored:
        raise errors.Refused(f"{disk} is mirrored; snapshots by cloning are not supported for mirrored disks")
    if info.journaling:
        raise errors.Refused(f"{disk} has the journaling feature; snapshots by cloning are not supported with it")
