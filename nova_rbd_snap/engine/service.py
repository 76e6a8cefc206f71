# SPDX-License-Identifier: Apache-2.0
"""The engine as plain calls: what nova-compute, and later the command line, may ask for.

Thread-safe; each call blocks until it is done. Arguments and results are plain data, for they cross a socket.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any, Callable, Optional, TypeVar

from nova_rbd_snap import errors
from nova_rbd_snap.ceph.interface import Cluster, ImageInfo
from nova_rbd_snap.conf import Settings
from nova_rbd_snap.engine import Report
from nova_rbd_snap.ledger.job import CLONE, FREEZE, Job, Owner
from nova_rbd_snap.ledger.store import OBJECT, Ledger
from nova_rbd_snap.snapshot import saga, steps
from nova_rbd_snap.specs import GLANCE_SNAP, ImageSpec, Location

LOG = logging.getLogger(__name__)
T = TypeVar("T")

#: Whether Glance's record of an image points at a location: True, False, or None where that cannot be known.
Registered = Callable[[str, str], Optional[bool]]


def _unheard(step: str, done: int, total: int) -> None:
    """For calls whose progress nobody follows."""


class Engine:
    """All work in one cluster for one nova-compute."""

    def __init__(
        self,
        settings: Settings,
        *,
        host: str,
        machine: str,
        connect: Callable[[], Cluster],
        registered: Registered,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """
        :param host: see :class:`nova_rbd_snap.ledger.job.Owner`, as *machine*.
        :param connect: makes a new connection to the cluster.
        :param registered: asks Glance with the service's own credentials.
        """
        self._settings = settings
        self._host = host
        self._machine = machine
        self._incarnation = str(uuid.uuid4())
        self._connect = connect
        self._registered = registered
        self._clock = clock
        self._state = threading.Condition()
        self._connecting = threading.Lock()
        self._cluster: Optional[Cluster] = None
        # Jobs at work here, with the event that cancels them; and jobs that await nova-compute's finish or rollback.
        self._running: dict[str, tuple[ImageSpec, threading.Event]] = {}
        self._ready: set[str] = set()
        self._stopping = False

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
            # A write that changes nothing: the key is absent before and after.
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

    def clone(self, image_id: str, disk: str, dest_pool: str, report: Report) -> str:
        """Clone the server's disk into Glance's pool as *image_id*, ready to be registered.

        What becomes of it is then said by :meth:`finish` or :meth:`rollback`.

        :returns: the location's URL.
        :raises errors.Refused: the disk or the destination cannot be cloned; nothing was changed.
        :raises errors.SnapError: a step failed, and all was undone (``undo_failures`` says what could not be).
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
            job = self._job(cluster, image_id, CLONE, source, dest=dest, data_pool=data_pool)
            location = self._location(cluster, job)  # asked first: once the job is ready nothing may fail
            self._perform(cluster, job, report)
            return location

    def freeze(self, job_id: str, disk: str, report: Report) -> str:
        """Take a snapshot of the server's disk for a full copy to read; :meth:`rollback` removes it.

        :returns: the snapshot's name.
        :raises errors.SnapError: as :meth:`clone`.
        """
        source = ImageSpec(self._settings.pool, disk)
        with self._connection() as cluster:
            job = self._job(cluster, job_id, FREEZE, source)
            return self._perform(cluster, job, report).snap.name

    def finish(self, image_id: str) -> None:
        """The image is registered and active: nothing but its job is left to remove."""
        with self._connection() as cluster:
            ledger = self._ledger(cluster)
            ledger.forget(self._adopt(ledger.load(image_id), cluster))
        self._no_longer_ready(image_id)

    def rollback(self, job_id: str, report: Report = _unheard) -> bool:
        """Undo all of the job, whoever of this nova-compute's engines did it; False where there is no such job.

        Never call it for an image that Glance may hold: it removes the rbd image.

        :raises errors.SnapError: something could not be undone; the record says what.
        """
        with self._connection() as cluster:
            try:
                job = self._adopt(self._ledger(cluster).load(job_id), cluster)
            except errors.NoRecord:
                self._no_longer_ready(job_id)
                return False
            failures = saga.undo(job, steps.started(job), self._ledger(cluster), self._run(cluster, report))
            if failures:
                error = errors.SnapError(f"job {job_id} could not be undone")
                error.undo_failures = failures
                raise error
        self._no_longer_ready(job_id)
        return True

    def cancel(self, server: str, report: Report = _unheard) -> list[str]:
        """Stop what is under way on the disks of a server that is being deleted, and undo it.

        So is what an earlier attempt could not undo. A clone that awaits its registration needs the disk no more.

        :param server: uuid, which the names of the disks begin with.
        :returns: ids of the jobs that are undone.
        """
        with self._state:
            running = [job_id for job_id, (disk, _) in self._running.items() if disk.name.startswith(server)]
            for job_id in running:
                self._running[job_id][1].set()
            self._state.wait_for(
                lambda: not self._running.keys() & running, timeout=self._settings.operation_timeout
            )
            busy = self._running.keys() & running
        for job_id in busy:
            LOG.warning("Job %s does not stop; it will be undone, but its server's disk may outlive the server", job_id)
        report("cancel", 0, 0)
        undone, failure = set(running) - busy, None
        for job in self._ask(lambda cluster: self._ledger(cluster).jobs()):
            if not job.disk.name.startswith(server) or job.id in busy or (job.kind, job.step) == (CLONE, steps.READY):
                continue
            if not self._is_mine(job):
                LOG.warning(
                    "Job %s of %s (%s) stays, and may keep %s from being deleted", job.id, job.owner.host,
                    job.owner.machine, job.disk,
                )
                continue
            try:
                self.rollback(job.id, report)
                undone.add(job.id)
            except errors.SnapError as error:  # another job may fare better
                failure = error
        if failure is not None:
            raise failure
        return sorted(undone)

    # -- the engine's own end ------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Take no more work, cancel what runs, and wait until it is undone."""
        with self._state:
            self._stopping = True
            for _, cancelled in self._running.values():
                cancelled.set()
            self._state.wait_for(lambda: not self._running)

    def wait_until_idle(self, timeout_seconds: float) -> bool:
        """Wait until nova-compute has finished or rolled back all that is ready for it; False if it has not."""
        with self._state:
            return self._state.wait_for(lambda: not self._running and not self._ready, timeout_seconds)

    def settle(self) -> None:
        """nova-compute is gone: finish or undo what this engine had ready for it, as far as that can be known."""
        for job_id in sorted(self._ready):
            try:
                with self._connection() as cluster:
                    self._settle(cluster, self._ledger(cluster).load(job_id))
            except Exception as error:  # the next job may fare better
                LOG.warning("Job %s stays in the ledger: %s", job_id, errors.known(error).report())

    def _settle(self, cluster: Cluster, job: Job) -> None:
        registered = False if job.kind == FREEZE else self._registered(job.id, self._location(cluster, job))
        if registered is None:
            LOG.warning("Job %s stays in the ledger: whether Glance uses %s is not known", job.id, job.dest)
        elif registered:
            self.finish(job.id)
        else:
            self.rollback(job.id)

    def _undo_anew(self, job_id: str, error: errors.Blocklisted) -> None:
        """Undo on a new connection what could not be undone on one that was cut off."""
        with self._connecting:
            self._cluster = None
        try:
            self.rollback(job_id)
        except errors.SnapError as failure:
            error.undo_failures = failure.undo_failures or [str(failure)]
        else:
            error.undo_failures = []

    # -- helpers -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _connection(self) -> Iterator[Cluster]:
        """The one connection, made when first needed and again once this client was cut off."""
        with self._connecting:
            if self._cluster is None:
                self._cluster = self._connect()
            cluster = self._cluster
        try:
            yield cluster
        except errors.Blocklisted:
            with self._connecting:
                if self._cluster is cluster:
                    self._cluster = None
            raise

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

    def _owner(self, cluster: Cluster) -> Owner:
        return Owner(self._host, self._machine, self._incarnation, cluster.address())

    def _is_mine(self, job: Job) -> bool:
        return (job.owner.host, job.owner.machine) == (self._host, self._machine)

    def _adopt(self, job: Job, cluster: Cluster) -> Job:
        """Take over a job of an earlier engine of this nova-compute; the ledger then refuses that engine's writes."""
        if not self._is_mine(job):
            raise errors.LedgerConflict(f"job {job.id} belongs to {job.owner.host} ({job.owner.machine})")
        if job.owner.incarnation == self._incarnation:
            return job
        return self._ledger(cluster).advance(job, owner=self._owner(cluster))

    def _location(self, cluster: Cluster, job: Job) -> str:
        if job.dest is None:
            raise errors.LedgerError(f"job {job.id} makes no image")
        return Location(cluster.fsid(), job.dest.snap(GLANCE_SNAP)).url

    def _data_pool(self, cluster: Cluster, dest: ImageSpec, disk: ImageInfo) -> Optional[str]:
        if self._settings.glance_data_pool:
            return self._settings.glance_data_pool
        if disk.parent is not None and disk.parent.image.pool == dest.pool:
            with contextlib.suppress(errors.Missing):  # Glance may have moved the base image to the trash
                return cluster.lookup(disk.parent.image).data_pool
        return cluster.usual_data_pool(dest.pool)

    def _job(self, cluster: Cluster, job_id: str, kind: str, disk: ImageSpec, **more: Any) -> Job:
        return Job(
            id=job_id,
            kind=kind,
            owner=self._owner(cluster),
            created=self._clock(),
            disk=disk,
            clone_format=self._settings.clone_format,
            step=steps.Snap.name,
            **more,
        )

    def _no_longer_ready(self, job_id: str) -> None:
        with self._state:
            self._ready.discard(job_id)
            self._state.notify_all()

    def _run(self, cluster: Cluster, report: Report = _unheard) -> saga.Run:
        return saga.Run(cluster, report, cancelled=lambda: False)

    def _perform(self, cluster: Cluster, job: Job, report: Report) -> Job:
        cancelled = threading.Event()
        with self._state:
            if self._stopping:
                raise errors.Cancelled("the engine is being stopped")
            if job.id in self._running:
                raise errors.LedgerConflict(f"job {job.id} is under way already")
            self._running[job.id] = (job.disk, cancelled)
        try:
            sequence, ledger = steps.sequence(job), self._ledger(cluster)
            run = saga.Run(cluster, report, cancelled.is_set)
            job = saga.perform(job, sequence, steps.READY, ledger, run)
            self._ready.add(job.id)
        except errors.Blocklisted as error:
            if error.undo_failures:
                self._undo_anew(job.id, error)
            raise
        finally:
            with self._state:
                del self._running[job.id]
                self._state.notify_all()
        return job


def _refuse_uncloneable(disk: ImageSpec, info: ImageInfo) -> None:
    """:raises errors.Refused: for disks whose clones nobody has tried."""
    if info.mirrored:
        raise errors.Refused(f"{disk} is mirrored; snapshots by cloning are not supported for mirrored disks")
    if info.journaling:
        raise errors.Refused(f"{disk} has the journaling feature; snapshots by cloning are not supported with it")
