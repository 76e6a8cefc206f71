# SPDX-License-Identifier: Apache-2.0
"""Run every suite, tell how long each took, and end with the sum of all: ``python3 -m tests.run``.

What needs no servers runs while the lab is built and started. Then the two clouds are tested side by side, each by one
suite after the other, as far as that leaves the cluster they share in peace, and last, alone, what does not.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from tests import suite
from tests.monitor import HURRIED_SECONDS
from tests.suite import CEPH_16, REPO, end_to_end, inside

_counts = re.compile(r"(\d+) (passed|failed|errors?|skipped)")
_printing = threading.Lock()


class Suite(suite.Suite):
    """One command and its outcome."""

    def __init__(self, name: str, command: str) -> None:
        super().__init__(name, command, REPO / "build" / "tests")
        self.seconds = 0.0
        self.ok = False
        self.counts: dict[str, int] = {}

    def run(self) -> bool:
        """Run to the end; the log is shown when it failed."""
        started = time.monotonic()
        self.ok = self.execute() == 0
        self.seconds = time.monotonic() - started
        lines = self.log.read_text(errors="replace").splitlines()
        summary = next((line for line in reversed(lines) if _counts.search(line) and " in " in line), "")
        self.counts = {kind.rstrip("s"): int(number) for number, kind in _counts.findall(summary)}
        with _printing:
            outcome = "ok" if self.ok else "FAILED"
            print(f"{self.name:<14} {outcome:<7} {self.seconds:6.0f} s  {summary.strip(' =')}", flush=True)
            if not self.ok:
                print("\n".join(f"    {line}" for line in lines[-300:]), flush=True)
        return self.ok


FUNCTIONAL, E2E = "/src/tests/functional", "--durations=15 /src/tests/e2e"

VENV = Suite("venv", "make build/venv/ready")
STYLE = Suite("style", "make style")
UNIT = Suite("unit", "make test-unit")
CONFORMANCE = Suite("conformance", "build/venv/bin/python -m pytest tests/conformance")
#: What the fake is held to is in the unit tests.
_CONTRACT = ("/src/tests/contract", "-m", "'real and not slow'")
# From nothing: what an earlier run or a demo left shall not decide the outcome.
LAB = Suite("lab", "lab/lab build && lab/lab down && lab/lab up")
# One of each cloud. Nova 31, under eventlet, takes three times as long as 34 for the same, and so runs what tells most.
BESIDE = [
    [
        Suite("functional-31", inside("31", FUNCTIONAL, "-m", "'not disturbs and (quick or not slow)'")),
        Suite("e2e-nova-31", end_to_end("31", E2E, "-m", "core")),
        Suite("contract", inside("31", *_CONTRACT, NOVA_RBD_SNAP_REAL="1")),
        Suite("deaths", inside("31", "/src/tests/deaths", NOVA_RBD_SNAP_DEATHS="12")),
        Suite("contract-16", inside("ceph16", *_CONTRACT, **CEPH_16)),
    ],
    [
        Suite("functional-34", inside("34", FUNCTIONAL, "-m", "'not disturbs and not slow'")),
        Suite("e2e-nova-34", end_to_end("34", E2E, "-m", "'not disturbs and not slow'")),
    ],
]
ALONE = [
    Suite("disturbing", inside("34", FUNCTIONAL, "-m", "'disturbs and quick'")),
    Suite("e2e-disturbing", end_to_end("34", E2E, "-m", "'disturbs and not slow'")),
]


@contextlib.contextmanager
def hurried() -> Iterator[None]:
    """As :func:`tests.monitor.hurried`, for all suites together: none shall end it for the others."""

    def config(verb: str, *value: str) -> None:
        command = ["lab/lab", "exec", "ceph", "ceph", "config", verb, "mon", "paxos_propose_interval", *value]
        subprocess.run(command, cwd=REPO, check=True)

    config("set", str(HURRIED_SECONDS))
    try:
        yield
    finally:
        config("rm")


def run_all(suites: list[Suite]) -> None:
    for each in suites:
        each.run()


def main() -> int:
    started = time.monotonic()
    VENV.run()  # first, for it may need a package, as the lab may, and apt serves one at a time
    with ThreadPoolExecutor() as pool:
        lab = pool.submit(LAB.run)
        if UNIT.run():
            run_all([STYLE, CONFORMANCE])
        if lab.result():
            with hurried():
                list(pool.map(run_all, BESIDE))
                run_all(ALONE)

    suites = [VENV, UNIT, STYLE, CONFORMANCE, LAB, *itertools.chain(*BESIDE), *ALONE]
    kinds = ("failed", "passed", "skipped", "error")
    total = {kind: sum(each.counts.get(kind, 0) for each in suites) for kind in kinds}
    total["error"] += sum(1 for each in suites if not each.ok and not each.counts)
    summary = ", ".join(f"{number} {kind}" for kind, number in total.items() if number)
    print(f"===== {summary} in {time.monotonic() - started:.2f}s =====")
    return 0 if all(each.ok for each in suites) else 1


if __name__ == "__main__":
    sys.exit(main())
