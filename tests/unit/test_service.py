# SPDX-License-Identifier: Apache-2.0
"""The engine as plain calls: what a snapshot holds, who may touch a job, and how an engine ends."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Optional

import pytest

from nova_rbd_snap import errors
from nova_rbd_snap.engine.service import Engine
from nova_rbd_snap.ledger.job import copy_id
from nova_rbd_snap.ledger.store import OBJECT, Ledger
from nova_rbd_snap.specs import GLANCE_SNAP, ImageSpec, Location
from tests.fakes.cluster import FakeCluster
from tests.fakes.engine import (
    BASE,
    COPY,
    DEST,
    DISK,
    FROZEN,
    SERVER,
    FakeImages,
    Reports,
    UntilFlattening,
    clone,
    endless_disk,
    freeze,
    image,
    in_thread,
    make_engine,
    populated,
)
from tests.waiting import eventually

BOUND_SECONDS = 30
formats = pytest.mark.parametrize("clone_format", [1, 2])


def records(cluster: FakeCluster) -> dict[str, str]:
    return cluster.picture()[DISK.pool]["omap"].get(OBJECT, {})


# -- what a snapshot is --------------------------------------------------------------------------------------------


@formats
def test_clone_holds_the_disk_at_the_instant_of_the_snapshot(clone_format: int) -> None:
    """The image has the disk's bytes as of the snapshot, those of the disk's base image among them and none written
    later; it depends on nothing, and has the protected snapshot that the location names."""
    cluster = populated(clone_format)
    before = cluster.picture()
    engine = make_engine(cluster)
    cluster.do_on("create_snap", lambda snap: cluster.write(DISK, 0, b"too late"), applied=True)
    url = clone(engine)
    engine.finish(DEST.name)

    assert Location.parse(url) == Location(cluster.fsid(), DEST.snap(GLANCE_SNAP))
    assert cluster.content(DEST) == cluster.content(DEST.snap(GLANCE_SNAP)) == FROZEN
    assert cluster.lookup(DEST).parent is None
    assert [(snap.name, snap.protected) for snap in cluster.snaps(DEST)] == [(GLANCE_SNAP, True)]
    # All else is as before, but for what the guest wrote.
    assert cluster.content(DISK) == {**FROZEN, 0: b"too late"}
    cluster.write(DISK, 0, FROZEN[0])
    after = cluster.picture()
    del after[DEST.pool]["images"][DEST.name]
    assert after == before


def test_freeze_keeps_the_instant_until_rolled_back() -> None:
    """The frozen snapshot holds the bytes of its instant, and is gone after rollback."""
    cluster = populated()
    before = cluster.picture()
    engine = make_engine(cluster)
    name = freeze(engine)
    cluster.write(DISK, 0, b"later")
    assert cluster.content(DISK.snap(name)) == FROZEN
    cluster.write(DISK, 0, FROZEN[0])
    assert engine.rollback(COPY)
    assert cluster.picture() == before


@formats
def test_rollback_of_a_ready_job(clone_format: int) -> None:
    """An image that was not registered goes, and with it everything else; a second rollback finds nothing."""
    cluster = populated(clone_format)
    before = cluster.picture()
    engine = make_engine(cluster)
    clone(engine)
    assert engine.rollback(DEST.name)
    assert cluster.picture() == before
    assert not engine.rollback(DEST.name)


def test_progress_names_steps_in_bytes() -> None:
    """Progress tells each step, and the flatten in bytes that grow."""
    cluster, seen = populated(), []
    clone(make_engine(cluster), lambda *report: seen.append(report))
    assert list(dict.fromkeys(step for step, _, _ in seen)) == ["snap", "clone", "flatten", "seal"]
    size_bytes = cluster.lookup(DISK).size_bytes
    moved = [(done, total) for step, done, total in seen if step == "flatten" and total]
    assert moved == sorted(moved)
    assert {total for _, total in moved} == {size_bytes}


@pytest.mark.parametrize(
    ("option", "of_parent", "of_others", "expected"),
    [
        ("ec-1", "ec-2", "ec-3", "ec-1"),
        (None, "ec-2", "ec-3", "ec-2"),
        (None, None, "ec-3", "ec-3"),
        (None, "images", "ec-3", "images"),
        (None, None, "images", "images"),
    ],
)
def test_data_pool_is_the_one_glance_uses(
    option: Optional[str], of_parent: Optional[str], of_others: Optional[str], expected: Optional[str]
) -> None:
    """The option, else the data pool of the disk's parent, else that of an image in the destination pool; whatever the
    cluster's options say, which may be meant for servers' disks."""
    cluster = FakeCluster("vms", "images", "ec-1", "ec-2", "ec-3")
    if of_parent:
        base = ImageSpec("images", "base")
        cluster.create_disk(base, data_pool=of_parent)
        cluster.create_snap(base.snap("snap"))
        cluster.clone(base.snap("snap"), DISK, None)
    else:
        cluster.create_disk(DISK)
    if of_others:
        cluster.create_disk(ImageSpec("images", "another"), data_pool=of_others)
    cluster.default_data_pool = "ec-2"
    clone(make_engine(cluster, glance_data_pool=option))
    assert cluster.lookup(DEST).data_pool == expected


def test_describe_says_where_the_disk_is_and_comes_from() -> None:
    """fsid and pool, and the parent's pool where there is a parent."""
    cluster = populated()
    cluster.create_disk(ImageSpec("vms", "blank"))
    engine = make_engine(cluster)
    assert engine.describe(DISK.name) == {"fsid": cluster.fsid(), "pool": "vms", "parent_pool": "images"}
    assert engine.describe("blank")["parent_pool"] is None
    with pytest.raises(errors.Missing):
        engine.describe("no such disk")


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trait", "changes", "error", "text"),
    [
        ({"mirrored": True}, {}, errors.Refused, "mirrored"),
        ({"journaling": True}, {}, errors.Refused, "journaling"),
        ({}, {"dest_pool": "elsewhere"}, errors.Refused, "glance_pool"),
        ({}, {"disk": "no such disk"}, errors.Missing, "no such disk"),
        ({}, {"image_id": "base"}, errors.AlreadyThere, "left alone"),
    ],
)
def test_what_cannot_be_cloned_is_not_touched(
    trait: dict[str, bool], changes: dict[str, str], error: type[errors.SnapError], text: str
) -> None:
    """The reason is named and nothing was changed, not even in the ledger."""
    cluster = populated()
    cluster.create_disk(DISK, **trait)
    before = cluster.picture()
    with pytest.raises(error, match=text):
        clone(make_engine(cluster), **changes)
    assert cluster.picture() == before


