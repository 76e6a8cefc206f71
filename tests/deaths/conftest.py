# SPDX-License-Identifier: Apache-2.0
"""They run inside a cloud's container, beside its nova-compute, with the Ceph users and pools of that::

    lab/lab exec 34 python3 -m pytest -p no:cacheprovider /src/tests/deaths

``NOVA_RBD_SNAP_DEATHS`` says how many instants (100), ``NOVA_RBD_SNAP_SEED`` which.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from tests import monitor
from tests.deaths import test_random_instants as subject
from tests.deaths.instants import STEPS, Outcome, Place, Seconds, die, undisturbed
from tests.functional import world as functional

#: Instants at a time.
_BESIDE = 4
#: Not the functional suite's, which may run beside this one.
_PROXY_PORT = 9395

_outcomes = pytest.StashKey[list[Outcome]]()
_seconds = pytest.StashKey[Seconds]()


@pytest.fixture(autouse=True)
def _no_waiting() -> None:
    """Here a dead client's watch is waited for, as it would be."""


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(functional, "PROXY_PORT", _PROXY_PORT)
        world = functional.World(stack)
        stack.enter_context(monitor.hurried(world.rados))
        yield Place(world, tmp_path_factory.mktemp("deaths"))


@pytest.fixture(scope="session")
def played(request: pytest.FixtureRequest, place: Place) -> Iterator[dict[int, Future[None]]]:
    """The instants of all tests that run, several at a time: number to what became of it."""
    numbers = [item.callspec.params["number"] for item in request.session.items if played.__name__ in item.fixturenames]
    with ThreadPoolExecutor(_BESIDE) as pool:
        runs = list(pool.map(undisturbed, [place] * _BESIDE))
        # The quickest of each, for the first of all wait for what nobody has read yet.
        seconds = {step: min(run[step] for run in runs if step in run) for step in STEPS}
        outcomes = request.config.stash[_outcomes] = []
        request.config.stash[_seconds] = seconds
        futures = {number: pool.submit(die, place, subject.SEED, number, seconds, outcomes) for number in numbers}
        try:
            yield futures
        finally:
            for future in futures.values():
                future.cancel()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    outcomes = config.stash.get(_outcomes, [])
    if outcomes:
        steps = ", ".join(f"{step} {count}" for step, count in Counter(o.job_step for o in outcomes).most_common())
        terminalreporter.write_line(
            f"seed {subject.SEED}: {len(outcomes)} deaths within {sum(config.stash[_seconds].values()):.1f} s, "
            f"{sum(o.status == 'active' for o in outcomes)} images, {sum(len(o.left) for o in outcomes)} leftovers, "
            f"clean within {max(o.clean_seconds for o in outcomes):.1f} s, "
            f"longest write of a guest {max(o.stall_seconds for o in outcomes):.1f} s; jobs were at: {steps}"
        )
