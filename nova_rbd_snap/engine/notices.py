# SPDX-License-Identifier: Apache-2.0
"""What is told to the log once, and not each time that it is found to be as it was."""

from __future__ import annotations

import logging

LOG = logging.getLogger(__name__)


class Notices:
    """By what they are about."""

    def __init__(self) -> None:
        self._told: dict[str, str] = {}

    def tell(self, what: str, text: str) -> None:
        """Warn, unless that is the last that was said about it."""
        if self._told.get(what) != text:
            LOG.warning("%s: %s", what.capitalize(), text)
        self._told[what] = text

    def withdraw(self, what: str) -> None:
        """It is over: should it come again, it is told again."""
        self._told.pop(what, None)