@formats
@pytest.mark.parametrize(
    ("call", "make", "step"),
    [
        ("create_snap", lambda cluster: cluster.create_snap(DISK.snap(f"nova-rbd-snap-{DEST.name}")), "snap"),
        ("clone", lambda cluster: cluster.create_disk(DEST), "clone"),
    ],
)
def test_what_somebody_else_made_is_spared(
    clone_format: int, call: str, make: Callable[[FakeCluster], None], step: str
) -> None:
    """What appears under our name a moment before we make it is not ours: ours is undone, the other thing stays."""
    cluster = populated(clone_format)
    foreign: dict[str, Any] = {}

    def intrude(*args: object) -> None:
        cluster.heal()
        make(cluster)
        foreign.update(cluster.picture())

    before = cluster.picture()
    cluster.do_on(call, intrude)
    with pytest.raises(errors.AlreadyThere) as caught:
        clone(make_engine(cluster))
    after = cluster.picture()
    assert (caught.value.step, caught.value.undo_failures) == (step, [])
    if call == "create_snap":
        # All that differs from before is the other's snapshot.
        (snap,) = after["vms"]["images"][DISK.name].pop("snaps")
        assert snap in foreign["vms"]["images"][DISK.name]["snaps"]
        assert before["vms"]["images"][DISK.name].pop("snaps") == []
    else:
        assert after["images"]["images"].pop(DEST.name) == foreign["images"]["images"][DEST.name]
    assert after == before


def _sealed(cluster: FakeCluster) -> None:
    cluster.create_disk(DEST)
    cluster.create_snap(DEST.snap(GLANCE_SNAP))


def _clone_of_another(cluster: FakeCluster) -> None:
    cluster.create_snap(DISK.snap("other"))
    cluster.clone(DISK.snap("other"), DEST, None)


