# SPDX-License-Identifier: Apache-2.0
"""What suites on a real Ceph tell its monitor."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def hurried(connection: Any) -> Iterator[None]:
    """Meanwhile the monitor proposes ten times as often as it does by itself, which is what each snapshot waits for.

    :param connection: a ``rados.Rados`` of an administrator.
    """

    def config(verb: str, **more: str) -> None:
        command = {"prefix": f"config {verb}", "who": "mon", "name": "paxos_propose_interval", **more}
        code, _, text = connection.mon_command(json.dumps(command), b"")
        assert code == 0, f"{command}: {code} {text}"

    config("set", value="0.1")
    try:
        yield
    finally:
        config("rm")
