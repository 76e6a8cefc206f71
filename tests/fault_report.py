#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Run the whole fault matrix, on fakes and on real servers, and every point of death; print what came of it.

Each cell of these suites writes what it found to one log (``tests/faults/recording.py``). One that began and has no end
was broken off, and has failed. The figures go to ``build/fault-report.json``. The lab must be up, nobody else in it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
LOGS = REPO / "build" / "faults"
CELLS = LOGS / "cells.jsonl"
REPORT = REPO / "build" / "fault-report.json"
VARIABLE = "NOVA_RBD_SNAP_FAULT_LOG"
LONGEST_SECONDS = 60 * 60

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
        "longest_wait_seconds": round(max((cell["wait_seconds"] for cell in found), default=0.0), 1),
        "guest_suspensions": sum(cell["guest_suspensions"] for cell in found),
    }


def is_good(found: list[Found]) -> bool:
    """Whether every cell passed, nothing is left, and every guest was let be."""
    total = figures(found)
    return total["passed"] == total["cells"] > 0 and not total["leftovers"] and not total["guest_suspensions"]


class Suite:
    """One command whose tests are cells."""

    def __init__(self, name: str, command: str) -> None:
        self.name = name
        self.command = command

    def run(self) -> list[Found]:
        """Run it to its end; returns what its cells came to."""
        CELLS.unlink(missing_ok=True)
        log = LOGS / f"{self.name.replace(' ', '-')}.log"
        with log.open("w") as out:
            command = ["timeout", "--kill-after=30", str(LONGEST_SECONDS), "sh", "-c", self.command]
            code = subprocess.run(command, cwd=REPO, stdout=out, stderr=subprocess.STDOUT, check=False).returncode
        found = outcomes(CELLS.read_text().splitlines() if CELLS.exists() else [])
        if not found or (code and is_good(found)):
            # There are cells that never began, or something else went wrong: it shall not pass unseen.
            found.append({**dict.fromkeys(("real", "kill", "leftovers", "wait_seconds", "guest_suspensions"), 0),
                          "passed": False, "cell": f"{self.name}: ended with code {code}, see {log}"})
        return found


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


def row(name: str, values: Iterable[Any], took: str) -> str:
    cells = zip(COLUMNS, values)
    return f"{name:<14}" + "".join(f"{value!s:>{len(head) + 3}}" for head, value in cells) + f"{took:>10}"


def main() -> int:
    started = time.monotonic()
    LOGS.mkdir(parents=True, exist_ok=True)
    REPORT.unlink(missing_ok=True)
    print(row("", COLUMNS, "took"), flush=True)
    found: list[Found] = []
    for suite in SUITES:
        began = time.monotonic()
        part = suite.run()
        print(row(suite.name, figures(part).values(), f"{time.monotonic() - began:.0f} s"), flush=True)
        found += part
    print(row("all", figures(found).values(), f"{time.monotonic() - started:.0f} s"))
    for cell in found:
        if not cell["passed"]:
            print(f"failed: {cell['cell']}")
    REPORT.write_text(json.dumps(figures(found), indent=2) + "\n")
    return 0 if is_good(found) else 1


if __name__ == "__main__":
    sys.exit(main())
