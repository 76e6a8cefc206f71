# SPDX-License-Identifier: Apache-2.0
"""Clear away what is left of images that were deleted before they were flat.

The snapshot of the disk that such an image was cloned from is needed by nobody then. And librbd removes a trashed
snapshot, and a parent in the trash, with the last clone, only if who removes that may write to the pool: Glance, as a
rule, may not. And an image that servers were booted from Glance moves to the trash of its own pool, where nobody looks
for it once those are gone. All of that is meant to go.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from typing import Callable

from nova_rbd_snap import errors
from nova_rbd_snap.ceph.interface import Cluster, SnapInfo, TrashInfo
from nova_rbd_snap.janitor.jobs import Images
from nova_rbd_snap.ledger.job import SNAP_PREFIX, purge_id
from nova_rbd_snap.ledger.store import Ledger
from nova_rbd_snap.specs import GLANCE_SNAP, UUID, ImageSpec, Location

_IMAGE, _DISK = re.compile(UUID), re.compile(f"{UUID}_.+")
_OUR_SNAP = re.compile(f"{SNAP_PREFIX}{UUID}")


@dataclass(frozen=True)
class Cleared:
    """What was removed, for people.

    :ivar kept: why it was not, for what could not be looked at, or removed; empty for what was.
    """

    what: str
    kept: str = ""


def clear(
    cluster: Cluster, pool: str, glance_pools: Iterable[str], images: Images, now: float
) -> Iterator[Cleared]:
    """Remove what servers' disks in *pool* are kept for in vain, and what is kept of them; yields what was.

    :param glance_pools: what is known of Glance's pools. To ask for a snapshot's clones is dear, and needless where its
        image is there.
    :param images: Glance, asked with the service's own credentials: no image goes but on its word.
    :param now: seconds since the epoch.
    :raises errors.Unreachable: the cluster does not answer.
    """
    there = {name for glance_pool in glance_pools for name in cluster.images(glance_pool)}
    yield from _Clearing(cluster, pool, there, images, now).all()


class _Clearing:
    """One round."""

    def __init__(self, cluster: Cluster, pool: str, there: Container[str], images: Images, now: float) -> None:
        self._cluster, self._pool, self._there, self._images, self._now = cluster, pool, there, images, now
        self._ledger = Ledger(cluster, pool)
        #: What is in the trash of a pool: read once, for it may be much.
        self._trashed: Callable[[str], list[TrashInfo]] = functools.cache(cluster.trashed)

    def all(self) -> Iterator[Cleared]:
        for waiting in self._cluster.trashed(self._pool):
            if waiting.is_parent:
                yield from self._each(f"{self._pool}/{waiting.name}", self._parent(waiting))
            elif self._ledger.has(purge_id(waiting.id)):  # its job removes the rest
                yield from self._each(f"{self._pool}/{waiting.name}", self._clones(waiting))
        for name in self._cluster.images(self._pool):
            if _DISK.fullmatch(name):
                disk = ImageSpec(self._pool, name)
                yield from self._each(str(disk), self._snapshots(disk))

    @staticmethod
    def _each(what: str, removals: Iterator[str]) -> Iterator[Cleared]:
        try:
            yield from map(Cleared, removals)
        except (errors.Unreachable, errors.LeaseLost):
            raise
        except errors.Missing:
            return  # gone meanwhile
        except errors.SnapError as error:
            yield Cleared(what, error.report())

    def _clones(self, waiting: TrashInfo) -> Iterator[str]:
        yield from self._images_of(self._cluster.children_of_trashed(self._pool, waiting.id))

    def _parent(self, waiting: TrashInfo) -> Iterator[str]:
        children = self._cluster.children_of_trashed(self._pool, waiting.id)
        if children:
            yield from self._images_of(children)
            children = self._cluster.children_of_trashed(self._pool, waiting.id)  # with the last one librbd removes it
        if not children:
            self._cluster.remove_trashed(self._pool, waiting.id)
            yield f"{self._pool}/{waiting.name} ({waiting.id}) from the trash"

    def _snapshots(self, disk: ImageSpec) -> Iterator[str]:
        found = [
            snap
            for snap in self._cluster.snaps(disk)
            if (snap.trashed or _OUR_SNAP.fullmatch(snap.name))
            and snap.name.removeprefix(SNAP_PREFIX) not in self._there
        ]
        for snap in found:
            # Asked after it was seen, so that none of a job that begins meanwhile is taken for nobody's.
            if not self._ledger.has(snap.name.removeprefix(SNAP_PREFIX)):
                yield from self._snapshot(disk, snap)

    def _snapshot(self, disk: ImageSpec, snap: SnapInfo) -> Iterator[str]:
        children = self._cluster.children(disk, snap.id)
        if children:
            removed = list(self._images_of(children))
            yield from removed
            children = self._cluster.children(disk, snap.id) if removed else children
        if not children and not snap.protected:
            self._cluster.ask_holder(disk)  # a guest that was only stopped would lose its disk
            self._cluster.remove_snap_by_id(disk, snap.id)
            yield f"snapshot {snap.name} ({snap.id}) of {disk}"

    def _images_of(self, clones: Iterable[ImageSpec]) -> Iterator[str]:
        """Remove those of *clones* that are images in the trash, kept for nobody."""
        for clone in clones:
            if not _IMAGE.fullmatch(clone.name) or self._cluster.exists(clone):
                continue
            for found in self._trashed(clone.pool):
                if found.name == clone.name and found.kept_until <= self._now and self._is_deleted(clone):
                    with contextlib.suppress(errors.Missing, errors.Busy):
                        # Made again by us for a deletion that seemed to have failed, when it was on its way here.
                        self._cluster.remove_snap_of_trashed(clone.pool, found.id, GLANCE_SNAP)
                    with contextlib.suppress(errors.Missing, errors.Busy):  # a server may depend on it
                        self._cluster.remove_trashed(clone.pool, found.id)
                        yield f"image {clone} ({found.id}) from the trash"

    def _is_deleted(self, image: ImageSpec) -> bool:
        """Whether Glance says so; the rbd image alone may have been put there by somebody else."""
        url = Location(self._cluster.fsid(), image.snap(GLANCE_SNAP)).url
        return self._images.uses(image.name, url) is False
