# SPDX-License-Identifier: Apache-2.0
"""What suites on a real Ceph tell its monitor."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

HURRIED_SECONDS = 0.1


@contextlib.contextmanager
def hurried(connection: Any) -> Iterator[None]:
    """Meanwhile the monitor proposes ten times as often as it does by itself, which is what each snapshot waits for.

    Where somebody has hurried it already, it is theirs to let it be.

    :param connection: a ``rados.Rados`` of an administrator.
    """

    def config(verb: str, **more: str) -> str:
        command = {"prefix": f"config {verb}", "who": "mon", **more}
        code, out, text = connection.mon_command(json.dumps(command), b"")
        assert code == 0, f"{command}: {code} {text}"
        return str(out.decode())

    if float(config("get", key="paxos_propose_interval")) == HURRIED_SECONDS:
        yield
        return
    config("set", name="paxos_propose_interval", value=str(HURRIED_SECONDS))
    try:
        yield
    finally:
        config("rm", name="paxos_propose_interval")
