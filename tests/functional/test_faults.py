# SPDX-License-Identifier: Apache-2.0
"""The fault matrix on real servers, as far as those can be made to do it.

``-m quick`` is a slice of a few minutes; ``disturbs`` marks what stops daemons or fills pools of the one cluster.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from nova_rbd_snap import errors
from tests.faults import recording, selection
from tests.faults.matrix import Cell
from tests.faults.outcome import check
from tests.faults.real import RealWorld
from tests.functional.world import World


def parameters() -> Iterator[Any]:
    for cell, arrives in selection.both_ends(selection.real_cells()):
        marks = [pytest.mark.disturbs] if selection.is_disturbing(cell) else []
        if selection.is_quick(cell):
            marks.append(pytest.mark.quick)
        yield pytest.param(cell, arrives, marks=marks, id=f"{cell}{', arrives' if arrives else ''}")


@pytest.mark.slow
@pytest.mark.parametrize(("cell", "arrives"), list(parameters()))
def test_cell(world: World, cell: Cell, arrives: bool, request: pytest.FixtureRequest) -> None:
    if "flatten" in cell.variant:
        request.getfixturevalue("readers")
    name = f"real {cell}{', arrives' if arrives else ''}"
    with recording.cell(name, real=True, kill=cell.cause.kills) as found:
        place = RealWorld(world, cell)
        try:
            check(place, cell, found, arrives=arrives)
        finally:
            place.remove()
        if place.promised_seconds is not None:
            assert found.wait_seconds < 2 * place.promised_seconds


def test_glance_is_not_there(world: World, disk: str, image_id: str) -> None:
    """Nothing listens at its address: the clone is undone."""
    before, engine = world.picture(), world.engine()
    url = world.clone(engine, disk, image_id)
    with pytest.raises(errors.GlanceSilent):
        world.register(engine, world.tenant_through("http://127.0.0.1:1"), image_id, url)
    assert world.picture() == before
