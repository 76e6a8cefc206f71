# SPDX-License-Identifier: Apache-2.0
"""Whatever fails or dies, the pools end as they were: every call of every way, one after the other.

The calls are not listed here: each way is run once while the tests are collected, and whatever it called is broken.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Callable

import pytest

from nova_rbd_snap import errors
from nova_rbd_snap.engine.service import Engine
from nova_rbd_snap.ledger.store import OBJECT, Ledger
from tests.fakes.cluster import HALF_MADE, FakeCluster
from tests.fakes.engine import COPY, DEST, DISK, Reports, clone, freeze, make_engine, populated


class Killed(BaseException):
    """The engine's process ends: nothing of it runs any more, not even an ``except Exception``."""


@dataclass(frozen=True)
class Way:
    """Something an engine does in steps."""

    name: str
    clone_format: int
    job_id: str
    steps: tuple[str, ...]
    start: Callable[[Engine, Reports], object]


WAYS = [
    Way("clone-2", 2, DEST.name, ("reserve", "snap", "clone", "flatten", "seal"), clone),
    Way("clone-1", 1, DEST.name, ("reserve", "snap", "protect", "clone", "flatten", "seal"), clone),
    Way("freeze", 2, COPY, ("reserve", "snap"), lambda engine, report: freeze(engine, report=report)),
]
CLONES = WAYS[:2]


@dataclass(frozen=True)
class Call:
    """One call a way makes: the *nth* of its *name*, in *step*."""

    way: Way
    name: str
    nth: int
    step: str

    def __str__(self) -> str:
        return f"{self.way.name}-{self.step}-{self.name}-{self.nth}"


def calls_of(way: Way, act: Callable[[FakeCluster], None]) -> Iterator[Call]:
    """What *act* calls from the first change on: the ledger's first record."""
    cluster = populated(way.clone_format)
    act(cluster)
    written = 0
    for index, name in enumerate(cluster.calls):
        if written or name == "omap_replace":
            yield Call(way, name, cluster.calls[: index + 1].count(name), way.steps[min(written, len(way.steps) - 1)])
        written += name == "omap_replace"


FORWARD = [
    call
    for way in WAYS
    for call in calls_of(way, lambda cluster, way=way: way.start(make_engine(cluster), Reports()))  # type: ignore[misc]
]


def break_the_end(cluster: FakeCluster, way: Way) -> None:
    """Let the last change of the way fail, so that all of it must be undone."""
    if way.job_id == DEST.name:
        cluster.fail_on("protect_snap", errors.NoSpace, nth={1: 2, 2: 1}[way.clone_format])
    else:
        cluster.fail_on("create_snap", errors.NoSpace)


def undoing_calls_of(way: Way) -> Iterator[Call]:
    """What is called after the last change of the way failed."""

    def act(cluster: FakeCluster) -> None:
        break_the_end(cluster, way)
        with pytest.raises(errors.NoSpace):
            way.start(make_engine(cluster), Reports())

    going_forward = sum(call.way is way for call in FORWARD) - 1  # all but the last record
    return itertools.islice(calls_of(way, act), going_forward, None)


BACKWARD = [call for way in WAYS for call in undoing_calls_of(way)]

ERRORS = [
    errors.Missing,
    errors.Busy,
    errors.HasSnapshots,
    errors.NoPermission,
    errors.NoSpace,
    errors.NotSupported,
    errors.CephError,
    errors.Unreachable,
    errors.Blocklisted,
]
before_or_applied = pytest.mark.parametrize("applied", [False, True], ids=["before", "applied"])
each_call = pytest.mark.parametrize("call", FORWARD, ids=str)
each_undoing_call = pytest.mark.parametrize("call", BACKWARD, ids=str)


#: "Not found" from a removal is no failure but a reason to look again.
REMOVALS = [
    call for call in FORWARD if call.step == "seal" and call.name in ("ask_holder", "unprotect_snap", "remove_snap")
]


@pytest.mark.parametrize("call", REMOVALS, ids=str)
def test_not_found_from_a_removal_is_not_gone(call: Call) -> None:
    """A snapshot that a removal did not find counts as gone only if it is."""
    cluster = populated(call.way.clone_format)
    before = cluster.picture()
    cluster.fail_on(call.name, errors.Missing, call.nth)
    with pytest.raises(errors.CephError, match="still there"):
        call.way.start(make_engine(cluster), Reports())
    assert cluster.picture() == before


@before_or_applied
@pytest.mark.parametrize(
    ("call", "error"),
    [(call, error) for call in FORWARD for error in ERRORS if (error, call in REMOVALS) != (errors.Missing, True)],
    ids=str,
)
def test_failed_call_leaves_no_trace(call: Call, error: type[errors.SnapError], applied: bool) -> None:
    """Whichever call fails before the job is ready, with whatever error, done or not: the pools look as before, and the
    caller gets that first error with the step's name."""
    cluster = populated(call.way.clone_format)
    before = cluster.picture()
    cluster.fail_on(call.name, error, call.nth, applied)
    with pytest.raises(error) as caught:
        call.way.start(make_engine(cluster), Reports())
    assert cluster.picture() == before
    assert type(caught.value) is error
    assert (caught.value.step, caught.value.undo_failures) == (call.step, [])


