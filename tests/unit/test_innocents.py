# SPDX-License-Identifier: Apache-2.0
"""No name makes a sweep remove anything else: many kinds of things that are no leftovers, under many names."""

from __future__ import annotations

import contextlib
import re
from typing import Any, Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nova_rbd_snap import errors
from nova_rbd_snap.janitor.findings import KEEP
from nova_rbd_snap.ledger.store import OBJECT
from nova_rbd_snap.specs import GLANCE_SNAP, ImageSpec
from tests.fakes.engine import DISK
from tests.fakes.sweep import HOUR, NOW, OLD, YOUNG, World, flatten_failed, ours_without_a_record, snap_of

uuids = st.uuids().map(str)
digits = st.from_regex(r"[0-9a-f]{32}", fullmatch=True)
near_uuids = st.one_of(
    uuids.map(str.upper).filter(lambda name: name != name.lower()),
    uuids.map(lambda name: name[:-1]),
    uuids.map(lambda name: f"{name}0"),
    uuids.map(lambda name: name.replace("-", "")),
    uuids.map(lambda name: name.replace("-", "_")),
    uuids.map(lambda name: f"{name}\n"),
    uuids.map(lambda name: f"\n{name}"),
    uuids.map(lambda name: f"{{{name}}}"),
    uuids.map(lambda name: f"volume-{name}"),
    uuids.map(lambda name: f"{name}.tmp"),
    uuids.map(lambda name: f"{name}_disk"),
    uuids.map(lambda name: f"{name}_disk.local"),
    uuids.map(lambda name: f"{name}@snap"),
    uuids.map(lambda name: "\N{FULLWIDTH DIGIT ONE}" + name[1:]),
    st.text(min_size=1).filter(lambda name: not re.fullmatch(r"[0-9a-f-]{36}", name)),
)
near_disks = st.one_of(
    uuids,
    near_uuids.filter(lambda name: not re.search(r"_disk(\.local)?\Z", name)),
    near_uuids.filter(lambda name: "_disk" not in name).map(lambda name: f"{name}_disk"),
    uuids.map(lambda name: f"{name}-disk"),
    uuids.map(lambda name: f"{name}_disk-backup"),
    uuids.map(lambda name: f"{name}_disk "),
    uuids.map(lambda name: f"{name}_disk\n"),
    uuids.map(lambda name: f"{name}_disk.rescue/x"),
    uuids.map(lambda name: f"{name}_DISK"),
    uuids.map(lambda name: f"{name}_disks"),
    uuids.map(lambda name: f"old_{name}_disk"),
).filter(lambda name: not re.fullmatch(r"[0-9a-f-]{36}_disk(\.[0-9a-z_]+)?", name))
near_snaps = st.one_of(
    digits.map(lambda name: name[:-1]),
    digits.map(lambda name: f"{name}0"),
    digits.map(lambda name: f"{name}\n"),
    digits.map(lambda name: f" {name}"),
    digits.map(str.upper).filter(lambda name: name != name.lower()),
    digits.map(lambda name: "\N{ARABIC-INDIC DIGIT ONE}" + name[1:]),
    digits.map(lambda name: f"nova-rbd-snap-{name}"),
    uuids,
    uuids.map(lambda name: f"nova-rbd-snap-{name}-copy-2"),
    uuids.map(lambda name: f"NOVA-RBD-SNAP-{name}"),
    uuids.map(lambda name: f"my-nova-rbd-snap-{name}"),
    uuids.map(lambda name: f"nova-rbd-snap-{name.upper()}A"),
    st.sampled_from(["snap", "nova-resize", "nova-rbd-snap-", ".mirror.primary.x", "backup-2024"]),
    st.text(min_size=1).filter(lambda name: not re.fullmatch(r"[0-9a-f]{32}|nova-rbd-snap-.*", name)),
)
moments = st.sampled_from([0.0, OLD, YOUNG, NOW, NOW + HOUR])

Innocent = Callable[[World], None]


def at(world: World, moment: float, make: Callable[[], Any]) -> None:
    """Make it at *moment*; what has the name already keeps it."""
    before, world.cluster.now = world.cluster.now, moment
    with contextlib.suppress(errors.AlreadyThere):
        make()
    world.cluster.now = before


def snap_on(world: World, image: ImageSpec, snap: str, moment: float, protected: bool) -> None:
    if not world.cluster.exists(image):
        world.cluster.create_disk(image)
    at(world, moment, lambda: snap_of(world, disk=image, name=snap, protected=protected))


def oddly_named_snap(snap: str, moment: float, protected: bool) -> Innocent:
    return lambda world: snap_on(world, DISK, snap, moment, protected)


def snap_of_no_disk(pool: str, name: str, snap: str, moment: float, protected: bool) -> Innocent:
    return lambda world: snap_on(world, ImageSpec(pool, name), snap, moment, protected)


def snap_elsewhere(name: str, snap: str, protected: bool) -> Innocent:
    return lambda world: snap_on(world, ImageSpec("elsewhere", f"{name}_disk"), snap, OLD, protected)


def snap_in_use(snap: str, pool: str, name: str, ours: bool) -> Innocent:
    def make(world: World) -> None:
        full = f"nova-rbd-snap-{name}" if ours else snap
        snap_on(world, DISK, full, OLD, True)
        child = ImageSpec(pool, f"child of {name}")
        at(world, OLD, lambda: world.cluster.clone(DISK.snap(full), child, None))

    return make