@pytest.mark.parametrize("known_id", [False, True])
@pytest.mark.parametrize("intrude", [_sealed, _clone_of_another])
def test_rollback_spares_an_image_that_is_not_its_clone(known_id: bool, intrude: Callable[[FakeCluster], None]) -> None:
    """An rbd image that took the clone's name meanwhile stays, and the job with it, for people to look at."""
    cluster = populated()
    cluster.fail_on("flatten" if known_id else "clone", _Killed)
    with pytest.raises(_Killed):
        clone(make_engine(cluster))
    if known_id:
        cluster.remove(DEST)
    intrude(cluster)
    foreign = cluster.picture()["images"]
    with pytest.raises(errors.SnapError) as caught:
        make_engine(cluster).rollback(DEST.name)
    assert [text for text in caught.value.undo_failures if "left" in text]
    assert cluster.picture()["images"] == foreign
    assert Ledger(cluster, "vms").load(DEST.name).failures


def test_rollback_spares_a_snapshot_that_is_not_its_own() -> None:
    """A snapshot of the disk that has the job's name, but not the id on record, stays."""
    cluster = populated()
    name = DISK.snap(f"nova-rbd-snap-{DEST.name}")
    cluster.fail_on("clone", _Killed)
    with pytest.raises(_Killed):
        clone(make_engine(cluster))
    cluster.remove_snap(name)
    foreign = cluster.create_snap(name)
    assert make_engine(cluster).rollback(DEST.name)
    assert [snap.id for snap in cluster.snaps(DISK)] == [foreign]


def test_image_exchanged_during_flatten() -> None:
    """What is flat in the end must be the clone that was made: another rbd image under its name is neither sealed nor
    removed."""
    cluster = populated()

    def exchange(*args: object) -> None:
        cluster.remove(DEST)
        cluster.create_disk(DEST)

    cluster.do_on("flatten", exchange)
    with pytest.raises(errors.CephError, match="not the flattened clone") as caught:
        clone(make_engine(cluster))
    assert caught.value.step == "flatten"
    assert [text for text in caught.value.undo_failures if "left" in text]
    assert (cluster.content(DEST), cluster.snaps(DEST)) == ({}, [])
    assert cluster.snaps(DISK) == []


class _Killed(BaseException):
    """The engine's process ended."""


# -- space, watchers, rights, the blocklist ------------------------------------------------------------------------


def test_first_record_in_a_full_pool() -> None:
    """Where not even the ledger's object can be made, nothing is begun."""
    cluster = populated()
    before = cluster.picture()
    cluster.fill("vms")
    with pytest.raises(errors.NoSpace) as caught:
        clone(make_engine(cluster))
    assert (caught.value.step, cluster.picture()) == ("reserve", before)


def test_full_pool_of_the_disks() -> None:
    """A snapshot in it could not be read: it is undone. There is room for the job, once there is a ledger."""
    cluster = populated()
    cluster.omap_replace("vms", OBJECT, "earlier", None, None)
    before = cluster.picture()
    cluster.fill("vms")
    with pytest.raises(errors.NoSpace) as caught:
        clone(make_engine(cluster))
    assert caught.value.step == "snap"
    assert cluster.picture() == before


def test_pool_that_fills_up_during_flatten() -> None:
    """Where a full pool refuses the removal, too, the clone stays, in the ledger, and goes once there is room."""
    cluster = populated()
    before = cluster.picture()
    cluster.do_on("flatten", lambda *args: cluster.fill("images"))
    with pytest.raises(errors.NoSpace) as caught:
        clone(make_engine(cluster))
    assert caught.value.step == "flatten"
    assert caught.value.undo_failures
    assert Ledger(cluster, "vms").load(DEST.name).failures
    cluster.fill("images", full=False)
    assert make_engine(cluster).rollback(DEST.name)
    assert cluster.picture() == before


