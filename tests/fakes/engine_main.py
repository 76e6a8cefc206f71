# SPDX-License-Identifier: Apache-2.0
"""The engine's process, as it is but for its cluster: a :class:`FakeCluster` in which things go wrong as told.

``python -m tests.fakes.engine_main [--picture FILE] […] --fd N``. When it ends it writes what its pools looked like
before and after, so that a test can see what a process that outlives its parent did.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

from nova_rbd_snap import errors
from nova_rbd_snap.engine import __main__ as engine_main
from nova_rbd_snap.engine import server as server_module
from nova_rbd_snap.engine.server import Server
from nova_rbd_snap.engine.service import Engine
from tests.fakes.cluster import FakeCluster
from tests.fakes.engine import FakeImages, endless_disk, make_engine, populated

REGISTERED = {"yes": True, "no": False, "unknown": None}


def _disturb(cluster: FakeCluster, told: argparse.Namespace) -> None:
    if told.stuck:
        cluster.do_on(told.stuck, lambda *args: threading.Event().wait())
    if told.denied:
        cluster.fail_on(told.denied, errors.NoPermission)
    if told.slow_seconds:
        cluster.do_on("flatten", lambda image, on_progress: _slowly(told.slow_seconds, on_progress))


def _slowly(seconds: float, on_progress: Any) -> None:
    """A flatten that moves, but takes its time."""
    for done in range(8):
        time.sleep(seconds / 8)
        on_progress(done, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path, help="where to write the pools when it ends")
    parser.add_argument("--stuck", metavar="CALL", help="never return from this call")
    parser.add_argument("--denied", metavar="CALL", help="fail this call once")
    parser.add_argument("--slow-seconds", type=float, help="how long a flatten takes at least")
    parser.add_argument("--registered", choices=REGISTERED, default="unknown", help="what Glance would say")
    parser.add_argument("--take-seconds", type=float, default=60, help="how long SIGTERM waits for what is ready")
    told, _ = parser.parse_known_args()

    cluster = populated()
    endless_disk(cluster)
    before = cluster.picture()
    _disturb(cluster, told)

    def build(server: Server, config: list[str]) -> Engine:
        hello = server.greet()

        images = FakeImages(uses_it=REGISTERED[told.registered], settles_as=REGISTERED[told.registered])
        return make_engine(
            cluster, host=hello["host"], machine=hello["machine"], life=hello["incarnation"], held=hello["held"],
            images=images,
        )

    engine_main._build = build
    server_module._TAKE_SECONDS = told.take_seconds
    engine_main.main()
    if told.picture:
        written = told.picture.with_suffix(".new")
        written.write_text(json.dumps({"before": repr(before), "after": repr(cluster.picture())}))
        os.replace(written, told.picture)


if __name__ == "__main__":
    main()
