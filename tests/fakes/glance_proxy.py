# SPDX-License-Identifier: Apache-2.0
"""A proxy in front of Glance that can refuse, hang, or lose the answer of chosen requests."""

from __future__ import annotations

import http.client
import socketserver
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Any, Callable, Optional

_GLANCE = ("127.0.0.1", 9292)
_PIECE = 1 << 20


@dataclass(frozen=True)
class Request:
    """A request on its way to Glance; *body* is empty where it is an upload."""

    method: str
    path: str
    body: bytes

    @property
    def registers(self) -> bool:
        """Whether it registers a location, in either of Glance's ways."""
        return (self.method == "POST" and self.path.endswith("/locations")) or (
            self.method == "PATCH" and b'"/locations/-"' in self.body
        )


@dataclass(frozen=True)
class Fault:
    """What becomes of the requests that *hits* chooses.

    :ivar status: answered instead of asking Glance.
    :ivar body: of a good answer that is given instead of asking Glance.
    :ivar asked: whether Glance gets the request, where it is not answered.
    :ivar cut: after so many bytes of an upload the connection is cut, on both sides.
    :ivar times: so often; else each time.
    :ivar held: no answer comes until :meth:`GlanceProxy.behave`; else the connection is cut at once.
    """

    hits: Callable[[Request], bool]
    status: Optional[int] = None
    body: Optional[bytes] = None
    asked: bool = False
    cut: Optional[int] = None
    times: Optional[int] = None
    held: bool = False


class GlanceProxy:
    """Listens on a port of this machine, in threads of its own."""

    def __init__(self, port: int) -> None:
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.proxy = self
        self._released = threading.Event()
        self._fault: Optional[Fault] = None
        #: The requests that were chosen, and how many of them are without an answer.
        self.seen: list[Request] = []
        self.hits = 0

    def __enter__(self) -> GlanceProxy:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.behave()
        self._server.shutdown()
        self._server.server_close()

    def break_(self, hits: Callable[[Request], bool], **how: Any) -> None:
        """From now on do *how* (see :class:`Fault`) to the requests that *hits* chooses."""
        self.behave()
        self.seen, self.hits = [], 0
        self._released = threading.Event()
        self._fault = Fault(hits, **how)

    def behave(self) -> None:
        """Be honest again; what was held is cut off."""
        self._fault = None
        self._released.set()

    def fault_for(self, request: Request) -> Optional[Fault]:
        fault = self._fault
        if fault is None or not fault.hits(request) or len(self.seen) == fault.times:
            return None
        self.seen.append(request)
        return fault

    def hit(self, *, held: bool) -> None:
        """A fault happened to a request, which Glance has got by now if it was to get it."""
        self.hits += 1
        if held:
            self._released.wait()


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 50
    proxy: GlanceProxy


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def log_message(self, *_args: object) -> None:
        """Keep quiet."""

    def _handle(self) -> None:
        self.close_connection = True
        length = int(self.headers.get("Content-Length") or 0)
        # Uploads are passed on piece by piece.
        self._upload = length if self.command == "PUT" else 0
        body = b"" if self._upload else self.rfile.read(length)
        fault = self.server.proxy.fault_for(Request(self.command, self.path, body))
        if fault is None:
            self._answer(*self._ask(body))
        elif fault.body:
            self._answer(200, [("Content-Type", "application/json")], iter([fault.body]))
        elif fault.status:
            self._answer(fault.status, [("Content-Type", "text/plain")], iter([b"the proxy refuses\n"]))
        elif fault.cut is not None:
            self._cut(fault.cut)
        else:
            if fault.asked:
                self._ask(body)
            self.server.proxy.hit(held=fault.held)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _handle

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], Iterator[bytes]]:
        chunked = self.headers.get("Transfer-Encoding", "").lower() == "chunked"
        connection, headers = self._to_glance()
        if chunked:
            headers["Transfer-Encoding"] = "chunked"
        whole = self._counted(self._upload) if self._upload else body
        connection.request(
            self.command, self.path, self._pieces() if chunked else whole, headers, encode_chunked=chunked
        )
        answer = connection.getresponse()
        names = ("connection", "transfer-encoding", "content-length", "server", "date")
        kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in names]
        return answer.status, kept, iter(lambda: answer.read(_PIECE), b"")

    def _to_glance(self) -> tuple[http.client.HTTPConnection, dict[str, str]]:
        skip = ("host", "connection", "transfer-encoding", "expect")
        headers = {name: value for name, value in self.headers.items() if name.lower() not in skip}
        return http.client.HTTPConnection(*_GLANCE), headers

    def _cut(self, after: int) -> None:
        """Pass on the start of an upload, and then nothing."""
        connection, headers = self._to_glance()
        connection.putrequest(self.command, self.path)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        for piece in self._counted(after):
            connection.send(piece)
        connection.close()
        self.server.proxy.hit(held=False)

    def _counted(self, count: int) -> Iterator[bytes]:
        while count and (piece := self.rfile.read(min(count, _PIECE))):
            yield piece
            count -= len(piece)

    def _pieces(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _answer(self, status: int, headers: list[tuple[str, str]], body: Iterator[bytes]) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        for piece in body:
            self.wfile.write(piece)
