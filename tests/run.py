#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Run every suite, tell how long each took, and end with the sum of all.

What needs no servers runs while the lab is built and started. Then the two clouds are tested side by side, as far as that
leaves the one cluster they share in peace, and last, alone, what does not.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
LOGS = REPO / "build" / "tests"
LONGEST_SECONDS = 40 * 60
PYTEST = "python3 -m pytest -p no:cacheprovider"

_counts = re.compile(r"(\d+) (passed|failed|errors?|skipped)")
_printing = threading.Lock()


class Suite:
    """One command, its log and its outcome."""

    def __init__(self, name: str, command: str) -> None:
        self.name = name
        self.command = command
        self.seconds = 0.0
        self.ok = False
        self.counts: dict[str, int] = {}

    def run(self) -> bool:
        """Run to the end; the log is shown when it failed."""
        started = time.monotonic()
        log = LOGS / f"{self.name}.log"
        with log.open("w") as out:
            # A suite that hangs shall fail with its log, while there is somebody to read it.
            command = ["timeout", "--kill-after=30", str(LONGEST_SECONDS), "sh", "-c", self.command]
            done = subprocess.run(command, cwd=REPO, stdout=out, stderr=subprocess.STDOUT, check=False)
        self.seconds = time.monotonic() - started
        self.ok = done.returncode == 0
        lines = log.read_text(errors="replace").splitlines()
        summary = next((line for line in reversed(lines) if _counts.search(line) and " in " in line), "")
        self.counts = {kind.rstrip("s"): int(number) for number, kind in _counts.findall(summary)}
        with _printing:
            print(f"{self.name:<14} {'ok' if self.ok else 'FAILED':<7} {self.seconds:6.0f} s  {summary.strip(' =')}", flush=True)
            if not self.ok:
                print("\n".join(f"    {line}" for line in lines[-300:]), flush=True)
        return self.ok


def end_to_end(cloud: str, *options: str) -> Suite:
    """The end to end suite inside a cloud, on the plugin as it is in the tree."""
    pytest = f"{PYTEST} --durations=15 /src/tests/e2e {' '.join(options)}"
    command = f"lab/lab install {cloud} && lab/lab exec {cloud} {pytest}"
    return Suite(f"e2e-nova-{cloud}", command)


def functional(cloud: str, *options: str, name: str = "functional") -> Suite:
    """The functional suite inside a cloud, on the tree itself."""
    return Suite(f"{name}-{cloud}", f"lab/lab exec {cloud} {PYTEST} /src/tests/functional {' '.join(options)}")


STYLE = Suite("style", "make style")
UNIT = Suite("unit", "make test-unit")
CONFORMANCE = Suite("conformance", "build/venv/bin/python -m pytest tests/conformance")
# From nothing: what an earlier run or a demo left shall not decide the outcome.
LAB = Suite("lab", "lab/lab build && lab/lab down && lab/lab up 31 34")
CONTRACT = Suite("contract", f"lab/lab exec 34 env NOVA_RBD_SNAP_REAL=1 {PYTEST} /src/tests/contract")
DEATHS = Suite("deaths", f"lab/lab exec 34 env NOVA_RBD_SNAP_DEATHS=12 {PYTEST} /src/tests/deaths")
# What stops daemons of the one cluster, or fills its pools, runs alone.
DISTURBING = functional("34", "-m", "'quick and disturbs'", name="disturbing")
# Nova 31, under eventlet, takes three times as long as 34 for the same, and so runs what tells most.
BESIDE = [
    [functional("31", "-m", "'not disturbs and (quick or not slow)'"), end_to_end("31", "-m", "core")],
    [CONTRACT, functional("34", "-m", "'not disturbs and (quick or not slow)'"), DEATHS],
]
ALONE = [DISTURBING, end_to_end("34", "-m", "'not slow'")]


def run_all(suites: list[Suite]) -> None:
    for suite in suites:
        suite.run()


def main() -> int:
    started = time.monotonic()
    LOGS.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor() as pool:
        lab = pool.submit(LAB.run)
        if UNIT.run():
            run_all([STYLE, CONFORMANCE])
        if lab.result():
            list(pool.map(run_all, BESIDE))
            run_all(ALONE)

    suites = [UNIT, STYLE, CONFORMANCE, LAB, *itertools.chain(*BESIDE), *ALONE]
    total = {kind: sum(suite.counts.get(kind, 0) for suite in suites) for kind in ("failed", "passed", "skipped", "error")}
    total["error"] += sum(1 for suite in suites if not suite.ok and not suite.counts)
    summary = ", ".join(f"{number} {kind}" for kind, number in total.items() if number)
    print(f"===== {summary} in {time.monotonic() - started:.2f}s =====")
    return 0 if all(suite.ok for suite in suites) else 1


if __name__ == "__main__":
    sys.exit(main())
