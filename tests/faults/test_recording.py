# SPDX-License-Identifier: Apache-2.0
"""The fault report counts what was not seen to pass as failed."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests import fault_report
from tests.faults import recording


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cells.jsonl"
    monkeypatch.setenv(recording.LOG_VARIABLE, str(path))
    return path


def run_cells(*ends: Any) -> None:
    """A cell for each: what it finds, or what it raises."""
    for number, end in enumerate(ends):
        with contextlib.suppress(BaseException), recording.cell(f"cell {number}", real=True) as found:
            if isinstance(end, BaseException):
                raise end
            vars(found).update(end)


def test_figures(log: Path) -> None:
    good = {"wait_seconds": 2.04}, {"kill": True, "wait_seconds": 1.0}
    run_cells(*good, {"leftovers": 2}, AssertionError(), KeyboardInterrupt())
    found = fault_report.outcomes(log.read_text().splitlines())
    assert fault_report.figures(found) == {
        "cells": 5,
        "passed": 2,
        "real_cells": 5,
        "kill_points": 1,
        "leftovers": 2,
        "longest_wait_seconds": 2.0,
        "guest_suspensions": None,
    }
    assert not fault_report.is_good(found)


def test_what_there_was_not_is_not_shown_as_zero(log: Path) -> None:
    """Where there was no guest none was let be, and where no request ended none was quick."""

    def shown() -> list[str]:
        figures = fault_report.figures(fault_report.outcomes(log.read_text().splitlines()))
        return fault_report.row("suite", figures.values(), "").split()[-2:]

    run_cells({}, {})
    assert shown() == ["-", "-"]
    run_cells({"guest_suspensions": 0, "wait_seconds": 3.0})
    assert shown() == ["3.0", "0"]


@pytest.mark.parametrize("end", [{"leftovers": 1}, {"guest_suspensions": 1}, ValueError()])
def test_one_is_enough(log: Path, end: Any) -> None:
    run_cells({}, {})
    assert fault_report.is_good(fault_report.outcomes(log.read_text().splitlines()))
    run_cells({}, end)
    assert not fault_report.is_good(fault_report.outcomes(log.read_text().splitlines()))


@pytest.mark.parametrize("cut", ["the end", "a part"])
def test_broken_off(log: Path, cut: str) -> None:
    """A process that dies in a cell, or as it writes, leaves a cell that has failed."""
    run_cells({}, {})
    lines = log.read_text().splitlines()
    lines = lines[:-1] if cut == "the end" else [*lines[:-1], lines[-1][:20]]
    found = fault_report.outcomes(lines)
    assert [(cell["cell"], cell["passed"]) for cell in found] == [("cell 0", True), ("cell 1", None)]
    assert fault_report.figures(found)["passed"] == 1


def test_same_name_again(log: Path) -> None:
    """Each run of a cell counts, also one that has no end beside one that has."""
    run_cells({})
    run_cells({})
    lines = [*log.read_text().splitlines(), json.dumps({**json.loads(log.read_text().splitlines()[0])})]
    assert [cell["passed"] for cell in fault_report.outcomes(lines)] == [True, True, None]


@pytest.mark.parametrize(("command", "why"), [("exit 3", "code 3"), ("true", "code 0")])
def test_suite_that_reports_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, why: str
) -> None:
    """A suite that crashes before its first cell, or runs none, has failed."""
    monkeypatch.setattr(fault_report, "LOGS", tmp_path)
    monkeypatch.setattr(fault_report, "CELLS", tmp_path / "cells.jsonl")
    (cell,) = fault_report.Suite("some suite", command).run()
    assert why in cell["cell"]
    assert not fault_report.is_good([cell])


def test_suite_that_crashes_after_good_cells(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fault_report, "LOGS", log.parent)
    monkeypatch.setattr(fault_report, "CELLS", log)
    run_cells({})
    good = log.read_text()
    suite = fault_report.Suite("suite", f"printf '%s' '{good}' > {log}; kill -SEGV $$")
    assert [cell["passed"] for cell in suite.run()] == [True, False]


def test_nothing_is_written_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(recording.LOG_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    run_cells({})
    assert list(tmp_path.iterdir()) == []
