# SPDX-License-Identifier: Apache-2.0
"""From a frozen disk into one that is blank: pieces in parallel, each tried again by itself."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import tenacity

from nova_rbd_snap import errors
from nova_rbd_snap.copy.extents import PIECE, Extent, Extents, OnProgress, Sink, Source
from nova_rbd_snap.copy.limits import Limits

#: How often a piece is tried where the cluster does not answer; each time it may take as long as that takes to show.
_ATTEMPTS = 3
#: How many pieces are under way at once.
_WORKERS = 16
#: What is all zeros and so long, at a multiple of that, is not written: it is so already.
_BLOCK = 64 << 10
_ZEROS = bytes(_BLOCK)

_patiently = tenacity.Retrying(
    retry=tenacity.retry_if_exception_type(errors.Unreachable)
    & tenacity.retry_if_not_exception_type(errors.Blocklisted),
    stop=tenacity.stop_after_attempt(_ATTEMPTS),
    reraise=True,
)


def transfer(source: Source, sink: Sink, extents: Extents, on_progress: OnProgress, limits: Limits) -> int:
    """Write what is in *extents* of *source* to *sink*; returns how many bytes that were.

    :raises errors.Cancelled: *on_progress* asked to stop.
    :raises errors.SnapError: the first that a piece failed of, for good.
    """
    pieces, total = extents.pieces(PIECE), extents.total
    with ThreadPoolExecutor(_WORKERS, thread_name_prefix="copy") as pool:
        written = 0

        def begin(count: int) -> set[Future[tuple[int, int]]]:
            return {
                pool.submit(_patiently.copy(), _move, source, sink, piece, limits)
                for piece in itertools.islice(pieces, count)
            }

        done, under_way = 0, begin(_WORKERS)
        while under_way:
            ended, under_way = wait(under_way, return_when=FIRST_COMPLETED)
            for piece in ended:
                moved, new = piece.result()
                done, written = done + moved, written + new
            if not on_progress(done, total):
                raise errors.Cancelled("the copy was cancelled")
            under_way |= begin(len(ended))
    return written


def _move(source: Source, sink: Sink, piece: Extent, limits: Limits) -> tuple[int, int]:
    """Copy one piece; returns its bytes, and how many of them had to be written."""
    written = 0
    limits.memory.take(piece.length)
    try:
        for offset, run in _runs(source.read(piece.offset, piece.length), piece.offset):
            limits.throttle.wait(len(run))
            sink.write(offset, run)
            written += len(run)
    finally:
        limits.memory.give(piece.length)
    return piece.length, written


def _runs(data: bytes, offset: int) -> Iterator[tuple[int, bytes]]:
    """What of *data*, which is at *offset*, has to be written to a blank disk."""
    begin = None
    for start in range(0, len(data), _BLOCK):
        block = data[start : start + _BLOCK]
        if block != _ZEROS[: len(block)]:
            begin = start if begin is None else begin
        elif begin is not None:
            yield offset + begin, data[begin:start]
            begin = None
    if begin is not None:
        yield offset + begin, data[begin:] if begin else data
