# SPDX-License-Identifier: Apache-2.0
"""What is installed, and what an operator copies from."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from oslo_config import generator

REPO = Path(__file__).resolve().parent.parent.parent


def test_wheel_carries_the_shim_and_nothing_of_novas(tmp_path: Path) -> None:
    """The wheel puts our module into Nova's package and replaces none of Nova's files."""
    tree = tmp_path / "tree"  # a copy: what an earlier build left in build/ would be packed again
    shutil.copytree(REPO, tree, ignore=shutil.ignore_patterns("build", ".git", "*.egg-info"))
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "-w", tmp_path, tree],
        check=True,
        env={**os.environ, "PBR_VERSION": "0.0.1"},
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if name.startswith("nova/")] == ["nova/virt/rbd_snap/__init__.py"]
    ours = {str(path.relative_to(REPO)) for path in (REPO / "nova_rbd_snap").rglob("*.py")}
    assert {name for name in names if name.startswith("nova_rbd_snap/")} == ours
    assert not [name for name in names if name.startswith("tests/")]


def test_syntax_is_that_of_python_39() -> None:
    """Nova 26 to 31 run on Python 3.9; nothing installed there uses newer syntax."""
    for path in [*(REPO / "nova_rbd_snap").rglob("*.py"), *(REPO / "nova").rglob("*.py")]:
        ast.parse(path.read_text(), str(path), feature_version=(3, 9))


def test_sample_is_current(tmp_path: Path) -> None:
    """The option sample says what the options say: ``make sample`` was run after they changed."""
    made = tmp_path / "sample"
    generator.main(["--namespace", "nova_rbd_snap", "--output-file", str(made)])
    assert made.read_text() == (REPO / "etc/nova/nova-rbd-snap.conf.sample").read_text()
