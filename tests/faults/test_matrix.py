# SPDX-License-Identifier: Apache-2.0
"""The description of the fault matrix is complete: no step, call or error of the clone way is missing from it."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest

from nova_rbd_snap import errors
from nova_rbd_snap.snapshot import steps
from tests.faults import fake, selection
from tests.faults.fake import FakeWorld
from tests.faults.matrix import ANSWERS, CAUSES, ENGINE, EXEMPTIONS, GLANCE, STEPS, Outcome

VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"clone_format": 1},
    {"old_glance": True},
    {"flat_disk": True},
    {"flatten": "background"},
    {"flatten": "never"},
    {"to_store": True},
)


def tree(cls: type[errors.SnapError]) -> set[type[errors.SnapError]]:
    return {cls}.union(*(tree(child) for child in cls.__subclasses__()))


def test_every_call_has_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a request calls is what its steps are said to call: no more, and no less."""
    found = defaultdict(set)
    for variant in VARIANTS:
        for place in selection.trace_of(**variant):
            found[place.step].add(place.call)
    # Whether Glance answers at all is asked only where it does not know the record.
    (deleted,) = (cell for cell in selection.FAKE if str(cell) == "wait.get: record_deleted")
    fake.hurry(monkeypatch, selection.GUEST_MODULE, deleted)
    world = FakeWorld(selection.GUEST_MODULE)
    world.prepare(deleted)
    world.request().run()
    found["wait"] |= {place.call for place in world.saboteur.trace if place.step == "wait"}
    assert dict(found) == {step.name: set(step.calls) for step in STEPS.values()}


def test_every_step_of_the_saga() -> None:
    assert {step.name for sequence in steps.CLONE_STEPS.values() for step in sequence} <= ENGINE.keys()
    assert {step.name for step in steps.COPY_STEPS} <= ENGINE.keys()


def test_every_error_of_the_cluster() -> None:
    special = {errors.AlreadyThere, errors.HolderSilent, errors.MayNotFence, errors.LeaseLost, errors.StoreSilent}
    assert tree(errors.CephError) == {*ANSWERS, *special}


def test_every_error_of_glance() -> None:
    of_uploads = {errors.GlanceError, errors.Damaged}
    assert tree(errors.GlanceError) - of_uploads <= {cause.error for cause in CAUSES}


def test_every_cause_and_every_exemption_is_met() -> None:
    """None of the description says nothing."""
    real = selection.real_cells()
    for cause in CAUSES:
        assert any(cell.cause == cause for cell in [*selection.FAKE, *real]), cause
    for exemption in EXEMPTIONS:
        assert any(exemption.is_for(cell) for cell in selection.FAKE), exemption
    assert selection.missed() == set()


def test_every_step_meets_its_causes() -> None:
    """Each call of the engine meets errors, the end of processes and, where it changes something, the loss of its
    answer; each request of Glance meets refusals and silence."""
    kinds = defaultdict(set)
    for cell in selection.FAKE:
        kinds[cell.place.step, cell.place.call].add(cell.cause.kind)
    for step in ENGINE.values():
        for call in step.calls:
            assert {"raises", "engine_killed", "both_killed", "compute_killed"} <= kinds[step.name, call]
            assert ("loses_the_answer" in kinds[step.name, call]) == (call in step.changes)
    for step in GLANCE.values():
        for call in step.calls - {"schemas"}:
            assert {"answers", "is_silent", "both_killed", "compute_killed", "engine_killed"} <= kinds[step.name, call]


def test_enough_is_real() -> None:
    """At least 80 cells, with each outcome, and causes at work before and after the pivot."""
    real = selection.real_cells()
    assert len(set(map(str, real))) == len(real) >= 80
    assert {cell.promise.outcome for cell in real} == set(Outcome)
    # A copy into a store is tried on real servers in tests/e2e/test_copy.py.
    assert {cell.place.step for cell in real} == {*ENGINE, *GLANCE} - {"create", "copy"}


@pytest.mark.parametrize(
    ("place", "cause", "outcome"),
    [
        ("clone.clone", "raises NoSpace", Outcome.BACK),
        ("clone.clone", "loses_the_answer Unreachable", Outcome.ENDS),
        ("forget.omap_replace", "raises Unreachable", Outcome.FORWARD),
        ("metadata.properties", "answers 401", Outcome.ENDS),
        ("register.post", "answers 409", Outcome.BACK),
        ("register.post", "is_silent reset", Outcome.KEPT),
        ("register.post", "loses_the_reply reset", Outcome.FORWARD),
        ("seal.create_snap", "both_killed after", Outcome.ENDS),
        ("wait.get", "both_killed before", Outcome.FORWARD),
    ],
)
def test_promise(place: str, cause: str, outcome: Outcome) -> None:
    """The rules say what the table in ``docs/design/clone.rst`` says."""
    (cell,) = (c for c in selection.FAKE if (str(c.place), str(c.cause), c.variant) == (place, cause, {}))
    assert cell.promise.outcome is outcome
