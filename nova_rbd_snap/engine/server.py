# SPDX-License-Identifier: Apache-2.0
"""The engine's end of the socket: runs each call in a thread, and ends in order when nova-compute does.

The end of the socket is the one sign that nova-compute is gone, however it went. Then running work is cancelled and
undone, what was ready for registration is settled, and the process ends. SIGTERM, which a stop of the whole service
sends to every process, cancels and undoes running work at once; the process ends when nothing awaits nova-compute,
or after a minute.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from nova_rbd_snap import errors
from nova_rbd_snap.engine import Report, wire
from nova_rbd_snap.engine.service import Engine

LOG = logging.getLogger(__name__)

#: More than there ever are: a call that waited for a thread would look stuck.
_THREADS = 10_000
#: Once nova-compute is gone nobody else ends an engine whose librbd does not return.
_END_SECONDS = 600
#: How long SIGTERM lets work end, and nova-compute take what is ready for it; meanwhile no snapshot is begun.
_TAKE_SECONDS = 60
#: Seconds between two reports of the same step: one per object would keep nova-compute busy.
_REPORT_SECONDS = 1.0

#: Calls that may be made over the socket, and whether they report progress.
_CALLS = {
    "check": False,
    "describe": False,
    "reserve_clone": False,
    "reserve_copy": False,
    "reserve_freeze": False,
    "perform": True,
    "upload": True,
    "upload_file": True,
    "make_flat": True,
    "distrust": False,
    "finish": False,
    "rollback": True,
    "leave": False,
    "cancel": True,
    "remove_disks": True,
}


class Server:
    """Serves one nova-compute over one socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._sending = threading.Lock()
        self._terminated = False

    def greet(self) -> dict[str, Any]:
        """Receive the first message. :raises ValueError: the other end speaks another version."""
        hello = wire.receive(self._socket)
        if hello is None:
            raise ValueError("nova-compute ended before it said anything")
        if hello["version"] != wire.VERSION:
            raise ValueError(
                f"nova-compute speaks version {hello['version']} and its engine {wire.VERSION}: the package was "
                "upgraded under it; restart nova-compute"
            )
        return hello

    def send(self, message: dict[str, Any]) -> bool:
        """Send *message*; False once nova-compute is gone."""
        try:
            with self._sending:
                wire.send(self._socket, message)
        except OSError:
            return False
        return True

    def _reporter(self, number: int) -> Report:
        """Sends the progress of call *number*, each step at once and then now and again."""
        last: tuple[str, float] = ("", 0.0)

        def report(step: str, done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if step != last[0] or now - last[1] >= _REPORT_SECONDS:
                last = (step, now)
                self.send({"id": number, "report": (step, done, total)})

        return report

    def serve(self, engine: Engine) -> None:
        """Answer calls until nova-compute is gone, then end its work."""
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="call") as pool:
            while (request := wire.receive(self._socket)) is not None:
                pool.submit(self._answer, engine, request)
            threading.Thread(target=_end_late, name="end", daemon=True).start()
            LOG.info("The engine ends")
            if not self._terminated:
                engine.orphan()
            engine.stop()
        if not self._terminated:
            engine.settle()

    def terminate(self, engine: Engine) -> None:
        """Cancel running work, and end once nova-compute has taken what was ready for it.

        What it has not taken in time is left to it: as long as it lives it alone knows what becomes of that, and its
        next call starts another engine.
        """
        deadline = time.monotonic() + _TAKE_SECONDS
        engine.stop(_TAKE_SECONDS)
        engine.wait_until_idle(max(0.0, deadline - time.monotonic()))
        self._terminated = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)

    def _answer(self, engine: Engine, request: dict[str, Any]) -> None:
        number, call, arguments = request["id"], request["call"], request["arguments"]
        try:
            if _CALLS[call]:
                arguments["report"] = self._reporter(number)
            self.send({"id": number, "result": getattr(engine, call)(**arguments)})
        except Exception as error:
            if not isinstance(error, errors.SnapError):
                LOG.exception("Call %s failed in a way nobody expected", call)
            self.send({"id": number, "error": errors.known(error).to_wire()})


class LogToParent(logging.Handler):
    """Hands log records to nova-compute, so that they stand in its log; to stderr, its journal, once it is gone."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self._server = server
        # Of the bindings' and libraries' own chatter only warnings matter to nova-compute's log.
        self.addFilter(lambda record: record.name.startswith("nova_rbd_snap") or record.levelno >= logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if not self._server.send({"log": [record.levelno, record.name, text]}):
            # Who ran nova-compute may have closed the other end: then nobody is left to tell, but much to do.
            with contextlib.suppress(OSError):
                print(f"nova-rbd-snap: {record.levelname} {text}", file=sys.stderr, flush=True)


def _end_late() -> None:
    time.sleep(_END_SECONDS)
    LOG.error("The engine did not come to its end within %d s; what is left of its jobs is in the ledger", _END_SECONDS)
    os._exit(1)