@pytest.mark.parametrize("attempts", [2, float("inf")])
def test_clone_that_somebody_has_open(attempts: float) -> None:
    """A watcher that goes is waited for; one that stays leaves the clone, told and in the ledger."""
    cluster = populated()
    before = cluster.picture()

    def fail(*args: object) -> None:
        cluster.hold(DEST, attempts)
        raise errors.CephError("broken")

    cluster.do_on("flatten", fail)
    with pytest.raises(errors.CephError, match="broken") as caught:
        clone(make_engine(cluster))
    if attempts == 2:
        assert caught.value.undo_failures == []
    else:
        assert "open somewhere" in Ledger(cluster, "vms").load(DEST.name).failures[0]
        cluster.hold(DEST, 0)
        make_engine(cluster).rollback(DEST.name)
    assert cluster.picture() == before


@formats
@pytest.mark.parametrize("again", [False, True], ids=["once", "and again"])
@pytest.mark.parametrize("call", ["create_snap", "clone", "flatten", "protect_snap"])
def test_client_that_is_cut_off(clone_format: int, call: str, again: bool) -> None:
    """A blocklisted client can undo nothing, but the same engine's next connection can; if that is cut off as well, the
    error says what is left, and a later rollback undoes it."""
    cluster, connections = populated(clone_format), []
    before = cluster.picture()

    def connect() -> FakeCluster:
        connections.append(cluster.another())
        connections[-1].blocklisted = again and len(connections) == 2
        return connections[-1]

    engine = make_engine(cluster, connect=connect)
    cluster.do_on(call, lambda *args: setattr(connections[0], "blocklisted", True))
    with pytest.raises(errors.Blocklisted) as caught:
        clone(engine)
    assert bool(caught.value.undo_failures) == again
    if again:
        assert engine.rollback(DEST.name)
    assert cluster.picture() == before


class Engines:
    """An engine whose connections a test can see.

    :ivar connections: in the order they were made.
    """

    def __init__(self, cluster: FakeCluster, **options: Any) -> None:
        self.connections: list[FakeCluster] = []
        self._cluster = cluster
        self.engine = make_engine(cluster, connect=self._connect, **options)

    def _connect(self) -> FakeCluster:
        self.connections.append(self._cluster.another())
        return self.connections[-1]


def test_connection_is_replaced_between_reservation_and_work() -> None:
    """The record names the client that works, so that this is the one which a later life cuts off."""
    cluster = populated()
    before = cluster.picture()
    these, report = Engines(cluster), Reports(hold_at="flatten")
    these.engine.reserve_clone(DEST.name, DISK.name, DEST.pool)
    these.connections[0].blocklisted = True
    assert these.engine.describe(DISK.name)["pool"] == DISK.pool  # whoever asks first notices
    working = in_thread(these.engine.perform, DEST.name, None, report)
    assert report.reached.wait(BOUND_SECONDS)
    assert Ledger(cluster, "vms").load(DEST.name).owner.client == these.connections[1].address()
    make_engine(cluster, life="life-2", images=FakeImages(settles_as=False)).reclaim()
    assert these.connections[1].blocklisted
    assert cluster.picture() == before
    report.go_on.set()
    with pytest.raises(errors.Blocklisted):
        working.result(BOUND_SECONDS)
    assert cluster.picture() == before


def test_two_at_work_are_cut_off_at_once() -> None:
    """The second to notice does not drop the connection that the first has replaced, and whose work goes on."""
    cluster = populated()
    before = cluster.picture()
    these = Engines(cluster)
    names, reports = (image(1), image(2)), (Reports(hold_at="flatten"), Reports(hold_at="flatten"))
    working = [in_thread(clone, these.engine, report, name) for name, report in zip(names, reports)]
    assert all(report.reached.wait(BOUND_SECONDS) for report in reports)
    these.connections[0].blocklisted = True
    for report, work in zip(reports, working):
        report.go_on.set()
        with pytest.raises(errors.Blocklisted) as caught:
            work.result(BOUND_SECONDS)
        assert caught.value.undo_failures == []
    assert len(these.connections) == 2
    assert not these.connections[1].blocklisted
    assert cluster.picture() == before


