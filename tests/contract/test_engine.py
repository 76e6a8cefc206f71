# SPDX-License-Identifier: Apache-2.0
"""The engine's jobs from end to end, on the fake and on a real cluster: what unit tests claim holds on both."""

from __future__ import annotations

import functools
import uuid
from typing import Optional

import pytest

from nova_rbd_snap import errors
from nova_rbd_snap.engine import unheard
from nova_rbd_snap.engine.service import Engine, Report
from nova_rbd_snap.ledger.job import Owner, copy_id
from nova_rbd_snap.ledger.store import Ledger
from nova_rbd_snap.specs import GLANCE_SNAP, ImageSpec, Location
from tests.contract.worlds import World
from tests.fakes.engine import FakeImages, make_settings

formats = pytest.mark.parametrize("clone_format", [1, 2])
BASE = {0: b"base 0", 3: b"base 3"}
FROZEN = {**BASE, 0: b"disk 0", 2: b"disk 2"}


def make_engine(world: World, clone_format: int, data_pool: Optional[str] = None, life: str = "life-1") -> Engine:
    settings = make_settings(pool=world.vms, glance_data_pool=data_pool, clone_format=clone_format)
    return Engine(
        settings,
        functools.partial(Owner, "compute-1", "machine-1", life),
        connect=lambda: world.connect(clone_format),
        images=FakeImages(settles_as=False),
    )


@pytest.fixture
def disk(world: World) -> ImageSpec:
    """A server's disk, itself a clone of a base image in Glance's pool."""
    name = str(uuid.uuid4())
    base, made = ImageSpec(world.images, f"{name}-base"), ImageSpec(world.vms, f"{name}_disk")
    world.create(base)
    for number, data in BASE.items():
        world.write(base, number, data)
    cluster = world.connect()
    cluster.create_snap(base.snap("snap"))
    cluster.protect_snap(base.snap("snap"))
    cluster.clone(base.snap("snap"), made, None)
    for number, data in FROZEN.items():
        if number not in BASE or data != BASE[number]:
            world.write(made, number, data)
    return made


@pytest.fixture
def dest(world: World) -> ImageSpec:
    """Where the snapshot goes."""
    return ImageSpec(world.images, str(uuid.uuid4()))


def clone(engine: Engine, disk: ImageSpec, dest: ImageSpec, report: Report = unheard) -> str:
    url = engine.reserve_clone(dest.name, disk.name, dest.pool)
    engine.perform(dest.name, None, report)
    return url


def assert_nothing_left(world: World, disk: ImageSpec, dest: ImageSpec) -> None:
    cluster = world.connect()
    assert not cluster.exists(dest)
    assert cluster.snaps(disk) == []
    assert dest.name not in {job.id for job in Ledger(cluster, world.vms).read().jobs}
    assert world.content(disk) == FROZEN


@formats
@pytest.mark.parametrize("in_data_pool", [False, True])
def test_snapshot(world: World, disk: ImageSpec, dest: ImageSpec, clone_format: int, in_data_pool: bool) -> None:
    """The image holds the disk's bytes of the instant, base image's included, depends on nothing, has the protected
    snapshot the location names, lies where Glance's data lies; nothing else is left."""
    engine = make_engine(world, clone_format, world.ec_data if in_data_pool else None)

    def write_after_the_instant(step: str, done: int, total: int) -> None:
        if step == "clone":
            world.write(disk, 1, b"too late")

    url = clone(engine, disk, dest, write_after_the_instant)
    engine.finish(dest.name)
    cluster = world.connect()
    assert Location.parse(url) == Location(cluster.fsid(), dest.snap(GLANCE_SNAP))
    assert world.content(dest) == world.content(dest.snap(GLANCE_SNAP)) == FROZEN
    info = cluster.lookup(dest)
    assert (info.parent, info.data_pool) == (None, world.ec_data if in_data_pool else dest.pool)
    assert [(snap.name, snap.protected) for snap in cluster.snaps(dest)] == [(GLANCE_SNAP, True)]
    assert cluster.snaps(disk) == []
    assert dest.name not in {job.id for job in Ledger(cluster, world.vms).read().jobs}


@formats
def test_rollback(world: World, disk: ImageSpec, dest: ImageSpec, clone_format: int) -> None:
    """What was ready and is not wanted goes, undone by another engine from the record alone."""
    clone(make_engine(world, clone_format), disk, dest)
    assert make_engine(world, clone_format).rollback(dest.name)
    assert_nothing_left(world, disk, dest)


class _Killed(BaseException):
    """The engine's process ended."""


@formats
@pytest.mark.parametrize("step", ["snap", "clone", "flatten", "seal"])
@pytest.mark.parametrize("death", [errors.CephError, _Killed])
def test_broken_at_a_step(
    world: World, disk: ImageSpec, clone_format: int, step: str, death: type[BaseException]
) -> None:
    """Failed or killed as a step begins: nothing is left, at once or after the next engine's rollback."""
    dest = ImageSpec(world.images, str(uuid.uuid4()))

    def fail(now: str, done: int, total: int) -> None:
        if now == step:
            raise death("broken")

    with pytest.raises(death):
        clone(make_engine(world, clone_format), disk, dest, fail)
    if death is _Killed:
        assert make_engine(world, clone_format).rollback(dest.name)
    assert_nothing_left(world, disk, dest)


def test_freeze(world: World, disk: ImageSpec) -> None:
    """A frozen snapshot shows its instant until it is rolled back."""
    engine, job_id = make_engine(world, 2), copy_id(str(uuid.uuid4()))
    name = engine.reserve_freeze(job_id, disk.name)
    engine.perform(job_id, None, unheard)
    world.write(disk, 0, b"later")
    assert world.content(disk.snap(name)) == FROZEN
    assert engine.rollback(job_id)
    assert world.connect().snaps(disk) == []
