# SPDX-License-Identifier: Apache-2.0
"""What travels between nova-compute and its engine: JSON objects, each after its length as four bytes.

To the engine
    ``{"version", "host", "machine", "incarnation", "held"}`` first (``held``: ids of the jobs that nova-compute has the
    say about), then ``{"id", "call", "arguments"}`` for each call.
From the engine
    ``{"version"}`` first, or ``{"error"}`` when it cannot work; then for each call any number of ``{"id", "report"}``
    and one ``{"id", "result"}`` or ``{"id", "error"}``; and ``{"log": [level, logger, text]}`` at any time.
"""

from __future__ import annotations

import json
import socket
import struct
from typing import Any, Optional

#: Of this protocol. Two ends that differ do not talk: a package was upgraded under a running nova-compute.
VERSION = 3

_LENGTH = struct.Struct(">I")
_LONGEST_BYTES = 16 * 1024 * 1024


def send(sock: socket.socket, message: dict[str, Any]) -> None:
    """Send one message. Not thread-safe. :raises OSError: the other end is gone."""
    data = json.dumps(message).encode()
    sock.sendall(_LENGTH.pack(len(data)) + data)


def receive(sock: socket.socket) -> Optional[dict[str, Any]]:
    """The next message; None once the other end is gone. :raises ValueError: what arrived is not a message."""
    head = _read(sock, _LENGTH.size)
    if head is None:
        return None
    (length,) = _LENGTH.unpack(head)
    if length > _LONGEST_BYTES:
        raise ValueError(f"a message of {length} bytes: the other end does not speak this protocol")
    body = _read(sock, length)
    return None if body is None else dict(json.loads(body))


def _read(sock: socket.socket, count: int) -> Optional[bytes]:
    parts = []
    while count:
        try:
            part = sock.recv(count)
        except ConnectionResetError:
            return None
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