@formats
def test_guest_that_is_silent_keeps_its_disk(clone_format: int) -> None:
    """A frozen one would lose it to a change of its snapshots: the image is made, and the snapshot goes later."""
    cluster = populated(clone_format)
    before = cluster.picture()
    engine, report = make_engine(cluster), Reports(hold_at="flatten")
    working = in_thread(clone, engine, report)
    assert report.reached.wait(BOUND_SECONDS)
    cluster.freeze_holder(DISK)
    report.go_on.set()
    working.result(BOUND_SECONDS)
    with pytest.raises(errors.SnapError) as caught:
        engine.finish(DEST.name)
    assert "does not answer" in caught.value.report()
    made = cluster.picture()["images"]
    engine.reclaim()
    assert len(cluster.snaps(DISK)) == 1
    cluster.freeze_holder(DISK, frozen=False)
    engine.reclaim()
    assert cluster.picture() == {**before, "images": made}
    assert cluster.content(DEST) == FROZEN


def test_frozen_snapshot_of_a_silent_guest_stays_for_now() -> None:
    """It is undone once the guest answers."""
    cluster = populated()
    before = cluster.picture()
    engine = make_engine(cluster)
    freeze(engine)
    cluster.freeze_holder(DISK)
    with pytest.raises(errors.SnapError):
        engine.rollback(COPY)
    assert len(cluster.snaps(DISK)) == 1
    cluster.freeze_holder(DISK, frozen=False)
    engine.reclaim()
    assert cluster.picture() == before


def test_nobody_is_cut_off_whose_undo_failed() -> None:
    """A server that was migrated is deleted: what its old host could not undo is undone, and that host works on."""
    cluster = populated()
    theirs = cluster.another()
    cluster.fail_on("flatten", errors.NoSpace)
    cluster.fail_on("remove", errors.NoPermission)
    with pytest.raises(errors.NoSpace):
        clone(make_engine(cluster, host="compute-9", connect=lambda: theirs))
    make_engine(cluster).cancel(SERVER)
    assert (cluster.snaps(DISK), cluster.exists(DEST)) == ([], False)
    assert not theirs.blocklisted


def test_takeover_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Whose client was cut off, by whom and for which job: who is cut off cannot tell."""
    cluster = populated()
    theirs = cluster.another()
    clone(make_engine(cluster, host="compute-9", connect=lambda: theirs))
    with caplog.at_level(logging.WARNING), pytest.raises(errors.InDoubt):
        make_engine(cluster, images=FakeImages(uses_it=None)).end(DEST.name, "")
    (record,) = caplog.records
    for word in (DEST.name, "compute-9", theirs.address()):
        assert word in record.getMessage()


class Queue:
    """A lock that tells who has come for it so far."""

    def __init__(self) -> None:
        self.callers: list[int] = []
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self.callers.append(threading.get_ident())
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def test_cluster_that_cannot_be_reached_is_tried_once_for_all() -> None:
    """Whoever waited for an attempt that failed has waited long enough; the next one tries anew."""
    callers, attempts, cluster = 16, [], populated()

    def connect() -> FakeCluster:
        attempts.append(None)
        if len(attempts) > 1:
            return cluster
        eventually(lambda: len(queue.callers) == callers, "all of them wait", BOUND_SECONDS)
        raise errors.Unreachable("no monitor answers")

    engine = make_engine(cluster, connect=connect)
    engine._connection._connecting = queue = Queue()
    with ThreadPoolExecutor(callers) as pool:
        for call in [pool.submit(engine.check) for _ in range(callers)]:
            with pytest.raises(errors.Unreachable, match="no monitor answers"):
                call.result(BOUND_SECONDS)
    assert len(attempts) == 1
    assert engine.check() == []


def test_nobody_is_cut_off_for_a_record_alone() -> None:
    """All that is left of a job is a record of Glance's: its engine may be at work on others."""
    cluster = populated()
    these = Engines(cluster, images=FakeImages(settles_as=None))
    freeze(make_engine(cluster, life="life-0"))
    these.engine.reclaim()
    assert Ledger(cluster, "vms").load(COPY).step == "record"
    assert Ledger(cluster, "vms").load(COPY).owner.client == these.connections[0].address()
    other = make_engine(cluster, host="compute-2", images=FakeImages(settles_as=False))
    assert other.cancel(SERVER) == []
    other.end(COPY, "")
    assert not these.connections[0].blocklisted
    assert records(cluster) == {}


