# SPDX-License-Identifier: Apache-2.0
"""What ``ceph/interface.py`` promises, on the fake and on a real cluster."""

from __future__ import annotations

import contextlib
import functools
import re
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable

import pytest

from nova_rbd_snap import errors
from nova_rbd_snap.ceph.interface import Cluster
from nova_rbd_snap.specs import ImageSpec, SnapSpec
from tests.contract.worlds import RealWorld, World, need_manager
from tests.fakes.cluster import BLANK, HALF_MADE, NAME_ONLY, OBJECT_BYTES, UNLISTED
from tests.waiting import eventually

formats = pytest.mark.parametrize("clone_format", [1, 2])
WRITTEN = {0: b"zero", 2: b"two"}


@pytest.fixture
def cluster(world: World) -> Cluster:
    return world.connect()


@pytest.fixture
def name() -> str:
    """A name nobody used."""
    return uuid.uuid4().hex


@pytest.fixture
def disk(world: World, name: str) -> ImageSpec:
    """A server's disk with something on it."""
    made = ImageSpec(world.vms, name)
    world.create(made)
    for number, data in WRITTEN.items():
        world.write(made, number, data)
    return made


@pytest.fixture
def dest(world: World, name: str) -> ImageSpec:
    """Where a clone of the disk may go."""
    return ImageSpec(world.images, name)


@pytest.fixture
def snap(cluster: Cluster, disk: ImageSpec) -> SnapSpec:
    """A snapshot of the disk."""
    made = disk.snap("frozen")
    cluster.create_snap(made)
    return made


def go_on(done: int, total: int) -> bool:
    return True


# -- cluster and pools --


def test_identity(world: World, cluster: Cluster) -> None:
    """The fsid is the cluster's; the address is this very client's, with its nonce."""
    other = world.connect()
    assert cluster.fsid() == other.fsid()
    assert str(uuid.UUID(cluster.fsid())) == cluster.fsid()
    assert re.search(r":\d+/\d+", cluster.address())
    assert cluster.address() != other.address()


def test_pools(world: World, cluster: Cluster, name: str) -> None:
    """A pool is there or not; whatever is done in one that is not says Missing."""
    assert cluster.has_pool(world.vms)
    assert not cluster.has_pool(name)
    nowhere = ImageSpec(name, "x")
    for call in (
        lambda: cluster.exists(nowhere),
        lambda: cluster.lookup(nowhere),
        lambda: cluster.usual_data_pool(name),
        lambda: cluster.images(name),
        lambda: cluster.children(nowhere, 1),
        lambda: cluster.trash(nowhere, 0),
        lambda: cluster.remove(nowhere),
        lambda: cluster.ask_holder(nowhere),
        lambda: cluster.omap_items(name, "x"),
        lambda: cluster.omap_replace(name, "x", "key", None, "new"),
    ):
        with pytest.raises(errors.Missing):
            call()


# -- fencing --


@pytest.fixture
def victim(world: World) -> Cluster:
    """A connection that was used before it is cut off."""
    made = world.connect()
    assert not made.exists(ImageSpec(world.vms, "none"))
    return made


def test_fenced_client(world: World, cluster: Cluster, victim: Cluster, snap: SnapSpec, dest: ImageSpec) -> None:
    """Whatever the fencing client touches is closed to the fenced one at once, and stays so; others go on."""
    other = world.connect()
    cluster.fence(victim.address())
    for act in CHANGES.values():
        touch(cluster, snap, dest)
        with pytest.raises(errors.Blocklisted):
            act(victim, snap, dest)
    assert world.content(snap.image) == WRITTEN
    other.remove_snap(snap)
    assert cluster.snaps(snap.image) == []


def touch(cluster: Cluster, snap: SnapSpec, dest: ImageSpec) -> None:
    """Read what the acts below begin with, as whoever undoes another's work does."""
    cluster.snaps(snap.image)
    cluster.exists(dest)
    for pool in (snap.image.pool, dest.pool):
        cluster.images(pool)
        cluster.usual_data_pool(pool)
        cluster.omap_items(pool, "x")


def test_fencing_tells_clients_of_one_machine_apart(world: World, cluster: Cluster, disk: ImageSpec) -> None:
    """A guest on the machine of the fenced client writes before, at and after it, to the same pool."""
    victim = world.connect()
    with world.guest(disk) as guest, ThreadPoolExecutor(1) as beside:
        assert host(guest.address) == host(victim.address())
        assert guest.address != victim.address()
        guest.write(0, b"before")
        fencing = beside.submit(cluster.fence, victim.address())
        for number in range(100):
            guest.write(1, b"%d" % number)
        fencing.result()
        cluster.snaps(disk)
        with pytest.raises(errors.Blocklisted):
            victim.create_snap(disk.snap("s"))
        guest.write(3, b"after")
    assert world.content(disk) == {0: b"before", 1: b"99", 2: b"two", 3: b"after"}
    assert victim.address() in world.blocklist()
    assert guest.address not in world.blocklist()


def test_holder_that_is_asked(world: World, cluster: Cluster, disk: ImageSpec) -> None:
    """One that is frozen gives no sign of life, and is none the worse for having been asked; nor does a dead one. One
    that is cut off has nothing to lose."""
    cluster.ask_holder(disk)
    cluster.create_snap(disk.snap("s"))
    with world.holder(disk) as holder:
        cluster.ask_holder(disk)
        holder.freeze()
        with pytest.raises(errors.HolderSilent):
            cluster.ask_holder(disk)
        holder.go_on()
        holder.assert_writing()
        cluster.ask_holder(disk)
        cluster.remove_snap(disk.snap("s"))
        holder.assert_writing()
        holder.die()
        with pytest.raises(errors.HolderSilent):
            cluster.ask_holder(disk)
        cluster.fence(holder.address)
        cluster.ask_holder(disk)
        cluster.create_snap(disk.snap("s"))


def host(address: str) -> str:
    return address.rsplit(":", 1)[0]


@pytest.mark.parametrize(
    "address",
    [
        "203.0.113.5",
        "203.0.113.5:0",
        "203.0.113.5:0/0",
        "203.0.113.5:0/00",
        "203.0.113.5:0/4294967296",
        "203.0.113.5:0/42949672960000000000",
        "203.0.113.5:0/-1",
        "203.0.113.5:0/0x1",
        "203.0.113.5/32",
        "203.0.113.5/32:0/0",
        "203.0.113.5:6800/5",
        "203.0.113.5:0/5/24",
        "203.0.113.5:0/5 60",
        "203.0.113.5:0/5,203.0.113.5:0/0",
        "[v2:203.0.113.5:0/0,v1:203.0.113.5:0/5]",
        "v2:203.0.113.5:0/0",
        "256.1.1.1:0/5",
        "1.2.3:0/5",
        "localhost:0/5",
        "-",
        ":/0",
        "",
    ],
)
def test_nobody_is_fenced(world: World, cluster: Cluster, address: str) -> None:
    """An address that is not exactly one client's is refused, whatever Ceph would make of it.

    None of the lab's: were it taken, it would cut off all clients of that machine.
    """
    before = world.blocklist()
    with pytest.raises(errors.Refused):
        cluster.fence(address)
    assert world.blocklist() == before


