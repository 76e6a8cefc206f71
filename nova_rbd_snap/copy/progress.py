# SPDX-License-Identifier: Apache-2.0
"""How far a copy is, for people: now and again in the log, and where *note* writes it down."""

from __future__ import annotations

import logging
import time
from typing import Callable

LOG = logging.getLogger(__name__)

#: Seconds between two lines.
_SECONDS = 10.0
_MIB = 1 << 20


class Progress:
    """Of one copy."""

    def __init__(
        self, what: str, note: Callable[[int], None], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """
        :param what: is copied, for people.
        :param note: told how many percent are done.
        """
        self._what, self._note, self._clock = what, note, clock
        self._told_at = clock()

    def moved(self, done: int, total: int) -> None:
        """So many bytes of so many are done. :raises errors.SnapError: what *note* raises."""
        now = self._clock()
        if total == 0 or now - self._told_at < _SECONDS:
            return
        self._told_at = now
        percent = 100 * done // total
        LOG.info("%s: %d %% (%d of %d MiB)", self._what, percent, done // _MIB, total // _MIB)
        self._note(percent)
