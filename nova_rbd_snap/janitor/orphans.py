# SPDX-License-Identifier: Apache-2.0
"""Disks that stock Nova could not remove with their server, for images depend on them.

A host without this project, or where it is switched off, deletes the server all the same, and leaves the disk under its
name. It is one of this cloud if this Glance uses an image of it, and nobody's if this Nova does not know the server.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Optional

from nova_rbd_snap import errors
from nova_rbd_snap.janitor.findings import KEEP, TRASH, Finding, Scene
from nova_rbd_snap.janitor.strays import DISK, has_record
from nova_rbd_snap.ledger.job import SNAP_PREFIX
from nova_rbd_snap.ledger.store import Contents
from nova_rbd_snap.specs import UUID, ImageSpec

_OUR_SNAP = re.compile(rf"{SNAP_PREFIX}({UUID})")


@dataclass(frozen=True)
class Disk:
    """A disk that images were taken of, and that nothing else is known to need.

    :ivar images: those that depend on it.
    """

    spec: ImageSpec
    id: str
    images: tuple[ImageSpec, ...] = field(compare=False)

    def weigh(self, scene: Scene) -> Optional[Finding]:
        """What it is; None where its server is there.

        :raises errors.NovaSilent: that cannot be known.
        :raises errors.GlanceError: the same.
        """
        server = self.spec.name.partition("_")[0]
        if scene.nova().knows(server):
            return None
        names = ", ".join(map(str, self.images))
        if not any(has_record(scene.glance(), image.name) for image in self.images):
            why = f"Nova knows no server {server}, nor Glance any of its images, so it may be another cloud's: {names}"
            return Finding("disk", str(self.spec), KEEP, why, self)
        why = f"Nova knows no server {server}; it goes for good with the last of its images: {names}"
        return Finding("disk", str(self.spec), TRASH, why, self)

    def judge(self, scene: Scene) -> Optional[Finding]:
        now = _look(scene, self.spec, scene.ledger())
        return now.weigh(scene) if now is not None else None

    def remove(self, scene: Scene) -> None:
        for snap in scene.cluster.snaps(self.spec):
            if not snap.trashed:
                scene.cluster.remove_snap_by_id(self.spec, snap.id)
        scene.cluster.remove(self.spec)  # refused, if somebody has it open


def disks(scene: Scene, ledger: Contents) -> Iterator[Finding]:
    """Those of Nova's pool whose server is gone.

    :param ledger: read after the pool's rbd images were listed.
    """
    for name in scene.cluster.images(scene.pool):
        if not DISK.fullmatch(name):
            continue
        try:
            found = _look(scene, ImageSpec(scene.pool, name), ledger)
            finding = found.weigh(scene) if found is not None else None
        except errors.Unreachable:
            raise
        except (errors.GlanceError, errors.NovaSilent) as error:
            yield Finding("disk", scene.pool, KEEP, f"which disks' servers are gone is not known: {error.report()}")
            return
        except errors.CephError:
            continue  # told as one whose snapshots cannot be read
        if finding is not None:
            yield finding


def _look(scene: Scene, disk: ImageSpec, ledger: Contents) -> Optional[Disk]:
    """The disk, if all its snapshots are ours, of no job, and images depend on some of them."""
    try:
        snaps = scene.cluster.snaps(disk)
        if not snaps or any(snap.protected or not _is_ours(snap.name, ledger) for snap in snaps):
            return None
        images = tuple(child for snap in snaps for child in scene.cluster.children(disk, snap.id))
        return Disk(disk, scene.cluster.lookup(disk).id, images) if images else None
    except errors.Missing:
        return None  # deleted meanwhile


def _is_ours(snap: str, ledger: Contents) -> bool:
    found = _OUR_SNAP.fullmatch(snap)
    if found is None or found[1] in ledger.strange:
        return False
    return all(job.id != found[1] for job in ledger.jobs)
