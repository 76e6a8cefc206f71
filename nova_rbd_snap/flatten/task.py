# SPDX-License-Identifier: Apache-2.0
"""Flatten an image that is in use.

Meanwhile the tenant may delete it. Glance then removes the snapshot that the image's location names first, and gives
up over the rbd image that is open here: the record would live on without its data. So the snapshot is watched, and
made again where the record lives.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import threading
import time
from collections.abc import Iterator
from typing import Callable

from nova_rbd_snap import errors
from nova_rbd_snap.ceph.interface import Cluster
from nova_rbd_snap.janitor import jobs
from nova_rbd_snap.ledger.job import FLATTEN, Job
from nova_rbd_snap.snapshot import saga, steps
from nova_rbd_snap.specs import GLANCE_SNAP, ImageSpec
from nova_rbd_snap.workers.worker import Current

LOG = logging.getLogger(__name__)

#: Seconds between two looks at whether the image is being deleted.
_LOOK_SECONDS = 1.0
#: How long Glance may take from the snapshot's removal to the image's: a removal is a proposal of the monitors.
_DELETION_SECONDS = 10.0
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


class Flattening:
    """See :class:`nova_rbd_snap.workers.worker.Task`, and the module."""

    kind = FLATTEN
    fails_as = "An image is usable, but not flat: that"

    def __init__(self, cluster: Cluster, images: jobs.Images) -> None:
        """
        :param images: Glance, asked with the service's own credentials.
        """
        self._cluster, self._images = cluster, images

    def do(self, current: Current, stopped: Callable[[], bool]) -> None:
        self._flatten(current, stopped)
        steps.remove_frozen(current.job, saga.Run(self._cluster))

    def _flatten(self, current: Current, stopped: Callable[[], bool]) -> None:
        """Return once the image is flat, or gone."""
        job, dest = current.job, steps.image_of(current.job)
        is_ours, is_repeated = False, current.is_repeated
        for _ in range(_DELETIONS):
            state = self._look(job, dest)
            is_ours |= state in (_State.SHARED, _State.UNSEALED)
            if state is _State.SHARED:
                if is_repeated:
                    # It may say that objects are there which the last attempt did not come to write.
                    self._cluster.rebuild_object_map(dest)
                is_repeated = True
                self._flatten_once(current, dest, stopped)
            elif state in (_State.GONE, _State.FLAT):
                return
            elif not self._await_deletion(job, dest, stopped):
                self._seal_again(job, dest, is_ours)
        raise errors.Busy(f"{dest}: somebody deletes the image over and over, and does not succeed")

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
            return not (deleted.is_set() or stopped())

        with self._watching(current, dest, lambda: percent) as deleted:
            try:
                self._cluster.flatten(dest, on_progress)
            except errors.Cancelled:
                if not deleted.is_set():
                    raise

    @contextlib.contextmanager
    def _watching(self, current: Current, dest: ImageSpec, percent: Callable[[], int]) -> Iterator[threading.Event]:
        """Within the block the event is set once somebody begins to delete the image, and progress is noted."""
        deleted, over = threading.Event(), threading.Event()

        def look() -> None:
            while not over.wait(_LOOK_SECONDS):
                with contextlib.suppress(errors.SnapError):  # the flatten, or the lease, meets it as well
                    if not self._look(current.job, dest).is_sealed:
                        deleted.set()
                        return
                    current.note(percent())

        looking = threading.Thread(target=look, name="nova-rbd-snap-watch", daemon=True)
        looking.start()
        try:
            yield deleted
        finally:
            over.set()
            looking.join()

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

    def _seal_again(self, job: Job, dest: ImageSpec, is_ours: bool) -> None:
        """Make an image whole whose deletion did not get through, or remove it where its record is gone all the same.

        :param is_ours: it was seen to be a clone of the disk. Else the job alone says so, which anybody who may write
            to the pool may have written.
        :raises errors.InDoubt: it is left alone.
        """
        is_used = self._images.uses(job.image_id, jobs.location(job, saga.Run(self._cluster)))
        if not (is_used or is_ours):
            raise errors.InDoubt(f"{dest} has no snapshot {GLANCE_SNAP!r}, and Glance does not say that it uses it")
        if is_used is False:
            with contextlib.suppress(errors.Missing):
                steps.when_free(saga.Run(self._cluster), "remove", self._cluster.remove, dest)
            return
        # A live record, or one that cannot be asked about, must find its data.
        LOG.info("Image %s: a deletion met its flatten and failed; its snapshot is made again", job.image_id)
        with contextlib.suppress(errors.AlreadyThere):
            self._cluster.create_snap(dest.snap(GLANCE_SNAP))
        with contextlib.suppress(errors.Busy):
            self._cluster.protect_snap(dest.snap(GLANCE_SNAP))
