# SPDX-License-Identifier: Apache-2.0
"""Waiting for what comes true in its own time, in every suite: bounded, and with words for when it does not."""

from __future__ import annotations

import time
from typing import Any, Callable


def eventually(condition: Callable[[], Any], what: str, seconds: float = 60, pause: float = 0.3) -> Any:
    """What *condition* returns once that is true. :raises AssertionError: it never was."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(pause)
    return found


def promised_seconds(operation_timeout: float) -> float:
    """Within which a request ends though the cluster does not answer (``docs/design/engine.rst``): so long without
    progress, and as long again for what is undone."""
    return 2 * max(5 * operation_timeout, 90)
