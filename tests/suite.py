# SPDX-License-Identifier: Apache-2.0
"""A suite as a command with a log: what the runners have in common. With the standard library alone."""

from __future__ import annotations

import subprocess
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
PYTEST = "python3 -m pytest -p no:cacheprovider --disable-warnings"
#: For what runs in the container of Ceph 16, whose manager survives a flatten.
CEPH_16 = {"NOVA_RBD_SNAP_REAL": "1", "NOVA_RBD_SNAP_MANAGER": "1"}
#: A suite that hangs shall fail with its log, while there is somebody to read it.
LONGEST_SECONDS = 40 * 60


class Suite:
    """One command.

    :ivar log: what it prints.
    """

    def __init__(self, name: str, command: str, logs: Path) -> None:
        self.name, self.command = name, command
        self.log = logs / f"{name.replace(' ', '-')}.log"

    def execute(self) -> int:
        """Run to the end; returns the exit code."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("w") as out:
            command = ["timeout", "--kill-after=30", str(LONGEST_SECONDS), "sh", "-c", self.command]
            return subprocess.run(command, cwd=REPO, stdout=out, stderr=subprocess.STDOUT, check=False).returncode


def inside(cloud: str, *arguments: str, **environment: str) -> str:
    """pytest in a cloud's container."""
    # A binding that crashes as Python ends, after pytest, names its thread in the log, too.
    variables = "".join(f" {name}={value}" for name, value in {"PYTHONFAULTHANDLER": "1", **environment}.items())
    # Docker's client passes no signal on: in there somebody else must end what takes too long.
    bound = f"timeout --kill-after=30 {LONGEST_SECONDS - 60}"
    return f"lab/lab exec {cloud} {bound} env{variables} {PYTEST} {' '.join(arguments)}"


def end_to_end(cloud: str, *arguments: str, **environment: str) -> str:
    """The same with the plug-in installed there as it is in the tree."""
    return f"lab/lab install {cloud} && {inside(cloud, *arguments, **environment)}"
