# SPDX-License-Identifier: Apache-2.0
"""Files of Nova's own full copy that a killed nova-compute leaves on the local disk.

Nova copies a disk to ``<snapshots_directory>/<folder>/<32 hex digits>``, the folder being one of ``tempfile.mkdtemp``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Optional

from nova_rbd_snap import errors
from nova_rbd_snap.janitor.disks import STOCK_SNAP
from nova_rbd_snap.janitor.findings import KEEP, REMOVE, Finding, Folder, Scene

_FOLDER = re.compile(r"tmp[0-9a-z_]{8}")
_KIND = "local copy"


@dataclass(frozen=True)
class Copy:
    """A folder with such files, as it was seen."""

    name: str
    folder: Folder

    def judge(self, scene: Scene) -> Optional[Finding]:
        return _weigh(scene, self.name)

    def remove(self, scene: Scene) -> None:
        scene.machine.remove(self.name, self.folder.files)


def find(scene: Scene) -> Iterator[Finding]:
    """The copies on this machine's disk."""
    machine = scene.machine
    try:
        names = [name for name in machine.folders() if _FOLDER.fullmatch(name)]
    except errors.SnapError as error:
        yield Finding(_KIND, machine.directory or "snapshots directory", KEEP, f"not looked at: {error}")
        return
    for name in names:
        try:
            finding = _weigh(scene, name)
        except errors.SnapError as error:
            finding = Finding(_KIND, f"{machine.directory}/{name}", KEEP, str(error))
        if finding:
            yield finding


def _weigh(scene: Scene, name: str) -> Optional[Finding]:
    folder = scene.machine.look(name)
    if folder is None or not any(STOCK_SNAP.fullmatch(file) for file in folder.files):
        return None
    files = ", ".join(folder.files)
    why, action = f"left by Nova, {scene.age(folder.changed)}", KEEP
    since = scene.machine.nova_since()
    others = [*(file for file in folder.files if not STOCK_SNAP.fullmatch(file)), *folder.others]
    if others:
        why += f", but with {', '.join(others)} beside it"
    elif scene.is_young(folder.changed):
        why += ", so Nova may be at work on it"
    elif since is not None and folder.changed >= since:
        why += f", so it may be of the nova-compute that is {scene.age(since)}"
    elif scene.machine.is_open(name):
        why += ", but a process has it open"
    else:
        action = REMOVE
    return Finding(_KIND, f"{scene.machine.directory}/{name}/{files}", action, why, Copy(name, folder))
