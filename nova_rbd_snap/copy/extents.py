# SPDX-License-Identifier: Apache-2.0
"""A frozen disk, and what of it may be other than zeros."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Callable, Protocol

#: Called with bytes done and bytes in all; False asks to stop.
OnProgress = Callable[[int, int], bool]

#: The most bytes that are read at once: as a rule an object of an rbd image.
PIECE = 4 << 20


@dataclass(frozen=True)
class Extent:
    """Some bytes of a disk."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        return self.offset + self.length


class Extents:
    """Extents in order, apart from each other: 16 bytes each, for a disk may have millions."""

    def __init__(self, extents: Iterable[Extent] = ()) -> None:
        self._offsets, self._ends = array("Q"), array("Q")
        for extent in extents:
            self.add(extent.offset, extent.end)

    def add(self, offset: int, end: int) -> None:
        """Add what begins at or after the start of the last one; what touches or overlaps that becomes part of it."""
        if self._ends and offset <= self._ends[-1]:
            self._ends[-1] = max(self._ends[-1], end)
        elif end > offset:
            self._offsets.append(offset)
            self._ends.append(end)

    def __iter__(self) -> Iterator[Extent]:
        return (Extent(offset, end - offset) for offset, end in zip(self._offsets, self._ends))

    def __len__(self) -> int:
        return len(self._offsets)

    @property
    def total(self) -> int:
        """Bytes in all of them."""
        return sum(self._ends) - sum(self._offsets)

    def aligned(self, unit: int) -> Extents:
        """The same in whole units, of which the last may go beyond the disk's end."""
        whole = Extents()
        for offset, end in zip(self._offsets, self._ends):
            whole.add(offset // unit * unit, -(-end // unit) * unit)
        return whole

    def pieces(self, most: int) -> Iterator[Extent]:
        """The same, cut at every multiple of *most* bytes."""
        for begin, end in zip(self._offsets, self._ends):
            yield Extent(begin, min(end, (begin // most + 1) * most) - begin)
            for offset in range((begin // most + 1) * most, end, most):
                yield Extent(offset, min(end - offset, most))


class Source(Protocol):
    """A disk that does not change.

    Every method may be called from several threads, and raises what the place of the disk may raise.

    :ivar size: bytes.
    """

    size: int

    def extents(self, on_progress: OnProgress) -> Extents:
        """What is allocated: all else is zeros, and of this some may be.

        :raises errors.Cancelled: *on_progress* asked to stop.
        """

    def read(self, offset: int, length: int) -> bytes:
        """Bytes within the disk."""


class Sink(Protocol):
    """A disk that is all zeros, and is to be filled. Every method may be called from several threads."""

    def write(self, offset: int, data: bytes) -> None:
        """Write bytes within the disk; they are there once this has returned. Repeatable."""