@each_call
def test_bug_is_undone(call: Call) -> None:
    """An exception nobody planned for is undone like any other, and stays visible as the cause."""
    cluster = populated(call.way.clone_format)
    before = cluster.picture()
    cluster.fail_on(call.name, ZeroDivisionError, call.nth)
    with pytest.raises((errors.SnapError, ZeroDivisionError), match="injected"):
        call.way.start(make_engine(cluster), Reports())
    assert cluster.picture() == before


@before_or_applied
@each_call
def test_killed_anywhere_then_rolled_back(call: Call, applied: bool) -> None:
    """Wherever the engine dies, the next one undoes the job from its record alone."""
    cluster = populated(call.way.clone_format)
    before = cluster.picture()
    cluster.fail_on(call.name, Killed, call.nth, applied)
    with pytest.raises(Killed):
        call.way.start(make_engine(cluster), Reports())
    make_engine(cluster).rollback(call.way.job_id)
    assert cluster.picture() == before


@pytest.mark.parametrize("half", HALF_MADE)
@pytest.mark.parametrize("error", [errors.Unreachable, Killed])
@pytest.mark.parametrize("way", CLONES, ids=lambda way: way.name)
def test_half_made_clone_is_removed(way: Way, error: type[BaseException], half: str) -> None:
    """What a clone that never returned leaves behind is removed, by the saga or by the next engine."""
    cluster = populated(way.clone_format)
    before = cluster.picture()
    cluster.fail_clone(half, error)
    with pytest.raises(error):
        way.start(make_engine(cluster), Reports())
    if error is Killed:
        assert cluster.picture() != before
        make_engine(cluster).rollback(way.job_id)
    assert cluster.picture() == before


@before_or_applied
@each_undoing_call
def test_failed_undo_rides_along_and_can_be_repeated(call: Call, applied: bool) -> None:
    """An undo that fails does not hide the first error, and what it left is undone by the next engine."""
    cluster = populated(call.way.clone_format)
    before = cluster.picture()
    cluster.fail_on(call.name, errors.NoPermission, call.nth, applied)
    error = failed_at_the_end(cluster, call.way)
    assert any("injected" in failure for failure in error.undo_failures)
    make_engine(cluster).rollback(call.way.job_id)
    assert cluster.picture() == before


@pytest.mark.parametrize("way", CLONES, ids=lambda way: way.name)
def test_clone_without_a_name_on_record_is_known_by_its_parent(way: Way) -> None:
    """The answer to the clone was lost and its removal failed, so that its parent may be in the trash by now: it is
    still this job's, and goes with the next attempt."""
    cluster = populated(way.clone_format)
    before = cluster.picture()
    cluster.fail_on("clone", errors.Unreachable, applied=True)
    cluster.fail_on("remove", errors.Unreachable)
    with pytest.raises(errors.Unreachable) as caught:
        way.start(make_engine(cluster), Reports())
    assert caught.value.undo_failures
    make_engine(cluster).rollback(way.job_id)
    assert cluster.picture() == before


def failed_at_the_end(cluster: FakeCluster, way: Way) -> errors.SnapError:
    break_the_end(cluster, way)
    with pytest.raises(errors.NoSpace) as caught:
        way.start(make_engine(cluster), Reports())
    return caught.value


@before_or_applied
@each_undoing_call
def test_killed_while_undoing_then_rolled_back(call: Call, applied: bool) -> None:
    """Undo can be broken off anywhere and done again."""
    cluster = populated(call.way.clone_format)
    before = cluster.picture()
    break_the_end(cluster, call.way)
    cluster.fail_on(call.name, Killed, call.nth, applied)
    with pytest.raises(Killed):
        call.way.start(make_engine(cluster), Reports())
    make_engine(cluster).rollback(call.way.job_id)
    assert cluster.picture() == before


@pytest.mark.parametrize("way", CLONES, ids=lambda way: way.name)
def test_what_cannot_be_undone_is_in_the_ledger(way: Way) -> None:
    """The record of a job that could not be undone says what is left, in the words the caller got."""
    cluster = populated(way.clone_format)
    cluster.fail_on("remove", errors.NoPermission)
    error = failed_at_the_end(cluster, way)
    (job,) = Ledger(cluster, DISK.pool).read().jobs
    assert (job.id, list(job.failures)) == (way.job_id, error.undo_failures)
    assert error.undo_failures[0].startswith("clone: ")
    assert error.undo_failures[0] in error.report()


@before_or_applied
@pytest.mark.parametrize("way", CLONES, ids=lambda way: way.name)
def test_finish_can_be_broken_off_anywhere(way: Way, applied: bool) -> None:
    """Killed at whichever call of finish, the next engine's finish ends in the same state; the image is not lost."""

    def ready() -> tuple[FakeCluster, Engine]:
        cluster = populated(way.clone_format)
        engine = make_engine(cluster)
        way.start(engine, Reports())
        cluster.calls.clear()
        return cluster, engine

    cluster, engine = ready()
    engine.finish(way.job_id)
    wanted, count = cluster.picture(), len(cluster.calls)
    for nth in range(1, count + 1):
        cluster, engine = ready()
        cluster.fail_on("*", Killed, nth, applied)
        with pytest.raises(Killed):
            engine.finish(way.job_id)
        if OBJECT in cluster.picture()[DISK.pool]["omap"]:
            make_engine(cluster).finish(way.job_id)
        assert cluster.picture() == wanted
