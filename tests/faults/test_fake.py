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


@pytest.mark.parametrize("hold", ["suspended for the copy", "suspended for good"])
def test_guest_that_is_not_let_be_is_counted(hold: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is, where its disk could be frozen for the copy, and where nobody lets it go."""
    (cell,) = (cell for cell in selection.FAKE if (str(cell), cell.variant) == ("register.post: answers 403", {}))
    fake.hurry(monkeypatch, selection.GUEST_MODULE, cell)
    world = FakeWorld(selection.GUEST_MODULE)
    copy, reclaim = world._copy, world.reclaim

    def never_let_go() -> None:
        reclaim()
        world.guest.suspended = True

    if hold == "suspended for good":
        monkeypatch.setattr(world, "reclaim", never_let_go)
    else:
        monkeypatch.setattr(world, "_copy", lambda snap: copy(None))
    found = recording.Cell("cell")
    with pytest.raises(AssertionError):
        check(world, cell, found)
    assert found.guest_suspensions == 1
