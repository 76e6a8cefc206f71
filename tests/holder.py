# SPDX-License-Identifier: Apache-2.0
"""Who has an rbd image open as QEMU does, with its lock, in a process of its own that can be frozen."""

from __future__ import annotations

import contextlib
import pathlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

from nova_rbd_snap.specs import client_address

_PAUSE_SECONDS = 0.05
_BLOCK = b"held" * 128
_END_SECONDS = 60


class Holder:
    """A process that writes to the end of the rbd image all the time, and says so.

    :ivar address: of its client, as the blocklist takes it.
    """

    def __init__(self, ceph_conf: str, user: str, pool: str, name: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.holder", ceph_conf, user, pool, name],
            stdout=subprocess.PIPE,
            bufsize=0,
            cwd=pathlib.Path(__file__).resolve().parent.parent,
        )
        assert self._process.stdout is not None
        self.address = client_address(self._process.stdout.readline().decode())
        self.assert_writing()

    def freeze(self) -> None:
        """Let it do nothing, as a QEMU that hangs."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it go on as if nothing had been."""
        self._process.send_signal(signal.SIGCONT)

    def assert_writing(self) -> None:
        """Its writes succeed, also those begun from now on."""
        assert self._process.stdout is not None
        for _ in range(3):
            assert self._process.stdout.read(1) == b".", "it cannot write"

    def end(self) -> None:
        """Let it close the rbd image, and go."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait(_END_SECONDS)

    def die(self) -> None:
        """Kill it: Ceph takes 30 s to notice."""
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def holding(ceph_conf: str, user: str, pool: str, name: str) -> Iterator[Holder]:
    """Within the block somebody holds the rbd image."""
    holder = Holder(ceph_conf, user, pool, name)
    try:
        yield holder
    finally:
        holder.die()


def _hold(ceph_conf: str, user: str, pool: str, name: str) -> None:
    import rados
    import rbd

    over = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: over.set())
    with (
        rados.Rados(rados_id=user, conffile=ceph_conf) as cluster,
        cluster.open_ioctx(pool) as ioctx,
        rbd.Image(ioctx, name) as image,
    ):
        print(cluster.get_addrs(), flush=True)
        while not over.is_set():
            image.write(_BLOCK, image.size() - len(_BLOCK))
            sys.stdout.write(".")
            sys.stdout.flush()
            over.wait(_PAUSE_SECONDS)


if __name__ == "__main__":
    _hold(*sys.argv[1:])
