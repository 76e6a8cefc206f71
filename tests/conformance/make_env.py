#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make the virtual environment of one Nova release, with Nova's own tests.

``make_env.py 31`` builds ``build/conformance/nova-31`` unless it is there already, and prints the path of its
interpreter. An environment holds Nova's wheel (which ships ``nova.tests``), what those tests import, and our source
tree; neither librados nor libvirt, which Nova's tests replace by mocks. It takes seconds, and is made again when its
line below changes; removing ``build/conformance`` is always safe.

An old Nova does not work with today's libraries. So each environment is resolved as of a day on which that release was
current; only Nova itself may be younger, to get the last fixes of its series.
"""

import argparse
import contextlib
import fcntl
import json
import pathlib
import shutil
import subprocess
import sys
import typing

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "conformance"


class Release(typing.NamedTuple):
    """One Nova release and the day its dependencies are taken from."""

    nova: str
    day: str
    pins: tuple = ()


RELEASES = {
    26: Release("26.3.0", "2023-03-01", ("sqlalchemy<2",)),
    27: Release("27.5.1", "2023-09-01", ("sqlalchemy<2",)),
    28: Release("28.3.1", "2024-02-01"),
    29: Release("29.4.0", "2024-08-01"),
    30: Release("30.3.0", "2025-02-01"),
    31: Release("31.3.1", "2025-06-01"),
    32: Release("32.2.1", "2026-01-01"),
    33: Release("33.0.2", "2026-06-01", ("cryptography<46",)),
    34: Release("34.0.0", "2026-11-01"),
}

# What nova.tests.unit imports beyond Nova's own requirements.
TEST_PACKAGES = [
    "ddt",
    "fixtures",
    "gabbi",
    "oslotest",
    "PyMySQL",
    "requests-mock",
    "testresources",
    "testscenarios",
    "testtools",
    "wsgi-intercept",
]

# The one Python that all of 26 to 34 have wheels for.
PYTHON = "3.11"


def make(number: int) -> pathlib.Path:
    """Return the interpreter of the environment for Nova *number*; make it first if needed."""
    release = RELEASES[number]
    folder = BUILD / f"nova-{number}"
    python = folder / "bin" / "python"
    stamp = folder / "made-from.json"
    recipe = json.dumps([release, TEST_PACKAGES, PYTHON, str(ROOT)])
    with _locked():
        if stamp.is_file() and stamp.read_text() == recipe:
            return python
        shutil.rmtree(folder, ignore_errors=True)
        _uv("venv", "--python", PYTHON, "--no-python-downloads", folder)
        as_of = ("--exclude-newer", release.day, "--exclude-newer-package", "nova=false")
        _uv("pip", "install", "--python", python, *as_of, f"nova=={release.nova}", *release.pins, *TEST_PACKAGES)
        _add_our_tree(python)
        stamp.write_text(recipe)  # last: an interrupted attempt is made again
    return python


def _add_our_tree(python: pathlib.Path) -> None:
    """Let the environment import our source tree, laid out as our wheel would be.

    The .pth line comes after site-packages in sys.path, so the tree's nova/ folder cannot shadow the installed Nova.
    For the same reason Nova does not see our loader shim in there: the shim is linked into Nova's own folder, where a
    wheel would put it.
    """
    find = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = pathlib.Path(subprocess.run(find, check=True, stdout=subprocess.PIPE, text=True).stdout.strip())
    (site / "nova_rbd_snap_tree.pth").write_text(f"{ROOT}\n")
    (site / "nova" / "virt" / "rbd_snap").symlink_to(ROOT / "nova" / "virt" / "rbd_snap")


def _uv(*arguments: object) -> None:
    """Run uv, from a small environment of its own: it alone can resolve as of a day."""
    tools = BUILD / "tools"
    if not (tools / "bin" / "uv").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", tools], check=True)
        install = [tools / "bin" / "python", "-m", "pip", "install", "-q", "uv>=0.13"]
        subprocess.run(install, check=True, stdout=sys.stderr)
    command = [str(tools / "bin" / "uv"), arguments[0], "-q", *map(str, arguments[1:])]
    subprocess.run(command, check=True, stdout=sys.stderr)


@contextlib.contextmanager
def _locked() -> typing.Iterator[None]:
    """Two test runs in one tree must not make the same environment at once."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the environment of one Nova release; print its interpreter.")
    parser.add_argument("release", type=int, choices=sorted(RELEASES))
    print(make(parser.parse_args().release))