def young_snap(snap: str) -> Innocent:
    return lambda world: snap_on(world, DISK, snap, YOUNG, True)


def snap_of_a_job(name: str, record: str, copy: bool) -> Innocent:
    def make(world: World) -> None:
        key = f"{name}-copy" if copy else name
        snap_on(world, DISK, f"nova-rbd-snap-{key}", OLD, False)
        world.cluster.omap_replace("vms", OBJECT, key, None, record or "{}")

    return make


def image_of(world: World, spec: ImageSpec, moment: float, **more: Any) -> None:
    if not world.cluster.exists(spec):
        at(world, moment, lambda: world.cluster.create_disk(spec, **more))
        world.seal(spec)


def oddly_named_image(name: str, moment: float) -> Innocent:
    return lambda world: image_of(world, ImageSpec("images", name), moment)


def image_elsewhere(pool: str, name: str, moment: float) -> Innocent:
    return lambda world: image_of(world, ImageSpec(pool, name), moment)


def glance_image(name: str, moment: float) -> Innocent:
    def make(world: World) -> None:
        image_of(world, ImageSpec("images", name), moment)
        world.glance.known.add(name)

    return make


def image_of_a_job(name: str, record: str, copy: bool) -> Innocent:
    def make(world: World) -> None:
        image_of(world, ImageSpec("images", name), OLD)
        world.cluster.omap_replace("vms", OBJECT, f"{name}-copy" if copy else name, None, record or "{}")

    return make


def young_image(name: str) -> Innocent:
    return lambda world: image_of(world, ImageSpec("images", name), YOUNG)


def mirrored_image(name: str) -> Innocent:
    return lambda world: image_of(world, ImageSpec("images", name), OLD, mirrored=True)


def image_in_use(name: str, pool: str) -> Innocent:
    def make(world: World) -> None:
        spec = ImageSpec("images", name)
        image_of(world, spec, OLD)
        at(world, OLD, lambda: world.cluster.clone(spec.snap(GLANCE_SNAP), ImageSpec(pool, f"child of {name}"), None))

    return make


def image_with_a_snap(name: str, snap: str) -> Innocent:
    def make(world: World) -> None:
        image_of(world, ImageSpec("images", name), OLD)
        snap_on(world, ImageSpec("images", name), f"kept-{snap}", OLD, False)

    return make


def clone_of_another(name: str, snap: str) -> Innocent:
    def make(world: World) -> None:
        source = ImageSpec("vms", f"golden-{name}")
        snap_on(world, source, snap, OLD, True)
        at(world, OLD, lambda: world.cluster.clone(source.snap(snap), ImageSpec("images", name), None))

    return make


pools = st.sampled_from(["vms", "images", "elsewhere"])
KINDS: dict[str, st.SearchStrategy[Innocent]] = {
    "oddly named snapshot": st.builds(oddly_named_snap, near_snaps, moments, st.booleans()),
    "snapshot of no disk": st.builds(snap_of_no_disk, st.just("vms"), near_disks, digits, moments, st.booleans()),
    "snapshot elsewhere": st.builds(snap_elsewhere, uuids, digits, st.booleans()),
    "snapshot in use": st.builds(snap_in_use, digits, pools, uuids, st.booleans()),
    "young snapshot": st.builds(young_snap, digits),
    "snapshot of a job": st.builds(snap_of_a_job, uuids, st.text(), st.booleans()),
    "oddly named image": st.builds(oddly_named_image, near_uuids, moments),
    "image elsewhere": st.builds(image_elsewhere, st.sampled_from(["vms", "elsewhere"]), uuids, moments),
    "image of Glance's": st.builds(glance_image, uuids, moments),
    "image of a job": st.builds(image_of_a_job, uuids, st.text(), st.booleans()),
    "young image": st.builds(young_image, uuids),
    "mirrored image": st.builds(mirrored_image, uuids),
    "image in use": st.builds(image_in_use, uuids, pools),
    "image with a snapshot": st.builds(image_with_a_snap, uuids, st.text(min_size=1)),
    "clone of another": st.builds(clone_of_another, uuids, digits),
}
without_hurry = [HealthCheck.too_slow, HealthCheck.filter_too_much]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None, suppress_health_check=without_hurry)
@given(data=st.data())
def test_innocents_of_a_kind_survive(kind: str, data: st.DataObject) -> None:
    """Nothing of them is planned for removal, let alone removed."""
    assert_survive(data.draw(st.lists(KINDS[kind], min_size=1, max_size=4)))


@settings(max_examples=100, deadline=None, suppress_health_check=without_hurry)
@given(st.lists(st.one_of(*KINDS.values()), max_size=15))
def test_innocents_of_all_kinds_survive(them: list[Innocent]) -> None:
    """Also among each other."""
    assert_survive(them)


def assert_survive(them: list[Innocent]) -> None:
    """All is as before, and what was leaked beside them is gone."""
    world = World()
    for make in them:
        make(world)
    before = world.cluster.picture()
    leaked = flatten_failed(world) | ours_without_a_record(world)
    outcomes = world.sweep()
    assert {what for what, outcome in outcomes.items() if outcome.finding.action != KEEP} == leaked
    assert all(outcome.done for outcome in outcomes.values())
    assert world.cluster.picture() == before
