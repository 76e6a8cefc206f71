# SPDX-License-Identifier: Apache-2.0
"""An image as one forward stream: what its bytes are, before any of them is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, Union

from nova_rbd_snap.copy.extents import Extent, Extents

SECTOR = 512


@dataclass(frozen=True)
class Zeros:
    """So many bytes that are zero."""

    length: int


#: A piece of a stream: bytes as they are, of the disk, or zeros. What is beyond the disk's end is zeros, too.
Part = Union[bytes, Extent, Zeros]


class Layout(Protocol):
    """A format.

    :ivar length: bytes of the whole stream.
    """

    length: int

    def parts(self) -> Iterable[Part]:
        """The stream, in order."""


def whole_sectors(size: int) -> int:
    """*size* rounded up to what a virtual disk can have."""
    return -(-size // SECTOR) * SECTOR


class Raw:
    """The disk byte by byte; its last sector is filled up with zeros. See :class:`Layout`."""

    def __init__(self, size: int, extents: Extents) -> None:
        self.length = whole_sectors(size)
        self._extents = extents

    def parts(self) -> Iterator[Part]:
        end = 0
        for extent in self._extents:
            if extent.offset > end:
                yield Zeros(extent.offset - end)
            yield extent
            end = extent.end
        if self.length > end:
            yield Zeros(self.length - end)