def test_check_names_option_and_remedy() -> None:
    """Pools that do not exist and pools without rights are told by the option that names them; else nothing is said."""
    cluster = populated()
    before = cluster.picture()
    assert make_engine(cluster, glance_pool="images").check() == []
    (missing,) = make_engine(cluster, glance_pool="imagse").check()
    assert "[rbd_snap] glance_pool" in missing
    assert "'imagse'" in missing
    stranger = cluster.another()
    stranger.forbidden.add("vms")
    (denied,) = make_engine(cluster, connect=lambda: stranger).check()
    assert "[libvirt] rbd_user nova" in denied
    assert "'vms'" in denied
    assert "profile rbd" in denied
    assert cluster.picture() == before


# -- whose job it is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [{"host": "compute-2"}, {"machine": "machine-2"}])
@pytest.mark.parametrize("call", ["finish", "rollback"])
def test_job_of_another_host_is_left_alone(call: str, other: dict[str, str]) -> None:
    """Neither finished nor undone, whoever asks: its owner may be at work."""
    cluster = populated()
    clone(make_engine(cluster))
    before = cluster.picture()
    with pytest.raises(errors.LedgerConflict, match="compute-1"):
        getattr(make_engine(cluster, **other), call)(DEST.name)
    assert cluster.picture() == before


@formats
@pytest.mark.parametrize("call", ["finish", "rollback"])
def test_ready_job_of_an_earlier_engine(clone_format: int, call: str) -> None:
    """The next engine of the same host finishes or undoes what a dead one had ready."""
    worlds = [populated(clone_format), populated(clone_format)]
    for cluster, engines in zip(worlds, (1, 2)):
        first = make_engine(cluster)
        clone(first)
        getattr(first if engines == 1 else make_engine(cluster), call)(DEST.name)
    pictures = [cluster.picture() for cluster in worlds]
    for picture in pictures:
        for found in picture["images"]["images"].values():
            del found["id"]  # counted by connections, too
            found["snaps"] = [snap[1:] for snap in found["snaps"]]
        del picture["vms"]["images"][DISK.name]["id"]
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize(
    ("clone_format", "step"),
    [(2, step) for step in ("snap", "clone", "flatten", "seal")] + [(1, step) for step in ("snap", "protect", "clone")],
)
def test_late_engine_leaves_nothing(clone_format: int, step: str) -> None:
    """An engine that goes on at any step after the next life's engine undid its job is cut off, and leaves nothing."""
    cluster = populated(clone_format)
    before = cluster.picture()
    report = Reports(hold_at=step)
    working = in_thread(clone, make_engine(cluster), report)
    assert report.reached.wait(BOUND_SECONDS)
    make_engine(cluster, life="life-2", images=FakeImages(settles_as=False)).reclaim()
    assert cluster.picture() == before
    report.go_on.set()
    with pytest.raises(errors.Blocklisted) as caught:
        working.result(BOUND_SECONDS)
    assert caught.value.undo_failures == []
    assert cluster.picture() == before


def test_late_engine_leaves_the_record_to_its_new_owner() -> None:
    """Where another engine took the job over and could not undo all of it, the late one does not touch the record."""
    cluster, images = populated(), FakeImages(settles_as=False)
    before = cluster.picture()
    report = Reports(hold_at="flatten")
    working = in_thread(clone, make_engine(cluster), report)
    assert report.reached.wait(BOUND_SECONDS)
    cluster.fail_on("remove", errors.NoPermission)
    make_engine(cluster, life="life-2", images=images).reclaim()
    taken_over = records(cluster)
    assert "life-2" in taken_over[DEST.name]
    report.go_on.set()
    with pytest.raises(errors.Blocklisted) as caught:
        working.result(BOUND_SECONDS)
    assert any("belongs to" in failure for failure in caught.value.undo_failures)
    assert records(cluster) == taken_over
    make_engine(cluster, life="life-3", images=images).reclaim()
    assert cluster.picture() == before


