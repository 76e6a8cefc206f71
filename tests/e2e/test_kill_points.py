# SPDX-License-Identifier: Apache-2.0
"""kill -9 of nova-compute, of its engine, and of both, at every boundary of a snapshot's steps.

Where nova-compute lives the request ends in an image; where it does not, in one or in none, and nothing else is left.
So it is where the image is flattened later, or never, and where the engine that flattens it is killed.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
from breakpoints import ENGINES, NOVAS, WORKERS
from cloud import Cloud, Log, Options, eventually
from test_deaths import DEAD_CLIENT_SECONDS, gone
from test_flatten import wait_for_readers

from tests.faults import recording

#: Up to here there may be no job yet: who dies leaves an image record that nobody knows of, as stock Nova does.
UNHEARD = ("connect", "reserve")
#: From here on Glance has the location, and the image stays.
REGISTERED = ("wait", "finish", "end")


def killed(cloud: Cloud, victim: str, held: Any) -> None:
    """Kill; whoever was held and lives goes on."""
    (engine,), nova_compute = cloud.engines(), cloud.nova_compute
    log = Log()
    for pid in {"engine": [engine], "nova-compute": [nova_compute], "both": [nova_compute, engine]}[victim]:
        os.kill(pid, signal.SIGKILL)
    held.go_on()
    eventually(lambda: gone(engine), "the engine has ended", DEAD_CLIENT_SECONDS)
    if victim != "engine":
        cloud.nova_compute_is_back(log)


#: Those that tell most; the others take their time.
QUICK = {("clone", "both"), ("seal", "engine"), ("ready", "nova-compute")}


@pytest.mark.parametrize(
    ("point", "clone_format"),
    [
        pytest.param(
            (place, victim),
            1 if place == "protect" else 2,
            id=f"{victim} at {place}",
            marks=() if (place, victim) in QUICK else pytest.mark.slow,
        )
        # Where they are configured alike they stand together.
        for place in sorted((*ENGINES, *NOVAS), key="protect".__eq__)
        for victim in ("nova-compute", "engine", "both")
    ],
)
def test_killed(cloud: Cloud, server: Any, held_at: Any, found: recording.Cell, point: tuple[str, str]) -> None:
    """See the module."""
    (place, victim), found.kill = point, True
    before, digest = cloud.picture(), cloud.disk_digest(server)
    image_id = held_at(server, place)
    interruptions, began = cloud.guests.interruptions(server.id), time.monotonic()
    killed(cloud, victim, held_at)
    assert cloud.settled(server).status == "ACTIVE"
    if victim == "engine":
        found.wait_seconds = time.monotonic() - began
    if victim == "engine" or place in REGISTERED:
        eventually(lambda: cloud.image(image_id).status == "active", "the image is active", 20)
        eventually(lambda: cloud.ceph.ledger(cloud.vms) == {}, "no job is left")
        assert cloud.image_digest(image_id) == digest
        cloud.delete_image(image_id)
    elif place in UNHEARD:
        image = cloud.image(image_id)
        assert image is None or image.status == "queued"
    else:
        eventually(lambda: cloud.image(image_id) is None, "the image record is deleted", DEAD_CLIENT_SECONDS)
    cloud.unchanged(before, DEAD_CLIENT_SECONDS)
    found.guest_suspensions = cloud.guests.interruptions(server.id) - interruptions


#: By policy of flattening the boundaries from where on that counts.
SHARED = ("seal", "ready", "location", "wait", "finish", "end")
PLACES = {"background": (*SHARED, *WORKERS), "never": SHARED}


@pytest.mark.slow
@pytest.mark.usefixtures("readers")
@pytest.mark.parametrize("patience_seconds", [10])  # so that nobody waits long for a dead worker's lease
@pytest.mark.parametrize(
    ("policy", "point"),
    [
        pytest.param(policy, (place, victim), id=f"{victim} at {place}, {policy}")
        for policy, places in PLACES.items()
        for place in places
        for victim in ("nova-compute", "engine", "both")
    ],
)
def test_killed_while_it_is_not_flat(
    cloud: Cloud, server: Any, held_at: Any, found: recording.Cell, point: tuple[str, str]
) -> None:
    """As above; in the end the image is what it shall be, and once it is deleted nothing is left."""
    (place, victim), found.kill = point, True
    before, digest = cloud.picture(), cloud.disk_digest(server)
    image_id = held_at(server, place)
    interruptions = cloud.guests.interruptions(server.id)
    killed(cloud, victim, held_at)
    assert cloud.settled(server).status == "ACTIVE"
    if victim == "engine" or place in (*REGISTERED, *WORKERS):
        eventually(lambda: cloud.image(image_id).status == "active", "the image is active", 20)
        eventually(lambda: all(wait_for_readers(cloud)), "a flatten is done, if there is one", DEAD_CLIENT_SECONDS)
        assert cloud.image_digest(image_id) == digest
        cloud.delete_image(image_id)
    else:
        eventually(lambda: cloud.image(image_id) is None, "the image record is deleted", DEAD_CLIENT_SECONDS)
    cloud.ceph.let_a_day_pass(cloud.vms)
    eventually(lambda: cloud.ceph.ledger(cloud.vms) == {}, "no job is left", DEAD_CLIENT_SECONDS)
    cloud.command("trash", "purge")
    cloud.unchanged(before, DEAD_CLIENT_SECONDS)
    found.guest_suspensions = cloud.guests.interruptions(server.id) - interruptions


@pytest.mark.slow
def test_engine_killed_as_it_freezes_the_disk(
    cloud: Cloud, server: Any, holding: Options, held_at: Any, found: recording.Cell
) -> None:
    """For a full copy: the next engine freezes it, and the guest is not suspended."""
    cloud.configure(holding, {"rbd_snap": {"ways": "nova"}})
    found.kill = True
    before, digest = cloud.picture(), cloud.disk_digest(server)
    interruptions = cloud.guests.interruptions(server.id)
    image_id = held_at(server, "snap")
    killed(cloud, "engine", held_at)
    assert cloud.settled(server).status == "ACTIVE"
    assert cloud.image(image_id).status == "active"
    assert cloud.image_digest(image_id) == digest
    cloud.delete_image(image_id)
    cloud.unchanged(before, DEAD_CLIENT_SECONDS)
    found.guest_suspensions = cloud.guests.interruptions(server.id) - interruptions
    assert found.guest_suspensions == 0
