# SPDX-License-Identifier: Apache-2.0
"""Switched off, or told nonsense: nova-compute starts, says what is wrong, and takes Nova's own snapshots."""

from __future__ import annotations

from typing import Any

import pytest
from cloud import Cloud, Log, eventually, run

from tests import daemons


def assert_stock(cloud: Cloud) -> None:
    """A snapshot is Nova's own direct one."""
    server = cloud.standing_server()
    digest, log = cloud.disk_digest(server), Log()
    image_id = cloud.request(server)
    cloud.settled(server)
    # Nova itself does not wait for the task in which Glance takes the location.
    eventually(lambda: cloud.image(image_id).status == "active", "the image is active")
    assert cloud.image_digest(image_id) == digest
    assert not log.lines("nova_rbd_snap")


def test_enabled_false(cloud: Cloud) -> None:
    """enabled = false: new snapshots are Nova's own; what ours left earlier is looked after."""
    cloud.configure({"rbd_snap": {"enabled": "false"}})
    assert_stock(cloud)
    eventually(lambda: len(cloud.engines()) == 1, "an engine looks after what is left")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("clone_format", 7),
        pytest.param("ways", "clone,foo", marks=pytest.mark.slow),
        pytest.param("ways", "", marks=pytest.mark.slow),
        pytest.param("operation_timeout", 1, marks=pytest.mark.slow),
        pytest.param("flatten", "lazily", marks=pytest.mark.slow),
        ("enabled", "perhaps"),
    ],
)
def test_value_that_cannot_be(cloud: Cloud, option: str, value: Any) -> None:
    """The log names the option and what to do, and all else goes on as if we were not there."""
    start = cloud.configure({"rbd_snap": {option: value}})
    (line,) = start.lines(r"ERROR nova_rbd_snap")
    assert "nova-rbd-snap is off" in line
    assert f"[rbd_snap] {option}" in line
    if option in ("clone_format", "enabled"):
        assert_stock(cloud)
    assert cloud.engines() == []


@pytest.mark.parametrize("option", ["glance_pool", "glance_data_pool"])
def test_pool_that_is_not_there(cloud: Cloud, option: str) -> None:
    """A pool the cluster does not have is named at the start, with its option."""
    start = cloud.configure({"rbd_snap": {option: "nowhere"}})
    line = start.has(r"ERROR nova_rbd_snap.*'nowhere'")
    assert f"[rbd_snap] {option}" in line


@pytest.mark.disturbs
def test_cluster_silent_at_start(cloud: Cloud) -> None:
    """A cluster that does not answer while nova-compute starts is told, and used once it answers again."""
    cloud.configure()
    with daemons.frozen(daemons.MONITOR):
        log = Log()
        cloud.write_configuration({"rbd_snap": {"operation_timeout": 5}})
        run("supervisorctl", "restart", "nova-compute")
        log.has("nova-rbd-snap: cannot be checked now", 60)
    cloud.nova_compute_is_back(log)
    server = cloud.standing_server()
    log = Log()
    image = cloud.snapshot(server)
    assert log.lines(f"Snapshot to image {image.id}: cloned in")
    eventually(cloud.engines, "an engine runs")


def test_disks_outside_ceph(cloud: Cloud) -> None:
    """With images_type = qcow2 there is nothing to clone: said at the start, with the option, and no engine runs."""
    start = cloud.configure({"libvirt": {"images_type": "qcow2"}})
    assert "[libvirt] images_type" in start.has("WARNING nova_rbd_snap.*will not clone")
    assert cloud.engines() == []
