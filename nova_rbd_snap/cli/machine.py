# SPDX-License-Identifier: Apache-2.0
"""Nova's snapshots directory on this machine, and the processes that may use what is in it.

That nobody uses a file can be told only by who sees every process, and of a disk that no other machine writes to.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Callable, Optional

from nova_rbd_snap import errors
from nova_rbd_snap.janitor.findings import Folder

#: File systems of one machine; of all others it is not known who else writes to them.
_LOCAL = ("bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs")
#: The kernel's number of the first process namespace (PROC_PID_INIT_INO): from within it all processes are seen.
_FIRST_NAMESPACE = "pid:[4026531836]"


@contextlib.contextmanager
def _told(doing: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise errors.SnapError(f"{doing}: {error}") from error


def _booted() -> float:
    # Not by /proc/uptime: a container may be shown its own.
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


class LocalMachine:
    """See :class:`nova_rbd_snap.janitor.findings.Machine`."""

    def __init__(
        self,
        directory: Optional[str],
        *,
        proc: Path = Path("/proc"),
        user: Callable[[], int] = os.geteuid,
        booted: Callable[[], float] = _booted,
    ) -> None:
        """
        :param directory: [libvirt] snapshots_directory, if it is known.
        :param user: id of the user who asks.
        :param booted: when the machine was, in seconds since the epoch.
        """
        self.directory = directory or ""
        self._proc, self._user, self._booted = proc, user, booted

    def folders(self) -> list[str]:
        if not self.directory:
            raise errors.SnapError("nova.conf does not tell where; set [libvirt] snapshots_directory or state_path")
        if not os.path.isdir(self.directory):
            return []
        with _told(f"list {self.directory}"):
            kind = self._file_system()
            if kind not in _LOCAL:
                raise errors.SnapError(f"{self.directory} is on {kind}, which other machines may write to")
            with os.scandir(self.directory) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))

    def _file_system(self) -> str:
        path, longest, kind = os.path.realpath(self.directory), "", "an unknown file system"
        for line in (self._proc / "self/mountinfo").read_text().splitlines():
            fields = line.split()
            mount = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), fields[4])
            if f"{path}/".startswith(mount.rstrip("/") + "/") and len(mount) >= len(longest):
                longest, kind = mount, fields[fields.index("-") + 1]
        return kind

    def look(self, name: str) -> Optional[Folder]:
        files: list[str] = []
        others: list[str] = []
        try:
            with _told(f"look into {self.directory}/{name}"), self._opened(name) as folder:
                changed = os.fstat(folder).st_mtime
                for entry in sorted(os.listdir(folder)):
                    found = os.stat(entry, dir_fd=folder, follow_symlinks=False)
                    (files if stat.S_ISREG(found.st_mode) else others).append(entry)
                    changed = max(changed, found.st_mtime)
        except errors.SnapError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise
        return Folder(tuple(files), tuple(others), changed)

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[int]:
        """The folder itself, whatever takes its name meanwhile."""
        folder = os.open(os.path.join(self.directory, name), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            yield folder
        finally:
            os.close(folder)

    def is_open(self, name: str) -> bool:
        # By name: another container may see it elsewhere, but under the same random name.
        paths = (path for process in self._processes() for path in self._open_paths(process))
        return any(f"/{name}/" in f"{path}/" for path in paths)

    def nova_since(self) -> Optional[float]:
        moments = []
        for process in self._processes():
            with _told(f"look at {process}"), contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if self._is_nova_compute(process):
                    moments.append(self._started(process))
        if not moments and os.readlink(self._proc / "self/ns/pid") != _FIRST_NAMESPACE:
            raise errors.SnapError("no nova-compute is seen from within this container; ask where it runs")
        return min(moments, default=None)

    def _processes(self) -> list[Path]:
        if self._user() != 0:
            raise errors.SnapError("only root sees what other users' processes have open")
        return [entry for entry in self._proc.iterdir() if entry.name.isdigit()]

    @staticmethod
    def _is_nova_compute(process: Path) -> bool:
        """An interpreter comes before the script."""
        words = (process / "cmdline").read_bytes().split(b"\0")[:3]
        return any(os.path.basename(word) == b"nova-compute" for word in words)

    def _started(self, process: Path) -> float:
        # The name in brackets may hold anything; 20 fields after it is the start, in ticks since boot.
        ticks = int((process / "stat").read_text().rpartition(")")[2].split()[19])
        return self._booted() + ticks / os.sysconf("SC_CLK_TCK")

    @staticmethod
    def _open_paths(process: Path) -> Iterator[str]:
        # In a container root needs CAP_SYS_PTRACE for those of other users.
        seeing = _told(f"see what process {process.name} has open")
        with seeing, contextlib.suppress(FileNotFoundError, ProcessLookupError):  # they end, and close files, meanwhile
            for descriptor in os.listdir(process / "fd"):
                with contextlib.suppress(FileNotFoundError):
                    yield os.readlink(process / "fd" / descriptor)

    def remove(self, name: str, files: Sequence[str]) -> None:
        with _told(f"remove {self.directory}/{name}"):
            with self._opened(name) as folder:
                for file in files:
                    os.unlink(file, dir_fd=folder)
            os.rmdir(os.path.join(self.directory, name))
