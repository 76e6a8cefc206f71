# SPDX-License-Identifier: Apache-2.0
"""Deleting a server does not wait for its disks to be removed: they are in the trash, and go from there."""

from __future__ import annotations

import pytest

from nova_rbd_snap import errors
from nova_rbd_snap.janitor.purge import Purge
from nova_rbd_snap.ledger.job import AT_WORK, FLATTEN, NEVER, PURGE, QUEUED, Owner, purge_id
from nova_rbd_snap.ledger.store import Ledger
from nova_rbd_snap.snapshot import steps
from nova_rbd_snap.specs import GLANCE_SNAP, ImageSpec
from nova_rbd_snap.workers.worker import Worker
from tests.fakes.cluster import FakeCluster
from tests.fakes.engine import DEST, DISK, FROZEN, SERVER, clone, in_thread, make_engine, populated
from tests.waiting import eventually

BOUND_SECONDS = 30
NOW = 1000.0


def going_on() -> bool:
    return False


def make_worker(cluster: FakeCluster, host: str = "compute-1", now: float = NOW) -> Worker:
    def clock() -> float:
        return now

    client = cluster.another()
    owner = Owner(host, f"machine of {host}", "life-1", client.address())
    return Worker(client, DISK.pool, owner, [Purge(client, clock)], limit=4, lease_seconds=60.0, clock=clock)


def jobs(cluster: FakeCluster) -> list[tuple[str, str]]:
    return [(job.kind, job.step) for job in Ledger(cluster, DISK.pool).read().jobs]


def test_disk_is_gone_for_nova_at_once() -> None:
    """Whoever has it open, for a dead QEMU counts for 30 s; a worker of any host removes it."""
    cluster = populated()
    cluster.hold(DISK, 1)
    assert make_engine(cluster, delete="trash").remove_disks(SERVER) == []
    assert not cluster.exists(DISK)
    assert [each.name for each in cluster.trashed(DISK.pool)] == [DISK.name]
    assert jobs(cluster) == [(PURGE, QUEUED)]
    assert make_worker(cluster, "another host").work(going_on)
    assert cluster.trashed(DISK.pool) == []
    assert jobs(cluster) == []


def test_engine_purges_what_it_trashed() -> None:
    """At once, unasked."""
    cluster = populated()
    engine = make_engine(cluster, delete="trash")
    working = in_thread(engine.upkeep.keep_working, PURGE, FLATTEN)
    assert engine.remove_disks(SERVER) == []
    eventually(lambda: not cluster.trashed(DISK.pool) and not jobs(cluster), "the disk is removed", pause=0.01)
    engine.stop(BOUND_SECONDS)
    working.result(BOUND_SECONDS)


def test_disk_that_is_open_when_it_is_to_go() -> None:
    """It is tried again."""
    cluster = populated()
    make_engine(cluster, delete="trash").remove_disks(SERVER)
    cluster.fail_on("remove_trashed", errors.Busy)
    worker = make_worker(cluster)
    assert worker.work(going_on)
    (job,) = Ledger(cluster, DISK.pool).read().jobs
    assert (job.step, job.attempts, len(job.failures)) == (QUEUED, 1, 1)
    Ledger(cluster, DISK.pool).advance(job, not_before=0.0)
    assert worker.work(going_on)
    assert cluster.trashed(DISK.pool) == []


def test_deletion_that_dies_before_the_trash() -> None:
    """The disk is where it was, and Nova deletes its server anew: no worker removes what is not in the trash."""
    cluster = populated()
    cluster.fail_on("trash", errors.Unreachable)
    engine = make_engine(cluster, delete="trash")
    with pytest.raises(errors.Unreachable):
        engine.remove_disks(SERVER)
    assert cluster.content(DISK) == FROZEN
    assert jobs(cluster) == [(PURGE, QUEUED)]
    assert engine.remove_disks(SERVER) == []
    assert jobs(cluster) == [(PURGE, QUEUED)]
    assert make_worker(cluster).work(going_on)
    assert cluster.trashed(DISK.pool) == []
    assert jobs(cluster) == []


def test_disk_that_was_taken_back() -> None:
    """An operator has restored it: it stays, and in a while the job is forgotten."""
    cluster = populated()
    make_engine(cluster, delete="trash").remove_disks(SERVER)
    pool = cluster._state.pools[DISK.pool]
    pool.images[DISK.name] = pool.trash.pop()
    assert make_worker(cluster).work(going_on)
    assert cluster.content(DISK) == FROZEN
    assert jobs(cluster) == [(PURGE, QUEUED)]
    assert make_worker(cluster, now=NOW + 3600).work(going_on)
    assert cluster.content(DISK) == FROZEN
    assert jobs(cluster) == []


