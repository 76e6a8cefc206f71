# SPDX-License-Identifier: Apache-2.0
"""See :mod:`tests.contract.chains`.

On a real cluster each run takes minutes: ``NOVA_RBD_SNAP_CHAINS`` says how many, ``NOVA_RBD_SNAP_SEED`` which.
"""

from __future__ import annotations

import functools
import os

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from nova_rbd_snap.flatten import task
from tests.contract.chains import Chains
from tests.contract.worlds import FakeWorld, RealWorld
from tests.faults.recording import cell

SEED = int(os.environ.get("NOVA_RBD_SNAP_SEED") or int.from_bytes(os.urandom(4), "big"))


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "_LOOK_SECONDS", 0.001)
    monkeypatch.setattr(task, "_DELETION_SECONDS", 0.0)


def test_on_the_fake() -> None:
    run_state_machine_as_test(
        lambda: Chains(FakeWorld(), lease_seconds=60.0),
        settings=settings(max_examples=100, stateful_step_count=50, deadline=None, derandomize=True),
    )


@pytest.mark.real
def test_on_a_cluster(real_world: RealWorld) -> None:
    runs = int(os.environ.get("NOVA_RBD_SNAP_CHAINS", "1"))
    print(f"NOVA_RBD_SNAP_SEED={SEED}")
    # What failed is not tried again in shorter forms: that would take hours.
    long = settings(
        max_examples=runs,
        stateful_step_count=40,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    make = seed(SEED)(functools.partial(Chains, real_world, lease_seconds=2.0))
    with cell(f"chains, seed {SEED}", real=True, kill=True):
        run_state_machine_as_test(make, settings=long)
