# SPDX-License-Identifier: Apache-2.0
"""What Glance leaves behind of clones that it may delete, but whose parents it may only read."""

from __future__ import annotations

from typing import Optional

import pytest

from nova_rbd_snap import errors
from nova_rbd_snap.janitor import parents
from nova_rbd_snap.ledger.job import NEVER
from nova_rbd_snap.specs import GLANCE_SNAP, ImageSpec
from tests.fakes.cluster import FakeCluster
from tests.fakes.engine import (
    DEST,
    DISK,
    FROZEN,
    SERVER,
    FakeImages,
    clone,
    delete_image,
    freeze,
    image,
    in_thread,
    make_engine,
    populated,
    unseal,
)
from tests.waiting import eventually

BOUND_SECONDS = 30
NOW = 1000.0
#: Glance knows none of the images.
DELETED = FakeImages(uses_it=False)
POOLS = [DEST.pool]


def cleared(cluster: FakeCluster, pool: str, pools: list[str], images: FakeImages, now: float) -> list[str]:
    """What was removed."""
    return [found.what for found in parents.clear(cluster, pool, pools, images, now) if not found.kept]


def images_that_are_not_flat(cluster: FakeCluster, count: int) -> list[ImageSpec]:
    """Images of the same disk."""
    engine = make_engine(cluster, flatten=NEVER)
    for number in range(1, count + 1):
        clone(engine, image_id=image(number))
        engine.finish(image(number))
    return [ImageSpec(DEST.pool, image(number)) for number in range(1, count + 1)]


def test_snapshots_of_a_disk_in_use() -> None:
    """Those that no image needs any more go; the others stay, and so do those of a job, or of somebody else."""
    cluster = populated()
    freeze(make_engine(cluster))
    cluster.create_snap(DISK.snap("operators"))
    before = cluster.picture()["vms"]["images"]
    first, second = images_that_are_not_flat(cluster, 2)
    delete_image(cluster, first)
    assert len(cluster.snaps(DISK)) == 4
    (told,) = cleared(cluster, DISK.pool, POOLS, DELETED, NOW)
    assert first.name in told
    assert [cluster.children(DISK, left.id) for left in cluster.snaps(DISK)] == [[], [], [second]]
    assert cleared(cluster, DISK.pool, POOLS, DELETED, NOW) == []
    delete_image(cluster, second)
    assert len(cleared(cluster, DISK.pool, POOLS, DELETED, NOW)) == 1
    assert cluster.picture()["vms"]["images"] == before


def test_disk_in_the_trash() -> None:
    """It goes with the last image that depended on it, and not before."""
    cluster = populated()
    images = images_that_are_not_flat(cluster, 2)
    assert make_engine(cluster).remove_disks(SERVER) == []
    for each in images:
        assert cleared(cluster, DISK.pool, POOLS, DELETED, NOW) == []
        assert [waiting.name for waiting in cluster.trashed(DISK.pool)] == [DISK.name]
        delete_image(cluster, each)
    (told,) = cleared(cluster, DISK.pool, POOLS, DELETED, NOW)
    assert DISK.name in told
    assert cluster.trashed(DISK.pool) == []


def trashed_by_glance(cluster: FakeCluster, dest: ImageSpec) -> None:
    """As Glance deletes an image that a server was booted from."""
    unseal(cluster, dest).trash(dest, 0)


@pytest.mark.parametrize("server_goes_first", [True, False])
def test_image_that_servers_were_booted_from(server_goes_first: bool) -> None:
    """Glance has moved it to its trash: it goes with the last of them, and so does the disk it was taken of."""
    cluster = populated()
    engine = make_engine(cluster, flatten=NEVER)
    (only,) = images_that_are_not_flat(cluster, 1)
    booted = ImageSpec(DISK.pool, f"{image(7)}_disk")
    cluster.clone(only.snap(GLANCE_SNAP), booted, None)
    if server_goes_first:
        engine.remove_disks(SERVER)
    trashed_by_glance(cluster, only)
    assert cleared(cluster, DISK.pool, POOLS, DELETED, NOW) == []
    assert cluster.content(booted) == FROZEN
    engine.remove_disks(image(7))
    assert len(cleared(cluster, DISK.pool, POOLS, DELETED, NOW)) >= 1
    assert cluster.trashed(only.pool) == []
    assert cluster.trashed(DISK.pool) == []
    assert server_goes_first or cluster.snaps(DISK) == []


def test_image_that_was_sealed_again_on_its_way_to_the_trash() -> None:
    """By us, for its deletion seemed to have failed: it goes with that snapshot."""
    cluster = populated()
    (only,) = images_that_are_not_flat(cluster, 1)
    cluster.trash(only, 0)
    assert len(cleared(cluster, DISK.pool, POOLS, DELETED, NOW)) == 2
    assert cluster.trashed(only.pool) == []
    assert cluster.snaps(DISK) == []


def test_image_in_the_trash_that_is_kept() -> None:
    """For as long as whoever put it there wanted."""
    cluster = populated()
    (only,) = images_that_are_not_flat(cluster, 1)
    unseal(cluster, only)
    cluster.now = NOW
    cluster.trash(only, 10)
    assert cleared(cluster, DISK.pool, POOLS, DELETED, NOW + 9) == []
    assert len(cleared(cluster, DISK.pool, POOLS, DELETED, NOW + 10)) == 2
    assert cluster.snaps(DISK) == []