def test_addresses_as_librados_gives_them(world: World, cluster: Cluster, disk: ImageSpec) -> None:
    """With the messenger's version, and as a list, they name the same client."""
    for pattern in ("v2:{}", "v1:{}", "any:{}", "[v2:{},v1:{}]", " {}\n"):
        victim = world.connect()
        cluster.fence(pattern.format(*[victim.address()] * 2))
        assert victim.address() in world.blocklist()
        cluster.snaps(disk)
        with pytest.raises(errors.Blocklisted):
            victim.snaps(disk)


def test_fencing_again(world: World, cluster: Cluster, victim: Cluster, disk: ImageSpec) -> None:
    """Who is cut off already, or was never there, can be fenced all the same."""
    for address in (victim.address(), victim.address(), "192.0.2.77:0/5", "[2001:db8::77]:0/5"):
        cluster.fence(address)
    cluster.snaps(disk)
    with pytest.raises(errors.Blocklisted):
        victim.snaps(disk)


def test_fencing_needs_a_right_of_its_own(world: World, victim: Cluster, disk: ImageSpec) -> None:
    """Who lacks it is told which; nobody is cut off."""
    reader, before = world.connect_without_fencing(), world.blocklist()
    assert reader.snaps(disk) == []
    with pytest.raises(errors.NoPermission) as caught:
        reader.fence(victim.address())
    assert "mon 'profile rbd'" in caught.value.report()
    assert world.blocklist() == before
    assert victim.snaps(disk) == []


def test_cut_off_client_still_hears_the_monitors(world: World, victim: Cluster) -> None:
    """It is the OSDs that do not serve it; so it can still fence others, and must not be trusted to stop by itself."""
    cut_off = world.connect_cut_off()
    assert cut_off.fsid() == victim.fsid()
    assert cut_off.has_pool(world.vms)
    cut_off.fence(victim.address())
    assert {cut_off.address(), victim.address()} <= world.blocklist()


# -- rbd images --


def test_images(world: World, cluster: Cluster, name: str, dest: ImageSpec, snap: SnapSpec) -> None:
    """All names of the pool, half-made rbd images' included, and none of another pool or of the trash."""
    before = set(cluster.images(dest.pool))
    disk, half, whole, trashed = (ImageSpec(dest.pool, f"{name}-{kind}") for kind in ("disk", "half", "whole", "gone"))
    for image in (disk, whole, trashed):
        world.create(image)
    world.half_clone(NAME_ONLY, snap, half)
    cluster.trash(trashed, 0)
    assert set(cluster.images(dest.pool)) - before == {disk.name, half.name, whole.name}
    assert snap.image.name not in cluster.images(dest.pool)


def test_times(world: World, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, name: str, dest: ImageSpec) -> None:
    """When a thing was made, in seconds since the epoch whatever the time zone; a trashed snapshot keeps its time."""
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        disk = ImageSpec(world.vms, name)
        began = time.time()
        world.create(disk)
        cluster.create_snap(disk.snap("s"))
        cluster.clone(disk.snap("s"), dest, None)
        made = [cluster.lookup(disk).created, cluster.snaps(disk)[0].created, cluster.lookup(dest).created]
        cluster.remove_snap(disk.snap("s"))
        (trashed,) = cluster.snaps(disk)
    finally:
        monkeypatch.undo()
        time.tzset()
    assert all(-5 < moment - began < 60 for moment in made), (began, made)
    assert (trashed.trashed, trashed.created) == (True, made[1])


def test_trash(world: World, cluster: Cluster, disk: ImageSpec, dest: ImageSpec) -> None:
    """Open, protected or with clones, an rbd image leaves its name at once, and what depends on it stays whole."""
    snap = disk.snap("s")
    cluster.create_snap(snap)
    cluster.protect_snap(snap)
    cluster.clone(snap, dest, None)
    with world.open(disk):
        cluster.trash(disk, 0)
        assert not cluster.exists(disk)
    assert disk.name not in cluster.images(disk.pool)
    assert world.content(dest) == WRITTEN
    with pytest.raises(errors.Missing):
        cluster.trash(disk, 0)
    world.create(disk, object_count=1)
    assert cluster.snaps(disk) == []
    cluster.flatten(dest, go_on)
    assert world.content(dest) == WRITTEN


@pytest.mark.parametrize("half", HALF_MADE)
def test_trash_of_a_half_made_clone(
    world: World, cluster: Cluster, dest: ImageSpec, snap: SnapSpec, half: str
) -> None:
    """It goes, too."""
    world.half_clone(half, snap, dest)
    cluster.trash(dest, 0)
    assert not cluster.exists(dest)
    assert dest.name not in cluster.images(dest.pool)


def test_lookup(world: World, cluster: Cluster, disk: ImageSpec, name: str) -> None:
    """Size and features as made; an id of its own; no parent, no data pool."""
    info = cluster.lookup(disk)
    assert cluster.exists(disk)
    assert info.size_bytes == 4 * OBJECT_BYTES
    assert (info.parent, info.data_pool) == (None, disk.pool)
    assert (info.deep_flatten, info.journaling, info.mirrored) == (True, False, False)
    other = ImageSpec(world.vms, f"{name}-other")
    world.create(other)
    assert cluster.lookup(other).id != info.id


@pytest.mark.parametrize("trait", ["journaling", "mirrored"])
def test_lookup_tells_what_is_refused(world: World, cluster: Cluster, name: str, trait: str) -> None:
    """The journaling feature and mirroring are seen."""
    image = ImageSpec(world.images, f"{name}-{trait}")
    world.create(image, **{trait: True})
    assert getattr(cluster.lookup(image), trait)


def test_lookup_tells_a_disk_without_deep_flatten(world: World, cluster: Cluster, name: str) -> None:
    """The feature's absence is seen."""
    image = ImageSpec(world.vms, name)
    world.create(image, deep_flatten=False)
    assert not cluster.lookup(image).deep_flatten


def test_absent_image(cluster: Cluster, dest: ImageSpec) -> None:
    """Of what does not exist every call says Missing, and a name is free."""
    assert not cluster.exists(dest)
    for call in (
        lambda: cluster.lookup(dest),
        lambda: cluster.snaps(dest),
        lambda: cluster.ask_holder(dest),
        lambda: cluster.create_snap(dest.snap("s")),
        lambda: cluster.protect_snap(dest.snap("s")),
        lambda: cluster.unprotect_snap(dest.snap("s")),
        lambda: cluster.remove_snap(dest.snap("s")),
        lambda: cluster.remove_snap_by_id(dest, 1),
        lambda: cluster.clone(dest.snap("s"), ImageSpec(dest.pool, f"{dest.name}-2"), None),
        lambda: cluster.flatten(dest, go_on),
        lambda: cluster.children(dest, 1),
        lambda: cluster.trash(dest, 0),
        lambda: cluster.remove(dest),
    ):
        with pytest.raises(errors.Missing):
            call()


def test_remove(world: World, cluster: Cluster, disk: ImageSpec) -> None:
    """Busy while somebody has it open, refused while it has snapshots, else gone, with word of how far it is."""
    with world.open(disk), pytest.raises(errors.Busy) as caught:
        cluster.remove(disk)
    assert type(caught.value) is errors.Busy
    snap_id = cluster.create_snap(disk.snap("s"))
    with pytest.raises(errors.HasSnapshots):
        cluster.remove(disk)
    cluster.remove_snap_by_id(disk, snap_id)
    told = []

    def note(done: int, total: int) -> bool:
        told.append((done, total))
        return True

    cluster.remove(disk, note)
    assert 0 < told[-1][0] <= told[-1][1]
    assert not cluster.exists(disk)


# -- snapshots --


