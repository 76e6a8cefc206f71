# SPDX-License-Identifier: Apache-2.0
"""What QEMU makes of our qcow2."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nova_rbd_snap.copy.extents import Extent, Extents, OnProgress
from nova_rbd_snap.copy.limits import Limits
from nova_rbd_snap.copy.qcow2 import Qcow2
from nova_rbd_snap.copy.stream import stream

pytestmark = pytest.mark.quick

SECTOR, KIB, MIB, TIB = 512, 1 << 10, 1 << 20, 1 << 40


@dataclass
class Disk:
    """A disk whose extents are each full of a byte of their own."""

    size: int
    written: list[Extent]

    def extents(self, on_progress: OnProgress) -> Extents:
        return Extents(self.written)

    def read(self, offset: int, length: int) -> bytes:
        data = bytearray(length)
        for number, extent in enumerate(self.written, start=1):
            begin, end = max(extent.offset, offset), min(extent.end, offset + length)
            if begin < end:
                data[begin - offset : end - offset] = bytes([number]) * (end - begin)
        return bytes(data)


def disk(size: int, places: Iterable[tuple[float, int]]) -> Disk:
    """One with extents at some places, told as shares of its size, of so many bytes."""
    written, end = [], 0
    for share, length in sorted(places):
        offset = max(end, int(share * size) // SECTOR * SECTOR)
        extent = Extent(offset, min(length, size - offset))
        if extent.length > 0:
            written.append(extent)
            end = -(-extent.end // SECTOR) * SECTOR
    return Disk(size, written)


sizes = st.one_of(
    st.integers(1, 4 * KIB), st.integers(1, 64 * MIB), st.integers(1, 16 * TIB),
    st.sampled_from([SECTOR, 16 * TIB, 512 * MIB, 512 * MIB + 1]),
)  # fmt: skip
places = st.lists(st.tuples(st.floats(0, 1), st.integers(1, MIB)), max_size=8)
disks = st.builds(disk, sizes, places)
clusters = st.sampled_from([64 * KIB, 128 * KIB, 512 * KIB, 2 * MIB])


def tool(*words: object) -> None:
    command = list(map(str, words))
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout


def make_reference(disk: Disk, path: Path) -> None:
    """The same disk, as QEMU writes it."""
    tool("qemu-img", "create", "-q", "-f", "qcow2", path, -(-disk.size // SECTOR) * SECTOR)
    writes = [f"write -q -P {n} {e.offset} {e.length}" for n, e in enumerate(disk.written, start=1)]
    if writes:
        tool("qemu-io", "-f", "qcow2", *(word for write in writes for word in ("-c", write)), path)


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(disks, clusters)
def test_every_extent_map(disk: Disk, cluster: int) -> None:
    """QEMU finds nothing to mend, and reads the same."""
    with tempfile.TemporaryDirectory() as folder:
        ours, reference = Path(folder, "ours"), Path(folder, "reference")
        layout = Qcow2(disk.size, Extents(disk.written), cluster)
        with ours.open("wb") as file:
            for chunk in stream(disk, layout.parts(), Limits()):
                file.write(chunk)
        assert ours.stat().st_size == layout.length
        make_reference(disk, reference)
        tool("qemu-img", "check", "-q", "-f", "qcow2", ours)
        tool("qemu-img", "compare", "-q", "-f", "qcow2", "-F", "qcow2", ours, reference)
