# SPDX-License-Identifier: Apache-2.0
"""What Glance leaves behind of clones that it may delete, but whose parents it may only read."""

from __future__ import annotations

import pytest

from nova_rbd_snap import errors
from nova_rbd_snap.janitor import parents
from nova_rbd_snap.ledger.job import NEVER
from nova_rbd_snap.specs import GLANCE_SNAP, ImageSpec
from tests.fakes.cluster import FakeCluster
from tests.fakes.engine import DEST, DISK, FROZEN, SERVER, clone, image, in_thread, make_engine, populated
from tests.waiting import eventually

BOUND_SECONDS = 30
NOW = 1000.0


def images_that_are_not_flat(cluster: FakeCluster, count: int) -> list[ImageSpec]:
    """Images of the same disk."""
    engine = make_engine(cluster, flatten=NEVER)
    for number in range(1, count + 1):
        clone(engine, image_id=image(number))
        engine.finish(image(number))
    return [ImageSpec(DEST.pool, image(number)) for number in range(1, count + 1)]


def delete_image(cluster: FakeCluster, dest: ImageSpec) -> None:
    """As Glance does, whose user may only read Nova's pool."""
    glance = cluster.another()
    glance.read_only = {DISK.pool}
    glance.unprotect_snap(dest.snap(GLANCE_SNAP))
    glance.remove_snap(dest.snap(GLANCE_SNAP))
    glance.remove(dest)


def test_snapshots_of_a_disk_in_use() -> None:
    """Those that no image needs any more go; the others, and what is no snapshot of librbd's trash, stay."""
    cluster = populated()
    before = cluster.picture()["vms"]["images"]
    first, second = images_that_are_not_flat(cluster, 2)
    delete_image(cluster, first)
    assert len(cluster.snaps(DISK)) == 2
    (told,) = parents.clear(cluster, DISK.pool, NOW)
    assert first.name in told
    (left,) = cluster.snaps(DISK)
    assert cluster.children(DISK, left.id) == [second]
    assert list(parents.clear(cluster, DISK.pool, NOW)) == []
    delete_image(cluster, second)
    assert len(list(parents.clear(cluster, DISK.pool, NOW))) == 1
    assert cluster.picture()["vms"]["images"] == before


def test_disk_in_the_trash() -> None:
    """It goes with the last image that depended on it, and not before."""
    cluster = populated()
    images = images_that_are_not_flat(cluster, 2)
    assert make_engine(cluster).remove_disks(SERVER) == []
    for each in images:
        assert list(parents.clear(cluster, DISK.pool, NOW)) == []
        assert [waiting.name for waiting in cluster.trashed(DISK.pool)] == [DISK.name]
        delete_image(cluster, each)
    (told,) = parents.clear(cluster, DISK.pool, NOW)
    assert DISK.name in told
    assert cluster.trashed(DISK.pool) == []


def trashed_by_glance(cluster: FakeCluster, dest: ImageSpec) -> None:
    """As Glance deletes an image that a server was booted from."""
    glance = cluster.another()
    glance.read_only = {DISK.pool}
    glance.unprotect_snap(dest.snap(GLANCE_SNAP))
    glance.remove_snap(dest.snap(GLANCE_SNAP))
    glance.trash(dest, 0)


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
    assert list(parents.clear(cluster, DISK.pool, NOW)) == []
    assert cluster.content(booted) == FROZEN
    engine.remove_disks(image(7))
    assert len(list(parents.clear(cluster, DISK.pool, NOW))) >= 1
    assert cluster.trashed(only.pool) == []
    assert cluster.trashed(DISK.pool) == []
    assert server_goes_first or cluster.snaps(DISK) == []


def test_image_in_the_trash_that_is_kept() -> None:
    """For as long as whoever put it there wanted."""
    cluster = populated()
    (only,) = images_that_are_not_flat(cluster, 1)
    cluster.unprotect_snap(only.snap(GLANCE_SNAP))
    cluster.remove_snap(only.snap(GLANCE_SNAP))
    cluster.now = NOW
    cluster.trash(only, 10)
    assert list(parents.clear(cluster, DISK.pool, NOW + 9)) == []
    assert len(list(parents.clear(cluster, DISK.pool, NOW + 10))) == 1
    assert cluster.snaps(DISK) == []


def test_what_somebody_else_put_in_the_trash() -> None:
    """Is not ours to remove."""
    cluster = populated()
    cluster.trash(DISK, 0)
    assert list(parents.clear(cluster, DISK.pool, NOW)) == []
    assert len(cluster.trashed(DISK.pool)) == 1


@pytest.mark.parametrize("call", ["snaps", "children", "remove_snap_by_id"])
def test_disk_that_cannot_be_looked_at(call: str) -> None:
    """It does not keep the others from being."""
    cluster = populated()
    (only,) = images_that_are_not_flat(cluster, 1)
    delete_image(cluster, only)
    cluster.fail_on(call, errors.Missing)
    cluster.create_disk(ImageSpec(DISK.pool, f"{image(9)}_disk"))
    assert list(parents.clear(cluster, DISK.pool, NOW)) == []
    assert cluster.calls.count("snaps") >= 2
    assert len(list(parents.clear(cluster, DISK.pool, NOW))) == 1
    assert cluster.snaps(DISK) == []


def test_guest_that_does_not_answer() -> None:
    """It would lose its disk: the snapshot stays until it does."""
    cluster = populated()
    (only,) = images_that_are_not_flat(cluster, 1)
    delete_image(cluster, only)
    cluster.freeze_holder(DISK)
    assert list(parents.clear(cluster, DISK.pool, NOW)) == []
    cluster.freeze_holder(DISK, frozen=False)
    assert len(list(parents.clear(cluster, DISK.pool, NOW))) == 1


def test_one_engine_looks_for_all() -> None:
    """Whoever is first; the next look is only after a while."""
    cluster = populated()
    first, second = images_that_are_not_flat(cluster, 2)
    engines = [make_engine(cluster, host=f"compute-{number}", reclaim_interval=0) for number in range(3)]
    delete_image(cluster, first)
    working = [in_thread(engine.keep_reclaiming) for engine in engines]
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
