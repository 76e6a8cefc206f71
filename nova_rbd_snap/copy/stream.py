# SPDX-License-Identifier: Apache-2.0
"""The bytes of an image in order, read ahead in parallel within a bound of memory."""

from __future__ import annotations

import collections
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Union

from nova_rbd_snap.copy.body import Part, Zeros
from nova_rbd_snap.copy.extents import PIECE, Extent, Extents, Source
from nova_rbd_snap.copy.limits import Limits

#: How many reads are under way at once, for where extents are small.
_READERS = 16

_ZEROS = bytes(PIECE)


def stream(source: Source, parts: Iterable[Part], limits: Limits) -> Generator[bytes, None, None]:
    """The bytes of *parts*, those of the disk read from *source*.

    Reads are begun as soon as there is memory for what they bring, and no sooner: who takes the bytes sets the pace.
    Whoever wants no more closes the generator, which gives the memory back.
    """
    waiting: collections.deque[Union[bytes, Future[bytes]]] = collections.deque()
    memory, sizes = limits.memory, collections.deque[int]()

    def first() -> Iterator[bytes]:
        piece = waiting.popleft()
        data = piece if isinstance(piece, bytes) else piece.result()
        limits.throttle.wait(len(data))
        yield data
        memory.give(sizes.popleft())

    with ThreadPoolExecutor(_READERS, thread_name_prefix="read") as pool:
        try:
            for part in _pieces(parts):
                size = part.length if isinstance(part, Extent) else len(part)
                while not memory.try_take(size):
                    if waiting:
                        yield from first()
                    else:
                        memory.take(size)
                        break
                sizes.append(size)
                waiting.append(pool.submit(_read, source, part) if isinstance(part, Extent) else part)
            while waiting:
                yield from first()
        finally:
            for piece in waiting:
                if isinstance(piece, Future):
                    piece.cancel()
            for size in sizes:
                memory.give(size)


def _pieces(parts: Iterable[Part]) -> Iterator[Union[bytes, Extent]]:
    """*parts* in pieces that are small enough; zeros need no memory."""
    for part in parts:
        if isinstance(part, Zeros):
            whole, rest = divmod(part.length, PIECE)
            for _ in range(whole):
                yield _ZEROS
            if rest:
                yield _ZEROS[:rest]
        elif isinstance(part, Extent):
            yield from Extents([part]).pieces(PIECE)
        else:
            yield part


def _read(source: Source, extent: Extent) -> bytes:
    there = max(0, min(extent.end, source.size) - extent.offset)
    data = source.read(extent.offset, there) if there else b""
    return data + bytes(extent.length - there) if there < extent.length else data
