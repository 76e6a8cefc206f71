#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Run the whole fault matrix, on fakes and on real servers, and every point of death; print what came of it.

Each cell of these suites writes what it found to one log (``tests/faults/recording.py``). What began and has no end was
broken off, and has failed. The figures go to ``build/fault-report.json``; the lab must be up, and used by nobody else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
LOGS = REPO / "build" / "faults"
CELLS = LOGS / "cells.jsonl"
REPORT = REPO / "build" / "fault-report.json"
VARIABLE = "NOVA_RBD_SNAP_FAULT_LOG"
LONGEST_SECONDS = 60 * 60


@dataclass
class Tally:
    """What cells came to."""

    cells: int = 0
    real_cells: int = 0
    kill_points: int = 0
    leftovers: int = 0
    longest_wait_seconds: float = 0.0
    guest_suspensions: int = 0
    #: Names of those that failed.
    failed: list[str] = field(default_factory=list)

    @property
    def passed(self) -> int:
        return self.cells - len(self.failed)

    def add(self, found: dict[str, Any]) -> None:
        """Count a cell that has come to its end, or was broken off."""
        self.cells += 1
        self.real_cells += found["real"]
        self.kill_points += found["real"] and found["kill"]
        self.leftovers += found["leftovers"]
        self.longest_wait_seconds = max(self.longest_wait_seconds, found["wait_seconds"])
        self.guest_suspensions += found["guest_suspensions"]
        if not found["passed"]:
            self.failed.append(found["cell"])

    def as_figures(self) -> dict[str, Any]:
        """For ``fault-report.json``."""
        return {
            "cells": self.cells,
            "passed": self.passed,
            "real_cells": self.real_cells,
            "kill_points": self.kill_points,
            "leftovers": self.leftovers,
            "longest_wait_seconds": round(self.longest_wait_seconds, 1),
            "guest_suspensions": self.guest_suspensions,
        }


def outcomes(lines: Iterable[str]) -> list[dict[str, Any]]:
    """The last word of each cell: one that only began, or was cut off as it wrote, has not passed."""
    ended, open_ = [], Counter()
    begun: dict[str, dict[str, Any]] = {}
    for line in lines:
        try:
            found = json.loads(line)
        except ValueError:
            continue  # its beginning is there
        if found["passed"] is None:
            open_[found["cell"]] += 1
            begun[found["cell"]] = found
        else:
            open_[found["cell"]] -= 1
            ended.append(found)
    return ended + [begun[name] for name in open_.elements()]


class Suite:
    """One command whose tests are cells."""

    def __init__(self, name: str, command: str) -> None:
        self.name = name
        self.command = command
        self.tally = Tally()
        self.seconds = 0.0

    def run(self) -> None:
        """Run it to its end."""
        CELLS.unlink(missing_ok=True)
        started = time.monotonic()
        with (LOGS / f"{self.name}.log").open("w") as log:
            command = ["timeout", "--kill-after=30", str(LONGEST_SECONDS), "sh", "-c", self.command]
            code = subprocess.run(command, cwd=REPO, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
        self.seconds = time.monotonic() - started
        for found in outcomes(CELLS.read_text().splitlines() if CELLS.exists() else []):
            self.tally.add(found)
        if not self.tally.cells or (code and not self.tally.failed):
            # Cells that never began, or something beside them: it may not pass unseen.
            self.tally.add({**NOTHING, "cell": f"{self.name} ended with code {code}, see {log.name}"})
        print(self.row(), flush=True)

    def row(self) -> str:
        """Its line of the table."""
        return row(self.name, self.tally, self.seconds)


#: A cell that did not even begin.
NOTHING = {
    "real": False, "kill": False, "passed": False, "leftovers": 0, "wait_seconds": 0.0, "guest_suspensions": 0
}  # fmt: skip

COLUMNS = ("cells", "passed", "real", "kills", "left", "longest wait", "suspended", "took")


def row(name: str, tally: Tally, seconds: float) -> str:
    figures = tally.as_figures()
    values = [str(figures[key]) for key in ("cells", "passed", "real_cells", "kill_points", "leftovers")]
    values += [f"{tally.longest_wait_seconds:.1f} s", str(tally.guest_suspensions), f"{seconds:.0f} s"]
    return f"{name:<12}" + "".join(f"{value:>{len(column) + 3}}" for value, column in zip(values, COLUMNS))


def inside(cloud: str, *arguments: str) -> str:
    """pytest in a cloud's container."""
    log = f"/src/{CELLS.relative_to(REPO)}"
    return f"lab/lab exec {cloud} env {VARIABLE}={log} python3 -m pytest -p no:cacheprovider {' '.join(arguments)}"


SUITES = [
    Suite("fakes", f"{VARIABLE}={CELLS} build/venv/bin/python -m pytest tests/faults"),
    Suite("servers", inside("31", "/src/tests/functional/test_faults.py", "-m", "'not disturbs'")),
    Suite("disturbances", inside("31", "/src/tests/functional/test_faults.py", "-m", "disturbs")),
    Suite("kill points", "lab/lab install 34 && " + inside("34", "/src/tests/e2e/test_kill_points.py")),
    Suite("deaths", inside("34", "/src/tests/deaths")),
]


def main() -> int:
    started = time.monotonic()
    LOGS.mkdir(parents=True, exist_ok=True)
    REPORT.unlink(missing_ok=True)
    print(" " * 12 + "".join(f"{column:>{len(column) + 3}}" for column in COLUMNS), flush=True)
    for suite in SUITES:
        suite.run()
    total = Tally()
    for suite in SUITES:
        part = suite.tally
        total = Tally(
            total.cells + part.cells,
            total.real_cells + part.real_cells,
            total.kill_points + part.kill_points,
            total.leftovers + part.leftovers,
            max(total.longest_wait_seconds, part.longest_wait_seconds),
            total.guest_suspensions + part.guest_suspensions,
            total.failed + part.failed,
        )
    print(row("all", total, time.monotonic() - started))
    for name in total.failed:
        print(f"failed: {name}")
    REPORT.write_text(json.dumps(total.as_figures(), indent=2) + "\n")
    return int(bool(total.failed or total.leftovers or total.guest_suspensions))


if __name__ == "__main__":
    os.umask(0o022)
    sys.exit(main())