def test_life_of_a_snapshot(world: World, cluster: Cluster, disk: ImageSpec) -> None:
    """It holds the instant; its id is its own; protected it is not removed; removed it leaves the name free."""
    snap = disk.snap("s")
    snap_id = cluster.create_snap(snap)
    world.write(disk, 0, b"later")
    assert world.content(snap) == WRITTEN
    with pytest.raises(errors.AlreadyThere):
        cluster.create_snap(snap)
    cluster.protect_snap(snap)
    with pytest.raises(errors.Busy):
        cluster.protect_snap(snap)
    (info,) = cluster.snaps(disk)
    assert (info.id, info.name, info.protected, info.trashed) == (snap_id, "s", True, False)
    with pytest.raises(errors.Busy):
        cluster.remove_snap(snap)
    with pytest.raises(errors.Busy):
        cluster.remove_snap_by_id(disk, snap_id)
    cluster.unprotect_snap(snap)
    with pytest.raises(errors.CephError):
        cluster.unprotect_snap(snap)
    cluster.remove_snap(snap)
    with pytest.raises(errors.Missing):
        cluster.remove_snap(snap)
    with pytest.raises(errors.Missing):
        cluster.remove_snap_by_id(disk, snap_id)
    assert cluster.create_snap(snap) != snap_id


def test_snapshots_come_oldest_first(cluster: Cluster, disk: ImageSpec) -> None:
    """Whatever their names."""
    ids = [cluster.create_snap(disk.snap(name)) for name in ("b", "a", "c")]
    assert [(snap.id, snap.name) for snap in cluster.snaps(disk)] == list(zip(ids, "bac"))


# -- clones --


@formats
def test_children(world: World, disk: ImageSpec, dest: ImageSpec, snap: SnapSpec, clone_format: int) -> None:
    """Those of this very snapshot, in every pool, trashed ones included, until they are flat or gone."""
    cluster = world.connect(clone_format)
    other = disk.snap("other")
    cluster.create_snap(other)
    ids = {found.name: found.id for found in cluster.snaps(disk)}
    near, trashed = ImageSpec(disk.pool, f"{disk.name}-near"), ImageSpec(dest.pool, f"{dest.name}-trashed")

    def children(name: str = snap.name) -> set[ImageSpec]:
        found = cluster.children(disk, ids[name])
        assert len(found) == len(set(found))
        return set(found)

    assert children() == children(other.name) == set()
    if clone_format == 1:
        cluster.protect_snap(snap)
    for made in (dest, near, trashed):
        cluster.clone(snap, made, None)
    assert children() == {dest, near, trashed}
    assert children(other.name) == set()
    cluster.trash(trashed, 0)
    assert children() == {dest, near, trashed}
    cluster.create_snap(dest.snap("snap"))
    if clone_format == 2:
        cluster.remove_snap(snap)
        assert children() == {dest, near, trashed}
    cluster.flatten(dest, go_on)
    cluster.remove(near)
    assert children() == {trashed}
    with pytest.raises(errors.Missing):
        cluster.children(disk, 1 << 40)


def test_children_that_the_parent_does_not_know(
    world: World, cluster: Cluster, disk: ImageSpec, dest: ImageSpec, snap: SnapSpec
) -> None:
    """A half-made clone is no child."""
    (info,) = cluster.snaps(disk)
    world.half_clone(UNLISTED, snap, dest)
    assert cluster.lookup(dest).parent == snap
    assert cluster.children(disk, info.id) == []


def test_snapshots_of_a_clone_are_its_children(
    world: World, cluster: Cluster, disk: ImageSpec, dest: ImageSpec, snap: SnapSpec
) -> None:
    """A snapshot of a clone without deep-flatten keeps the parent's snapshot, also once the clone itself is flat."""
    (info,) = cluster.snaps(disk)
    world.clone_without_deep_flatten(snap, dest)
    cluster.create_snap(dest.snap("snap"))
    cluster.flatten(dest, go_on)
    assert cluster.lookup(dest).parent is None
    assert cluster.children(disk, info.id) == [dest]


@formats
def test_clone_shows_the_snapshot(
    world: World, disk: ImageSpec, dest: ImageSpec, snap: SnapSpec, clone_format: int
) -> None:
    """It has the snapshot's bytes and size, names it as its parent, and can be deep-flattened but not journaled."""
    cluster = world.connect(clone_format)
    if clone_format == 1:
        cluster.protect_snap(snap)
    world.write(disk, 1, b"later")
    made = cluster.clone(snap, dest, None)
    info = cluster.lookup(dest)
    assert (info.id, info.size_bytes, info.parent) == (made, 4 * OBJECT_BYTES, snap)
    assert (info.deep_flatten, info.journaling, info.mirrored) == (True, False, False)
    assert world.content(dest) == WRITTEN


def test_format_1_needs_protection(world: World, dest: ImageSpec, snap: SnapSpec) -> None:
    """In format 1 the snapshot must be protected before, and stays so while the clone depends on it."""
    cluster = world.connect(1)
    with pytest.raises(errors.CephError):
        cluster.clone(snap, dest, None)
    assert not cluster.exists(dest)
    cluster.protect_snap(snap)
    cluster.clone(snap, dest, None)
    with pytest.raises(errors.Busy):
        cluster.unprotect_snap(snap)
    cluster.flatten(dest, go_on)
    cluster.unprotect_snap(snap)


def test_format_2_does_not_mind_protection(cluster: Cluster, dest: ImageSpec, snap: SnapSpec) -> None:
    """In format 2 protection may go although a clone depends on the snapshot."""
    cluster.protect_snap(snap)
    cluster.clone(snap, dest, None)
    cluster.unprotect_snap(snap)
    assert cluster.lookup(dest).parent == snap


@pytest.mark.parametrize("by_id", [False, True])
@pytest.mark.parametrize("end", ["flatten", "remove"])
def test_trashed_snapshot(world: World, dest: ImageSpec, snap: SnapSpec, end: str, by_id: bool) -> None:
    """Removed while a clone depends on it, it is trashed: its name is free, the clone is whole, it cannot be removed
    for good; and with the clone's link it vanishes by itself."""
    cluster, disk = world.connect(), snap.image
    (info,) = cluster.snaps(disk)
    cluster.clone(snap, dest, None)
    if by_id:
        cluster.remove_snap_by_id(disk, info.id)
    else:
        cluster.remove_snap(snap)
    (trashed,) = cluster.snaps(disk)
    assert (trashed.id, trashed.name, trashed.protected, trashed.trashed) == (info.id, snap.name, False, True)
    with pytest.raises(errors.Missing):
        cluster.remove_snap(snap)
    again = cluster.create_snap(snap)
    assert {found.id for found in cluster.snaps(disk)} == {info.id, again}
    cluster.remove_snap_by_id(disk, again)
    parent = cluster.lookup(dest).parent
    assert parent is not None
    assert (parent.image, parent.name != snap.name) == (disk, True)
    assert world.content(dest) == WRITTEN
    with pytest.raises(errors.Busy):
        cluster.remove_snap_by_id(disk, info.id)
    if end == "flatten":
        cluster.flatten(dest, go_on)
        assert world.content(dest) == WRITTEN
    else:
        cluster.remove(dest)
    assert cluster.snaps(disk) == []
    cluster.remove(disk)


