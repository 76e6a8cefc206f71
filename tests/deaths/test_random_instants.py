# SPDX-License-Identifier: Apache-2.0
"""Whenever nova-compute, its engine, or both are killed: a whole image or none, and nothing else."""

from __future__ import annotations

import os
import random
from concurrent.futures import Future

import pytest

COUNT = int(os.environ.get("NOVA_RBD_SNAP_DEATHS", "100"))
SEED = os.environ.get("NOVA_RBD_SNAP_SEED") or str(random.SystemRandom().randrange(1_000_000))


@pytest.mark.parametrize("number", range(COUNT), ids=lambda number: f"seed {SEED}, {number}")
def test_death_at_a_random_instant(number: int, played: dict[int, Future[None]]) -> None:
    """Either the image is active, sealed, and the disk's bytes of one instant, or nothing of it exists."""
    played[number].result()
