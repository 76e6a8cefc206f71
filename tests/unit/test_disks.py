# SPDX-License-Identifier: Apache-2.0
"""A server is deleted: its disks go, with what nobody needs of their snapshots, and no other thing does."""

from __future__ import annotations

from typing import Callable

import pytest

from nova_rbd_snap import errors
from nova_rbd_snap.specs import ImageSpec
from tests.fakes.cluster import FakeCluster
from tests.fakes.engine import DEST, DISK, SERVER, Reports, clone, freeze, in_thread, make_engine, populated

STOCK = DISK.snap("0123456789abcdef" * 2)
OURS = DISK.snap("nova-rbd-snap-22222222-2222-4222-8222-222222222299")
CHILD = ImageSpec("images", "33333333-3333-4333-8333-333333333333")


def stray(cluster: FakeCluster) -> None:
    """What stock Nova and a lost ledger of ours may leave on a disk."""
    for snap in (STOCK, OURS, DISK.snap("nova-resize")):
        cluster.create_snap(snap)
    cluster.protect_snap(STOCK)


def trashed(cluster: FakeCluster) -> None:
    """A removal that timed out."""
    cluster.create_snap(OURS)
    cluster.clone(OURS, CHILD, None)
    cluster.remove_snap(OURS)
    cluster.heal()
    image = cluster._open(CHILD)
    image.parent = None
    del cluster._state.pools["images"].images[CHILD.name]


@pytest.mark.parametrize("make", [lambda cluster: None, stray, trashed])
def test_disks_go_with_stray_snapshots(make: Callable[[FakeCluster], None]) -> None:
    """Every disk of the server, whatever was left on it; not one of another server, nor anything in Glance's pool."""
    cluster = populated()
    others = ImageSpec("vms", f"{SERVER[:-1]}2_disk")
    looks_alike = ImageSpec("vms", f"{SERVER}-not_disk")
    for spec in (ImageSpec("vms", f"{SERVER}_disk.config"), others, looks_alike):
        cluster.create_disk(spec)
    images = cluster.picture()["images"]
    make(cluster)
    assert make_engine(cluster).remove_disks(SERVER) == []
    assert sorted(cluster.images("vms")) == sorted([others.name, looks_alike.name])
    assert cluster.picture()["images"] == images


def test_snapshot_goes_meanwhile() -> None:
    """Another engine undoes its job just then: the disk goes all the same."""
    cluster = populated()
    cluster.create_snap(OURS)
    cluster.do_on("children", lambda *args: cluster.remove_snap(OURS))
    assert make_engine(cluster).remove_disks(SERVER) == []
    assert not cluster.exists(DISK)


def test_own_job_that_does_not_let_go() -> None:
    """Fails the deletion, which can be repeated: of a server that is gone nobody would remove the disk."""
    cluster, report = populated(), Reports(hold_at="flatten")
    engine = make_engine(cluster, operation_timeout=0)
    working = in_thread(clone, engine, report)
    assert report.reached.wait(30)
    assert engine.cancel(SERVER) == []
    with pytest.raises(errors.StillAtWork) as caught:
        engine.remove_disks(SERVER)
    assert not caught.value.may_fall_back
    report.go_on.set()
    with pytest.raises(errors.Cancelled):
        working.result(30)
    assert engine.remove_disks(SERVER) == []
    assert not cluster.exists(DISK)


@pytest.mark.parametrize("call", ["snaps", "children", "remove"])
def test_silent_cluster_fails_the_deletion(call: str) -> None:
    """At once, whichever disk it is about: the deletion can be repeated."""
    cluster = populated()
    cluster.create_snap(OURS)
    cluster.fail_on(call, errors.Unreachable)
    with pytest.raises(errors.Unreachable):
        make_engine(cluster).remove_disks(SERVER)
    assert make_engine(cluster).remove_disks(SERVER) == []


def test_holder_of_a_deleted_servers_disk_is_not_asked() -> None:
    """Its guest is dead, and may have left its lock."""
    cluster = populated()
    cluster.create_snap(OURS)
    cluster.freeze_holder(DISK)
    assert make_engine(cluster).remove_disks(SERVER) == []


def operators(cluster: FakeCluster) -> None:
    cluster.create_snap(DISK.snap("before-upgrade"))


def with_child(cluster: FakeCluster) -> None:
    cluster.create_snap(STOCK)
    cluster.protect_snap(STOCK)
    cluster.clone(STOCK, CHILD, None)


@pytest.mark.parametrize(
    ("hold", "named"),
    [(operators, "snapshot before-upgrade"), (with_child, f"its clones {CHILD}")],
)
def test_what_somebody_needs_keeps_the_disk(hold: Callable[[FakeCluster], None], named: str) -> None:
    """An operator's snapshot, or a clone: the disk stays under its name, they stay as they are, and are named."""
    cluster = populated()
    cluster.create_snap(OURS)
    hold(cluster)
    (left,) = make_engine(cluster).remove_disks(SERVER)
    assert str(DISK) in left
    assert named in left
    assert [snap.name for snap in cluster.snaps(DISK)] == [
        "before-upgrade" if hold is operators else STOCK.name
    ]
    assert hold is operators or cluster.lookup(CHILD).parent == STOCK


@pytest.mark.parametrize("attempts", [3, float("inf")])
def test_watcher(attempts: float) -> None:
    """One that goes is waited for; one that stays does not keep the name: the disk is in the trash, and told."""
    cluster = populated()
    cluster.hold(DISK, attempts)
    left = make_engine(cluster).remove_disks(SERVER)
    assert cluster.images("vms") == []
    assert len(cluster.picture()["vms"]["trash"]) == len(left) == (attempts == float("inf"))


def test_one_disk_does_not_keep_the_others() -> None:
    """Whatever is the matter with it."""
    cluster = populated()
    cluster.create_disk(ImageSpec("vms", f"{SERVER}_disk.eph0"))
    cluster.fail_on("snaps", errors.NoPermission)
    (left,) = make_engine(cluster).remove_disks(SERVER)
    assert "profile rbd" in left
    assert len(cluster.images("vms")) == 1


def test_half_made_disk() -> None:
    """One that cannot be opened is removed all the same."""
    cluster = FakeCluster("vms", "images")
    cluster.create_disk(DISK, half="name only")
    assert make_engine(cluster).remove_disks(SERVER) == []
    assert cluster.images("vms") == []


def test_cancel_then_remove() -> None:
    """As a deletion does it: what was under way is undone, and then there is nothing to hold the disk."""
    cluster = populated()
    engine = make_engine(cluster)
    freeze(engine)
    engine.reserve_clone(DEST.name, DISK.name, DEST.pool)
    assert len(engine.cancel(SERVER)) == 2
    assert engine.remove_disks(SERVER) == []
    with pytest.raises(errors.Cancelled):
        engine.perform(DEST.name, None, lambda *args: None)
    assert cluster.images("vms") == []
    assert DEST.name not in cluster.images("images")
    assert cluster.picture()["vms"]["omap"] == {}
