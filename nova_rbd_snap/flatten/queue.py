# SPDX-License-Identifier: Apache-2.0
"""The images that are not flat, and the ledger's jobs to flatten them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Optional

from nova_rbd_snap import errors
from nova_rbd_snap.ceph.interface import Cluster
from nova_rbd_snap.ledger.job import BACKGROUND, FLATTEN, QUEUED, SNAP_PREFIX, Job, Owner
from nova_rbd_snap.ledger.store import Ledger
from nova_rbd_snap.specs import GLANCE_SNAP, UUID, ImageSpec

_IMAGE, _DISK = re.compile(UUID), re.compile(f"{UUID}_.+")


@dataclass(frozen=True)
class Shared:
    """An image that still shares data with a server's disk.

    :ivar disk: which may be in the trash by now.
    :ivar id: of the rbd image.
    :ivar depth: through how many rbd images it reads.
    """

    image: ImageSpec
    disk: ImageSpec
    id: str
    depth: int


def shared_images(cluster: Cluster, pool: str, glance_pools: Iterable[str]) -> Iterator[Shared]:
    """The images that are clones of servers' disks in *pool*; each rbd image in Glance's pools is opened.

    Not what is not sealed: it is no image yet, and whoever makes it may be flattening it.
    """
    for glance_pool in glance_pools:
        for name in cluster.images(glance_pool):
            found = shared(cluster, ImageSpec(glance_pool, name)) if _IMAGE.fullmatch(name) else None
            if found is not None and found.disk.pool == pool:
                yield found


def shared(cluster: Cluster, image: ImageSpec) -> Optional[Shared]:
    """The image, if it is one, and a clone of a server's disk."""
    try:
        info = cluster.lookup(image)
        if info.parent is None or not _DISK.fullmatch(info.parent.image.name):
            return None
        if not any(snap.name == GLANCE_SNAP and snap.protected for snap in cluster.snaps(image)):
            return None
        return Shared(image, info.parent.image, info.id, len(cluster.ancestors(image)))
    except errors.Missing:
        return None  # deleted meanwhile, or half-made


def queue(job: Job, ledger: Ledger) -> None:
    """Make the job of a clone, whose image is active by now, the one of flattening it."""
    ledger.advance(job, kind=FLATTEN, step=QUEUED, failures=())


def queue_image(found: Shared, ledger: Ledger, owner: Owner, now: float) -> None:
    """Have an image flattened.

    :param now: seconds since the epoch.
    :raises errors.LedgerConflict: it has a job already.
    """
    job = Job(
        id=found.image.name,
        kind=FLATTEN,
        owner=owner,
        created=now,
        disk=found.disk,
        clone_format=2,
        step=QUEUED,
        flatten=BACKGROUND,
        dest=found.image,
        dest_id=found.id,
    )
    ledger.reserve(job)


def queue_oldest(disk: ImageSpec, cluster: Cluster, ledger: Ledger, owner: Owner, now: float) -> None:
    """Have the oldest image flattened that depends on the disk, and has no job yet; as :func:`queue_image`."""
    have_jobs = {job.id for job in ledger.read().jobs}
    for snap in cluster.snaps(disk):
        name = snap.name.removeprefix(SNAP_PREFIX)
        if name == snap.name or name in have_jobs:
            continue
        with contextlib.suppress(errors.Missing, errors.LedgerConflict):
            for child in cluster.children(disk, snap.id):
                if child.name == name and (found := shared(cluster, child)) is not None:
                    queue_image(found, ledger, owner, now)
                    return