def test_image_that_is_kept_open(world: World, cluster: Cluster, dest: ImageSpec, snap: SnapSpec) -> None:
    """As if opened anew each time; what others change meanwhile is seen; and it is in nobody's way after that."""
    other = world.connect()
    with cluster.keep_open(dest):
        with pytest.raises(errors.Missing):
            cluster.lookup(dest)
        dest_id = cluster.clone(snap, dest, None)
        assert cluster.lookup(dest).id == dest_id
        assert cluster.flatten(dest, go_on).parent is None
        cluster.create_snap(dest.snap("s"))
        cluster.protect_snap(dest.snap("s"))
        other.create_snap(dest.snap("theirs"))
        assert {each.name for each in cluster.snaps(dest)} == {"s", "theirs"}
        other.remove_snap(dest.snap("theirs"))
        assert [(each.name, each.protected) for each in cluster.snaps(dest)] == [("s", True)]
        cluster.ask_holder(dest)
        cluster.unprotect_snap(dest.snap("s"))
        cluster.remove_snap(dest.snap("s"))
        assert cluster.snaps(dest) == []
    other.remove(dest)
    with cluster.keep_open(dest):
        pass


@pytest.mark.parametrize("end", ["flatten", "remove", "remove the parent's parent"])
def test_parent_that_is_removed(
    world: World, cluster: Cluster, dest: ImageSpec, snap: SnapSpec, end: str
) -> None:
    """It is in the trash until no clone depends on it, and nobody gets rid of it before; its name is free, and the
    clone whole. With the clone's link it goes, and so does a parent of its own that waited for it."""
    disk, grandchild = snap.image, ImageSpec(dest.pool, f"{dest.name}-grandchild")
    if end == "remove the parent's parent":
        cluster.clone(snap, dest, None)
        cluster.create_snap(dest.snap("s"))
        cluster.clone(dest.snap("s"), grandchild, None)
        cluster.remove_snap(dest.snap("s"))
        cluster.remove_snap(snap)
        cluster.remove(disk)
        cluster.remove(dest)
        last = grandchild
    else:
        cluster.clone(snap, dest, None)
        cluster.remove_snap(snap)
        cluster.remove(disk)
        last = dest
    assert not cluster.exists(disk)
    (waiting,) = [each for each in cluster.trashed(disk.pool) if each.name == disk.name]
    assert waiting.is_parent
    # What is in the trash as well bears its former name.
    assert cluster.children_of_trashed(disk.pool, waiting.id) == [dest]
    with pytest.raises(errors.HasSnapshots):
        cluster.remove_trashed(disk.pool, waiting.id)
    assert world.content(last) == WRITTEN
    if end == "flatten":
        cluster.flatten(last, go_on)
        assert world.content(last) == WRITTEN
    else:
        cluster.remove(last)
    names = {each.name for pool in (disk.pool, dest.pool) for each in cluster.trashed(pool)}
    assert names.isdisjoint({disk.name, dest.name})


def test_ancestors(world: World, cluster: Cluster, dest: ImageSpec, snap: SnapSpec) -> None:
    """All that it reads through, nearest first, in the trash or not."""
    disk, grandchild = snap.image, ImageSpec(dest.pool, f"{dest.name}-grandchild")
    cluster.clone(snap, dest, None)
    cluster.create_snap(dest.snap("s"))
    cluster.clone(dest.snap("s"), grandchild, None)
    assert cluster.ancestors(grandchild) == [dest, disk]
    cluster.remove_snap(snap)
    cluster.remove(disk)
    world.create(disk)  # another of the same name
    assert cluster.ancestors(grandchild) == [dest, disk]
    assert cluster.ancestors(disk) == []
    with pytest.raises(errors.Missing):
        cluster.ancestors(ImageSpec(disk.pool, "nothing"))


def test_parent_with_a_snapshot_of_its_own(cluster: Cluster, dest: ImageSpec, snap: SnapSpec) -> None:
    """One that is not trashed keeps it from being removed, clones or not."""
    cluster.clone(snap, dest, None)
    with pytest.raises(errors.HasSnapshots):
        cluster.remove(snap.image)
    cluster.remove_snap(snap)
    cluster.create_snap(snap.image.snap("operators"))
    with pytest.raises(errors.HasSnapshots):
        cluster.remove(snap.image)
    assert cluster.exists(snap.image)


@pytest.mark.parametrize("is_removed", [True, False])
def test_reader_that_removes_the_last_clone(
    world: World, cluster: Cluster, dest: ImageSpec, snap: SnapSpec, is_removed: bool
) -> None:
    """Who may only read the parent's pool leaves what waited for that clone; who may write clears it away."""
    disk, reader = snap.image, world.connect_reader()
    cluster.clone(snap, dest, None)
    cluster.remove_snap(snap)
    if is_removed:
        cluster.remove(disk)
    reader.lookup(dest)
    reader.remove(dest)
    if is_removed:
        (left,) = [each for each in cluster.trashed(disk.pool) if each.name == disk.name]
        cluster.remove_trashed(disk.pool, left.id)
        with pytest.raises(errors.Missing):
            cluster.remove_trashed(disk.pool, left.id)
    else:
        (found,) = cluster.snaps(disk)
        assert (found.trashed, cluster.children(disk, found.id)) == (True, [])
        cluster.remove_snap_by_id(disk, found.id)
        cluster.remove(disk)
    assert not cluster.exists(disk)
    assert disk.name not in {each.name for each in cluster.trashed(disk.pool)}


def test_trash_is_listed(cluster: Cluster, disk: ImageSpec) -> None:
    """With what is known of each, and none in a pool that never had any."""
    image_id = cluster.lookup(disk).id
    cluster.trash(disk, 3600)
    (found,) = [each for each in cluster.trashed(disk.pool) if each.name == disk.name]
    assert (found.id, found.is_parent) == (image_id, False)
    assert 3500 < found.kept_until - time.time() < 3700
    cluster.remove_trashed(disk.pool, image_id)
    assert image_id not in {each.id for each in cluster.trashed(disk.pool)}
    with pytest.raises(errors.Missing):
        cluster.children_of_trashed(disk.pool, image_id)


def test_clone_onto_something(world: World, cluster: Cluster, dest: ImageSpec, snap: SnapSpec) -> None:
    """What exists is not replaced."""
    world.create(dest, object_count=1)
    before = cluster.lookup(dest)
    with pytest.raises(errors.AlreadyThere):
        cluster.clone(snap, dest, None)
    assert cluster.lookup(dest) == before


def test_clone_of_nothing(cluster: Cluster, disk: ImageSpec, dest: ImageSpec, snap: SnapSpec) -> None:
    """Missing snapshot, pool or data pool: Missing, and no rbd image is left."""
    with pytest.raises(errors.Missing):
        cluster.clone(disk.snap("none"), dest, None)
    with pytest.raises(errors.Missing):
        cluster.clone(snap, ImageSpec("no-such-pool", dest.name), None)
    with pytest.raises(errors.Missing):
        cluster.clone(snap, dest, "no-such-pool")
    assert not cluster.exists(dest)


def test_data_pool(world: World, cluster: Cluster, dest: ImageSpec, snap: SnapSpec) -> None:
    """A clone's data goes where it is told to, here an erasure-coded pool, and lookup says so."""
    cluster.clone(snap, dest, world.ec_data)
    cluster.flatten(dest, go_on)
    assert cluster.lookup(dest).data_pool == world.ec_data
    assert world.content(dest) == WRITTEN


