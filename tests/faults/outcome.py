# SPDX-License-Identifier: Apache-2.0
"""Make the request of a cell in a world, and compare what becomes of it with what is promised."""

from __future__ import annotations

import time
from typing import Any, Optional

from tests.faults import recording
from tests.faults.matrix import Cell, Outcome
from tests.faults.sabotage import Killed
from tests.faults.world import World


def check(world: World, cell: Cell, found: recording.Cell, *, arrives: bool = False) -> None:
    """
    :param arrives: what is in doubt turns out to have been done; else Nova deletes the record.
    """
    promise, cause = cell.promise, cell.cause
    outcome, status = promise.outcome, _STATUS.get(promise.outcome)
    before = world.surroundings()
    world.prepare(cell)
    world.deletes_records = not arrives
    request = world.request()
    began = time.monotonic()
    try:
        error = request.run()
    except Killed:
        assert cause.dead
    else:
        found.wait_seconds = time.monotonic() - began
        assert not cause.dead
        assert type(request.failure) is (promise.error or type(None)), request.failure
        assert request.was_copied == bool(promise.error and promise.error.may_fall_back)
        assert (error is None) == (promise.error is None or outcome is Outcome.BACK), error
    assert world.saboteur.struck
    promised_suspensions = int(cause.suspends and request.was_copied)
    if world.guest:
        found.guest_suspensions = max(world.suspensions - promised_suspensions, 0)
    assert world.suspensions == promised_suspensions

    if outcome is Outcome.KEPT:
        kept = _left(before, world)
        assert kept, "the job is kept"
        assert world.has_data() or world.status() is None
    if not (outcome is Outcome.KEPT or cause.lasts or cause.dead or cell.is_late):
        # At once, and nothing remains to be done.
        _assert_as_promised(world, before, found, status)
    world.heal()
    if arrives:
        world.arrive()
    world.reclaim()
    if world.guest:
        found.guest_suspensions += bool(world.guest.hold())
    _assert_as_promised(world, before, found, "active" if arrives else status)


#: What becomes of the image record.
_STATUS = {Outcome.FORWARD: "active", Outcome.BACK: "active", Outcome.UNHEARD: "queued"}


def _assert_as_promised(world: World, before: dict[str, Any], found: recording.Cell, status: Optional[str]) -> None:
    world.drain()
    left = _left(before, world)
    if status != "active" and world.has_data():
        left.append("the clone")
    found.leftovers = len(left)
    assert left == []
    assert world.status() == status
    if status == "active":
        world.assert_whole()


def _left(before: dict[str, Any], world: World) -> list[str]:
    """What is not as before."""
    after = world.surroundings()
    return [
        f"{name} was {before.get(name)!r}, is {after.get(name)!r}"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]
