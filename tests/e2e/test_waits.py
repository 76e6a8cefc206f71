# SPDX-License-Identifier: Apache-2.0
"""A cluster that does not answer holds up nothing of nova-compute's but the request itself, and that not for ever."""

from __future__ import annotations

import pathlib
import time
from typing import Any

import pytest
from cloud import Cloud, eventually

from tests import daemons
from tests.faults import recording
from tests.waiting import promised_seconds

PATIENCE_SECONDS = 5
BOUND_SECONDS = 2 * promised_seconds(PATIENCE_SECONDS)
#: How much longer than an idle stock one nova-compute may take to answer while one of our requests waits: less than
#: whatever waits for the cluster.
MARGIN_SECONDS = 3
QUESTIONS = 8
ROUNDS = 4
#: Nova's own pools, whose threads come and never go, so small that they are full before the first round ends.
SMALL_POOLS = {
    "DEFAULT": {
        "executor_thread_pool_size": 4,
        "default_thread_pool_size": 1,
        "max_concurrent_builds": 1,
        "max_concurrent_snapshots": 1,
    }
}


def slowest_answer(cloud: Cloud) -> float:
    """Of some questions in a row to nova-compute, in seconds."""
    slowest = 0.0
    for _ in range(QUESTIONS):
        began = time.monotonic()
        assert cloud.nova_compute_answers()
        slowest = max(slowest, time.monotonic() - began)
    return slowest


def threads(cloud: Cloud) -> int:
    return len(list(pathlib.Path(f"/proc/{cloud.nova_compute}/task").iterdir()))


@pytest.mark.disturbs
@pytest.mark.slow
def test_nova_compute_goes_on(cloud: Cloud, server: Any, found: recording.Cell) -> None:
    """It answers while our request waits for the cluster as an idle stock one does under the same fault; the request
    ends in time; and what the fault left heals by itself: jobs, threads, connections."""
    cloud.configure(SMALL_POOLS, {"DEFAULT": {"compute_driver": "libvirt.LibvirtDriver"}})
    with daemons.frozen(*daemons.OSDS):
        stock = slowest_answer(cloud)
    cloud.configure(SMALL_POOLS, {"rbd_snap": {"operation_timeout": PATIENCE_SECONDS}})
    cloud.delete_image(cloud.snapshot(server).id)
    before, busy, interruptions = cloud.picture(), [], cloud.guests.interruptions(server.id)
    for _ in range(ROUNDS):
        with daemons.frozen(*daemons.OSDS):
            began = time.monotonic()
            image_id = cloud.request(server)
            ours = slowest_answer(cloud)
            cloud.failed_snapshot(server, image_id, seconds=BOUND_SECONDS)
            waited = time.monotonic() - began
        print(f"slowest answer: stock {stock:.2f} s, ours {ours:.2f} s; the request ended after {waited:.0f} s")
        found.wait_seconds = max(found.wait_seconds or 0, waited)
        assert ours < stock + MARGIN_SECONDS
        cloud.unchanged(before, 120)
        busy.append(threads(cloud))
    # One for each request would show.
    assert busy[-1] - busy[0] < ROUNDS - 1, busy
    eventually(lambda: cloud.rados_clients(cloud.engines()[0]) == 1, "one connection")
    found.guest_suspensions = cloud.guests.interruptions(server.id) - interruptions
    assert cloud.snapshot(server).status == "active"
