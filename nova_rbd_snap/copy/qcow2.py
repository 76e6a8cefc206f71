# SPDX-License-Identifier: Apache-2.0
"""qcow2 as one forward stream: version 3, nothing compressed, no backing file.

Since the extents are known beforehand, all metadata comes first, in whole clusters: header, refcount table, refcount
blocks, L1 table, L2 tables; then the data clusters in the disk's order. QEMU's docs/interop/qcow2.rst has the format.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterator

from nova_rbd_snap.copy.body import Part, whole_sectors
from nova_rbd_snap.copy.extents import Extents

_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
_MAGIC, _VERSION = b"QFI\xfb", 3
#: Where a cluster is referred to once, which all are here.
_COPIED = 1 << 63
#: Of a refcount, in powers of two bits: QEMU's default, 16 bits.
_REFCOUNT_ORDER = 4
_ENTRY, _REFCOUNT = 8, 2
#: QEMU refuses larger ones.
_LARGEST_L1 = 32 << 20
SMALLEST_CLUSTER, LARGEST_CLUSTER = 512, 2 << 20


def _clusters(size: int, cluster: int) -> int:
    return -(-size // cluster)


class Qcow2:
    """See :class:`nova_rbd_snap.copy.body.Layout`.

    :ivar virtual_size: of the disk that the image holds: *size*, rounded up to a sector.
    """

    def __init__(self, size: int, extents: Extents, cluster_size: int = 64 << 10) -> None:
        """
        :param size: bytes of the disk.
        :param cluster_size: a power of two, from 512 bytes to 2 MiB.
        :raises ValueError: it is not, or too small for a disk of that size.
        """
        if cluster_size & (cluster_size - 1) or not SMALLEST_CLUSTER <= cluster_size <= LARGEST_CLUSTER:
            raise ValueError(f"a qcow2 cluster of {cluster_size} bytes: a power of two, 512 to {LARGEST_CLUSTER}")
        self.virtual_size = whole_sectors(size)
        self._cluster = cluster_size
        self._data = extents.aligned(cluster_size)
        #: Clusters of the disk that one L2 table maps.
        self._mapped = cluster_size // _ENTRY
        self._l1_entries = max(1, _clusters(self.virtual_size, cluster_size * self._mapped))
        if self._l1_entries * _ENTRY > _LARGEST_L1:
            raise ValueError(f"a disk of {size} bytes needs larger qcow2 clusters than {cluster_size} bytes")
        self._l2_tables = self._count_tables()
        self._l1_clusters = _clusters(self._l1_entries * _ENTRY, cluster_size)
        self._reserve_refcounts()
        self.length = self._total * cluster_size

    def _count_tables(self) -> int:
        span, last, count = self._cluster * self._mapped, -1, 0
        for extent in self._data:
            first, end = extent.offset // span, (extent.end - 1) // span
            count += end - max(first, last + 1) + 1
            last = end
        return count

    def _reserve_refcounts(self) -> None:
        """How many clusters the refcounts take, of themselves, too."""
        data = self._data.total // self._cluster
        others = 1 + self._l1_clusters + self._l2_tables + data
        self._table_clusters = self._blocks = 1
        while True:
            self._total = others + self._table_clusters + self._blocks
            blocks = _clusters(self._total * _REFCOUNT, self._cluster)
            table = _clusters(blocks * _ENTRY, self._cluster)
            if (blocks, table) == (self._blocks, self._table_clusters):
                return
            self._blocks, self._table_clusters = blocks, table

    def parts(self) -> Iterator[Part]:
        cluster = self._cluster
        first_block = 1 + self._table_clusters
        l1 = first_block + self._blocks
        l2 = l1 + self._l1_clusters
        data = l2 + self._l2_tables
        yield self._filled(self._header(l1))
        yield self._filled(_big_endian(array("Q", (n * cluster for n in range(first_block, l1)))))
        yield from self._refcounts()
        yield self._filled(self._l1(l2))
        yield from self._l2(data)
        yield from self._data

    def _filled(self, data: bytes) -> bytes:
        return data + bytes(-len(data) % self._cluster)

    def _header(self, l1: int) -> bytes:
        return _HEADER.pack(
            _MAGIC,
            _VERSION,
            0,  # backing file: its name's offset,
            0,  # and length
            self._cluster.bit_length() - 1,
            self.virtual_size,
            0,  # encryption
            self._l1_entries,
            l1 * self._cluster,
            self._cluster,  # the refcount table follows
            self._table_clusters,
            0,  # snapshots: how many,
            0,  # and where
            0,  # features: incompatible,
            0,  # compatible,
            0,  # to be cleared
            _REFCOUNT_ORDER,
            _HEADER.size,
        )

    def _refcounts(self) -> Iterator[Part]:
        """One for each cluster of the file, block by block."""
        per_block, left = self._cluster // _REFCOUNT, self._total
        full = _big_endian(array("H", [1]) * per_block)
        while left:
            yield full if left >= per_block else self._filled(_big_endian(array("H", [1]) * left))
            left -= min(left, per_block)

    def _l1(self, l2: int) -> bytes:
        table = array("Q", bytes(self._l1_entries * _ENTRY))
        span, last, following = self._cluster * self._mapped, -1, l2
        for extent in self._data:
            for number in range(max(extent.offset // span, last + 1), (extent.end - 1) // span + 1):
                table[number] = following * self._cluster | _COPIED
                following, last = following + 1, number
        return _big_endian(table)

    def _l2(self, following: int) -> Iterator[Part]:
        """The tables that there are, one after the other; *following* is the first data cluster."""
        empty = array("Q", bytes(self._cluster))
        table, number = array("Q"), -1
        for piece in self._data.pieces(self._cluster * self._mapped):
            clusters = piece.length // self._cluster
            span, first = divmod(piece.offset // self._cluster, self._mapped)
            if span != number:
                if table:
                    yield _big_endian(table)
                table, number = array("Q", empty), span
            entries = range(following, following + clusters)
            table[first : first + clusters] = array("Q", (n * self._cluster | _COPIED for n in entries))
            following += clusters
        if table:
            yield _big_endian(table)


def _big_endian(values: array[int]) -> bytes:
    if sys.byteorder == "little":
        values = array(values.typecode, values)
        values.byteswap()
    return values.tobytes()