def test_disk_that_was_put_back() -> None:
    """An operator has restored it, and trashed it again to be kept: it goes when that is over."""
    cluster = populated()
    make_engine(cluster, delete="trash").remove_disks(SERVER)
    cluster._state.pools[DISK.pool].trash[0].kept_until = NOW + 500
    assert make_worker(cluster).work(going_on)
    assert not make_worker(cluster, now=NOW + 499).work(going_on)
    assert [each.name for each in cluster.trashed(DISK.pool)] == [DISK.name]
    assert make_worker(cluster, now=NOW + 500).work(going_on)
    assert cluster.trashed(DISK.pool) == []
    assert jobs(cluster) == []


def test_worker_that_comes_before_the_trash() -> None:
    """It finds the disk where it was: the job is done later, not forgotten."""
    cluster = populated()
    cluster.do_on("trash", lambda *args: make_worker(cluster).work(going_on))
    assert make_engine(cluster, delete="trash").remove_disks(SERVER) == []
    assert jobs(cluster) == [(PURGE, QUEUED)]
    assert make_worker(cluster, now=NOW + 60).work(going_on)
    assert cluster.trashed(DISK.pool) == []
    assert jobs(cluster) == []


@pytest.mark.parametrize("delete", ["now", "trash"])
def test_disk_that_somebody_has_open(delete: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than a dead client counts, so that it cannot be removed: it goes once that is over, unasked."""
    monkeypatch.setattr(steps._when_free, "sleep", lambda seconds: None)
    cluster = populated()
    cluster.hold(DISK, float("inf"))
    make_engine(cluster, delete=delete).remove_disks(SERVER)
    assert not cluster.exists(DISK)
    assert jobs(cluster) == [(PURGE, QUEUED)]
    assert make_worker(cluster).work(going_on)
    assert cluster.trashed(DISK.pool) == []
    assert jobs(cluster) == []


def test_disk_that_cannot_be_trashed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays where it is, which is told, and no job is left that would remove it some day."""
    monkeypatch.setattr(steps._when_free, "sleep", lambda seconds: None)
    cluster = populated()
    for nth in range(1, 100):
        cluster.fail_on("trash", errors.Busy, nth=nth)
    (text,) = make_engine(cluster, delete="trash").remove_disks(SERVER)
    assert str(DISK) in text
    assert cluster.content(DISK) == FROZEN
    assert jobs(cluster) == []


def test_half_made_disk() -> None:
    """It is removed at once, for it has no id to find it by in the trash."""
    cluster = FakeCluster("vms", "images")
    cluster.create_disk(DISK, half="name only")
    assert make_engine(cluster, delete="trash").remove_disks(SERVER) == []
    assert cluster.images("vms") == []
    assert jobs(cluster) == []


def test_disk_that_images_depend_on() -> None:
    """librbd itself keeps it for them: there is nothing to purge."""
    cluster = populated()
    engine = make_engine(cluster, delete="trash", flatten=NEVER)
    clone(engine)
    engine.finish(DEST.name)
    assert engine.remove_disks(SERVER) == []
    assert jobs(cluster) == []
    assert not make_worker(cluster).work(going_on)
    assert cluster.content(DEST.snap(GLANCE_SNAP)) == FROZEN


def test_purge_ends_with_its_worker() -> None:
    """The next one goes on."""
    cluster = populated()
    make_engine(cluster, delete="trash").remove_disks(SERVER)
    ledger = Ledger(cluster, DISK.pool)
    (job,) = ledger.read().jobs
    ledger.advance(job, step=AT_WORK)
    assert make_worker(cluster, "another host").work(going_on)
    assert cluster.fenced == {job.owner.client}
    assert cluster.trashed(DISK.pool) == []


def test_hostile_record() -> None:
    """Nothing is removed from the trash but what has both the id and the name of a server's disk."""
    cluster = populated()
    make_engine(cluster, delete="trash").remove_disks(SERVER)
    (job,) = Ledger(cluster, DISK.pool).read().jobs
    assert job.id == purge_id(cluster.trashed(DISK.pool)[0].id)
    others = ImageSpec(DISK.pool, "somebody-elses")
    cluster.create_disk(others)
    cluster.trash(others, 0)
    theirs = next(each for each in cluster.trashed(DISK.pool) if each.name == others.name)
    text = job.encode().replace(job.id, purge_id(theirs.id))
    cluster.omap_replace(DISK.pool, "nova_rbd_snap.ledger", purge_id(theirs.id), None, text)
    worker = make_worker(cluster)
    while worker.work(going_on):
        pass
    assert [each.name for each in cluster.trashed(DISK.pool)] == [others.name]
