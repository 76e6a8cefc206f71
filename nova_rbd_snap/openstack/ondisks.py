# SPDX-License-Identifier: Apache-2.0
"""Snapshots and the deletion of a server race for its disks: the deletion wins."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Callable

from nova_rbd_snap import errors


class OnDisks:
    """Who works on the disks of which server: a deletion must not take a disk away from under them, nor miss them."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._servers: list[str] = []
        self._given_up: set[str] = set()

    @contextlib.contextmanager
    def work(self, server: str) -> Iterator[None]:
        """Work on the server's disks. :raises errors.Cancelled: the server is being deleted."""
        with self._changed:
            if server in self._given_up:
                raise errors.Cancelled("the server is being deleted")
            self._servers.append(server)
        try:
            yield
        finally:
            with self._changed:
                self._servers.remove(server)
                self._changed.notify_all()

    @contextlib.contextmanager
    def given_up(self, server: str) -> Iterator[None]:
        """Within the block no work on the server's disks begins."""
        with self._changed:
            self._given_up.add(server)
        try:
            yield
        finally:
            with self._changed:
                self._given_up.discard(server)

    def stop(self, server: str, cancel: Callable[[str], list[str]], timeout_seconds: float) -> list[str]:
        """*cancel* the work on the disks of a server that is :meth:`given_up`, until none is left.

        :returns: what *cancel* returned.
        """
        deadline = time.monotonic() + timeout_seconds
        done = cancel(server)
        # What had begun, but reached the engine only after that.
        while self._is_worked_on(server) and time.monotonic() < deadline:
            done += cancel(server)
        return done

    def _is_worked_on(self, server: str) -> bool:
        with self._changed:
            return not self._changed.wait_for(lambda: server not in self._servers, timeout=1)
