# SPDX-License-Identifier: Apache-2.0
"""What all copies of a host share: a bound of memory, and one of bytes a second."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Callable


class Memory:
    """So many bytes, taken and given back. Thread-safe.

    Whoever takes some must be able to go on, and give them back, without taking more.
    """

    def __init__(self, total: int) -> None:
        self._free = self._total = total
        self._given = threading.Condition()

    def take(self, count: int) -> None:
        """Return once there are *count* bytes, or nobody has any."""
        with self._given:
            self._given.wait_for(lambda: self._fits(count))
            self._free -= count

    def try_take(self, count: int) -> bool:
        """Whether there are *count* bytes now; they are taken then."""
        with self._given:
            if not self._fits(count):
                return False
            self._free -= count
            return True

    def _fits(self, count: int) -> bool:
        return count <= self._free or self._free == self._total

    def give(self, count: int) -> None:
        with self._given:
            self._free += count
            self._given.notify_all()


class Throttle:
    """Lets bytes pass at a rate, whoever brings them. Thread-safe."""

    def __init__(
        self,
        bytes_per_second: int = 0,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """
        :param bytes_per_second: 0 for no limit.
        """
        self._rate, self._clock, self._sleep = bytes_per_second, clock, sleep
        self._lock = threading.Lock()
        self._free_at = 0.0

    def wait(self, count: int) -> None:
        """Return once *count* bytes may pass."""
        if not self._rate:
            return
        with self._lock:
            begin = max(self._free_at, self._clock())
            self._free_at = begin + count / self._rate
            pause = begin - self._clock()
        if pause > 0:
            self._sleep(pause)


@dataclass(frozen=True)
class Limits:
    """See the module."""

    memory: Memory = field(default_factory=lambda: Memory(64 << 20))
    throttle: Throttle = field(default_factory=Throttle)
