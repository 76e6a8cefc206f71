# SPDX-License-Identifier: Apache-2.0
"""A cluster that does not answer holds up nothing of nova-compute's but the request itself, and that not for ever."""

from __future__ import annotations

import contextlib
import pathlib
import time
from collections.abc import Iterator
from typing import Any

from cloud import Cloud, ceph_host, eventually

OSDS = ("osd.0", "osd.1", "osd.2")
PATIENCE_SECONDS = 5
#: docs/design/engine.rst: five times for the call and five for its undoing, each at least 90 s; and the time to end it.
PROMISED_SECONDS = 2 * 90 + 10
#: How long nova-compute may take to answer while one of our requests waits, where an idle stock one answers at once.
ANSWER_SECONDS = 10
QUESTIONS = 8
ROUNDS = 4


@contextlib.contextmanager
def silent_cluster() -> Iterator[None]:
    ceph_host("supervisorctl", "signal", "STOP", *OSDS)
    try:
        yield
    finally:
        ceph_host("supervisorctl", "signal", "CONT", *OSDS)


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


def test_nova_compute_goes_on(cloud: Cloud, server: Any) -> None:
    """It answers while our request waits for the cluster as an idle stock one does under the same fault; the request
    ends in time; and what the fault left heals by itself: jobs, threads, connections."""
    cloud.configure({"DEFAULT": {"compute_driver": "libvirt.LibvirtDriver"}})
    with silent_cluster():
        stock = slowest_answer(cloud)
    cloud.configure({"rbd_snap": {"operation_timeout": PATIENCE_SECONDS}})
    cloud.delete_image(cloud.snapshot(server).id)
    before, busy = cloud.picture(), []
    for _ in range(ROUNDS):
        with silent_cluster():
            began = time.monotonic()
            image_id = cloud.request(server)
            ours = slowest_answer(cloud)
            cloud.failed_snapshot(server, image_id, seconds=2 * PROMISED_SECONDS)
            waited = time.monotonic() - began
        print(f"slowest answer: stock {stock:.2f} s, ours {ours:.2f} s; the request ended after {waited:.0f} s")
        assert ours < ANSWER_SECONDS
        cloud.unchanged(before, 120)
        busy.append(threads(cloud))
    # Nova fills its own pools of threads meanwhile; one of ours for each request would show.
    assert busy[-1] - busy[0] < ROUNDS - 1, busy
    eventually(lambda: cloud.rados_clients(cloud.engines()[0]) == 1, "one connection")
    assert cloud.snapshot(server).status == "active"
