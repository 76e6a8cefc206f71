# SPDX-License-Identifier: Apache-2.0
"""Glance itself stops as a location is about to be sent to it."""

from __future__ import annotations

import os
import pathlib
import signal
from typing import Any

import pytest
from cloud import Cloud, Log, run
from test_deaths import DEAD_CLIENT_SECONDS


def glance() -> list[int]:
    """Process ids of Glance's master and its workers."""
    master = int(run("supervisorctl", "pid", "glance-api"))
    return [master, *map(int, pathlib.Path(f"/proc/{master}/task/{master}/children").read_text().split())]


@pytest.fixture
def patience_seconds() -> int:
    return 5


def test_killed(cloud: Cloud, server: Any, held_at: Any, log: Log) -> None:
    """Its supervisor starts it again: who cannot know whether the location arrived keeps the data, and the request
    fails; when Glance's record says so, it goes."""
    before = cloud.picture()
    image_id = held_at(server, "location")
    for pid in glance():
        os.kill(pid, signal.SIGKILL)
    held_at.go_on()
    log.has(f"ERROR nova_rbd_snap.*Snapshot to image {image_id} failed: .*the data is kept")
    cloud.wait_for_glance()
    cloud.failed_snapshot(server, image_id)
    cloud.unchanged(before, DEAD_CLIENT_SECONDS)
    assert not log.lines("copied in full")


@pytest.mark.slow
def test_frozen(cloud: Cloud, server: Any, held_at: Any, log: Log) -> None:
    """The same while it does not answer, and the data is kept as long; then Glance takes the location after all, or
    Nova's word that the image is not wanted any more."""
    before, digest = cloud.picture(), cloud.disk_digest(server)
    image_id = held_at(server, "location")
    frozen = glance()
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    try:
        held_at.go_on()
        log.has(f"ERROR nova_rbd_snap.*Snapshot to image {image_id} failed: .*the data is kept")
        assert image_id in cloud.ceph.ledger(cloud.vms)
        assert cloud.image_digest(image_id) == digest
    finally:
        for pid in frozen:
            os.kill(pid, signal.SIGCONT)
    cloud.failed_snapshot(server, image_id)
    cloud.unchanged(before, DEAD_CLIENT_SECONDS)
    assert not log.lines("copied in full")
