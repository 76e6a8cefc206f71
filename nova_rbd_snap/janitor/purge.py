# SPDX-License-Identifier: Apache-2.0
"""Remove for good the disks of deleted servers, which are in the trash of their pool by then.

That takes as long as the disk is large, and whoever deletes a server need not wait for it.
"""

from __future__ import annotations

import contextlib
from typing import Callable

from nova_rbd_snap import errors
from nova_rbd_snap.ceph.interface import Cluster
from nova_rbd_snap.ledger.job import PURGE, QUEUED, Job, Owner, purge_id
from nova_rbd_snap.ledger.store import Ledger
from nova_rbd_snap.specs import ImageSpec
from nova_rbd_snap.workers.worker import Current


def trash(disk: ImageSpec, cluster: Cluster, ledger: Ledger, owner: Owner, now: float) -> None:
    """Move the disk to the trash, and have it removed from there.

    :param now: seconds since the epoch.
    :raises errors.Missing: it does not exist, or is half-made and cannot be opened.
    """
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
    with contextlib.suppress(errors.LedgerConflict):  # an earlier attempt wrote it
        ledger.reserve(job)
    cluster.trash(disk, 0)


class Purge:
    """See :class:`nova_rbd_snap.workers.worker.Task`."""

    kind = PURGE
    fails_as = "The disk of a deleted server stays in the trash: the purge"

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def do(self, current: Current, stopped: Callable[[], bool]) -> None:
        """Remove the disk, if it is in the trash, and not taken back."""
        pool, image_id, name = current.job.disk.pool, current.job.image_id, current.job.disk.name
        # Anybody who may write to the pool may have written the record.
        if any((found.id, found.name) == (image_id, name) for found in self._cluster.trashed(pool)):
            with contextlib.suppress(errors.Missing):  # gone meanwhile
                self._cluster.remove_trashed(pool, image_id)
