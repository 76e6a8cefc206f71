# SPDX-License-Identifier: Apache-2.0
"""Flatten an image that is in use.

Meanwhile the tenant may delete it. Glance then removes the snapshot that the image's location names first, and gives
up over the rbd image that is open here: the record would live on without its data. So the snapshot is watched, and
made again where the record lives.
"""

from __future__ import annotations

import contextlib
import enum
import itertools
import logging
import threading
import time
from collections.abc import Iterator
from typing import Callable, Optional

from nova_rbd_snap import errors
from nova_rbd_snap.ceph.interface import Cluster, TrashInfo
from nova_rbd_snap.flatten.means import Means
from nova_rbd_snap.janitor import jobs
from nova_rbd_snap.ledger.job import FLATTEN, Job
from nova_rbd_snap.snapshot import saga, steps
from nova_rbd_snap.specs import GLANCE_SNAP, ImageSpec
from nova_rbd_snap.workers.worker import Current

LOG = logging.getLogger(__name__)

#: Seconds between two looks at whether the image is being deleted.
_LOOK_SECONDS = 1.0
#: Every how many looks the cluster is asked how it fares, and how long it is left alone.
_STRAIN_LOOKS, _STRAIN_SECONDS = 10, 60.0
#: How soon a flatten that failed is tried again over an image that is without its snapshot.
_HURRY_SECONDS = 10.0
#: How long who reads an image, and leaves no trace in the cluster, may have it open: a download, a hash. And how far
#: two hosts' clocks may differ.
_READERS_SECONDS, _SKEW_SECONDS = 24 * 3600.0, 600.0
#: How often is looked whether the image, or who was made of it, is gone by then.
_GONE_SECONDS = 3600.0
#: How long Glance may take from the snapshot's removal to the image's: a removal is a proposal of the monitors.
_DELETION_SECONDS = 10.0
#: What is written on an rbd image before its flatten, which takes away what it was known by: its own id, for clones
#: inherit it.
_MARK = "nova-rbd-snap.flatten"
#: How often a tenant may delete the image over the same flatten before that makes a pause.
_DELETIONS = 5


class _State(enum.Enum):
    GONE = "the image is deleted"
    UNSEALED = "its snapshot is removed, as at the start of a deletion"
    UNSEALED_FLAT = "the same, and it depends on nothing"
    SHARED = "it depends on its parent"
    FLAT = "it depends on nothing"

    @property
    def is_sealed(self) -> bool:
        """Whether the snapshot is there that the image's location names."""
        return self in (_State.SHARED, _State.FLAT)


class _Watch:
    """What ends a flatten: somebody begins to delete the image; the cluster has more urgent things to do."""

    def __init__(self) -> None:
        self.deleted, self.strained = threading.Event(), threading.Event()