@pytest.mark.parametrize("ready", [False, True])
def test_same_request_twice(ready: bool) -> None:
    """A second request for an image that has a job is refused, and the first is not disturbed."""
    cluster = populated()
    engine, report = make_engine(cluster), Reports(hold_at=None if ready else "snap")
    first = in_thread(clone, engine, report)
    if ready:
        first.result(BOUND_SECONDS)
    else:
        assert report.reached.wait(BOUND_SECONDS)
    with pytest.raises((errors.LedgerConflict, errors.AlreadyThere)):
        clone(engine)
    report.go_on.set()
    assert first.result(BOUND_SECONDS)
    engine.finish(DEST.name)
    assert cluster.content(DEST) == FROZEN
    assert records(cluster) == {}


def test_record_of_a_newer_release() -> None:
    """It is kept, it blocks its own image only, and other jobs run as ever."""
    cluster = populated()
    text = '{"version": 99}'
    cluster.omap_replace("vms", OBJECT, DEST.name, None, text)
    engine = make_engine(cluster)
    with pytest.raises(errors.LedgerConflict):
        clone(engine)
    assert not engine.rollback(DEST.name)
    clone(engine, image_id=image(1))
    engine.finish(image(1))
    assert records(cluster) == {DEST.name: text}


# -- the end -------------------------------------------------------------------------------------------------------


@formats
@pytest.mark.parametrize("end", [lambda engine: engine.cancel(SERVER), Engine.stop], ids=["cancel", "stop"])
def test_cancelled_during_flatten(clone_format: int, end: Callable[[Engine], object]) -> None:
    """Deleting the server, or stopping the engine, ends a flatten under way and undoes its job."""
    cluster = populated(clone_format)
    disk = endless_disk(cluster)
    before = cluster.picture()
    engine, report = make_engine(cluster), UntilFlattening()
    working = in_thread(lambda: clone(engine, report, disk=disk.name))
    assert report.reached.wait(BOUND_SECONDS)
    end(engine)
    with pytest.raises(errors.Cancelled) as caught:
        working.result(BOUND_SECONDS)
    assert caught.value.step == "flatten"
    assert cluster.picture() == before


@pytest.mark.parametrize(
    ("clone_format", "during", "stopped_at"),
    [(2, "snap", "clone"), (2, "clone", "flatten"), (1, "snap", "protect"), (1, "protect", "clone")],
)
def test_cancelled_between_steps(clone_format: int, during: str, stopped_at: str) -> None:
    """A step that cannot be stopped runs to its end; the next one does not begin, and all is undone."""
    cluster = populated(clone_format)
    before = cluster.picture()
    engine = make_engine(cluster, operation_timeout=0)  # cancel, called from within the work, does not wait for it

    def cancel(step: str, done: int, total: int) -> None:
        if step == during:
            assert engine.cancel(SERVER) == []  # not yet

    with pytest.raises(errors.Cancelled) as caught:
        clone(engine, cancel)
    assert caught.value.step == stopped_at
    assert cluster.picture() == before


@formats
@pytest.mark.parametrize("then", ["finish", "rollback"])
def test_cancel_lets_the_disk_go(clone_format: int, then: str) -> None:
    """Deleting a server frees its disk of all our snapshots; its image that awaits registration stays, and can still
    be finished or rolled back; another server's work is not touched."""
    cluster = populated(clone_format)
    others = ImageSpec("vms", "33333333-3333-4333-8333-333333333333_disk")
    cluster.create_disk(others)
    engine = make_engine(cluster)
    freeze(engine, copy_id(image(1)), others.name)
    before = cluster.picture()
    clone(engine)
    ready = cluster.picture()
    freeze(engine)
    assert engine.cancel(SERVER) == [COPY]
    assert cluster.snaps(DISK) == []
    after = cluster.picture()
    assert after["images"] == ready["images"]
    assert after["vms"]["omap"] == ready["vms"]["omap"]
    getattr(engine, then)(DEST.name)
    after = cluster.picture()
    if then == "finish":
        assert after["images"]["images"].pop(DEST.name) == ready["images"]["images"][DEST.name]
    assert after == before


def test_cancel_goes_on_after_trouble() -> None:
    """One job that cannot be undone does not keep the others on the disk that is about to be deleted."""
    cluster = populated()
    before = cluster.picture()
    first, second = copy_id(image(1)), copy_id(image(2))
    for job_id in (first, second):
        freeze(make_engine(cluster), job_id)
    cluster.fail_on("remove_snap_by_id", errors.NoPermission)
    with pytest.raises(errors.SnapError, match=first):
        make_engine(cluster).cancel(SERVER)
    assert [job.id for job in Ledger(cluster, "vms").read().jobs] == [first]
    assert make_engine(cluster).cancel(SERVER) == [first]
    assert cluster.picture() == before


