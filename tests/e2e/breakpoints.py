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

#: The boundaries of steps. The engine's: before it looks at the disk, before the job is reserved, before each step, and
#: when all are done. nova-compute's: before the record's metadata, before the location is sent, after it was sent, when
#: the image is active, and when its job is forgotten.
ENGINES = ("connect", "reserve", "snap", "protect", "clone", "flatten", "seal", "ready")
NOVAS = ("register", "location", "wait", "finish", "end")
#: And one in the middle of a step.
AMID_FLATTEN = "amid flatten"
#: The engine's, too, of an image that is in use: before it flattens it, and when that is done, but not noted.
WORKERS = ("background flatten", "flat")

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


def at(place: str) -> Callable[..., str]:
    """The place of all calls of a function."""
    return lambda *args: place


def in_step(step: str, done: int, total: int) -> str:
    """The place that a report of progress tells."""
    return f"amid {step}" if done else step


def in_nova_compute() -> None:
    """Make this nova-compute hold where it is wanted, and run this file as its engine."""
    from nova_rbd_snap.engine import client
    from nova_rbd_snap.openstack import clone, registration

    client.EngineClient.__init__.__kwdefaults__["command"] = (sys.executable, __file__)
    clone.register = _held(clone.register)
    registration._send = before(registration._send, at("location"))
    registration.observe = before(registration.observe, at("wait"))


def _held(register: Callable[..., Any]) -> Callable[..., Any]:
    def held(*args: Any, report: Callable[..., None], **kwargs: Any) -> None:
        register(*args, report=before(report, in_step), **kwargs)
        hold("end")

    return held


def in_engine() -> None:
    """Be the engine."""
    from nova_rbd_snap.engine import __main__ as main
    from nova_rbd_snap.engine import service
    from nova_rbd_snap.flatten import means
    from nova_rbd_snap.snapshot import saga

    perform = saga.perform

    def held(job: Any, steps: Any, final: str, ledger: Any, run: Any) -> Any:
        done = perform(job, steps, final, ledger, dataclasses.replace(run, report=before(run.report, in_step)))
        hold("ready")
        return done

    copy = means.ByWorker.flatten

    def held_copy(*args: Any) -> None:
        hold(WORKERS[0])
        copy(*args)
        hold(WORKERS[1])

    saga.perform = held
    means.ByWorker.flatten = held_copy
    service.Engine.describe = before(service.Engine.describe, at("connect"))
    service.Engine.reserve_clone = before(service.Engine.reserve_clone, at("reserve"))
    main.main()


if __name__ == "__main__":
    in_engine()