def test_data_pool_beside_the_options(world: World, dest: ImageSpec, snap: SnapSpec) -> None:
    """What a client's options say of new rbd images holds for a clone that is told nothing, and for no other."""
    cluster = world.connect_with_data_pool(world.ec_data)
    cluster.clone(snap, dest, None)
    assert cluster.lookup(dest).data_pool == world.ec_data
    cluster.remove(dest)
    cluster.clone(snap, dest, dest.pool)
    cluster.flatten(dest, go_on)
    assert cluster.lookup(dest).data_pool == dest.pool
    assert world.content(dest) == WRITTEN


def test_usual_data_pool(world: World, cluster: Cluster, name: str) -> None:
    """Judged by an rbd image that is there; half-made ones do not hinder."""
    first = ImageSpec(world.ec_free, f"{name}-b")
    assert cluster.usual_data_pool(world.ec_free) is None
    world.create(first, data_pool=world.ec_data)
    assert cluster.usual_data_pool(world.ec_free) == world.ec_data
    source = ImageSpec(world.vms, name)
    world.create(source)
    cluster.create_snap(source.snap("s"))
    half = ImageSpec(world.ec_free, f"{name}-a")
    world.half_clone(NAME_ONLY, source.snap("s"), half)
    assert cluster.usual_data_pool(world.ec_free) == world.ec_data
    cluster.remove(half)
    cluster.remove(first)


@formats
def test_flatten(world: World, dest: ImageSpec, disk: ImageSpec, snap: SnapSpec, clone_format: int) -> None:
    """The link is cut for head and snapshots alike, protected ones, too; progress is in bytes; again does nothing."""
    cluster, seen = world.connect(clone_format), []
    cluster.protect_snap(snap)
    cluster.clone(snap, dest, None)
    world.write(dest, 2, b"TWO")
    cluster.create_snap(dest.snap("snap"))
    cluster.protect_snap(dest.snap("snap"))

    def note(done: int, total: int) -> bool:
        seen.append((done, total))
        return True

    cluster.flatten(dest, note)
    assert cluster.lookup(dest).parent is None
    assert world.content(dest) == world.content(dest.snap("snap")) == {**WRITTEN, 2: b"TWO"}
    assert [found.protected for found in cluster.snaps(dest)] == [True]
    assert seen
    assert all(0 <= done <= total == 4 * OBJECT_BYTES and done % OBJECT_BYTES == 0 for done, total in seen)
    cluster.flatten(dest, note)
    # Nothing depends on the disk any more.
    cluster.unprotect_snap(snap)
    cluster.remove_snap(snap)
    assert cluster.snaps(disk) == []
    cluster.remove(disk)


def test_flatten_of_a_disk_without_parent(world: World, cluster: Cluster, disk: ImageSpec) -> None:
    """There is nothing to do, and nothing is done."""
    cluster.flatten(disk, go_on)
    assert world.content(disk) == WRITTEN


def test_cancelled_flatten(world: World, cluster: Cluster, dest: ImageSpec, snap: SnapSpec) -> None:
    """Asked to stop it keeps the parent and every byte; another flatten completes it."""
    cluster.clone(snap, dest, None)
    with pytest.raises(errors.Cancelled):
        cluster.flatten(dest, lambda done, total: False)
    assert cluster.lookup(dest).parent == snap
    assert world.content(dest) == WRITTEN
    cluster.flatten(dest, go_on)
    assert cluster.lookup(dest).parent is None
    assert world.content(dest) == WRITTEN


# -- what else a worker asks for --


@pytest.mark.parametrize("is_protected", [True, False])
def test_snapshot_of_what_is_in_the_trash(
    world: World, cluster: Cluster, dest: ImageSpec, snap: SnapSpec, is_protected: bool
) -> None:
    """It goes once no clone depends on it, and then the rbd image can."""
    cluster.clone(snap, dest, None, object_map=False)
    sealed, made = dest.snap("s"), ImageSpec(dest.pool, f"{dest.name}-clone")
    cluster.create_snap(sealed)
    if is_protected:
        cluster.protect_snap(sealed)
    cluster.clone(sealed, made, None)
    image_id = cluster.lookup(dest).id
    cluster.trash(dest, 0)
    with pytest.raises(errors.Busy):
        cluster.remove_snap_of_trashed(dest.pool, image_id, "s")
    cluster.remove(made)
    with pytest.raises(errors.HasSnapshots):
        cluster.remove_trashed(dest.pool, image_id)
    cluster.remove_snap_of_trashed(dest.pool, image_id, "s")
    with pytest.raises(errors.Missing):
        cluster.remove_snap_of_trashed(dest.pool, image_id, "s")
    cluster.remove_trashed(dest.pool, image_id)
    with pytest.raises(errors.Missing):
        cluster.remove_snap_of_trashed(dest.pool, image_id, "s")


def test_image_that_is_created(world: World, cluster: Cluster, dest: ImageSpec) -> None:
    """It holds what it is made of, and may be cloned; there is one of a name."""
    cluster.create(dest, b"zero".ljust(512, b"\0"))
    with pytest.raises(errors.AlreadyThere):
        cluster.create(dest, bytes(512))
    cluster.create_snap(dest.snap("s"))
    made = ImageSpec(dest.pool, f"{dest.name}-clone")
    cluster.clone(dest.snap("s"), made, None)
    with world.reader(dest.snap("s")) as read:
        assert read(0) == b"zero"


def test_one_pair(world: World, cluster: Cluster) -> None:
    """Of those that there are; none where there is no such key, or no object."""
    name = uuid.uuid4().hex
    assert cluster.omap_item(world.vms, name, "key") is None
    cluster.omap_replace(world.vms, name, "key", None, "new")
    cluster.omap_replace(world.vms, name, "key 2", None, "other")
    assert cluster.omap_item(world.vms, name, "key") == "new"
    assert cluster.omap_item(world.vms, name, "ke") is None
    world.write_omap(world.vms, name, b"key", b"\xff")
    assert cluster.omap_item(world.vms, name, "key") == "\\xff"


def test_how_full_a_pool_is(world: World, cluster: Cluster) -> None:
    """Between nothing and all; of a pool that there is."""
    assert 0 <= cluster.used(world.vms) < 1
    with pytest.raises(errors.Missing):
        cluster.used("no-such-pool")


def test_cluster_that_is_at_ease(cluster: Cluster) -> None:
    """Nothing should wait."""
    assert eventually(lambda: cluster.strain() is None, "nothing strains the cluster")


def test_who_may_ask(world: World) -> None:
    """Everybody who may use rbd at all."""
    cluster = world.connect_reader()
    cluster.strain()
    assert 0 <= cluster.used(world.vms) < 1


@pytest.fixture
def queueing(request: pytest.FixtureRequest, world: World, cluster: Cluster) -> Cluster:
    if isinstance(world, RealWorld):
        need_manager()
    return cluster


def test_manager_flattens(world: World, queueing: Cluster, dest: ImageSpec, snap: SnapSpec) -> None:
    """Queued twice it is one task; it ends with a flat image, and is known no more then."""
    queueing.clone(snap, dest, None, object_map=False)
    task = queueing.queue_flatten(dest)
    assert queueing.queue_flatten(dest).id == task.id
    eventually(lambda: queueing.flatten_task(dest) is None, "the manager has done it", pause=0.1)
    assert queueing.lookup(dest).parent is None
    assert world.content(dest) == WRITTEN
    with pytest.raises(errors.Missing):
        queueing.cancel_task(task.id)