def test_cancel_takes_over_what_another_host_left() -> None:
    """The server is here now: whoever worked on its disk elsewhere is cut off, and its snapshot goes."""
    cluster, theirs = populated(), []
    before = cluster.picture()

    def connect() -> FakeCluster:
        theirs.append(cluster.another())
        return theirs[-1]

    freeze(make_engine(cluster, host="compute-2", connect=connect))
    make_engine(cluster).cancel(SERVER)
    assert cluster.snaps(DISK) == []
    assert [connection.blocklisted for connection in theirs] == [True]
    # The image record is another matter: it is not waited for while a server is being deleted.
    make_engine(cluster, images=FakeImages(settles_as=False)).reclaim()
    assert cluster.picture() == before


def test_stopped_engine_takes_no_work() -> None:
    """After stop nothing is begun."""
    cluster = populated()
    before = cluster.picture()
    engine = make_engine(cluster)
    engine.stop()
    with pytest.raises(errors.Cancelled):
        clone(engine)
    assert cluster.picture() == before


@formats
@pytest.mark.parametrize("registered", [True, False, None])
def test_settle_after_nova_compute_died(clone_format: int, registered: Optional[bool]) -> None:
    """What awaited registration is finished if Glance uses it, undone if it does not, and kept if nobody can say."""
    cluster, images = populated(clone_format), FakeImages(settles_as=registered)
    before = cluster.picture()
    engine = make_engine(cluster, images=images)
    url = clone(engine)
    ready = cluster.picture()
    engine.stop()
    engine.settle()
    assert images.asked[0] == (DEST.name, url)
    after = cluster.picture()
    if registered:
        assert after["images"] == ready["images"]
        assert after["vms"] == before["vms"]
    elif registered is False:
        assert after == before
    else:
        assert after["images"] == ready["images"]
        assert Ledger(cluster, "vms").load(DEST.name).orphaned


@pytest.mark.parametrize("trouble", [errors.NotAuthorized, ZeroDivisionError])
def test_settle_goes_on_after_trouble(trouble: type[Exception]) -> None:
    """A job that cannot be settled, for whatever reason, stays as it is and holds up no other; a freeze just goes."""
    cluster, images = populated(), FakeImages(settles_as=False)
    before = cluster.picture()

    def settle(image_id: str, url: str, server: str) -> bool:
        if image_id == image(1):
            raise trouble("no answer")
        return False

    images.settle = settle  # type: ignore[method-assign]
    engine = make_engine(cluster, images=images)
    clone(engine, image_id=image(1))
    kept = cluster.picture()["images"]
    clone(engine, image_id=image(2))
    freeze(engine, copy_id(image(3)))
    engine.settle()
    assert cluster.picture()["images"] == kept
    assert [job.id for job in Ledger(cluster, "vms").read().jobs] == [image(1)]
    engine.rollback(image(1))
    assert cluster.picture() == before


def test_idle_once_all_is_taken() -> None:
    """An engine told to end waits for what nova-compute still has to finish or roll back, and no longer."""
    cluster = populated()
    engine = make_engine(cluster)
    clone(engine)
    assert not engine.wait_until_idle(0)
    waiting = threading.Thread(target=engine.wait_until_idle, args=[BOUND_SECONDS], daemon=True)
    waiting.start()
    engine.finish(DEST.name)
    waiting.join(BOUND_SECONDS)
    assert not waiting.is_alive()


def test_many_at_once() -> None:
    """Snapshots of one disk run side by side, each whole."""
    cluster = populated()
    engine = make_engine(cluster)
    names = [image(number) for number in range(8)]
    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(lambda name: (clone(engine, image_id=name), engine.finish(name)), names))
    assert all(cluster.content(ImageSpec("images", name)) == FROZEN for name in names)
    assert records(cluster) == {}
    assert cluster.snaps(DISK) == []
    assert cluster.content(ImageSpec("images", "base")) == BASE
