# SPDX-License-Identifier: Apache-2.0
"""Clear away what is left of images that were deleted before they were flat.

librbd removes a trashed snapshot, and a parent in the trash, with the last clone, if who removes that may write to the
pool. Glance, as a rule, may not. And an image that servers were booted from Glance moves to the trash of its own pool,
where nobody looks for it once those are gone. All of that is needed by nobody, and meant to go.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator

from nova_rbd_snap import errors
from nova_rbd_snap.ceph.interface import Cluster
from nova_rbd_snap.specs import UUID, ImageSpec

_IMAGE, _DISK = re.compile(UUID), re.compile(f"{UUID}_.+")


def clear(cluster: Cluster, pool: str, now: float) -> Iterator[str]:
    """Remove what servers' disks in *pool* are kept for in vain, and what is kept of them; yields what was, for people.

    :param now: seconds since the epoch.
    :raises errors.Unreachable: the cluster does not answer.
    """
    for waiting in cluster.trashed(pool):
        if waiting.is_parent:
            with contextlib.suppress(errors.Missing):
                yield from _clear_images(cluster, cluster.children_of_trashed(pool, waiting.id), now)
            # As long as a clone depends on it this is refused, and with the last one librbd may have done it.
            with contextlib.suppress(errors.Missing, errors.Busy):
                cluster.remove_trashed(pool, waiting.id)
                yield f"{pool}/{waiting.name} ({waiting.id}) from the trash"
    for name in cluster.images(pool):
        if _DISK.fullmatch(name):
            try:
                yield from _clear_snapshots(cluster, ImageSpec(pool, name), now)
            except errors.Unreachable:
                raise
            except errors.CephError:
                continue  # deleted meanwhile, or its guest does not answer: there is time


def _clear_snapshots(cluster: Cluster, disk: ImageSpec, now: float) -> Iterator[str]:
    for snap in cluster.snaps(disk):
        if snap.trashed:
            yield from _clear_images(cluster, cluster.children(disk, snap.id), now)
            if not cluster.children(disk, snap.id):
                cluster.ask_holder(disk)  # a guest that was only stopped would lose its disk
                cluster.remove_snap_by_id(disk, snap.id)
                yield f"snapshot {snap.name} ({snap.id}) of {disk}"


def _clear_images(cluster: Cluster, clones: Iterable[ImageSpec], now: float) -> Iterator[str]:
    """Remove those of *clones* that are images in the trash, kept for nobody."""
    for clone in clones:
        if not _IMAGE.fullmatch(clone.name) or cluster.exists(clone):
            continue
        for found in cluster.trashed(clone.pool):
            if found.name == clone.name and found.kept_until <= now:
                with contextlib.suppress(errors.Missing, errors.Busy):  # a server may depend on it
                    cluster.remove_trashed(clone.pool, found.id)
                    yield f"image {clone} ({found.id}) from the trash"
