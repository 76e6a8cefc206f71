# SPDX-License-Identifier: Apache-2.0
"""Nova's own tests pass with our classes in the place of Nova's; ``run.py`` says how.

Nova's classes are not pytest's: each release runs in an interpreter of its own, which ``make_env.py`` makes.
``NOVA_RELEASES=29,33`` tries other releases than the usual.
"""

import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).resolve().parent

RELEASES = os.environ.get("NOVA_RELEASES", "26,31,34").split(",")


def conform(release, **environment):
    """Run Nova *release*'s tests, and fail with what they print."""
    made = subprocess.run(
        [sys.executable, HERE / "make_env.py", release], capture_output=True, text=True, check=False, timeout=900
    )
    if made.returncode:
        pytest.fail(f"no environment for Nova {release}:\n{made.stderr}", pytrace=False)
    ran = subprocess.run(
        [made.stdout.split()[-1], HERE / "run.py", release],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=900,
        env={**os.environ, **environment},
    )
    if ran.returncode:
        pytest.fail(ran.stdout, pytrace=False)
    print(ran.stdout)


@pytest.mark.conformance
@pytest.mark.parametrize("release", RELEASES)
def test_novas_own_tests_pass_with_our_classes(release):
    """On each release, all but the listed exceptions pass."""
    conform(release)


@pytest.mark.conformance
@pytest.mark.skipif("34" not in RELEASES, reason="only Nova 34 is run with native threads")
def test_novas_own_tests_pass_without_eventlet():
    """Nova 34's default for nova-compute is native threads, in which importing eventlet is an error."""
    conform("34", OS_NOVA_DISABLE_EVENTLET_PATCHING="true")
