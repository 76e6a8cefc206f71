# SPDX-License-Identifier: Apache-2.0
"""nova-compute and its engine, as they are but for places at which a test can hold them.

As a Nova driver (:data:`SHIM`, put into Nova's package by a test) it makes nova-compute run this file as its engine.
Whichever of the two comes to the place that :data:`WANTED` names says so in :data:`REACHED`, and goes on once the test
removes the former; or never, because it was killed.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import time
from typing import Any, Callable

WANTED = pathlib.Path("/run/nova-rbd-snap-wanted")
REACHED = pathlib.Path("/run/nova-rbd-snap-reached")

#: The boundaries of steps. The engine's: before each of its steps, and when all are done. nova-compute's: before the
#: location is sent, after it was sent, and when the image is active.
ENGINES = ("snap", "clone", "flatten", "seal", "ready")
NOVAS = ("register", "wait", "finish")

SHIM = '''
import sys

sys.path.append("/src")
from tests.e2e import breakpoints

breakpoints.in_nova_compute()
from nova_rbd_snap.openstack.driver import LibvirtDriver
'''


def hold(place: str) -> None:
    """Wait here while the test wants it."""
    try:
        wanted = WANTED.read_text()
    except FileNotFoundError:
        return
    if wanted != place:
        return
    REACHED.write_text(place)
    while WANTED.exists():
        time.sleep(0.02)


def before(function: Callable[..., Any], place: Callable[..., str]) -> Callable[..., Any]:
    """*function*, held before its call at the place that its arguments tell."""

    def held(*args: Any, **kwargs: Any) -> Any:
        hold(place(*args))
        return function(*args, **kwargs)

    return held


def in_nova_compute() -> None:
    """Make this nova-compute hold where it is wanted, and run this file as its engine."""
    from nova_rbd_snap.engine import client
    from nova_rbd_snap.openstack import clone, registration

    client.EngineClient.__init__.__kwdefaults__["command"] = (sys.executable, __file__)
    clone.register = _reporting(clone.register)
    registration.observe = before(registration.observe, lambda *args: "wait")


def _reporting(register: Callable[..., Any]) -> Callable[..., Any]:
    def held(*args: Any, report: Callable[..., None], **kwargs: Any) -> Any:
        return register(*args, report=before(report, lambda step, *_: step), **kwargs)

    return held


def in_engine() -> None:
    """Be the engine."""
    from nova_rbd_snap.engine import __main__ as engine
    from nova_rbd_snap.snapshot import saga

    perform = saga.perform

    def held(job: Any, steps: Any, final: str, ledger: Any, run: Any) -> Any:
        report = before(run.report, lambda step, *_: step)
        done = perform(job, steps, final, ledger, dataclasses.replace(run, report=report))
        hold("ready")
        return done

    saga.perform = held
    engine.main()


if __name__ == "__main__":
    in_engine()
