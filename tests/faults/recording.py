# SPDX-License-Identifier: Apache-2.0
"""What each cell of the fault matrix came to, for ``make fault-report``: one line of JSON per event in a common log.

A cell writes a line as it begins and another as it ends, so one whose process dies in between is seen to have no end.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Optional

#: Names the log; without it nothing is written.
LOG_VARIABLE = "NOVA_RBD_SNAP_FAULT_LOG"


@dataclass
class Cell:
    """One cell, or one point of death.

    :ivar real: on real servers.
    :ivar kill: processes are killed in it.
    :ivar passed: None until it has ended.
    :ivar leftovers: things in the pools, the ledger, Glance or on the local disk that should not be there.
    :ivar wait_seconds: how long its request took, from what went wrong, or from its begin, until nova-compute was done
        with it; None where none came to its end, for nova-compute died.
    :ivar guest_suspensions: guests suspended by our ways, or not running at the end; None where there is no guest.
    """

    cell: str
    real: bool = False
    kill: bool = False
    passed: Optional[bool] = None
    leftovers: int = 0
    wait_seconds: Optional[float] = None
    guest_suspensions: Optional[int] = None


@contextlib.contextmanager
def cell(name: str, *, real: bool = False, kill: bool = False) -> Iterator[Cell]:
    """Run a cell; what was found is put into its attributes."""
    found = Cell(name, real, kill)
    with recorded(found):
        yield found


@contextlib.contextmanager
def recorded(found: Cell) -> Iterator[None]:
    """Run a cell, which passes if nothing is raised in the block, nothing is left, and every guest was let be."""
    _write(found)
    try:
        yield
    except BaseException:
        found.passed = False
        raise
    else:
        found.passed = not (found.leftovers or found.guest_suspensions)
    finally:
        _write(found)


def _write(found: Cell) -> None:
    path = os.environ.get(LOG_VARIABLE)
    if not path:
        return
    # One write at the end of the file: several processes may do so at once.
    log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(log, json.dumps(asdict(found)).encode() + b"\n")
    finally:
        os.close(log)
