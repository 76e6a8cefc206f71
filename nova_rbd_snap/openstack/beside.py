# SPDX-License-Identifier: Apache-2.0
"""Work that is done beside other work, in a thread of its own."""

from __future__ import annotations

import threading
from typing import Any, Callable, Optional


class Beside:
    """Some work: begun at the start of a block, and over at its end. Under eventlet the thread is a green one.

    Its error is raised by :meth:`wait` alone: who does not wait has one of their own.
    """

    def __init__(self, name: str, work: Callable[[], object]) -> None:
        """
        :param name: of the thread.
        :param work: ends within a bounded time.
        """
        self._work = work
        self._error: Optional[Exception] = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __enter__(self) -> Beside:
        self._thread.start()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._thread.join()

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:  # raised again where it can be acted upon
            self._error = error

    def wait(self) -> None:
        """Return when the work is done. :raises Exception: what the work raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
