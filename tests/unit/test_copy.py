# SPDX-License-Identifier: Apache-2.0
"""The formats, the stream and the transfer, on disks in memory."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nova_rbd_snap import errors
from nova_rbd_snap.copy.body import Layout, Raw
from nova_rbd_snap.copy.extents import PIECE, Extent, Extents, OnProgress
from nova_rbd_snap.copy.limits import Limits, Memory, Throttle
from nova_rbd_snap.copy.qcow2 import Qcow2
from nova_rbd_snap.copy.stream import stream
from nova_rbd_snap.copy.transfer import transfer

MEMORY = 4 * PIECE
LIMITS = Limits(Memory(MEMORY))
KIB, MIB, TIB = 1 << 10, 1 << 20, 1 << 40


@dataclass
class Disk:
    """A disk of which some extents have data that tell their place: every 8 bytes their own offset, but never zeros."""

    size: int
    allocated: Extents
    reads: list[Extent] = field(default_factory=list)
    held: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def extents(self, on_progress: OnProgress) -> Extents:
        return self.allocated

    def read(self, offset: int, length: int) -> bytes:
        assert 0 < length <= self.size - offset
        with self.lock:
            self.reads.append(Extent(offset, length))
        return self.data(offset, length)

    def data(self, offset: int, length: int) -> bytes:
        """What is there, where all of it is allocated or not is no matter."""
        first = offset // 8
        count = (offset + length + 7) // 8 - first
        words = struct.pack(f">{count}Q", *(n | 1 << 63 for n in range(first, first + count)))
        found = bytearray(words[offset - first * 8 :][:length])
        end = offset
        for extent in (*self.allocated, Extent(self.size, 0)):
            if extent.offset > end and end < offset + length:
                stop = min(extent.offset, offset + length)
                found[end - offset : stop - offset] = bytes(stop - end)
            end = max(end, extent.end)
        return bytes(found)


#: How long an example takes depends on the machine; what is large takes long.
unhurried = settings(deadline=None, max_examples=50)


def disks(most: int = 64 * MIB, granule: int = 512) -> st.SearchStrategy[Disk]:
    """Disks of any size, with some extents at any place."""

    def disk(size: int, marks: Iterable[int]) -> Disk:
        ends = sorted({min(mark * granule, size) for mark in marks})
        found = Extents(Extent(a, b - a) for a, b in zip(ends[::2], ends[1::2]))
        return Disk(size, found)

    sizes = st.integers(1, most)
    return sizes.flatmap(
        lambda size: st.lists(st.integers(0, -(-size // granule)), max_size=20).map(lambda marks: disk(size, marks))
    )


def read_qcow2(data: bytes, offset: int, length: int) -> bytes:
    """What a guest reads, by QEMU's docs/interop/qcow2.rst."""
    (bits,) = struct.unpack_from(">I", data, 20)
    (l1,) = struct.unpack_from(">Q", data, 40)
    cluster, found = 1 << bits, bytearray()
    while length:
        number, start = divmod(offset, cluster)
        count = min(length, cluster - start)
        high, low = divmod(number, cluster // 8)
        (table,) = struct.unpack_from(">Q", data, l1 + 8 * high)
        place = 0
        if table:
            (entry,) = struct.unpack_from(">Q", data, (table & ~(1 << 63)) + 8 * low)
            place = entry & ~(1 << 63)
        found += data[place + start : place + start + count] if place else bytes(count)
        offset, length = offset + count, length - count
    return bytes(found)


def body(disk: Disk, layout: Layout) -> bytes:
    data = b"".join(stream(disk, layout.parts(), LIMITS))
    assert len(data) == layout.length
    return data


@unhurried
@given(disks(most=6 * MIB))
def test_raw(disk: Disk) -> None:
    """All the bytes, up to whole sectors; zeros are not read."""
    data = body(disk, Raw(disk.size, disk.allocated))
    assert len(data) == -(-disk.size // 512) * 512
    assert data == disk.data(0, disk.size).ljust(len(data), b"\0")
    assert sum(read.length for read in disk.reads) == disk.allocated.total


@unhurried
@given(disks(most=8 * MIB), st.sampled_from([512, 4 * KIB, 64 * KIB, 2 * MIB]))
def test_qcow2(disk: Disk, cluster: int) -> None:
    """A guest reads the same; nothing is read but whole clusters of what is allocated."""
    layout = Qcow2(disk.size, disk.allocated, cluster)
    data = body(disk, layout)
    assert read_qcow2(data, 0, disk.size) == disk.data(0, disk.size)
    assert layout.virtual_size == -(-disk.size // 512) * 512
    assert sum(read.length for read in disk.reads) <= disk.allocated.aligned(cluster).total


@pytest.mark.parametrize("cluster", [64 * KIB, 2 * MIB])
def test_qcow2_of_a_large_disk(cluster: int) -> None:
    """It is as long as what is allocated, and little more."""
    extents = Extents(Extent(start, MIB) for start in range(0, 16 * TIB, TIB))
    layout = Qcow2(16 * TIB, extents, cluster)
    assert layout.length < 16 * max(MIB, cluster) + 64 * cluster


@pytest.mark.parametrize("cluster", [0, 256, 1000, 4 * MIB])
def test_qcow2_clusters_that_cannot_be(cluster: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        Qcow2(MIB, Extents(), cluster)


def test_qcow2_clusters_that_are_too_small() -> None:
    with pytest.raises(ValueError, match="larger qcow2 clusters"):
        Qcow2(16 * TIB, Extents(), 4 * KIB)


def test_stream_holds_no_more_than_it_may() -> None:
    """Nothing is read before there is room."""
    size = 32 * PIECE
    disk = Disk(size, Extents([Extent(0, size)]))
    reading = stream(disk, Raw(size, disk.allocated).parts(), LIMITS)
    taken = 0
    for piece in reading:
        taken += len(piece)
        assert sum(read.length for read in disk.reads) <= taken + MEMORY
    assert taken == size


def test_stream_that_nobody_takes_any_more() -> None:
    size = 1024 * PIECE
    disk = Disk(size, Extents([Extent(0, size)]))
    reading = stream(disk, Raw(size, disk.allocated).parts(), LIMITS)
    next(reading)
    reading.close()
    assert len(disk.reads) <= MEMORY // PIECE + 1
    LIMITS.memory.take(MEMORY)
    LIMITS.memory.give(MEMORY)


def test_streams_share_memory() -> None:
    """Several at once take no more together, and all come to their end."""
    size, limits = 16 * PIECE, Limits(Memory(2 * PIECE))
    made = [Disk(size, Extents([Extent(0, size)])) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        taken = pool.map(lambda disk: sum(map(len, stream(disk, Raw(size, disk.allocated).parts(), limits))), made)
        assert list(taken) == [size] * 4


class Blank:
    """A disk to be filled; it may fail at some writes."""

    def __init__(self, size: int, failures: dict[int, list[errors.SnapError]]) -> None:
        self.data = bytearray(size)
        self.written = 0
        self._failures = failures
        self._lock = threading.Lock()

    def write(self, offset: int, data: bytes) -> None:
        with self._lock:
            if failures := self._failures.get(offset // PIECE):
                raise failures.pop()
            self.data[offset : offset + len(data)] = data
            self.written += len(data)


def copied(disk: Disk, failures: dict[int, list[errors.SnapError]], on_progress: OnProgress) -> Blank:
    blank = Blank(disk.size, failures)
    written = transfer(disk, blank, disk.allocated, on_progress, LIMITS)
    assert written == blank.written
    return blank


def go_on(done: int, total: int) -> bool:
    return True


@unhurried
@given(disks(most=10 * MIB))
def test_transfer(disk: Disk) -> None:
    blank = copied(disk, {}, go_on)
    assert blank.data == disk.data(0, disk.size)
    assert blank.written <= disk.allocated.total


def test_transfer_writes_no_zeros() -> None:
    """What is allocated and yet zeros is not written."""
    size = 4 * PIECE
    disk = Disk(size, Extents([Extent(PIECE, 64 * KIB), Extent(3 * PIECE, 1)]))
    blank = Blank(size, {})
    moved = transfer(disk, blank, Extents([Extent(0, size)]), go_on, LIMITS)
    assert moved == 2 * 64 * KIB
    assert blank.data == disk.data(0, size)


def test_transfer_tries_a_piece_again() -> None:
    """Where the cluster does not answer for a while; the others are not copied again."""
    size = 8 * PIECE
    disk = Disk(size, Extents([Extent(0, size)]))
    blank = copied(disk, {3: [errors.Unreachable("no answer")] * 2}, go_on)
    assert blank.data == disk.data(0, size)
    assert sorted(read.offset // PIECE for read in disk.reads) == [0, 1, 2, 3, 3, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    "failures",
    [[errors.Unreachable("no answer")] * 3, [errors.NoSpace("full")], [errors.Blocklisted("cut off")]],
    ids=["silent", "full", "cut off"],
)
def test_transfer_that_fails(failures: list[errors.SnapError]) -> None:
    disk = Disk(8 * PIECE, Extents([Extent(0, 8 * PIECE)]))
    with pytest.raises(type(failures[0])):
        copied(disk, {3: failures}, go_on)


def test_transfer_that_is_cancelled() -> None:
    disk = Disk(64 * PIECE, Extents([Extent(0, 64 * PIECE)]))
    with pytest.raises(errors.Cancelled):
        copied(disk, {}, lambda done, total: done < 8 * PIECE)
    assert len(disk.reads) < 32


def test_throttle() -> None:
    """What passes is paced, whoever brings it."""
    now, slept = [100.0], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    throttle = Throttle(1000, clock=lambda: now[0], sleep=sleep)
    for _ in range(4):
        throttle.wait(500)
    assert slept == [0.5, 0.5, 0.5]
    now[0] += 60
    throttle.wait(500)
    assert len(slept) == 3
