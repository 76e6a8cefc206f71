# SPDX-License-Identifier: Apache-2.0
"""What an engine does about the jobs of earlier ones: which it may touch, what becomes of them, and what stays."""

from __future__ import annotations

import logging
import threading
from typing import Callable, Optional

import pytest

from nova_rbd_snap import errors
from nova_rbd_snap.engine.service import Engine
from nova_rbd_snap.ledger.store import OBJECT, Ledger
from tests.fakes.cluster import HALF_MADE, FakeCluster
from tests.fakes.engine import (
    COPY,
    DEST,
    DISK,
    FROZEN,
    FakeImages,
    Reports,
    clone,
    freeze,
    image,
    in_thread,
    make_engine,
    populated,
)

STEPS = {1: ("snap", "protect", "clone", "flatten", "seal"), 2: ("snap", "clone", "flatten", "seal")}
formats = pytest.mark.parametrize("clone_format", [1, 2])
each_step = pytest.mark.parametrize(
    ("clone_format", "step"), [(number, step) for number, steps in STEPS.items() for step in steps]
)


class Killed(BaseException):
    """The engine's process ends."""


def die_at(step: str) -> Callable[[str, int, int], None]:
    def report(now: str, done: int, total: int) -> None:
        if now == step:
            raise Killed

    return report


def dead_at(step: str, clone_format: int = 2) -> tuple[FakeCluster, dict[str, object], FakeCluster]:
    """A cluster in which an engine died as it began *step*; how it looked before; and that engine's connection."""
    cluster, connections = populated(clone_format), []
    before = cluster.picture()

    def connect() -> FakeCluster:
        connections.append(cluster.another())
        return connections[-1]

    with pytest.raises(Killed):
        clone(make_engine(cluster, connect=connect), die_at(step))
    return cluster, before, connections[0]


def jobs(cluster: FakeCluster) -> list[str]:
    return [job.id for job in Ledger(cluster, DISK.pool).read().jobs]


def next_engine(cluster: FakeCluster, settles_as: Optional[bool] = False, **more: object) -> Engine:
    return make_engine(cluster, life="life-2", images=FakeImages(settles_as=settles_as), **more)


# -- nova-compute died, with its engine ------------------------------------------------------------------------------


@each_step
def test_dead_at_a_step(clone_format: int, step: str) -> None:
    """The next life undoes it, its image record included, and the dead one's client is cut off first."""
    cluster, before, dead = dead_at(step, clone_format)
    images = FakeImages(settles_as=False)
    make_engine(cluster, life="life-2", images=images).reclaim()
    assert cluster.picture() == before
    assert dead.blocklisted
    assert {image_id for image_id, _ in images.asked} == {DEST.name}


@formats
@pytest.mark.parametrize("settles_as", [True, False, None])
def test_dead_while_it_registered(clone_format: int, settles_as: Optional[bool]) -> None:
    """Glance's word decides: an image that is in use stays, one that is not goes, and in doubt all is kept."""
    cluster = populated(clone_format)
    before = cluster.picture()
    clone(make_engine(cluster))
    ready = cluster.picture()
    next_engine(cluster, settles_as).reclaim()
    after = cluster.picture()
    if settles_as is False:
        assert after == before
    else:
        assert after["images"] == ready["images"]
        assert jobs(cluster) == ([DEST.name] if settles_as is None else [])


@each_step
def test_without_glances_word(clone_format: int, step: str) -> None:
    """What provably is an unfinished clone of the job goes all the same; what may be in use stays; the image record,
    which may wait for ever, is kept on the list until Glance can be asked."""
    cluster, before, _ = dead_at(step, clone_format)
    next_engine(cluster, None).reclaim()
    after = cluster.picture()
    assert jobs(cluster) == [DEST.name]
    if step == "seal":  # flat: nothing tells it from an image of Glance's
        assert DEST.name in after["images"]["images"]
    else:
        assert after["images"] == before["images"]
        assert after["vms"]["images"] == before["vms"]["images"]
        (failure,) = Ledger(cluster, "vms").load(DEST.name).failures
        assert failure.startswith(f"record: image {DEST.name}")
    next_engine(cluster, False).reclaim()
    assert cluster.picture() == before


