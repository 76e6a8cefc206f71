# SPDX-License-Identifier: Apache-2.0
"""What every suite shares."""

from __future__ import annotations

import pytest
import tenacity

from nova_rbd_snap.snapshot import steps


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever waits for a dead client's watch to end tries five times at once."""
    hurried = steps._when_free.copy(sleep=lambda seconds: None, stop=tenacity.stop_after_attempt(5))
    monkeypatch.setattr(steps, "_when_free", hurried)
