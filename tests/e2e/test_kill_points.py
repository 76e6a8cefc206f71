# SPDX-License-Identifier: Apache-2.0
"""kill -9 of nova-compute, of its engine, and of both, at every boundary of a snapshot's steps.

Where nova-compute lives the request ends in an image; where it does not, in one or in none, and nothing else is left.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any, Callable

import pytest
from breakpoints import ENGINES, NOVAS, REACHED, SHIM, WANTED
from cloud import Cloud, Log, Options, eventually
from test_deaths import DEAD_CLIENT_SECONDS, gone

#: From here on Glance has the location, and the image stays.
REGISTERED = ("wait", "finish")


@pytest.fixture(scope="module")
def holding(whole_cloud: Cloud) -> Iterator[Options]:
    """What makes nova-compute and its engine ones that can be held."""
    with whole_cloud.stand_in_driver("rbd_holding", SHIM) as options:
        yield options


@pytest.fixture
def held_at(cloud: Cloud, holding: Options) -> Iterator[Callable[[Any, str], str]]:
    """A function that asks for a snapshot and returns the image's id once nova-compute or its engine is held."""
    cloud.configure(holding, {"rbd_snap": {"operation_timeout": 30}})

    def hold(server: Any, place: str) -> str:
        REACHED.unlink(missing_ok=True)
        WANTED.write_text(place)
        image_id = cloud.request(server)
        eventually(REACHED.exists, f"somebody comes to {place}", pause=0.02)
        return image_id

    yield hold
    WANTED.unlink(missing_ok=True)


def killed(cloud: Cloud, victim: str) -> None:
    """Kill; whoever was held and lives goes on."""
    (engine,), nova_compute = cloud.engines(), cloud.nova_compute
    log = Log()
    for pid in {"engine": [engine], "nova-compute": [nova_compute], "both": [nova_compute, engine]}[victim]:
        os.kill(pid, signal.SIGKILL)
    WANTED.unlink()
    eventually(lambda: gone(engine), "the engine has ended", DEAD_CLIENT_SECONDS)
    if victim != "engine":
        cloud.nova_compute_is_back(log)


@pytest.mark.parametrize("victim", ["nova-compute", "engine", "both"])
@pytest.mark.parametrize("place", [*ENGINES, *NOVAS])
def test_killed_at(cloud: Cloud, server: Any, held_at: Callable[[Any, str], str], place: str, victim: str) -> None:
    """See the module."""
    before, digest = cloud.picture(), cloud.disk_digest(server)
    image_id = held_at(server, place)
    killed(cloud, victim)
    assert cloud.settled(server).status == "ACTIVE"
    if victim == "engine" or place in REGISTERED:
        eventually(lambda: cloud.image(image_id).status == "active", "the image is active", 20)
        eventually(lambda: cloud.ceph.ledger(cloud.vms) == {}, "no job is left")
        assert cloud.image_digest(image_id) == digest
        cloud.delete_image(image_id)
    else:
        eventually(lambda: cloud.image(image_id) is None, "the image record is deleted", DEAD_CLIENT_SECONDS)
    cloud.unchanged(before, DEAD_CLIENT_SECONDS)
