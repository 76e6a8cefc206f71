# SPDX-License-Identifier: Apache-2.0
"""The disk of a server that is off, in a file or on a block device of this host, through ``qemu-nbd``.

QEMU reads whatever format it has, with what it is based on, and tells what is allocated; it refuses a disk that is in
use. It ends with the connection, which is a socket that it inherits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from nova_rbd_snap import errors
from nova_rbd_snap.copy.extents import Extents, OnProgress

#: Bytes that are asked about at once: less than what NBD's 32 bits can tell.
_LISTED_AT_ONCE = 1 << 30
#: Flags of ``base:allocation``.
_ZERO = 2


class NbdDisk:
    """See :class:`nova_rbd_snap.copy.extents.Source`."""

    def __init__(self, handle: Any, name: str) -> None:
        """
        :param handle: libnbd's, connected.
        :param name: for people.
        """
        self._handle, self._name = handle, name
        self.size = int(handle.get_size())

    def extents(self, on_progress: OnProgress) -> Extents:
        found, offset = Extents(), 0
        while offset < self.size:
            if not on_progress(offset, self.size):
                raise errors.Cancelled(f"nothing is read of {self._name} any more")
            offset = self._list(offset, found)
        return found

    def _list(self, offset: int, found: Extents) -> int:
        """Add what is allocated from *offset* on; returns how far that was told."""
        reached = offset

        def add(context: str, offset: int, entries: list[int], error: Any) -> int:
            nonlocal reached
            for length, flags in zip(entries[::2], entries[1::2]):
                if not flags & _ZERO:
                    found.add(offset, min(offset + length, self.size))
                offset += length
            reached = offset
            return 0

        with self._told("list what is allocated of"):
            self._handle.block_status(min(_LISTED_AT_ONCE, self.size - offset), offset, add)
        if reached <= offset:
            raise errors.DiskError(f"qemu-nbd does not tell what is allocated of {self._name} at {offset}")
        return min(reached, self.size)

    def read(self, offset: int, length: int) -> bytes:
        with self._told("read"):
            return bytes(self._handle.pread(length, offset))

    @contextlib.contextmanager
    def _told(self, doing: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if isinstance(error, errors.SnapError):
                raise
            raise errors.DiskError(f"cannot {doing} {self._name}: {error}") from error


@contextlib.contextmanager
def open_disk(path: str, disk_format: str) -> Iterator[NbdDisk]:
    """The disk in *path*.

    :param disk_format: ``qcow2`` or ``raw``: what a guest writes to its disk must not choose it.
    :raises errors.Refused: this host lacks the tools.
    :raises errors.DiskError: it cannot be opened, as a disk that is in use.
    """
    try:
        import nbd
    except ImportError as error:
        raise errors.Refused(
            f"disks in files are copied with libnbd, whose Python binding is not there ({error}); install the "
            "distribution's packages python3-libnbd and qemu-utils"
        ) from error
    with contextlib.closing(nbd.NBD()) as handle:
        try:
            handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
            handle.connect_systemd_socket_activation(["qemu-nbd", "--read-only", f"--format={disk_format}", path])
        except nbd.Error as error:
            raise errors.DiskError(f"qemu-nbd cannot open {path} as {disk_format}: {error}") from error
        yield NbdDisk(handle, path)