def test_what_the_manager_cannot_flatten(queueing: Cluster, disk: ImageSpec, dest: ImageSpec) -> None:
    """What does not exist, or has no parent; there is no task of it."""
    for image in (disk, dest):
        with pytest.raises(errors.Missing):
            queueing.queue_flatten(image)
        assert queueing.flatten_task(image) is None


def test_task_that_is_cancelled(world: World, queueing: Cluster, disk: ImageSpec, dest: ImageSpec) -> None:
    """The image keeps its parent, or was flat before; it is usable either way, and so it is once it is queued again."""
    queueing.create_snap(disk.snap("s"))
    queueing.clone(disk.snap("s"), dest, None, object_map=False)
    task = queueing.queue_flatten(dest)
    with contextlib.suppress(errors.Missing):  # it has ended
        queueing.cancel_task(task.id)
    eventually(lambda: queueing.flatten_task(dest) is None, "the task has ended", pause=0.1)
    assert world.content(dest) == WRITTEN
    if queueing.lookup(dest).parent is not None:
        assert queueing.queue_flatten(dest).id != task.id
        eventually(lambda: queueing.flatten_task(dest) is None, "the task has ended", pause=0.1)
    assert queueing.lookup(dest).parent is None


# -- what is on an rbd image but its data --


def test_metadata(cluster: Cluster, snap: SnapSpec, dest: ImageSpec) -> None:
    """It outlives a flatten, and a clone inherits it."""
    assert cluster.metadata(snap.image, "key") is None
    for word in ("first", "second"):
        cluster.set_metadata(snap.image, "key", word)
        assert cluster.metadata(snap.image, "key") == word
    cluster.clone(snap, dest, None, object_map=False)
    assert cluster.metadata(dest, "key") == "second"
    cluster.set_metadata(dest, "key", "of its own")
    cluster.flatten(dest, go_on)
    assert [cluster.metadata(image, "key") for image in (snap.image, dest)] == ["second", "of its own"]


def test_object_map(world: World, cluster: Cluster, dest: ImageSpec, snap: SnapSpec) -> None:
    """Given and taken away, again and again, it changes nothing that can be seen."""
    cluster.clone(snap, dest, None, object_map=False)
    cluster.create_snap(dest.snap("s"))
    cluster.protect_snap(dest.snap("s"))
    before = cluster.lookup(dest), cluster.snaps(dest)
    for image in (dest, snap.image):
        for change in (cluster.give_object_map, cluster.drop_object_map):
            change(image)
            change(image)
    assert (cluster.lookup(dest), cluster.snaps(dest)) == before
    cluster.flatten(dest, go_on)
    cluster.give_object_map(dest)
    assert world.content(dest) == world.content(dest.snap("s")) == WRITTEN


#: What is in the object that the server has never written, and in one that it has, with nothing but zeros.
ZEROS = {1: b"", 3: b""}


@pytest.fixture
def shared(world: World, cluster: Cluster, disk: ImageSpec, dest: ImageSpec) -> SnapSpec:
    """A sealed clone without a map of its objects, of a disk that has zeros in it; its own snapshot."""
    world.write(disk, 3, bytes(64))
    frozen = disk.snap("frozen")
    cluster.create_snap(frozen)
    cluster.clone(frozen, dest, None, object_map=False)
    cluster.create_snap(dest.snap("s"))
    cluster.protect_snap(dest.snap("s"))
    return dest.snap("s")


def test_reader_while_it_is_flattened(world: World, cluster: Cluster, disk: ImageSpec, shared: SnapSpec) -> None:
    """Who has it open from before reads what was there, whatever the server writes, as long as the disk's snapshot
    stays; and when it is given a map of its objects."""
    with world.reader(shared) as read:
        cluster.flatten(shared.image, go_on)
        for number in range(4):
            world.write(disk, number, b"later")
        assert {number: read(number) for number in range(4)} == {**WRITTEN, **ZEROS}
        cluster.give_object_map(shared.image)
        assert {number: read(number) for number in range(4)} == {**WRITTEN, **ZEROS}
    assert [snap.name for snap in cluster.snaps(disk)] == ["frozen"]


def over_a_base(world: World, cluster: Cluster, shared: SnapSpec) -> tuple[ImageSpec, SnapSpec]:
    """A disk that is itself a clone, with zeros over what its base image has; and a sealed clone of it."""
    base, disk = ImageSpec(world.images, f"{shared.image.name}-base"), ImageSpec(world.vms, f"{shared.image.name}-over")
    world.create(base)
    world.write(base, 0, b"base")
    cluster.create_snap(base.snap("s"))
    cluster.clone(base.snap("s"), disk, None)
    world.write(disk, 0, bytes(64))
    cluster.create_snap(disk.snap("frozen"))
    dest = ImageSpec(world.images, f"{shared.image.name}-of-over")
    cluster.clone(disk.snap("frozen"), dest, None, object_map=False)
    cluster.create_snap(dest.snap("s"))
    return disk, dest.snap("s")


def test_why_the_disk_stays(world: World, cluster: Cluster, shared: SnapSpec) -> None:
    """When it goes with the flatten, who has the clone open reads what is below it, where there were zeros."""
    disk, snap = over_a_base(world, cluster, shared)
    with world.reader(snap) as read:
        assert read(0) == b""
        cluster.remove_snap(disk.snap("frozen"))
        cluster.remove(disk)
        cluster.flatten(snap.image, go_on)
        assert disk.name not in {each.name for each in cluster.trashed(disk.pool)}
        assert read(0) == b"base"


def test_reader_while_the_disk_is_in_the_trash(world: World, cluster: Cluster, shared: SnapSpec) -> None:
    """With its snapshot as it was: it stays there after the flatten, and who has the clone open reads on."""
    disk, snap = over_a_base(world, cluster, shared)
    with world.reader(snap) as read:
        cluster.trash(disk, 0)
        cluster.flatten(snap.image, go_on)
        (waiting,) = [each for each in cluster.trashed(disk.pool) if each.name == disk.name]
        assert not waiting.is_parent
        (kept,) = cluster.snaps_of_trashed(disk.pool, waiting.id)
        assert (kept.name, kept.trashed) == ("frozen", False)
        assert read(0) == b""
    cluster.remove_snap_of_trashed(disk.pool, waiting.id, "frozen")
    cluster.remove_trashed(disk.pool, waiting.id)
    with pytest.raises(errors.Missing):
        cluster.snaps_of_trashed(disk.pool, waiting.id)


def test_reader_while_the_server_is_deleted(world: World, cluster: Cluster, disk: ImageSpec, shared: SnapSpec) -> None:
    """Over a disk that is no clone it reads on when that goes with the flatten."""
    with world.reader(shared) as read:
        cluster.remove_snap(disk.snap("frozen"))
        cluster.remove(disk)
        cluster.flatten(shared.image, go_on)
        assert disk.name not in {each.name for each in cluster.trashed(disk.pool)}
        assert {number: read(number) for number in range(4)} == {**WRITTEN, **ZEROS}