@pytest.mark.parametrize("half", HALF_MADE)
@pytest.mark.parametrize("settles_as", [False, None])
def test_half_made_clone(half: str, settles_as: Optional[bool]) -> None:
    """It goes on Glance's word, or where it names its parent; else it is kept: Glance itself may be writing one of
    that name."""
    cluster = populated()
    before = cluster.picture()
    cluster.fail_clone(half, Killed)
    with pytest.raises(Killed):
        clone(make_engine(cluster))
    next_engine(cluster, settles_as).reclaim()
    if settles_as is False:
        assert cluster.picture() == before
    else:
        assert (DEST.name in cluster.picture()["images"]["images"]) == (half != "unlisted")
        next_engine(cluster, False).reclaim()
        assert cluster.picture() == before


def test_image_in_use_is_kept_whatever_the_record_says() -> None:
    """A record that calls for its removal, of an image that Glance uses, is not believed: only what it left on the disk
    goes. As a rule the image is Nova's own copy, made after a clone that could not be undone."""
    cluster, before, _ = dead_at("seal")
    kept = cluster.picture()["images"]
    next_engine(cluster, True).reclaim()
    assert cluster.picture() == {**before, "images": kept}


def test_frozen_snapshot_goes_without_glances_word() -> None:
    """It holds up the disk; what becomes of the image record is seen to after it."""
    cluster = populated()
    before = cluster.picture()
    freeze(make_engine(cluster))
    next_engine(cluster, None).reclaim()
    assert cluster.snaps(DISK) == []
    assert jobs(cluster) == [COPY]
    images = FakeImages(settles_as=False)
    make_engine(cluster, life="life-3", images=images).reclaim()
    assert images.asked == [(DEST.name, "")]
    assert cluster.picture() == before


def asked_once_no_snapshot_is_left(cluster: FakeCluster) -> FakeImages:
    """Glance that says of every record that it is settled, and is gone."""
    images = FakeImages()

    def settle(image_id: str, url: str, server: str) -> bool:
        assert cluster.snaps(DISK) == []
        return False

    images.settle = settle  # type: ignore[method-assign]
    return images


def test_frozen_snapshots_come_first() -> None:
    """A Glance that keeps one waiting does not keep the frozen snapshots on the disks."""
    cluster = populated()
    engine = make_engine(cluster)
    clone(engine)
    freeze(engine)
    make_engine(cluster, life="life-2", images=asked_once_no_snapshot_is_left(cluster)).reclaim()
    assert jobs(cluster) == []


def test_no_snapshot_waits_for_the_word_about_another() -> None:
    """Glance is asked once all has been done that needs no word of it."""
    cluster = populated()
    engine = make_engine(cluster)
    for number in range(3):
        freeze(engine, f"22222222-2222-4222-8222-00000000000{number}-copy")
    make_engine(cluster, life="life-2", images=asked_once_no_snapshot_is_left(cluster)).reclaim()
    assert jobs(cluster) == []


def test_namesake_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """This host's name, and its machine or its cloud: left alone, and told once, for one of them may have changed. Of
    another cloud's machine of that name nothing is said."""
    cluster = populated()
    freeze(make_engine(cluster, machine="machine-0"))
    clone(make_engine(cluster, cloud="former address"))
    clone(make_engine(cluster, machine="machine-0", cloud="elsewhere"), image_id="22222222-2222-4222-8222-222222222223")
    left = cluster.picture()
    engine = make_engine(cluster, life="life-2", images=FakeImages(False, False))
    with caplog.at_level(logging.WARNING):
        engine.reclaim()
        engine.reclaim()
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert "machine-0" in told[0]
    assert "former address" in told[1]
    assert cluster.picture() == left


def test_glance_that_cannot_be_asked_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """What stays, and why, is told; once, not at every look."""
    cluster, images = populated(), FakeImages()
    clone(make_engine(cluster))
    images.error = errors.NotAuthorized("the user of section [service_user] lacks the role 'admin'")
    engine = make_engine(cluster, life="life-2", images=images)
    with caplog.at_level(logging.WARNING):
        engine.reclaim()
        engine.reclaim()
    (record,) = caplog.records
    assert DEST.name in record.getMessage()
    assert "lacks the role 'admin'" in record.getMessage()


