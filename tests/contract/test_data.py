# SPDX-License-Identifier: Apache-2.0
"""What ``ceph/interface.py`` promises of the data of rbd images, on the fake and on a real cluster."""

from __future__ import annotations

import random
import uuid
from typing import Callable

import pytest

from nova_rbd_snap import errors
from nova_rbd_snap.ceph.interface import Cluster
from nova_rbd_snap.copy.extents import Source
from nova_rbd_snap.specs import ImageSpec
from tests.contract.worlds import World
from tests.fakes.cluster import OBJECT_BYTES

OBJECTS = 12


@pytest.fixture
def cluster(world: World) -> Cluster:
    return world.connect()


@pytest.fixture
def disk(world: World) -> ImageSpec:
    made = ImageSpec(world.vms, uuid.uuid4().hex)
    world.create(made, object_count=OBJECTS)
    return made


@pytest.fixture
def dest(world: World) -> ImageSpec:
    return ImageSpec(world.images, uuid.uuid4().hex)


def go_on(done: int, total: int) -> bool:
    return True


def read_all(source: Source) -> bytes:
    """What is on the disk, by its extents alone."""
    data, end = bytearray(source.size), 0
    for extent in source.extents(go_on):
        assert end <= extent.offset, "in order, and apart"
        assert extent.end <= source.size
        data[extent.offset : extent.end] = source.read(extent.offset, extent.length)
        end = extent.end
    return bytes(data)


def scribble(world: World, image: ImageSpec, numbers: list[int], word: str) -> dict[int, str]:
    """Write to some objects; returns what, by object."""
    written = {number: f"{word:8}{number:8}" for number in numbers}
    for number, text in written.items():
        world.write(image, number, text.encode())
    return written


def expected(written: dict[int, str]) -> bytes:
    data = bytearray(OBJECTS * OBJECT_BYTES)
    for number, text in written.items():
        start = number * OBJECT_BYTES
        data[start : start + len(text)] = text.encode()
    return bytes(data)


@pytest.mark.parametrize("seed", range(3))
def test_extents_of_a_snapshot(world: World, cluster: Cluster, disk: ImageSpec, seed: int) -> None:
    """All that was written before it is in them, as it was then; and no object that was not written."""
    chance = random.Random(seed)
    first = scribble(world, disk, chance.sample(range(OBJECTS), 5), "before")
    earlier, later = disk.snap("earlier"), disk.snap("later")
    cluster.create_snap(earlier)
    second = {**first, **scribble(world, disk, chance.sample(range(OBJECTS), 4), "again")}
    cluster.create_snap(later)
    scribble(world, disk, chance.sample(range(OBJECTS), 6), "after")
    for snap, written in ((earlier, first), (later, second)):
        with cluster.open_snap(snap) as source:
            assert source.size == OBJECTS * OBJECT_BYTES
            assert read_all(source) == expected(written)
            objects = {extent.offset // OBJECT_BYTES for extent in source.extents(go_on)}
            assert len(objects) <= len(written)
            assert source.extents(go_on).total <= sum(map(len, written.values())) + 4096 * len(written)


def test_extents_of_a_clone(world: World, cluster: Cluster, disk: ImageSpec, dest: ImageSpec) -> None:
    """What is only in its parents is in them, too."""
    written = scribble(world, disk, [1, 3], "parent")
    golden = disk.snap("golden")
    cluster.create_snap(golden)
    cluster.clone(golden, dest, None)
    written |= scribble(world, dest, [3, 5], "child")
    frozen = dest.snap("frozen")
    cluster.create_snap(frozen)
    with cluster.open_snap(frozen) as source:
        assert read_all(source) == expected(written)


def test_extents_of_an_empty_disk(cluster: Cluster, disk: ImageSpec) -> None:
    frozen = disk.snap("frozen")
    cluster.create_snap(frozen)
    with cluster.open_snap(frozen) as source:
        assert list(source.extents(go_on)) == []
        assert source.read(OBJECT_BYTES - 10, 20) == bytes(20)


def test_extents_that_nobody_wants_any_more(world: World, cluster: Cluster, disk: ImageSpec) -> None:
    scribble(world, disk, [1], "data")
    frozen = disk.snap("frozen")
    cluster.create_snap(frozen)
    with cluster.open_snap(frozen) as source, pytest.raises(errors.Cancelled):
        source.extents(lambda done, total: False)


def test_blank_disk_that_is_filled(world: World, cluster: Cluster, dest: ImageSpec) -> None:
    made = cluster.create_blank(dest, 3 * OBJECT_BYTES, None)
    found = cluster.lookup(dest)
    assert (found.id, found.size_bytes, found.parent, found.snap_count) == (made, 3 * OBJECT_BYTES, None, 0)
    assert found.data_pool == dest.pool
    with pytest.raises(errors.AlreadyThere):
        cluster.create_blank(dest, OBJECT_BYTES, None)
    with cluster.open_blank(dest) as sink:
        sink.write(OBJECT_BYTES - 2, b"over the edge")
        sink.write(2 * OBJECT_BYTES + 5, b"here")
        sink.write(2 * OBJECT_BYTES + 5, b"here")
    snap = dest.snap("snap")
    cluster.create_snap(snap)
    with cluster.open_snap(snap) as source:
        assert source.read(OBJECT_BYTES - 3, 15) == b"\0over the edge\0"
        assert source.read(2 * OBJECT_BYTES, 10) == bytes(5) + b"here\0"
        assert read_all(source).count(0) == 3 * OBJECT_BYTES - len(b"over the edge") - len(b"here")


def test_blank_disk_with_a_data_pool(world: World, cluster: Cluster) -> None:
    dest = ImageSpec(world.ec_free, uuid.uuid4().hex)
    cluster.create_blank(dest, OBJECT_BYTES, world.ec_data)
    assert cluster.lookup(dest).data_pool == world.ec_data


def test_what_is_not_there(cluster: Cluster, disk: ImageSpec, dest: ImageSpec) -> None:
    opening: tuple[Callable[[], object], ...] = (
        lambda: cluster.open_snap(disk.snap("none")).__enter__(),
        lambda: cluster.open_snap(dest.snap("none")).__enter__(),
        lambda: cluster.open_blank(dest).__enter__(),
    )
    for act in opening:
        with pytest.raises(errors.Missing):
            act()


def test_no_room_to_fill(world: World, cluster: Cluster, dest: ImageSpec) -> None:
    cluster.create_blank(dest, OBJECT_BYTES, None)
    with cluster.open_blank(dest) as sink, world.fill(world.images), pytest.raises(errors.NoSpace):
        sink.write(0, b"more")
    with world.fill(world.images), pytest.raises(errors.NoSpace):
        cluster.create_blank(ImageSpec(world.images, uuid.uuid4().hex), OBJECT_BYTES, None)
