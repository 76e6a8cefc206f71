# SPDX-License-Identifier: Apache-2.0
"""Run the whole fault matrix, on fakes and on real servers, and every point of death; print what came of it:
``python3 -m tests.fault_report``.

Each cell of these suites writes what it found to one log (``tests/faults/recording.py``). One that began and has no end
was broken off, and has failed. The figures go to ``build/fault-report.json``. The lab must be up, nobody else in it.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, Callable, Optional

from tests import suite
from tests.faults.recording import LOG_VARIABLE, Cell
from tests.suite import CEPH_16, REPO, end_to_end, inside

LOGS = REPO / "build" / "faults"
CELLS = LOGS / "cells.jsonl"
REPORT = REPO / "build" / "fault-report.json"

Found = dict[str, Any]

#: Heads of the table's columns, with the figures in them.
COLUMNS = {
    "cells": "cells",
    "passed": "passed",
    "real": "real_cells",
    "kill points": "kill_points",
    "leftovers": "leftovers",
    "longest wait, s": "longest_wait_seconds",
    "guests suspended": "guest_suspensions",
}


def outcomes(lines: Iterable[str]) -> list[Found]:
    """The last word of each cell: of one that was broken off, its beginning, which says that it has not passed."""
    ended: list[Found] = []
    begun: dict[str, Found] = {}
    unended: Counter[str] = Counter()
    for line in lines:
        try:
            found = json.loads(line)
        except ValueError:
            continue  # broken off as it was written: what it was about has no end, and so has failed
        if found["passed"] is None:
            begun[found["cell"]] = found
            unended[found["cell"]] += 1
        else:
            ended.append(found)
            unended[found["cell"]] -= 1
    return ended + [begun[name] for name in unended.elements()]


def figures(found: list[Found]) -> dict[str, Any]:
    """What cells came to, as in ``fault-report.json``."""
    return {
        "cells": len(found),
        "passed": sum(bool(cell["passed"]) for cell in found),
        "real_cells": sum(cell["real"] for cell in found),
        "kill_points": sum(cell["real"] and cell["kill"] for cell in found),
        "leftovers": sum(cell["leftovers"] for cell in found),
        "longest_wait_seconds": _of_known(lambda waits: round(max(waits), 1), found, "wait_seconds"),
        "guest_suspensions": _of_known(sum, found, "guest_suspensions"),
    }


def _of_known(function: Callable[[list[Any]], Any], found: list[Found], name: str) -> Optional[Any]:
    """Of what is known of some cells; None where it is of none: there was no guest, or no request ended."""
    known = [cell[name] for cell in found if cell[name] is not None]
    return function(known) if known else None


def is_good(found: list[Found]) -> bool:
    """Whether every cell passed, nothing is left, and every guest was let be."""
    total = figures(found)
    return total["passed"] == total["cells"] > 0 and not total["leftovers"] and not total["guest_suspensions"]


class Suite(suite.Suite):
    """One command whose tests are cells."""

    def __init__(self, name: str, command: str) -> None:
        super().__init__(name, command, LOGS)

    def run(self) -> list[Found]:
        """Run it to its end; returns what its cells came to."""
        CELLS.unlink(missing_ok=True)
        code = self.execute()
        found = outcomes(CELLS.read_text().splitlines() if CELLS.exists() else [])
        if not found or (code and is_good(found)):
            # There are cells that never began, or something else went wrong: it shall not pass unseen.
            found.append(asdict(Cell(f"{self.name}: ended with code {code}, see {self.log}", passed=False)))
        return found


_INSIDE = {LOG_VARIABLE: f"/src/{CELLS.relative_to(REPO)}"}
_DELETIONS, _CHAINS = "/src/tests/functional/test_deletion_race.py", "/src/tests/contract/test_chains.py"
_MANAGER = "/src/tests/contract/test_manager_race.py"
_MATRIX, _E2E = "/src/tests/functional/test_faults.py", "/src/tests/e2e"
_OTHERS = ("-m", "slow", f"--ignore={_E2E}/test_kill_points.py", f"--ignore={_E2E}/test_waits.py")

SUITES = [
    Suite("fakes", f"{LOG_VARIABLE}={CELLS} build/venv/bin/python -m pytest tests/faults"),
    Suite("servers", inside("31", _MATRIX, "-m", "'not disturbs'", **_INSIDE)),
    Suite("disturbances", inside("31", _MATRIX, "-m", "disturbs", **_INSIDE)),
    # On Nova under eventlet, and on native threads.
    Suite("waits 31", end_to_end("31", f"{_E2E}/test_waits.py", "-s", **_INSIDE)),
    Suite("waits 34", end_to_end("34", f"{_E2E}/test_waits.py", "-s", **_INSIDE)),
    Suite("kill points", end_to_end("34", f"{_E2E}/test_kill_points.py", "-k", "'not is_not_flat'", **_INSIDE)),
    Suite("not flat", end_to_end("34", f"{_E2E}/test_kill_points.py", "-k", "is_not_flat", **_INSIDE)),
    Suite("other e2e", end_to_end("34", _E2E, *_OTHERS, **_INSIDE)),
    Suite("deaths", inside("34", "/src/tests/deaths", **_INSIDE)),
    # With an old glance_store, and a new one.
    Suite("deletions 31", inside("31", _DELETIONS, **_INSIDE)),
    Suite("deletions 34", inside("34", _DELETIONS, **_INSIDE)),
    # And of the manager's flattens, where it survives them.
    Suite("deletions 16", f"lab/lab up ceph16 && {inside('ceph16', _MANAGER, **CEPH_16, **_INSIDE)}"),
    Suite("chains", inside("34", _CHAINS, "-m", "real", NOVA_RBD_SNAP_REAL="1", NOVA_RBD_SNAP_CHAINS="10", **_INSIDE)),
]


def row(name: str, values: Iterable[Any], took: str) -> str:
    cells = zip(COLUMNS, ("-" if value is None else value for value in values))
    return f"{name:<14}" + "".join(f"{value!s:>{len(head) + 3}}" for head, value in cells) + f"{took:>10}"


def main() -> int:
    started = time.monotonic()
    REPORT.unlink(missing_ok=True)
    print(row("", COLUMNS, "took"), flush=True)
    found: list[Found] = []
    for each in SUITES:
        began = time.monotonic()
        part = each.run()
        print(row(each.name, figures(part).values(), f"{time.monotonic() - began:.0f} s"), flush=True)
        found += part
    print(row("all", figures(found).values(), f"{time.monotonic() - started:.0f} s"))
    for cell in found:
        if not cell["passed"]:
            print(f"failed: {cell['cell']}")
    REPORT.write_text(json.dumps(figures(found), indent=2) + "\n")
    return 0 if is_good(found) else 1


if __name__ == "__main__":
    sys.exit(main())