@formats
@pytest.mark.parametrize("settles_as", [False, None])
def test_nova_compute_dies_while_its_engine_works(clone_format: int, settles_as: Optional[bool]) -> None:
    """The engine stops, undoes its work, and sees to the image record that nobody else would delete; where Glance
    cannot be asked the next life's engine does."""
    cluster = populated(clone_format)
    before = cluster.picture()
    images = FakeImages(settles_as=settles_as)
    engine, report = make_engine(cluster, images=images), Reports(hold_at="flatten")
    working = in_thread(clone, engine, report)
    assert report.reached.wait(30)
    engine.orphan()
    stopping = threading.Thread(target=engine.stop, daemon=True)
    stopping.start()
    report.go_on.set()
    stopping.join(30)
    with pytest.raises(errors.Cancelled):
        working.result(30)
    engine.settle()
    assert [image_id for image_id, _ in images.asked] == [DEST.name]
    if settles_as is None:
        assert jobs(cluster) == [DEST.name]
        assert Ledger(cluster, "vms").load(DEST.name).step == "record"
        next_engine(cluster, False).reclaim()
    assert cluster.picture() == before


# -- nova-compute lives ------------------------------------------------------------------------------------------------


def test_what_nova_compute_has_the_say_about_is_left_alone() -> None:
    """At work, awaiting registration, or of an engine that died meanwhile: it is not this engine's to end."""
    cluster = populated()
    report = Reports(hold_at="flatten")
    engine = make_engine(cluster, images=FakeImages(uses_it=False, settles_as=False))
    working = in_thread(clone, engine, report)
    assert report.reached.wait(30)
    engine.reclaim()
    report.go_on.set()
    working.result(30)
    ready = cluster.picture()
    engine.reclaim()
    make_engine(cluster, held=[DEST.name], images=FakeImages(uses_it=False, settles_as=False)).reclaim()
    assert cluster.picture() == ready
    assert cluster.content(DEST) == FROZEN


@pytest.mark.parametrize("uses_it", [True, False, None])
def test_left_in_doubt(uses_it: Optional[bool]) -> None:
    """nova-compute gave it up: as soon as Glance's record says, it is ended, without a restart of anything."""
    cluster = populated()
    before = cluster.picture()
    images = FakeImages(uses_it=None)
    engine = make_engine(cluster, images=images)
    clone(engine)
    ready = cluster.picture()
    engine.leave(DEST.name)
    engine.reclaim()
    assert cluster.picture() == ready
    images.uses_it = uses_it
    engine.reclaim()
    assert jobs(cluster) == ([DEST.name] if uses_it is None else [])
    assert (cluster.picture() == before) == (uses_it is False)


def test_failed_undo_is_done_again() -> None:
    """What the cluster did not let us undo is undone once it does, by the same engine."""
    cluster = populated()
    before = cluster.picture()
    engine = make_engine(cluster)
    cluster.do_on("flatten", lambda *args: cluster.fill("images"))
    with pytest.raises(errors.NoSpace):
        clone(engine)
    engine.reclaim()
    assert jobs(cluster) == [DEST.name]
    cluster.fill("images", full=False)
    engine.reclaim()
    assert cluster.picture() == before


def test_what_was_undone_is_not_looked_for_again() -> None:
    """The clone is gone, only its snapshot is not: an image that Nova's own copy makes of its name meanwhile stays."""
    cluster = populated()
    cluster.fail_on("clone", errors.CephError)
    cluster.fail_on("remove_snap_by_id", errors.NoPermission)
    engine = make_engine(cluster, images=FakeImages(uses_it=False))
    with pytest.raises(errors.CephError):
        clone(engine)
    cluster.create_disk(DEST)
    theirs = cluster.picture()["images"]
    engine.reclaim()
    assert cluster.picture()["images"] == theirs
    assert cluster.snaps(DISK) == []
    assert jobs(cluster) == []


def test_rollback_that_failed_is_not_reconsidered() -> None:
    """Once nova-compute has said that Glance does not use the image, the rest of its removal needs no second word."""
    cluster = populated()
    before = cluster.picture()
    engine = make_engine(cluster, images=FakeImages(uses_it=False))
    clone(engine)
    cluster.fail_on("remove", errors.NoPermission)
    with pytest.raises(errors.SnapError, match="could not be undone"):
        engine.rollback(DEST.name)
    assert Ledger(cluster, "vms").load(DEST.name).step == "clone"
    engine.reclaim()
    assert cluster.picture() == before


