# SPDX-License-Identifier: Apache-2.0
"""A cloud for a sweep: with nothing left over, and every way in which stock Nova, or we, leave something behind."""

from __future__ import annotations

import dataclasses
from typing import Any, Callable, Optional

from nova_rbd_snap import errors
from nova_rbd_snap.janitor import leftovers
from nova_rbd_snap.janitor.findings import Folder, Outcome, Scene
from nova_rbd_snap.ledger.store import OBJECT
from nova_rbd_snap.specs import GLANCE_SNAP, ImageSpec, SnapSpec
from tests.fakes.cluster import BLANK, UNLISTED, FakeCluster
from tests.fakes.engine import COPY, DEST, DISK, SERVER, image

HOUR = 3600.0
NOW = 500_000 * HOUR
OLD, YOUNG = NOW - 48 * HOUR, NOW - HOUR
STOCK = "0123456789abcdef0123456789abcdef"
LEAKED = ImageSpec("images", image(7))
#: An image of Glance's, so that Glance is seen to know this pool.
BASE = ImageSpec("images", image(1))
FOLDER = "tmpab12_xyz"


class FakeGlance:
    """See :class:`nova_rbd_snap.janitor.findings.Glance`."""

    def __init__(self) -> None:
        self.known = {BASE.name}
        self.is_glance = True
        self.error: Optional[errors.GlanceError] = None

    def __call__(self) -> FakeGlance:
        return self

    def record(self, image_id: str) -> object:
        if self.error is not None:
            raise self.error
        if image_id not in self.known:
            raise errors.RecordGone(f"no {image_id}")
        return image_id

    def answers(self) -> bool:
        return self.is_glance


class FakeNova:
    """See :class:`nova_rbd_snap.janitor.findings.Nova`."""

    def __init__(self) -> None:
        self.known = {SERVER}
        self.error: Optional[errors.SnapError] = None

    def __call__(self) -> FakeNova:
        return self

    def knows(self, server: str) -> bool:
        if self.error is not None:
            raise self.error
        return server in self.known


@dataclasses.dataclass
class FakeMachine:
    """See :class:`nova_rbd_snap.janitor.findings.Machine`."""

    directory: str = "/snapshots"
    content: dict[str, Folder] = dataclasses.field(default_factory=dict)
    opened: set[str] = dataclasses.field(default_factory=set)
    since: Optional[float] = None
    error: Optional[errors.SnapError] = None

    def folders(self) -> list[str]:
        return list(self.content)

    def look(self, name: str) -> Optional[Folder]:
        return self.content.get(name)

    def is_open(self, name: str) -> bool:
        return name in self.opened

    def nova_since(self) -> Optional[float]:
        if self.error is not None:
            raise self.error
        return self.since

    def remove(self, name: str, files: Any) -> None:
        assert self.content.pop(name).files == files


class World:
    """A cloud with a server, its disk and a base image, all old, and nothing left over."""

    def __init__(self) -> None:
        self.cluster = FakeCluster("vms", "images", "elsewhere")
        self.glance, self.nova, self.machine = FakeGlance(), FakeNova(), FakeMachine()
        self.cluster.now = OLD
        self.cluster.create_disk(BASE)
        self.seal(BASE)
        self.cluster.clone(BASE.snap(GLANCE_SNAP), DISK, None)
        # librbd's trash objects, and the ledger's.
        self.cluster.omap_replace("vms", OBJECT, "check", None, None)

    def seal(self, spec: ImageSpec) -> None:
        self.cluster.create_snap(spec.snap(GLANCE_SNAP))
        self.cluster.protect_snap(spec.snap(GLANCE_SNAP))

    def scene(self, **changes: Any) -> Scene:
        values: dict[str, Any] = {
            "cluster": self.cluster,
            "pool": "vms",
            "glance_pools": ["images"],
            "glance": self.glance,
            "nova": self.nova,
            "machine": self.machine,
            "now": NOW,
            "older_than_seconds": 24 * HOUR,
        }
        return Scene(**{**values, **changes})

    def plan(self, **changes: Any) -> dict[str, tuple[str, str]]:
        """By what was found: what is to become of it, and why."""
        found = leftovers.plan(self.scene(**changes)).findings
        assert len({finding.what for finding in found}) == len(found)
        return {finding.what: (finding.action, finding.why) for finding in found}

    def sweep(self, **changes: Any) -> dict[str, Outcome]:
        scene = self.scene(**changes)
        return {outcome.finding.what: outcome for outcome in leftovers.execute(leftovers.plan(scene), scene)}

    def picture(self) -> tuple[dict[str, Any], dict[str, Folder]]:
        return self.cluster.picture(), dict(self.machine.content)


