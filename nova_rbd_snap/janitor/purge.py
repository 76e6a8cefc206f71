# SPDX-License-Identifier: Apache-2.0
"""Remove for good the disks of deleted servers, which are in the trash of their pool by then.

That takes as long as the disk is large, and whoever deletes a server need not wait for it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from typing import Callable

from nova_rbd_snap import errors
from nova_rbd_snap.ceph.interface import Cluster
from nova_rbd_snap.ledger.job import FLATTEN, PURGE, QUEUED, SNAP_PREFIX, Job, Owner, purge_id
from nova_rbd_snap.ledger.store import Ledger
from nova_rbd_snap.snapshot import steps
from nova_rbd_snap.snapshot.saga import Run
from nova_rbd_snap.specs import ImageSpec
from nova_rbd_snap.workers.worker import Current

LOG = logging.getLogger(__name__)

#: How long after its record a disk may come to be in the trash.
_ON_ITS_WAY_SECONDS = 3600.0
#: How often is looked whether the disk is needed for no flatten, and no image, any more.
_FLATTEN_SECONDS, _IMAGES_SECONDS = 600.0, 3600.0


def trash(disk: ImageSpec, run: Run, ledger: Ledger, owner: Owner, now: float) -> None:
    """Move the disk to the trash, and have it removed from there.

    :param now: seconds since the epoch.
    :raises errors.Missing: it does not exist, or is half-made and cannot be opened.
    :raises errors.Busy: it cannot be moved for whoever has it open.
    """
    cluster = run.cluster
    image_id = cluster.lookup(disk).id
    job = Job(
        id=purge_id(image_id),
        kind=PURGE,
        owner=owner,
        created=now,
        disk=disk,
        clone_format=2,
        step=QUEUED,
    )
    try:
        job = ledger.reserve(job)
    except errors.LedgerConflict:  # an earlier attempt wrote it
        job = ledger.load(job.id)
    try:
        steps.when_free(run, f"trash {disk.name}", lambda image: cluster.trash(image, 0), disk)
    except errors.Busy:
        with contextlib.suppress(errors.LedgerConflict):  # a worker has it, which will see for itself
            ledger.forget(job)
        raise
    LOG.info("%s is in the trash of its pool, from where a worker removes it", disk)


class Purge:
    """See :class:`nova_rbd_snap.workers.worker.Task`."""

    kind = PURGE
    fails_as = "The disk of a deleted server stays in the trash: the purge"

    def __init__(self, cluster: Cluster, clock: Callable[[], float] = time.time) -> None:
        """
        :param clock: seconds since the epoch.
        """
        self._cluster, self._clock = cluster, clock

    def do(self, current: Current, stopped: Callable[[], bool]) -> None:
        """Remove the disk, if it is in the trash, and not taken back."""
        job, disk = current.job, current.job.disk
        # Anybody who may write to the pool may have written the record.
        for found in self._cluster.trashed(disk.pool):
            if (found.id, found.name) == (job.image_id, disk.name):
                left = found.kept_until - self._clock()
                if left > 0:
                    raise errors.Later(f"waits, for somebody has put {disk} back into the trash", left)
                self._remove(job)
                return
        if self._is_on_its_way(job):
            raise errors.Later(f"waits, for {disk} is not in the trash yet")

    def _remove(self, job: Job) -> None:
        jobs = Ledger(self._cluster, job.disk.pool).read().jobs
        if any(other.kind == FLATTEN and other.disk == job.disk for other in jobs):
            raise errors.Later(f"waits until nobody reads an image of {job.disk} that was not flat", _FLATTEN_SECONDS)
        pool, image_id = job.disk.pool, job.image_id
        try:
            for snap in self._cluster.snaps_of_trashed(pool, image_id):
                if snap.name.startswith(SNAP_PREFIX) and not snap.trashed:
                    with contextlib.suppress(errors.Busy):  # an image depends on it
                        self._cluster.remove_snap_of_trashed(pool, image_id, snap.name)
            self._cluster.remove_trashed(pool, image_id)
        except errors.HasSnapshots as error:
            raise errors.Later(f"waits: {error.report()}", _IMAGES_SECONDS) from error
        except errors.Missing:
            return  # gone meanwhile

    def _is_on_its_way(self, job: Job) -> bool:
        """Whether whoever deletes the server may still be about to move the disk to the trash."""
        if self._clock() > job.created + _ON_ITS_WAY_SECONDS:
            return False
        try:
            return self._cluster.lookup(job.disk).id == job.image_id
        except errors.Missing:
            return False