def test_heals_by_itself() -> None:
    """Now and again, until the engine is stopped."""
    cluster = populated()
    before = cluster.picture()
    clone(make_engine(cluster))
    cluster.fail_on("omap_items", errors.Unreachable)
    engine = next_engine(cluster, reclaim_interval=0.01)
    healed = threading.Event()
    cluster.do_on("omap_items", lambda *args: healed.set(), nth=8)
    keeper = threading.Thread(target=engine.upkeep.keep_reclaiming, daemon=True)
    keeper.start()
    assert healed.wait(30)
    engine.stop()
    keeper.join(30)
    assert not keeper.is_alive()
    assert cluster.picture() == before


# -- others ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [{"host": "compute-2"}, {"machine": "machine-2"}])
def test_jobs_of_others_are_left_alone(other: dict[str, str]) -> None:
    """Of another host, and of a host of the same name in another cloud: not even their clients are cut off."""
    cluster, _, theirs = dead_at("flatten")
    left = cluster.picture()
    next_engine(cluster, **other).reclaim()
    assert cluster.picture() == left
    assert not theirs.blocklisted


def test_operators_word() -> None:
    """Named by an operator a job of another host is ended as if it were ours, its client cut off first."""
    cluster, before, theirs = dead_at("flatten")
    next_engine(cluster, host="compute-2").end(DEST.name, "")
    assert theirs.blocklisted
    assert cluster.picture() == before
    with pytest.raises(errors.NoRecord):
        next_engine(cluster, host="compute-2").end(DEST.name, "")


def test_nobody_is_touched_without_fencing() -> None:
    """Where the dead engine's client cannot be cut off its job stays: it might still be at work."""
    cluster, _, theirs = dead_at("flatten")
    left = cluster.picture()
    weak = cluster.another()
    weak.may_fence = False
    next_engine(cluster, connect=lambda: weak).reclaim()
    assert cluster.picture() == left
    assert not theirs.blocklisted


@pytest.mark.parametrize("text", ["not json", '{"version": 99}'])
def test_strange_records_are_told_once(text: str, caplog: pytest.LogCaptureFixture) -> None:
    """Kept, listed, and in nobody's way."""
    cluster = populated()
    cluster.omap_replace("vms", OBJECT, image(7), None, text)
    engine = make_engine(cluster)
    with caplog.at_level(logging.WARNING):
        engine.reclaim()
        engine.reclaim()
    assert [image(7) in record.getMessage() for record in caplog.records] == [True]
    clone(engine)
    engine.finish(DEST.name)
    assert cluster.omap_items("vms", OBJECT) == {image(7): text}


def test_ledger_that_cannot_be_read(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is reclaimed, and the log says so; the look itself raises nothing."""
    cluster, _, _ = dead_at("flatten")
    left = cluster.picture()
    cluster.fail_on("omap_items", errors.CephError)
    next_engine(cluster).reclaim()
    assert "cannot be read" in caplog.text
    assert cluster.picture() == left


@pytest.mark.parametrize("call", sorted({"lookup", "exists", "snaps", "fence", "remove", "omap_replace", "omap_items"}))
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_two_reclaimers_at_once(call: str, nth: int) -> None:
    """A second one that starts at any moment of the first's work does no harm: all is undone once."""
    cluster, before, _ = dead_at("seal")
    second = next_engine(cluster)
    cluster.do_on(call, lambda *args: second.reclaim(), nth=nth)
    next_engine(cluster).reclaim()
    next_engine(cluster).reclaim()
    assert cluster.picture() == before


@pytest.mark.parametrize("applied", [False, True], ids=["before", "applied"])
@pytest.mark.parametrize("settles_as", [True, False])
def test_reclaimer_killed_anywhere(settles_as: bool, applied: bool) -> None:
    """Killed at whichever of its calls, the next one ends the job as it would have."""

    def world() -> FakeCluster:
        cluster = populated()
        clone(make_engine(cluster))
        cluster.calls.clear()
        return cluster

    cluster = world()
    next_engine(cluster, settles_as).reclaim()
    wanted, count = cluster.picture(), len(cluster.calls)
    assert count > 3
    for nth in range(1, count + 1):
        cluster = world()
        cluster.fail_on("*", Killed, nth, applied)
        with pytest.raises(Killed):
            next_engine(cluster, settles_as).reclaim()
        make_engine(cluster, life="life-3", images=FakeImages(settles_as=settles_as)).reclaim()
        assert cluster.picture() == wanted
