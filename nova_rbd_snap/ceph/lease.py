# SPDX-License-Identifier: Apache-2.0
"""What Ceph's object class ``lock`` takes and gives, as bytes.

The bindings' own call leaves the microseconds of a lock's duration to chance, and takes no fractions of a second
(observed on 16.2.15 and 18.2.7), so a lease that has run out would not be known to have.
"""

from __future__ import annotations

import struct

#: Names of the class and of its methods.
CLASS, LOCK, UNLOCK = "lock", "lock", "unlock"

_NAME = "nova-rbd-snap"
_EXCLUSIVE = 1
#: Fail unless the lock is the caller's already (``LOCK_FLAG_MUST_RENEW``).
_MUST_RENEW = 2


def _text(value: str) -> bytes:
    return struct.pack("<I", len(value.encode())) + value.encode()


def _versioned(body: bytes) -> bytes:
    """With the class's version, the oldest that can read it, and the length before it."""
    return struct.pack("<BBI", 1, 1, len(body)) + body


def _lock(seconds: float, flags: int) -> bytes:
    whole = int(seconds)
    lock = _text(_NAME) + bytes([_EXCLUSIVE]) + _text("") + _text("")  # cookie and tag: a client has it once
    duration = struct.pack("<II", whole, int((seconds - whole) * 1e9))
    return _versioned(lock + _text("") + duration + bytes([flags]))


def taking(seconds: float) -> bytes:
    """Take the lock for so long: EBUSY where another client has it, EEXIST where this one does."""
    return _lock(seconds, 0)


def renewing(seconds: float) -> bytes:
    """Keep the lock for so long from now: ENOENT where this client does not have it."""
    return _lock(seconds, _MUST_RENEW)


def ending() -> bytes:
    """Give the lock back: ENOENT where this client does not have it."""
    return _versioned(_text(_NAME) + _text(""))