# -- what stock Nova leaves ------------------------------------------------------------------------------------------


def snap_of(world: World, *, protected: bool = True, name: str = STOCK, disk: ImageSpec = DISK) -> SnapSpec:
    world.cluster.create_snap(disk.snap(name))
    if protected:
        world.cluster.protect_snap(disk.snap(name))
    return disk.snap(name)


def protect_failed(world: World) -> set[str]:
    return {str(snap_of(world, protected=False))}


def removal_failed(world: World) -> set[str]:
    return {str(snap_of(world))}


def flatten_failed(world: World, clone_format: int = 1) -> set[str]:
    snap = snap_of(world)
    maker = world.cluster.another(clone_format)
    maker.now = OLD
    maker.clone(snap, LEAKED, None)
    return {str(snap), str(LEAKED)}


def flatten_failed_in_format_2(world: World) -> set[str]:
    return flatten_failed(world, clone_format=2)


def snap_was_trashed_before_the_clone(world: World) -> set[str]:
    found = flatten_failed(world, clone_format=2)
    world.cluster.unprotect_snap(DISK.snap(STOCK))
    world.cluster.remove_snap(DISK.snap(STOCK))
    return found


def unprotect_failed(world: World) -> set[str]:
    found = flatten_failed(world)
    world.cluster.flatten(LEAKED, lambda done, total: True)
    return found


def seal_failed(world: World) -> set[str]:
    world.cluster.create_disk(LEAKED)
    return {str(LEAKED)}


def seal_was_not_protected(world: World) -> set[str]:
    world.cluster.create_disk(LEAKED)
    world.cluster.create_snap(LEAKED.snap(GLANCE_SNAP))
    return {str(LEAKED)}


def died_before_registration(world: World) -> set[str]:
    world.cluster.create_disk(LEAKED)
    world.seal(LEAKED)
    return {str(LEAKED)}


def clone_was_half_made(world: World) -> set[str]:
    snap = snap_of(world)
    world.cluster.make_half_clone(UNLISTED, snap, LEAKED)
    return {str(snap), str(LEAKED)}


def clone_is_blank(world: World) -> set[str]:
    snap = snap_of(world)
    world.cluster.make_half_clone(BLANK, snap, LEAKED)
    return {str(snap), str(LEAKED)}


def flat_but_for_its_snapshot(world: World) -> set[str]:
    """As where rbd_default_features lacks deep-flatten."""
    found = flatten_failed(world)
    world.cluster._open(LEAKED).deep_flatten = False
    world.seal(LEAKED)
    world.cluster.flatten(LEAKED, lambda done, total: True)
    return found


def died_while_it_copied(world: World) -> set[str]:
    world.machine.content[FOLDER] = Folder((STOCK,), (), OLD)
    return {f"/snapshots/{FOLDER}/{STOCK}"}


def ours_without_a_record(world: World) -> set[str]:
    names = (f"nova-rbd-snap-{DEST.name}", f"nova-rbd-snap-{COPY}")
    return {str(snap_of(world, name=name, protected=False)) for name in names}


LEAKS: list[Callable[[World], set[str]]] = [
    protect_failed,
    removal_failed,
    flatten_failed,
    flatten_failed_in_format_2,
    snap_was_trashed_before_the_clone,
    unprotect_failed,
    seal_failed,
    seal_was_not_protected,
    died_before_registration,
    clone_was_half_made,
    clone_is_blank,
    flat_but_for_its_snapshot,
    died_while_it_copied,
    ours_without_a_record,
]
