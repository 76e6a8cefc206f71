# SPDX-License-Identifier: Apache-2.0
"""The engine as plain calls: what nova-compute and the command line may ask for.

Thread-safe; each call blocks until it is done. Arguments and results are plain data, for they cross a socket.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Callable, Optional

from nova_rbd_snap import errors
from nova_rbd_snap.ceph.interface import Cluster, SnapInfo
from nova_rbd_snap.conf import Settings, Store
from nova_rbd_snap.copy import nbd
from nova_rbd_snap.copy.progress import Progress
from nova_rbd_snap.engine import Report, cloning, copying, unheard
from nova_rbd_snap.engine.connection import Connection
from nova_rbd_snap.engine.notices import Notices
from nova_rbd_snap.engine.ownership import Ownership
from nova_rbd_snap.engine.upkeep import Upkeep
from nova_rbd_snap.flatten import readers
from nova_rbd_snap.flatten.queue import queue_oldest
from nova_rbd_snap.janitor import disks, jobs, purge
from nova_rbd_snap.ledger.job import (
    AT_WORK,
    BACKGROUND_KINDS,
    CLONE,
    COPY,
    FLATTEN,
    FREEZE,
    INLINE,
    QUEUED,
    Job,
    Owner,
    copy_id,
)
from nova_rbd_snap.ledger.store import OBJECT, Ledger
from nova_rbd_snap.snapshot import saga, steps
from nova_rbd_snap.specs import GLANCE_SNAP, ImageSpec, Location

LOG = logging.getLogger(__name__)

#: Seconds between two looks at whether work that is waited for goes on.
_LOOK_SECONDS = 1.0


@dataclass
class Work:
    """A job at work in this engine.

    :ivar disk: where the work can be cancelled, what begins with the server's uuid.
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
        connect_to_store: Optional[Callable[[Store], Cluster]] = None,
        images: jobs.Images,
        uploads: Optional[copying.Uploads] = None,
        scratch: Optional[readers.ScratchImages] = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """
        :param owner: the owner of this engine's jobs, given the address of its client.
        :param held: ids of the jobs of the same nova-compute's earlier engine, which it still has the say about.
        :param connect: makes a new connection to the cluster.
        :param connect_to_work: the same for work in the background, which leaves others more room.
        :param connect_to_store: the same for the cluster of a store of Glance's.
        :param images: Glance, asked with the service's own credentials.
        :param uploads: Glance as it is sent copies; None where nobody sends any.
        :param scratch: the same as *images*, to see what it can read; None where nobody asks.
        """
        self._settings = settings
        self._owner = owner
        self._images = images
        self._uploads = uploads
        self._stores = copying.Stores(settings.stores if connect_to_store else (), connect_to_store or _no_store)
        self._limits = copying.limits(settings)
        self._clock = clock
        self._notices = Notices()
        self._connection = Connection(connect)
        self._ownership = Ownership(owner, settings.pool)
        self._flattenings = cloning.Flattenings(settings, self._notices)
        #: What is done though nobody calls for it; it begins with :meth:`start`.
        self.upkeep = Upkeep(
            settings,
            owner,
            self._connection,
            connect_to_work or connect,
            reclaim=self.reclaim,
            images=images,
            scratch=scratch,
            notices=self._notices,
            clock=clock,
        )
        self._state = threading.Condition()
        self._busy: dict[str, Work] = {}
        # Jobs that nova-compute has the say about: it has asked for them, and has not said finish, rollback or leave.
        self._held = set(held)
        # With the connection they were reserved over, whose client their records name.
        self._reserved: dict[str, tuple[Job, Cluster]] = {}
        self._stopping = False
        self._orphaned = False

    def start(self) -> None:
        """Begin what nobody calls for, where there is any: in Ceph."""
        if self._settings.in_ceph:
            self.upkeep.start()

    # -- calls ---------------------------------------------------------------------------------------------------

    def check(self) -> list[str]:
        """What in the configuration does not fit the cluster, as sentences that name the option and the remedy."""
        settings = self._settings
        with self._connection.use() as cluster:
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
        image = ImageSpec(self._settings.pool, disk)
        fsid, info = self._connection.ask(lambda cluster: (cluster.fsid(), cluster.lookup(image)))
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
        with self._connection.use() as cluster:
            if not cluster.has_pool(dest_pool):
                raise errors.Refused(
                    f"cluster {cluster.fsid()} has no pool {dest_pool!r}; set [rbd_snap] glance_pool to the pool of "
                    "Glance's rbd store"
                )
            info = cluster.lookup(source)
            cloning.refuse_uncloneable(source, info)
            if cluster.exists(dest):
                raise errors.AlreadyThere(f"{dest} exists already and is left alone")
            data_pool = cloning.data_pool(cluster, self._settings, dest, info)
            policy = self._flattenings.policy(cluster, source, dest, info, flatten or self._settings.flatten)
            job = self._job(cluster, image_id, CLONE, source, dest=dest, data_pool=data_pool, flatten=policy)
            # Asked first: once the job is reserved nothing may fail.
            location = jobs.location(job, self._run(job, cluster))
            self._reserve(cluster, job)
            return location

    def reserve_copy(self, image_id: str, disk: str, store: str) -> str:
        """Write down that the server's disk is to be copied into a store of Glance's as *image_id*.

        As :meth:`reserve_clone`.

        :param store: its name, see ``conf.Settings.stores``.
        :raises errors.StoreSilent: its cluster does not answer; nothing was changed.
        """
        there = self._stores.store(store)
        source, dest = ImageSpec(self._settings.pool, disk), ImageSpec(there.pool, image_id)
        with self._losing(store), steps.of_store(store):
            far = self._stores.cluster(store)
            if not far.has_pool(dest.pool):
                raise errors.Refused(f"cluster {far.fsid()} of store {store!r} has no pool {dest.pool!r}")
            if far.exists(dest):
                raise errors.AlreadyThere(f"{dest} exists already in store {store!r} and is left alone")
            data_pool = there.data_pool or far.usual_data_pool(dest.pool)
            location = Location(far.fsid(), dest.snap(GLANCE_SNAP))
        with self._connection.use() as cluster:
            copying.refuse_uncopyable(source, cluster.lookup(source))
            job = self._job(cluster, image_id, COPY, source, dest=dest, data_pool=data_pool, store=store)
            self._reserve(cluster, job)
            return location.url

    @contextlib.contextmanager
    def _losing(self, store: str) -> Iterator[None]:
        """Within the block it is the store's cluster that does not answer, if one does not."""
        try:
            yield
        except errors.StoreSilent:
            self._stores.drop(store)
            raise

    def upload(self, job_id: str, disk: str, target: Mapping[str, Any], report: Report) -> dict[str, Any]:
        """Send what :meth:`reserve_freeze` and :meth:`perform` froze to Glance.

        The frozen snapshot stays: nova-compute has the say about it.

        :param disk: that was frozen.
        :param target: a :class:`nova_rbd_snap.engine.copying.Target`.
        :returns: ``format``, and as bytes ``allocated`` and ``sent``.
        :raises errors.SnapError: as :class:`nova_rbd_snap.engine.copying.Uploads` says.
        """
        if self._uploads is None:
            raise errors.Refused("this engine uploads nothing")
        with self._connection.use() as cluster, self._at_work(job_id, disk) as work:
            ledger = self._ledger(cluster)
            job = self._ownership.adopt(ledger.load(job_id), cluster)
            noted = work.noting(report)

            def note(percent: int) -> None:
                nonlocal job
                job = ledger.advance(job, percent=percent)

            to = copying.Target(**target)
            progress = Progress(f"Uploading {job.snap} as image {to.image_id}", note)

            def on_progress(done: int, total: int) -> bool:
                noted("upload", done, total)
                progress.moved(done, total)
                return not (self._stopping or work.cancelled.is_set() or job_id not in self._held)

            with cluster.open_snap(job.snap) as source:
                return copying.Upload(self._uploads, self._limits, on_progress).send(to, source)

    def upload_file(
        self, server: str, path: str, disk_format: str, target: Mapping[str, Any], report: Report
    ) -> dict[str, Any]:
        """Send the disk of a server that is off, in a file or on a block device of this host, to Glance.

        Nothing is in the ledger of this: where nova-compute dies meanwhile this engine deletes the record.

        :param server: its uuid.
        :param path: of the file or device.
        :param disk_format: of its content, ``qcow2`` or ``raw``.
        :param target: as :meth:`upload`, as what follows.
        """
        if self._uploads is None:
            raise errors.Refused("this engine uploads nothing")
        to = copying.Target(**target)
        with self._at_work(copy_id(to.image_id), server) as work:
            noted, progress = work.noting(report), Progress(f"Uploading {path} as image {to.image_id}", _unnoted)

            def on_progress(done: int, total: int) -> bool:
                noted("upload", done, total)
                progress.moved(done, total)
                return not (self._stopping or work.cancelled.is_set())

            try:
                with nbd.open_disk(path, disk_format) as source:
                    return copying.Upload(self._uploads, self._limits, on_progress).send(to, source)
            finally:
                if self._orphaned:
                    self._uploads.give_up(to)

    def reserve_freeze(self, job_id: str, disk: str) -> str:
        """Write down that a snapshot of the server's disk is to be taken, for a full copy to read.

        As :meth:`reserve_clone`; :meth:`rollback` removes the snapshot.

        :returns: the snapshot's name.
        """
        with self._connection.use() as cluster:
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
            with self._connection.use() as cluster, self._at_work(job_id, job.disk.name) as work:
                if cluster is not reserved_over:
                    job = self._ownership.take_over(job, cluster)

                run = self._run(
                    job,
                    cluster,
                    report=work.noting(report),
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
        except errors.StoreSilent:
            self._stores.drop(job.store or "")
            raise

    def make_flat(self, image_id: str, report: Report) -> bool:
        """Flatten an image that is ready, for Glance does not take it as it is.

        :returns: False where it is flat, and Glance has something else against it.
        :raises errors.SnapError: it could not be; nova-compute still has the say.
        """
        with self._connection.use() as cluster, self._at_work(image_id) as work:
            ledger = self._ledger(cluster)
            job = self._ownership.adopt(ledger.load(image_id), cluster)
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
        with self._connection.use() as cluster:
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
        with self._leaving(image_id), self._connection.use() as cluster:
            ledger = self._ledger(cluster)
            job = self._ownership.adopt(ledger.load(image_id), cluster)
            jobs.finish(job, ledger, self._run(job, cluster))
            if job.flatten != INLINE:
                self._relieve(job, cluster, ledger)
        self.upkeep.look_for_work()

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
        if not self._settings.in_ceph:
            return sorted(undone)
        for job in self._connection.ask(lambda cluster: self._ledger(cluster).read()).jobs:
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
        with self._leaving(job_id), self._connection.use() as cluster:
            ledger = self._ledger(cluster)
            job = self._ownership.take_over(ledger.load(job_id), cluster)
            run = self._run(job, cluster, report=report)
            if is_held:
                jobs.undo(job, ledger, run)
            else:
                jobs.conclude(job, ledger, run, jobs.Unasked())

    def remove_disks(self, server: str, report: Report = unheard) -> list[str]:
        """Remove the disks of a server that is being deleted, with the snapshots that we and stock Nova left on them.

        :returns: what is left of them and why, as sentences.
        """
        with self._connection.use() as cluster:
            ledger, run = self._ledger(cluster), saga.Run(cluster, report)
            recorded = ledger.read().jobs
            at_work = {job.id for job in recorded if self._ownership.is_mine(job) and not steps.lets_go(job)}
            kept = {job.snap.name for job in recorded if job.kind == FLATTEN}
            discard = functools.partial(self._discard, run, ledger, kept)
            left = disks.remove_all(self._settings.pool, server, run, discard, at_work=at_work, kept=kept)
        self.upkeep.look_for_work()
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
        with self._at_work(job_id), self._connection.use() as cluster:
            ledger = self._ledger(cluster)
            theirs = ledger.load(job_id)
            self._ownership.refuse_another_clouds(theirs)
            if theirs.kind in BACKGROUND_KINDS:
                if theirs.step == AT_WORK:
                    self._ownership.cut_off(theirs, cluster)
                owner = dataclasses.replace(theirs.owner, cloud=cloud)
                ledger.advance(theirs, owner=owner, step=QUEUED, attempts=0, not_before=0.0)
                return "queued"
            job = self._ownership.take_over(theirs, cluster)
            try:
                jobs.conclude(job, ledger, self._run(job, cluster), self._images)
            except BaseException:  # the operator's patience has an end, too
                # Its own nova-compute, where there is one, goes on trying.
                with contextlib.suppress(errors.SnapError):
                    ledger.advance(ledger.load(job_id), owner=theirs.owner)
                raise
        return "ended"

    # -- what earlier work left ----------------------------------------------------------------------------------

    def reclaim(self) -> None:
        """End the jobs of this nova-compute, and of its earlier lives, that nobody has the say about any more.

        Those of others, and those in doubt, stay. Nothing is raised: what stays is told to the log, once.
        """
        try:
            found = self._connection.ask(lambda cluster: self._ledger(cluster).read())
        except Exception as error:
            text = f"it cannot be read, so nothing is reclaimed: {errors.known(error).report()}"
            self._notices.tell("the ledger", text)
            return
        self._notices.withdraw("the ledger")
        for key, text in found.strange.items():
            self._notices.tell(f"record {key}", f"left alone: {text}")
        for job in found.jobs:
            if job.kind in BACKGROUND_KINDS:
                self._tell_of_namesake(job)
        for job, failure in self._in_turn(_requests(found.jobs), self._reclaim):
            self._notices.tell(f"job {job.id}", f"stays in the ledger: {failure.report()}")

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

    def _reclaim(self, job: Job, images: jobs.Images) -> Optional[errors.SnapError]:
        """End the job if it is to be ended; returns why it stays although it is."""
        if not self._ownership.is_mine(job):
            self._tell_of_namesake(job)
            return None
        try:
            if job.id in self._held:  # else its work would be waited for
                return None
            with self._at_work(job.id), self._connection.use() as cluster:
                ledger = self._ledger(cluster)
                job = ledger.load(job.id)
                if self._stopping or job.id in self._held or not self._ownership.is_mine(job):
                    return None
                job = self._ownership.take_over(job, cluster)
                jobs.conclude(job, ledger, self._run(job, cluster), images)
        except errors.NoRecord:
            return None
        except Exception as error:  # the next job may fare better
            return errors.known(error)
        self._notices.withdraw(f"job {job.id}")
        LOG.info("Job %s, left by earlier work, is ended", job.id)
        return None

    def _tell_of_namesake(self, job: Job) -> None:
        if self._ownership.may_be_mine(job):
            them = job.owner
            text = f"left alone: of machine {them.machine} of cloud {them.cloud!r}, not ours; see 'job reclaim'"
            self._notices.tell(f"job {job.id}", text)

    # -- the engine's own end ------------------------------------------------------------------------------------

    def stop(self, timeout_seconds: Optional[float] = None) -> None:
        """Take no more work, cancel what runs, and wait until it is undone, for so long at most."""
        began = time.monotonic()
        with self._state:
            self._stopping = True
            for work in self._busy.values():
                work.cancelled.set()
            self._state.notify_all()
        self.upkeep.stop()
        with self._state:
            self._state.wait_for(lambda: not self._busy, timeout_seconds)
        left = None if timeout_seconds is None else max(0.0, began + timeout_seconds - time.monotonic())
        self.upkeep.wait(left)

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
        if not self._settings.in_ceph:
            return
        found = self._connection.ask(lambda cluster: self._ledger(cluster).read()).jobs
        ours = [job for job in _requests(found) if self._ownership.is_of_this_life(job)]
        for job, failure in self._in_turn(ours, self._settle):
            LOG.warning("Job %s stays in the ledger: %s", job.id, failure.report())

    def _settle(self, job: Job, images: jobs.Images) -> Optional[errors.SnapError]:
        """End the job; returns why it stays."""
        try:
            with self._connection.use() as cluster:
                ledger = self._ledger(cluster)
                job = self._ownership.adopt(ledger.load(job.id), cluster)
                jobs.conclude(ledger.advance(job, orphaned=True), ledger, self._run(job, cluster), images)
        except errors.NoRecord:
            return None
        except Exception as error:  # the next job may fare better
            return errors.known(error)
        return None

    # -- helpers -------------------------------------------------------------------------------------------------

    def _run(self, job: Job, cluster: Cluster, **more: Any) -> saga.Run:
        """What the steps of *job* work with."""
        to_store = functools.partial(self._stores.cluster, job.store) if job.store is not None else None
        return saga.Run(cluster, to_store=to_store, limits=self._limits, **more)

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
        with self._connection.use() as cluster:
            ledger = self._ledger(cluster)
            try:
                job = self._ownership.adopt(ledger.load(job_id), cluster)
            except errors.NoRecord:
                return False
            jobs.undo(job, ledger, self._run(job, cluster, report=report))
        return True

    def _undo_anew(self, job_id: str, error: errors.Blocklisted, lost: Cluster) -> None:
        """Undo on a new connection what could not be undone on the *lost* one."""
        self._connection.drop(lost)
        try:
            self._rollback(job_id)
        except errors.SnapError as failure:
            error.undo_failures = failure.undo_failures or [str(failure)]
        else:
            error.undo_failures = []


def _no_store(store: Store) -> Cluster:
    raise errors.Refused(f"this engine copies nothing to store {store.name!r}")


def _unnoted(percent: int) -> None:
    """Where nothing writes down how far a copy is."""


def _requests(jobs_found: Iterable[Job]) -> Iterator[Job]:
    """The jobs that somebody asked a snapshot with; the others are their workers'."""
    return (job for job in jobs_found if job.kind not in BACKGROUND_KINDS)
