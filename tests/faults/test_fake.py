# SPDX-License-Identifier: Apache-2.0
"""The whole fault matrix, on fakes."""

from __future__ import annotations

import pytest

from tests.faults import fake, recording, selection
from tests.faults.fake import FakeWorld
from tests.faults.matrix import Cell
from tests.faults.outcome import check


# Of a guest's call that was at work when nova-compute died.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(("cell", "arrives"), selection.both_ends(selection.FAKE), ids=str)
def test_cell(cell: Cell, arrives: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.hurry(monkeypatch, selection.GUEST_MODULE, cell)
    world = FakeWorld(selection.GUEST_MODULE, **cell.variant)
    with recording.cell(f"fake {cell}{', arrives' if arrives else ''}", kill=cell.cause.kills) as found:
        try:
            check(world, cell, found, arrives=arrives)
        finally:
            world.guest.over.set()
