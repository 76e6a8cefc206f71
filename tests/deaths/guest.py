# SPDX-License-Identifier: Apache-2.0
"""Who uses a disk, as QEMU does: a client of Ceph of its own, that has the disk open and writes a little all the time.

The writes are numbered, one after the other, so that a snapshot's bytes tell which of them it holds.
"""

from __future__ import annotations

import threading
import time
from typing import Any, Optional

import rados
import rbd

#: The guest writes in turn to so many places, each in an object of its own.
PLACES = 8
BLOCK_BYTES = 512
_PAUSE_SECONDS = 0.02


def block(number: int) -> bytes:
    """What write *number* writes."""
    return number.to_bytes(8, "little") * (BLOCK_BYTES // 8)


class Guest(threading.Thread):
    """Writes within the block; what goes wrong, an error or a long wait, is kept for the test to see."""

    def __init__(self, ceph_conf: str, user: str, pool: str, disk: str, object_bytes: int) -> None:
        super().__init__(name=f"guest of {disk}", daemon=True)
        self._where = (ceph_conf, user, pool, disk)
        self._object_bytes = object_bytes
        self._begun, self._over = threading.Event(), threading.Event()
        #: Number of the last write that has returned.
        self.written = 0
        self.longest_seconds = 0.0
        self.error: Optional[Exception] = None

    def __enter__(self) -> Guest:
        self.start()
        assert self._begun.wait(60), f"{self.name} did not begin"
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Return when the last write is done."""
        self._over.set()
        self.join(60)
        if self.is_alive():
            self.error = TimeoutError("a write does not return")

    def run(self) -> None:
        ceph_conf, user, pool, disk = self._where
        try:
            with (
                rados.Rados(rados_id=user, conffile=ceph_conf) as cluster,
                cluster.open_ioctx(pool) as ioctx,
                rbd.Image(ioctx, disk) as image,
            ):
                self._write(image)
        except Exception as error:
            self.error = error
        self._begun.set()

    def _write(self, image: Any) -> None:
        while not self._over.wait(_PAUSE_SECONDS):
            number, began = self.written + 1, time.monotonic()
            image.write(block(number), self.place(number))
            self.written = number
            self.longest_seconds = max(self.longest_seconds, time.monotonic() - began)
            self._begun.set()

    def place(self, number: int) -> int:
        """Where write *number* goes."""
        return (number % PLACES) * self._object_bytes + self._object_bytes // 2
