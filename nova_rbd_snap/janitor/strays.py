# SPDX-License-Identifier: Apache-2.0
"""Snapshots of disks, and rbd images in Glance's pools, that nobody looks after.

Ours are those that no record of the ledger names. Stock Nova's are what a failing step of its direct snapshot, or its
death, leaves behind: the snapshot of the disk, called by 32 hex digits, and the rbd image that it was cloned to, whose
Glance record Nova has deleted by then.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Optional

from nova_rbd_snap import errors
from nova_rbd_snap.ceph.interface import SnapInfo
from nova_rbd_snap.janitor.disks import STOCK_SNAP
from nova_rbd_snap.janitor.findings import KEEP, REMOVE, TRASH, Finding, Glance, Scene
from nova_rbd_snap.ledger.job import SNAP_PREFIX
from nova_rbd_snap.ledger.store import Contents
from nova_rbd_snap.snapshot import steps
from nova_rbd_snap.specs import GLANCE_SNAP, UUID, ImageSpec, SnapSpec

#: How long the trash keeps an rbd image that a sweep took for nobody's, whatever purges it meanwhile.
_KEEP_SECONDS = 7 * 24 * 3600

_IMAGE = re.compile(UUID)
DISK = re.compile(rf"{UUID}_disk(?:\.[0-9a-z_]+)?")
_OUR_SNAP = re.compile(rf"{SNAP_PREFIX}({UUID}(?:-copy)?)")


def _recorded(ledger: Contents) -> set[str]:
    """Ids that have a record, readable or not."""
    return {job.id for job in ledger.jobs} | ledger.strange.keys()


def _is_stray(snap: str) -> bool:
    """Whether a snapshot of a disk is named as we, or stock Nova, name them."""
    return bool(_OUR_SNAP.fullmatch(snap) or STOCK_SNAP.fullmatch(snap))


def _remove_snap(scene: Scene, spec: SnapSpec, snap_id: int) -> None:
    for snap in scene.cluster.snaps(spec.image):
        if snap.id == snap_id:
            steps.remove_snap(spec, snap, scene.cluster)
    if any(snap.id == snap_id for snap in scene.cluster.snaps(spec.image)):
        raise errors.CephError(f"{spec} was removed, but is still there")


# -- snapshots of disks ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    """A snapshot of a server's disk that is named as we, or stock Nova, name them.

    :ivar children: names of the clones that depend on it.
    """

    spec: SnapSpec
    id: int
    info: SnapInfo = field(compare=False)
    children: tuple[str, ...] = field(compare=False)

    def weigh(self, scene: Scene, ledger: Contents, doomed: Container[str] = ()) -> Optional[Finding]:
        """What it is; None where it belongs to a job.

        :param ledger: read after the snapshot was seen.
        :param doomed: names of rbd images that go before it.
        """
        ours = _OUR_SNAP.fullmatch(self.spec.name)
        if ours and ours[1] in _recorded(ledger):
            return None
        why = f"{'no job in the ledger' if ours else 'left by Nova'}, {scene.age(self.info.created)}"
        needed = [child for child in self.children if child not in doomed]
        if ours and any(child.endswith(f"/{ours[1]}") for child in needed):
            return None  # by its image, which is not flat
        action = KEEP
        if not ours and scene.is_young(self.info.created):
            why += ", so Nova may be at work on it"
        elif needed:
            why += f", but in use by {', '.join(needed)}"
        else:
            action = REMOVE
        return Finding("own snapshot" if ours else "stock snapshot", str(self.spec), action, why, self)

    def judge(self, scene: Scene) -> Optional[Finding]:
        for found in _snapshots_of(scene, self.spec.image):
            if found == self:
                return found.weigh(scene, scene.ledger())
        return None

    def remove(self, scene: Scene) -> None:
        scene.cluster.ask_holder(self.spec.image)  # a guest that was only stopped would lose its disk
        _remove_snap(scene, self.spec, self.id)


def snapshots(scene: Scene) -> tuple[list[Snapshot], list[Finding]]:
    """Those of all disks in Nova's pool, and the disks that do not tell."""
    found, unreadable = [], []
    for name in scene.cluster.images(scene.pool):
        if DISK.fullmatch(name):
            disk = ImageSpec(scene.pool, name)
            try:
                found += _snapshots_of(scene, disk)
            except errors.Unreachable:
                raise
            except errors.CephError as error:
                unreadable.append(Finding("disk", str(disk), KEEP, f"its snapshots cannot be read: {error.report()}"))
    return found, unreadable


def _snapshots_of(scene: Scene, disk: ImageSpec) -> list[Snapshot]:
    try:
        return [
            Snapshot(disk.snap(snap.name), snap.id, snap, tuple(map(str, scene.cluster.children(disk, snap.id))))
            for snap in scene.cluster.snaps(disk)
            if _is_stray(snap.name)
        ]
    except errors.Missing:
        return []  # deleted meanwhile