def test_what_somebody_else_put_in_the_trash() -> None:
    """Is not ours to remove."""
    cluster = populated()
    cluster.trash(DISK, 0)
    assert cleared(cluster, DISK.pool, POOLS, DELETED, NOW) == []
    assert len(cluster.trashed(DISK.pool)) == 1


@pytest.mark.parametrize("call", ["snaps", "children", "remove_snap_by_id"])
def test_disk_that_cannot_be_looked_at(call: str) -> None:
    """It does not keep the others from being."""
    cluster = populated()
    (only,) = images_that_are_not_flat(cluster, 1)
    delete_image(cluster, only)
    cluster.fail_on(call, errors.Missing)
    cluster.create_disk(ImageSpec(DISK.pool, f"{image(9)}_disk"))
    assert cleared(cluster, DISK.pool, POOLS, DELETED, NOW) == []
    assert cluster.calls.count("snaps") >= 2
    assert len(cleared(cluster, DISK.pool, POOLS, DELETED, NOW)) == 1
    assert cluster.snaps(DISK) == []


def test_guest_that_does_not_answer() -> None:
    """It would lose its disk: the snapshot stays until it does."""
    cluster = populated()
    (only,) = images_that_are_not_flat(cluster, 1)
    delete_image(cluster, only)
    cluster.freeze_holder(DISK)
    assert cleared(cluster, DISK.pool, POOLS, DELETED, NOW) == []
    cluster.freeze_holder(DISK, frozen=False)
    assert len(cleared(cluster, DISK.pool, POOLS, DELETED, NOW)) == 1


def test_one_engine_looks_for_all() -> None:
    """Whoever is first; the next look is only after a while."""
    cluster = populated()
    first, second = images_that_are_not_flat(cluster, 2)
    engines = [make_engine(cluster, host=f"compute-{number}", reclaim_interval=0) for number in range(3)]
    delete_image(cluster, first)
    working = [in_thread(engine.upkeep.keep_clearing) for engine in engines]
    eventually(lambda: len(cluster.snaps(DISK)) == 1, "what nobody needs is removed", pause=0.01)
    delete_image(cluster, second)
    looks = cluster.calls.count("trashed")
    begun = cluster.calls.count("take_lease")
    eventually(lambda: cluster.calls.count("take_lease") > begun + 10, "they go on", pause=0.01)
    assert cluster.calls.count("trashed") == looks
    cluster.let_pass(2 * 3600)
    eventually(lambda: not cluster.snaps(DISK), "there is another look", pause=0.01)
    for engine, each in zip(engines, working):
        engine.stop(BOUND_SECONDS)
        each.result(BOUND_SECONDS)


@pytest.mark.parametrize("uses_it", [True, None])
def test_image_in_the_trash_that_glance_may_know(uses_it: Optional[bool]) -> None:
    """An operator has put it there, or Glance's database failed after the move: it is not given up without its word."""
    cluster = populated()
    (only,) = images_that_are_not_flat(cluster, 1)
    trashed_by_glance(cluster, only)
    assert list(cleared(cluster, DISK.pool, POOLS, FakeImages(uses_it=uses_it), NOW)) == []
    assert [each.name for each in cluster.trashed(only.pool)] == [only.name]


def test_glance_that_cannot_be_asked() -> None:
    """What needs its word waits; the rest goes."""
    cluster = populated()
    first, second = images_that_are_not_flat(cluster, 2)
    trashed_by_glance(cluster, first)
    delete_image(cluster, second)
    silent = FakeImages()
    silent.error = errors.GlanceSilent("no answer")
    other = ImageSpec(DISK.pool, f"{image(9)}_disk")
    cluster.create_disk(other)
    cluster.create_snap(other.snap(f"nova-rbd-snap-{image(9)}"))
    (told,) = cleared(cluster, DISK.pool, POOLS, silent, NOW)
    assert str(other) in told


def test_parent_that_cannot_be_looked_at() -> None:
    """Another cloud's, whose images' pool is not ours to read: it does not keep the rest from being cleared."""
    cluster = populated()
    images_that_are_not_flat(cluster, 2)
    assert make_engine(cluster).remove_disks(SERVER) == []
    other = ImageSpec(DISK.pool, f"{image(9)}_disk")
    cluster.create_disk(other)
    cluster.create_snap(other.snap(f"nova-rbd-snap-{image(9)}"))
    cluster.fail_on("children_of_trashed", errors.NoPermission)
    (told,) = cleared(cluster, DISK.pool, POOLS, DELETED, NOW)
    assert str(other) in told


@pytest.mark.parametrize("pools", [POOLS, []])
def test_image_that_is_there(pools: list[str]) -> None:
    """Nobody asks for its snapshot's clones, which is dear, where it is known to be there; nothing goes either way."""
    cluster = populated()
    images_that_are_not_flat(cluster, 2)
    before, asked = cluster.picture(), cluster.calls.count("children")
    assert cleared(cluster, DISK.pool, pools, DELETED, NOW) == []
    assert (cluster.calls.count("children") == asked) == bool(pools)
    assert cluster.picture() == before