class Flattening:
    """See :class:`nova_rbd_snap.workers.worker.Task`, and the module."""

    kind = FLATTEN
    fails_as = "An image is usable, but not flat: that"

    def __init__(
        self, cluster: Cluster, images: jobs.Images, means: Means, clock: Callable[[], float] = time.time
    ) -> None:
        """
        :param images: Glance, asked with the service's own credentials.
        :param clock: seconds since the epoch.
        """
        self._cluster, self._images, self._means, self._clock = cluster, images, means, clock

    def do(self, current: Current, stopped: Callable[[], bool]) -> None:
        try:
            is_there = self._see_flat(current, stopped)
        except errors.SnapError as error:
            self._hurry(current.job, error)
            raise
        if is_there:
            self._release(current.job)
        else:  # what may be left of it, in a trash, keeps the snapshot itself
            steps.remove_frozen(current.job, saga.Run(self._cluster))

    def _see_flat(self, current: Current, stopped: Callable[[], bool]) -> bool:
        """Have the image flat, and note that; whether it is there, as far as that is seen."""
        if current.job.flat_at is not None:
            self._see_whole(current.job, stopped)
            return True
        self._make_way()
        if not self._flatten(current, stopped):
            return False
        current.change(flat_at=self._clock(), percent=100)
        return True

    def _hurry(self, job: Job, error: errors.SnapError) -> None:
        """An image without its snapshot does not wait long. :raises errors.Later: it is one."""
        with contextlib.suppress(errors.CephError):
            if self._look(job, steps.image_of(job)) in (_State.UNSEALED, _State.UNSEALED_FLAT):
                raise errors.Later(f"cannot be used until its snapshot is made again: {error.report()}", _HURRY_SECONDS)

    def _flatten(self, current: Current, stopped: Callable[[], bool]) -> bool:
        """Whether the image is flat, or nothing to us, once it is that, or gone."""
        job, dest = current.job, steps.image_of(current.job)
        has_map = False
        deletions = 0
        while True:
            state = self._look(job, dest)
            if state is _State.GONE:
                return False
            if state is _State.FLAT and has_map:
                return True
            if state is _State.FLAT:
                with contextlib.suppress(errors.Missing):  # deleted meanwhile
                    self._cluster.give_object_map(dest)
                has_map = True
                continue  # over the handle that this takes a deletion may have failed, too
            if state is _State.SHARED:
                self._see_parent_stays(job, dest)
                self._flatten_once(current, dest, stopped)
                continue
            deletions += 1
            if not self._await_deletion(job, dest, stopped):
                try:
                    if not self._mend_amid(job, dest):
                        return True
                except errors.Missing:  # deleted meanwhile
                    continue
                if deletions == _DELETIONS:
                    raise errors.Busy(f"{dest}: somebody deletes the image over and over, and does not succeed")

    def _release(self, job: Job) -> None:
        """Remove the disk's snapshot, once nobody can have the image open from before it was flat.

        Whoever has goes on reading from the snapshot what was zeros then, and would get what the server wrote since, or
        what the disk itself was cloned from.
        """
        run = saga.Run(self._cluster)
        is_trashed = any(not found.is_parent for found in self._trashed(job))  # and kept until this job has ended
        if is_trashed or any(not snap.trashed for snap in steps.frozen(job, run)):
            self._see_unread(job, steps.image_of(job))
        steps.remove_frozen(job, run)

    def _trashed(self, job: Job) -> list[TrashInfo]:
        """The server's disk, where that was deleted, or rebuilt."""
        return [found for found in self._cluster.trashed(job.disk.pool) if found.name == job.disk.name]

    def _see_unread(self, job: Job, dest: ImageSpec) -> None:
        """:raises errors.Later: the image may still be open from before it was flat."""
        clones, flat_at = self._clones(job, dest), job.flat_at or 0.0
        if clones is None:
            return
        left = flat_at + _READERS_SECONDS - self._clock()
        if left > 0:
            text = f"is flat; {job.snap} stays until who reads it from before must have ended"
            raise errors.Later(text, min(left, _GONE_SECONDS))
        for clone in clones:
            if self._is_of_before(clone, flat_at + _SKEW_SECONDS):
                text = f"is flat; {job.snap} stays, for {clone} was booted before, and may have it open"
                raise errors.Later(text, _GONE_SECONDS)

    def _clones(self, job: Job, dest: ImageSpec) -> Optional[list[ImageSpec]]:
        """What was made of the image; None where that is gone, and not only in the trash, for such clones."""
        if self._look(job, dest) is not _State.GONE:
            snaps = self._cluster.snaps(dest)
            return [clone for snap in snaps for clone in self._cluster.children(dest, snap.id)]
        if any(found.id == job.dest_id for found in self._cluster.trashed(dest.pool)):
            return self._cluster.children_of_trashed(dest.pool, job.dest_id or "")
        return None

    def _is_of_before(self, child: ImageSpec, moment: float) -> bool:
        try:
            return self._cluster.lookup(child).created < moment
        except (errors.Missing, errors.NoPermission):
            return True  # in the trash, where clones of its own need it; Cinder's, as a rule

    def _see_parent_stays(self, job: Job, dest: ImageSpec) -> None:
        """Who reads the image needs it longer. :raises errors.Later: librbd would remove it with its last clone."""
        for found in self._trashed(job):
            if found.is_parent and dest in self._cluster.children_of_trashed(job.disk.pool, found.id):
                raise errors.Later("is not made flat, for the disk that it is read from would go then", _GONE_SECONDS)

    def _look(self, job: Job, dest: ImageSpec) -> _State:
        try:
            info = self._cluster.lookup(dest)
            snaps = self._cluster.snaps(dest)
        except errors.Missing:
            return _State.GONE
        if info.id != job.dest_id:
            return _State.GONE
        if info.parent is not None and info.parent.image != job.disk:
            raise errors.LedgerError(f"{dest} is a clone of {info.parent}, and not of {job.disk}")
        is_sealed = any(snap.name == GLANCE_SNAP and snap.protected for snap in snaps)
        if info.parent is None:
            return _State.FLAT if is_sealed else _State.UNSEALED_FLAT
        return _State.SHARED if is_sealed else _State.UNSEALED

    def _flatten_once(self, current: Current, dest: ImageSpec, stopped: Callable[[], bool]) -> None:
        """Flatten until that is done, or somebody begins to delete the image."""
        percent = 0

        def on_progress(done: int, total: int) -> bool:
            nonlocal percent
            percent = 100 * done // total if total else 0
            return not (watch.deleted.is_set() or watch.strained.is_set() or stopped())

        def make_ready() -> None:
            self._cluster.drop_object_map(dest)  # one that somebody gave it: see Cluster.clone, and Cluster.flatten
            self._cluster.set_metadata(dest, _MARK, str(current.job.dest_id))

        self._means.begin(current, dest, make_ready)
        with self._watching(current, dest, lambda: percent) as watch:
            try:
                self._means.flatten(dest, on_progress)
            except errors.Cancelled:
                if stopped():
                    raise
        if watch.strained.is_set() and not watch.deleted.is_set():
            self._make_way()

    @contextlib.contextmanager
    def _watching(self, current: Current, dest: ImageSpec, percent: Callable[[], int]) -> Iterator[_Watch]:
        """Within the block what would end the flatten is looked for, and progress is noted."""
        watch, over = _Watch(), threading.Event()

        def look() -> None:
            for number in itertools.count(1):
                if over.wait(_LOOK_SECONDS):
                    return
                with contextlib.suppress(errors.SnapError):  # the flatten, or the lease, meets it as well
                    if not self._look(current.job, dest).is_sealed:
                        watch.deleted.set()
                        return
                    if number % _STRAIN_LOOKS == 0 and self._cluster.strain():
                        watch.strained.set()
                        return
                    current.note(percent())

        looking = threading.Thread(target=look, name="nova-rbd-snap-watch", daemon=True)
        looking.start()
        try:
            yield watch
        finally:
            over.set()
            looking.join()

    def _make_way(self) -> None:
        """:raises errors.Later: the cluster has more urgent things to do."""
        try:
            strain = self._cluster.strain()
        except errors.NoPermission:
            return  # then nobody can know
        if strain:
            raise errors.Later(f"waits while {strain}", _STRAIN_SECONDS)

    def _await_deletion(self, job: Job, dest: ImageSpec, stopped: Callable[[], bool]) -> bool:
        """Whether a deletion that has begun gets through in time."""
        deadline = time.monotonic() + _DELETION_SECONDS
        while self._look(job, dest) is not _State.GONE:
            if stopped():
                raise errors.Cancelled("the flatten was cancelled")
            if time.monotonic() >= deadline:
                return False
            time.sleep(_LOOK_SECONDS)
        return True

    def _mend_amid(self, job: Job, dest: ImageSpec) -> bool:
        """As :meth:`_mend`, where a flatten was under way, and may still be."""
        try:
            is_used = self._is_used(job)
        except errors.GlanceError as error:
            LOG.warning("Image %s: Glance cannot be asked about it: %s", job.image_id, error.report())
            is_used = None
        if is_used is not False:
            self._means.see_ended(dest)  # a snapshot taken amid a flatten may read zeros
        return self._mend(job, dest, is_used)

    def _mend(self, job: Job, dest: ImageSpec, is_used: Optional[bool]) -> bool:
        """Seal an image again whose deletion did not get through, or remove it where its record is gone all the same.

        :returns: False where that is not for us to do.
        :raises errors.InDoubt: where that cannot be known.
        """
        if not (is_used or self._is_ours(job, dest)):
            if is_used is None:
                raise errors.InDoubt(f"{dest} has no snapshot {GLANCE_SNAP!r}, and may be no image of ours")
            LOG.warning(
                "%s is left alone: it has no snapshot %r, Glance does not use it, and nothing shows that it was made "
                "here; see 'nova-rbd-snap sweep'",
                dest, GLANCE_SNAP,
            )
            return False
        if is_used is False:
            with contextlib.suppress(errors.Missing):
                steps.when_free(saga.Run(self._cluster), "remove", self._cluster.remove, dest)
            return True
        # A live record, or one that cannot be asked about, must find its data.
        LOG.info("Image %s: a deletion failed, for it was open; its snapshot is made again", dest.name)
        with contextlib.suppress(errors.AlreadyThere):
            self._cluster.create_snap(dest.snap(GLANCE_SNAP))
        with contextlib.suppress(errors.Busy):
            self._cluster.protect_snap(dest.snap(GLANCE_SNAP))
        return True

    def _is_used(self, job: Job) -> Optional[bool]:
        """As Glance's record says; see :meth:`nova_rbd_snap.janitor.jobs.Images.uses`."""
        return self._images.uses(job.image_id, jobs.location(job, saga.Run(self._cluster)))

    def _is_ours(self, job: Job, dest: ImageSpec) -> bool:
        """Whether the rbd image is, or was seen to be, a clone of the disk.

        The job alone does not prove it, for who may write to the pool of the disks could have written that.
        """
        is_clone = self._look(job, dest) is _State.UNSEALED
        return is_clone or self._cluster.metadata(dest, _MARK) == job.dest_id

    def _see_whole(self, job: Job, stopped: Callable[[], bool]) -> None:
        """Mend a flat image whose deletion failed over somebody else, as may be an older Glance that reads it."""
        dest = steps.image_of(job)
        if self._look(job, dest) is not _State.UNSEALED_FLAT or self._await_deletion(job, dest, stopped):
            return
        is_used = self._is_used(job)
        if is_used is not None:
            with contextlib.suppress(errors.Missing):  # deleted meanwhile
                self._mend(job, dest, is_used)