# -- rbd images in Glance's pools --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Image:
    """An rbd image that is named as Glance names its own, but that Glance does not know.

    :ivar is_clone: it still has a parent.
    """

    spec: ImageSpec
    id: str
    is_clone: bool

    def judge(self, scene: Scene) -> Optional[Finding]:
        now = _weigh(scene, self.spec)
        if now is None or now.target is None:
            return now
        if self.spec.name in _known_to_the_ledger(scene.ledger()) or has_record(scene.glance(), self.spec.name):
            return Finding(now.kind, now.what, KEEP, "the ledger or Glance has a record of it")
        return now

    def remove(self, scene: Scene) -> None:
        if self.is_clone:
            scene.cluster.remove(self.spec)
            return
        for snap in scene.cluster.snaps(self.spec):
            _remove_snap(scene, self.spec.snap(snap.name), snap.id)
        scene.cluster.trash(self.spec, _KEEP_SECONDS)


def image_names(scene: Scene) -> dict[str, list[str]]:
    """The rbd images in each of Glance's pools that are named as Glance names them."""
    return {
        pool: [name for name in scene.cluster.images(pool) if _IMAGE.fullmatch(name)] for pool in scene.glance_pools
    }


def images(scene: Scene, names: Mapping[str, list[str]], ledger: Contents) -> Iterator[Finding]:
    """Those of :func:`image_names` that neither Glance nor the ledger knows.

    :param ledger: read after the names.
    """
    if not names:
        yield Finding("image", "Glance's pool", KEEP, "not looked at: [rbd_snap] glance_pool does not tell which it is")
    for pool, those in names.items():
        ours = _known_to_the_ledger(ledger)
        asked = [name for name in those if name not in ours]
        try:
            unknown = [name for name in asked if not has_record(scene.glance(), name)]
        except errors.GlanceError as error:
            why = f"which of its {len(asked)} images are in use is not known: {error}"
            yield Finding("image", pool, KEEP, why)
            continue
        if unknown and unknown == asked:
            # So would say the Glance of another cloud or region.
            why = f"Glance knows none of its {len(asked)} images, so it may be another Glance's pool"
            yield Finding("image", pool, KEEP, why)
            continue
        found = (_weigh(scene, ImageSpec(pool, name)) for name in unknown)
        yield from (finding for finding in found if finding)


def _known_to_the_ledger(ledger: Contents) -> set[str]:
    return {job_id.removesuffix("-copy") for job_id in _recorded(ledger)}


def has_record(glance: Glance, image_id: str) -> bool:
    """:raises errors.GlanceError: that cannot be known."""
    try:
        glance.record(image_id)
    except errors.RecordGone as error:
        if not glance.answers():
            raise errors.GlanceSilent(f"it is not Glance that says: {error}") from error
        return False
    return True


def _weigh(scene: Scene, image: ImageSpec) -> Optional[Finding]:
    """What an rbd image without a record is, by itself; None where it is gone."""
    if not scene.cluster.exists(image):
        return None
    try:
        info, snaps = scene.cluster.lookup(image), scene.cluster.snaps(image)
        needed = [str(child) for snap in snaps for child in scene.cluster.children(image, snap.id)]
        is_clone = info.parent is not None
        is_unfinished = info.parent is not None and not snaps and _is_of_a_disk(scene, image, info.parent)
    except errors.Unreachable:
        raise
    except errors.CephError as error:
        return Finding("image", str(image), KEEP, f"no record in Glance, but it cannot be read: {error.report()}")
    why = f"no record in Glance, {scene.age(info.created)}"
    others = [snap.name for snap in snaps if snap.name != GLANCE_SNAP]
    action = KEEP
    if scene.is_young(info.created):
        why += ", so somebody may be at work on it"
    elif needed:
        why += f", but in use by {', '.join(needed)}"
    elif info.mirrored:
        why += ", but mirrored: perhaps another site's"
    elif others:
        why += f", but with snapshots that Glance makes none of: {', '.join(others)}"
    elif is_unfinished:
        action, why = REMOVE, f"{why}, an unfinished clone of {info.parent}"
    elif is_clone:
        why += f", but a clone of {info.parent}, which is none of Nova's or ours"
    else:
        action = TRASH
        why += "; to take it back: rbd trash restore"
        if snaps:
            why += f", rbd snap create and protect {image.snap(GLANCE_SNAP)}"
    return Finding("clone" if is_clone else "image", str(image), action, why, Image(image, info.id, is_clone))


def _is_of_a_disk(scene: Scene, image: ImageSpec, parent: SnapSpec) -> bool:
    """Whether the parent is a snapshot of a server's disk that is named as we, or stock Nova, name them."""
    disk = parent.image
    if disk.pool != scene.pool or not DISK.fullmatch(disk.name):
        return False
    if _is_stray(parent.name):
        return True
    # In the trash it bears another name, but is listed with its own.
    with contextlib.suppress(errors.Missing):
        snaps = scene.cluster.snaps(disk)
        return any(
            snap.trashed and _is_stray(snap.name) and image in scene.cluster.children(disk, snap.id) for snap in snaps
        )
    return False