def test_reader_while_another_image_keeps_the_disk(world: World, cluster: Cluster, shared: SnapSpec) -> None:
    """Of a server that was deleted: where nobody writes any more it makes no difference that the snapshot goes."""
    parent = cluster.lookup(shared.image).parent
    assert parent is not None
    disk = parent.image
    world.write(disk, 3, b"second")
    other = ImageSpec(shared.image.pool, f"{shared.image.name}-other")
    cluster.create_snap(disk.snap("other"))
    cluster.clone(disk.snap("other"), other, None, object_map=False)
    world.write(disk, 3, b"last")
    with world.reader(shared) as read:
        for name in ("frozen", "other"):
            cluster.remove_snap(disk.snap(name))
        cluster.remove(disk)
        cluster.flatten(shared.image, go_on)
        (waiting,) = [each for each in cluster.trashed(disk.pool) if each.name == disk.name]
        assert cluster.children_of_trashed(disk.pool, waiting.id) == [other]
        assert {number: read(number) for number in range(4)} == {**WRITTEN, **ZEROS}
        eventually(lambda: not world.is_trimming(), "the snapshot's objects are trimmed")
        assert {number: read(number) for number in range(4)} == {**WRITTEN, **ZEROS}
    assert world.content(other) == {**WRITTEN, 3: b"second"}


def test_why_the_snapshot_stays(world: World, cluster: Cluster, disk: ImageSpec, shared: SnapSpec) -> None:
    """Without it who has the clone open reads what the server has written since, where there were zeros. Should this
    fail librbd has learnt better, and ``docs/design/ceph.rst`` is to be changed."""
    with world.reader(shared) as read:
        cluster.flatten(shared.image, go_on)
        cluster.remove_snap(disk.snap("frozen"))
        world.write(disk, 3, b"later")
        eventually(lambda: read(3) == b"later", "the snapshot's objects are trimmed", pause=0.1)


def test_why_there_is_no_map(world: World, cluster: Cluster, disk: ImageSpec, dest: ImageSpec) -> None:
    """With one who has the clone open goes on to read from a parent that is no more. As above."""
    frozen = disk.snap("frozen")
    cluster.create_snap(frozen)
    cluster.clone(frozen, dest, None)
    cluster.create_snap(dest.snap("s"))
    with world.reader(dest.snap("s")) as read:
        assert read(0) == WRITTEN[0]
        cluster.flatten(dest, go_on)
        cluster.remove_snap(frozen)
        cluster.remove(disk)
        assert read(0) == b""


# -- half-made clones --


@pytest.mark.parametrize("half", HALF_MADE)
def test_half_made_clone(world: World, cluster: Cluster, dest: ImageSpec, snap: SnapSpec, half: str) -> None:
    """It takes the name and may look whole, and can be removed; the snapshot does not know it."""
    disk = snap.image
    world.half_clone(half, snap, dest)
    assert cluster.exists(dest)
    with pytest.raises(errors.AlreadyThere):
        cluster.clone(snap, dest, None)
    if half == NAME_ONLY:
        with pytest.raises(errors.Missing):
            cluster.lookup(dest)
    else:
        info = cluster.lookup(dest)
        assert info.size_bytes == 4 * OBJECT_BYTES
        assert info.parent == (snap if half == UNLISTED else None)
        assert cluster.snaps(dest) == []
    if half == BLANK:
        # As if it were flat: only who saw the link knows better.
        cluster.flatten(dest, go_on)
        assert world.content(dest) == {}
    cluster.remove(dest)
    assert not cluster.exists(dest)
    cluster.remove_snap(snap)
    assert cluster.snaps(disk) == []


def test_unlisted_clone_loses_its_parent(
    world: World, cluster: Cluster, disk: ImageSpec, dest: ImageSpec, snap: SnapSpec
) -> None:
    """A child that the parent does not list does not keep the snapshot, and then cannot be opened any more, but can
    still be removed."""
    world.half_clone(UNLISTED, snap, dest)
    cluster.remove_snap(snap)
    assert cluster.snaps(disk) == []
    with pytest.raises(errors.Missing):
        cluster.lookup(dest)
    assert cluster.exists(dest)
    cluster.remove(dest)
    assert not cluster.exists(dest)


# -- omap --


def test_omap(world: World, cluster: Cluster, name: str) -> None:
    """Set, replaced and removed only from what is there; an object without pairs reads as none."""
    pool = world.vms
    assert cluster.omap_items(pool, name) == {}
    cluster.omap_replace(pool, name, "key", None, "one")
    cluster.omap_replace(pool, name, "kéy", None, "zwölf")
    cluster.omap_replace(pool, name, "key", "one", "two")
    assert cluster.omap_items(pool, name) == {"key": "two", "kéy": "zwölf"}
    for old, new in ((None, "three"), ("one", "three"), ("one", None), (None, None)):
        with pytest.raises(errors.LedgerConflict):
            cluster.omap_replace(pool, name, "key", old, new)
    with pytest.raises(errors.LedgerConflict):
        cluster.omap_replace(pool, name, "absent", "old", "new")
    assert cluster.omap_items(pool, name) == {"key": "two", "kéy": "zwölf"}
    cluster.omap_replace(pool, name, "key", "two", None)
    cluster.omap_replace(pool, name, "absent", None, None)
    assert cluster.omap_items(pool, name) == {"kéy": "zwölf"}


def test_omap_with_many_keys(world: World, cluster: Cluster, name: str) -> None:
    """All pairs come, however many pages they fill, and also where a page ends with what is no text."""
    pairs = {f"{number:05}": "x" for number in range(1100)}
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: cluster.omap_replace(world.vms, name, key, None, "x"), pairs))
    assert cluster.omap_items(world.vms, name) == pairs
    world.write_omap(world.vms, name, b"00998\xff", b"x")
    assert cluster.omap_items(world.vms, name).keys() == {*pairs, "00998\\xff"}


def test_omap_that_is_no_text(world: World, cluster: Cluster, name: str) -> None:
    """Somebody else's bytes hide nothing else, are shown escaped, and are never replaced."""
    pool = world.vms
    cluster.omap_replace(pool, name, "key", None, "one")
    world.write_omap(pool, name, b"value", b"\xff{")
    world.write_omap(pool, name, b"k\xff", b"x")
    found = cluster.omap_items(pool, name)
    assert found.keys() == {"key", "value", "k\\xff"}
    assert (found["key"], found["value"]) == ("one", "\\xff{")
    for old in (None, found["value"]):
        with pytest.raises(errors.LedgerConflict):
            cluster.omap_replace(pool, name, "value", old, "new")
    cluster.omap_replace(pool, name, "key", "one", "two")
    assert cluster.omap_items(pool, name) == {**found, "key": "two"}


@pytest.mark.parametrize("old", [None, "start"])
def test_omap_race_has_one_winner(world: World, name: str, old: str) -> None:
    """Of many writers from the same state exactly one wins, and its value stands."""
    clusters = [world.connect() for _ in range(4)]
    if old:
        clusters[0].omap_replace(world.vms, name, "key", None, old)

    def write(number: int) -> bool:
        try:
            clusters[number % 4].omap_replace(world.vms, name, "key", old, str(number))
        except errors.LedgerConflict:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(write, range(16)))
    assert won.count(True) == 1
    assert clusters[0].omap_items(world.vms, name) == {"key": str(won.index(True))}


# -- leases --


def test_lease(world: World, cluster: Cluster, name: str) -> None:
    """One client has it, until it gives it back; then another may."""
    other = world.connect()
    cluster.take_lease(world.vms, name, 60)
    for client in (cluster, other):
        with pytest.raises(errors.Busy):
            client.take_lease(world.vms, name, 60)
    cluster.renew_lease(world.vms, name, 60)
    other.end_lease(world.vms, name)  # not theirs to end
    with pytest.raises(errors.Busy):
        other.take_lease(world.vms, name, 60)
    cluster.end_lease(world.vms, name)
    cluster.end_lease(world.vms, name)
    other.take_lease(world.vms, name, 60)
    with pytest.raises(errors.LeaseLost):
        cluster.renew_lease(world.vms, name, 60)


