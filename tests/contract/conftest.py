# SPDX-License-Identifier: Apache-2.0
"""The fixtures of cases that run on both clusters.

Without a real one the cases marked ``real`` are skipped, or fail where the environment says ``NOVA_RBD_SNAP_REAL=1``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest

from tests.contract.worlds import FakeWorld, RealWorld, World, absent


@pytest.fixture(scope="session")
def _session() -> Iterator[RealWorld]:
    if reason := absent():
        if os.environ.get("NOVA_RBD_SNAP_REAL") == "1":
            pytest.fail(f"NOVA_RBD_SNAP_REAL=1, but {reason}")
        pytest.skip(reason)
    with contextlib.ExitStack() as stack:
        yield RealWorld(stack)


@pytest.fixture
def real_world(_session: RealWorld) -> Iterator[RealWorld]:
    with _session.connections:
        yield _session


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.real)])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """Each cluster in turn."""
    if request.param == "fake":
        yield FakeWorld()
    else:
        yield request.getfixturevalue("real_world")