def test_lease_that_runs_out(world: World, cluster: Cluster, name: str) -> None:
    """Who does not renew it in time has lost it, and does not get it back unasked, whether or not another took it."""
    other = world.connect()
    cluster.take_lease(world.vms, name, 0.25)
    eventually(lambda: _takes(other, world.vms, name, 60), "the lease runs out", pause=0.05)
    with pytest.raises(errors.LeaseLost):
        cluster.renew_lease(world.vms, name, 60)
    other.renew_lease(world.vms, name, 0.25)
    eventually(lambda: _has_lost(other, world.vms, name), "the lease runs out", pause=0.5)
    cluster.take_lease(world.vms, name, 60)


def _takes(cluster: Cluster, pool: str, name: str, seconds: float) -> bool:
    try:
        cluster.take_lease(pool, name, seconds)
    except errors.Busy:
        return False
    return True


def _has_lost(cluster: Cluster, pool: str, name: str) -> bool:
    try:
        cluster.renew_lease(pool, name, 0.25)
    except errors.LeaseLost:
        return True
    return False


def test_nobody_has_a_lease_that_was_never_taken(world: World, cluster: Cluster, name: str) -> None:
    """It can be given back, but not renewed."""
    cluster.end_lease(world.vms, name)
    with pytest.raises(errors.LeaseLost):
        cluster.renew_lease(world.vms, name, 60)


# -- who may not, and where there is no room --

Act = Callable[[Cluster, SnapSpec, ImageSpec], Any]
CHANGES: dict[str, Act] = {
    "images": lambda cluster, snap, dest: cluster.images(snap.image.pool),
    "exists": lambda cluster, snap, dest: cluster.exists(snap.image),
    "lookup": lambda cluster, snap, dest: cluster.lookup(snap.image),
    "ancestors": lambda cluster, snap, dest: cluster.ancestors(snap.image),
    "usual_data_pool": lambda cluster, snap, dest: cluster.usual_data_pool(dest.pool),
    "snaps": lambda cluster, snap, dest: cluster.snaps(snap.image),
    "children": lambda cluster, snap, dest: cluster.children(snap.image, 1),
    "ask_holder": lambda cluster, snap, dest: cluster.ask_holder(snap.image),
    "metadata": lambda cluster, snap, dest: cluster.metadata(snap.image, "key"),
    "set_metadata": lambda cluster, snap, dest: cluster.set_metadata(snap.image, "key", "word"),
    "create_snap": lambda cluster, snap, dest: cluster.create_snap(snap.image.snap("another")),
    "protect_snap": lambda cluster, snap, dest: cluster.protect_snap(snap),
    "unprotect_snap": lambda cluster, snap, dest: cluster.unprotect_snap(snap),
    "remove_snap": lambda cluster, snap, dest: cluster.remove_snap(snap),
    "remove_snap_by_id": lambda cluster, snap, dest: cluster.remove_snap_by_id(snap.image, 1),
    "clone": lambda cluster, snap, dest: cluster.clone(snap, dest, None),
    "drop_object_map": lambda cluster, snap, dest: cluster.drop_object_map(snap.image),
    "flatten": lambda cluster, snap, dest: cluster.flatten(snap.image, go_on),
    "remove": lambda cluster, snap, dest: cluster.remove(snap.image),
    "trash": lambda cluster, snap, dest: cluster.trash(snap.image, 0),
    "take_lease": lambda cluster, snap, dest: cluster.take_lease(snap.image.pool, "x", 60),
    "renew_lease": lambda cluster, snap, dest: cluster.renew_lease(snap.image.pool, "x", 60),
    "end_lease": lambda cluster, snap, dest: cluster.end_lease(snap.image.pool, "x"),
    "trashed": lambda cluster, snap, dest: cluster.trashed(snap.image.pool),
    "snaps_of_trashed": lambda cluster, snap, dest: cluster.snaps_of_trashed(snap.image.pool, "1"),
    "children_of_trashed": lambda cluster, snap, dest: cluster.children_of_trashed(snap.image.pool, "1"),
    "remove_snap_of_trashed": lambda cluster, snap, dest: cluster.remove_snap_of_trashed(snap.image.pool, "1", "s"),
    "remove_trashed": lambda cluster, snap, dest: cluster.remove_trashed(snap.image.pool, "1"),
    "omap_item": lambda cluster, snap, dest: cluster.omap_item(snap.image.pool, "x", "key"),
    "create": lambda cluster, snap, dest: cluster.create(dest, bytes(512)),
    "omap_items": lambda cluster, snap, dest: cluster.omap_items(snap.image.pool, "x"),
    "omap_replace": lambda cluster, snap, dest: cluster.omap_replace(snap.image.pool, "x", "key", None, "new"),
}
each_act = pytest.mark.parametrize("act", CHANGES.values(), ids=CHANGES)


@each_act
def test_no_rights(world: World, snap: SnapSpec, dest: ImageSpec, act: Act) -> None:
    """cephx denies a user without rights everything, and that is what is said."""
    with pytest.raises(errors.NoPermission):
        act(world.connect_without_rights(), snap, dest)


@each_act
def test_cut_off(world: World, snap: SnapSpec, dest: ImageSpec, act: Act) -> None:
    """A client on the blocklist is told so by every call."""
    with pytest.raises(errors.Blocklisted):
        act(world.connect_cut_off(), snap, dest)


def test_full_pool(world: World, cluster: Cluster, snap: SnapSpec) -> None:
    """Nothing hangs: what needs room says NoSpace and leaves nothing, but for a snapshot that cannot be read; snapshots
    go, and so do pairs of an object that exists; removing or trashing the first rbd image ever fails, but not with
    Missing, for it is there, and any later one goes; with room again all works."""
    pool = world.new_pool()
    first, second, third = (ImageSpec(pool, name) for name in ("first", "second", "third"))
    cluster.clone(snap, first, None)
    cluster.clone(snap, second, None)
    cluster.omap_replace(pool, "x", "key", None, "old")
    cluster.create_snap(first.snap("s"))
    with world.fill(pool):
        with pytest.raises(errors.NoSpace):
            cluster.clone(snap, third, None)
        with pytest.raises(errors.NoSpace):
            cluster.omap_replace(pool, "y", "key", None, "new")
        with pytest.raises(errors.NoSpace):
            cluster.flatten(first, go_on)
        cluster.omap_replace(pool, "x", "key", "old", "new")
        cluster.omap_replace(pool, "x", "key", "new", None)
        with pytest.raises(errors.NoSpace):
            cluster.create_snap(first.snap("late"))
        for name in ("s", "late"):
            cluster.protect_snap(first.snap(name))
            cluster.unprotect_snap(first.snap(name))
            cluster.remove_snap(first.snap(name))
        for change in (cluster.remove, functools.partial(cluster.trash, keep_seconds=0)):
            with pytest.raises(errors.CephError) as caught:
                change(first)
            assert not isinstance(caught.value, errors.Missing)
        assert cluster.lookup(first).parent == snap
    assert not cluster.exists(third)
    cluster.drop_object_map(first)
    cluster.flatten(first, go_on)
    assert world.content(first) == WRITTEN
    cluster.remove(first)
    cluster.clone(snap, third, None)
    with world.fill(pool):
        cluster.remove(second)
        cluster.trash(third, 0)
    assert cluster.images(pool) == []
