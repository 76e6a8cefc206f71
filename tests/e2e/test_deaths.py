# SPDX-License-Identifier: Apache-2.0
"""Something ends, or stops answering, in the middle of a snapshot: a clean end, and pools as before."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import time
from typing import Any

import pytest
from cloud import MIB, SHORT_TOKEN_SECONDS, THROUGH_PROXY, Cloud, Log, eventually, run
from test_clone import UNTRUSTED, assert_cloned

from tests import daemons
from tests.fakes.glance_proxy import GlanceProxy
from tests.faults import recording
from tests.waiting import promised_seconds

PATIENCE_SECONDS = 10
BOUND_SECONDS = 2 * promised_seconds(PATIENCE_SECONDS)
IMPATIENT = ({"rbd_snap": {"operation_timeout": PATIENCE_SECONDS}}, THROUGH_PROXY)
#: A dead client's hold on an rbd image lasts 30 s.
DEAD_CLIENT_SECONDS = 60


@pytest.fixture(autouse=True)
def slow_flatten(cloud: Cloud) -> None:
    """Flattening takes seconds: one object at a time, of the many that the server's disk has."""
    cloud.configure(*IMPATIENT)
    user = f"client.nova-{cloud.release}"
    run("ceph", "config", "set", user, "rbd_concurrent_management_ops", "1")
    cloud.clean_up.callback(run, "ceph", "config", "rm", user, "rbd_concurrent_management_ops")


def at_step(cloud: Cloud, image_id: str, step: str) -> None:
    """Wait until the job of the image is at *step*."""

    def reached() -> bool:
        return bool(json.loads(cloud.ceph.ledger(cloud.vms).get(image_id, "{}")).get("step") == step)

    eventually(reached, f"image {image_id} at step {step}", pause=0.01)


def flattening(cloud: Cloud, server: Any) -> str:
    """Ask for a snapshot; returns the image's id while its clone is being flattened."""
    image_id = cloud.request(server)
    at_step(cloud, image_id, "flatten")
    return image_id


def gone(pid: int) -> bool:
    return not pathlib.Path(f"/proc/{pid}").exists()


def test_image_is_deleted(cloud: Cloud, server: Any, log: Log) -> None:
    """The tenant deletes the image half-way: nothing is left, nothing is copied, and the server is well."""
    before = cloud.picture()
    image_id = flattening(cloud, server)
    cloud.delete_image(image_id)
    cloud.failed_snapshot(server, image_id)
    cloud.unchanged(before)
    assert not log.lines("copied in full")


@pytest.mark.core
def test_server_is_deleted(cloud: Cloud, log: Log) -> None:
    """The tenant deletes the server half-way: it goes, and its disk, its half-made image and the record with it."""
    before = cloud.picture()
    server = cloud.boot()
    cloud.write(server, 250, size=3 * MIB, step=4 * MIB)  # so that the deletion comes amid the flatten
    image_id = flattening(cloud, server)
    cloud.delete_server(server)
    eventually(lambda: cloud.image(image_id) is None, f"image {image_id} is deleted")
    cloud.unchanged(before)
    assert not log.lines("copied in full")


@pytest.mark.core
def test_engine_is_killed(cloud: Cloud, server: Any, log: Log) -> None:
    """The next engine undoes what the killed one did, and the disk is copied."""
    before, digest = cloud.picture(), cloud.disk_digest(server)
    image_id = flattening(cloud, server)
    cloud.kill_engine()
    cloud.settled(server)
    assert cloud.image(image_id).status == "active"
    assert cloud.image_digest(image_id) == digest
    assert log.lines(f"{image_id}: copied in full")
    (warning,) = log.ours()
    assert "the engine ended during 'flatten'" in warning
    cloud.delete_image(image_id)
    cloud.unchanged(before)


def test_engine_is_asked_to_end(cloud: Cloud, server: Any, log: Log) -> None:
    """SIGTERM, as every service of the host gets it: the work is undone, the request fails, a new one works."""
    before = cloud.picture()
    image_id = flattening(cloud, server)
    engine = cloud.kill_engine(signal.SIGTERM)
    cloud.failed_snapshot(server, image_id)
    eventually(lambda: gone(engine), "the engine has ended")
    cloud.unchanged(before)
    assert not log.lines("copied in full")
    assert cloud.snapshot(server).status == "active"


@pytest.mark.core
def test_nova_compute_is_killed(cloud: Cloud, server: Any) -> None:
    """The engine sees it, undoes what is under way by itself, and ends."""
    before = cloud.picture()
    flattening(cloud, server)
    (engine,) = cloud.engines()
    log = Log()
    os.kill(cloud.nova_compute, signal.SIGKILL)
    eventually(lambda: gone(engine), "the engine has ended", DEAD_CLIENT_SECONDS)
    cloud.unchanged(before)
    # supervisord starts it again; Nova then frees the server of its task.
    cloud.nova_compute_is_back(log)
    cloud.settled(server)


def test_nova_compute_is_restarted(cloud: Cloud, server: Any, log: Log) -> None:
    """A restart in the middle lets the snapshot end or undoes it, within Nova's time; the next one is cloned."""
    before, digest = cloud.picture(), cloud.disk_digest(server)
    image_id = flattening(cloud, server)
    cloud.restart_nova_compute()
    cloud.settled(server)
    image = cloud.image(image_id)
    if image is not None and image.status == "active":
        assert cloud.image_digest(image_id) == digest
    cloud.delete_image(image_id)
    cloud.unchanged(before)
    image = cloud.snapshot(server)
    assert log.lines(f"Snapshot to image {image.id}: cloned in")


@pytest.mark.parametrize("arrived", [pytest.param(True, marks=pytest.mark.core), False])
def test_nova_compute_is_killed_while_it_registers(
    cloud: Cloud, server: Any, proxy: GlanceProxy, arrived: bool
) -> None:
    """Glance tells the engine: an image that has its data keeps it, else record and data are removed."""
    before, digest = cloud.picture(), cloud.disk_digest(server)
    proxy.break_(lambda request: request.registers, asked=arrived, held=True)
    image_id = cloud.request(server)
    eventually(lambda: proxy.hits, "the location is on its way")
    (engine,) = cloud.engines()
    log = Log()
    os.kill(cloud.nova_compute, signal.SIGKILL)
    eventually(lambda: gone(engine), "the engine has ended", DEAD_CLIENT_SECONDS)
    cloud.nova_compute_is_back(log)
    cloud.settled(server)
    if arrived:
        assert cloud.image(image_id).status == "active"
        assert cloud.image_digest(image_id) == digest
        assert cloud.ceph.ledger(cloud.vms) == {}
        cloud.delete_image(image_id)
    else:
        assert cloud.image(image_id) is None
    cloud.unchanged(before)


@pytest.mark.disturbs
def test_short_stall(cloud: Cloud, server: Any, log: Log) -> None:
    """A cluster that stalls for less than operation_timeout delays the snapshot, and no more."""
    digest = cloud.disk_digest(server)
    image_id = flattening(cloud, server)
    with daemons.frozen(*daemons.OSDS), pytest.raises(AssertionError, match="not within"):
        eventually(lambda: cloud.image(image_id).status == "active", "it stalls", 4)
    cloud.settled(server)
    assert cloud.image_digest(image_id) == digest
    assert_cloned(cloud, log, server, cloud.image(image_id))


@pytest.mark.slow
@pytest.mark.disturbs
def test_cluster_stops_answering(cloud: Cloud, server: Any, log: Log, found: recording.Cell) -> None:
    """In bounded time the request fails, without Nova's copy, which would wait for ever.

    What cannot be undone now is undone once the cluster answers again, by nobody's hand.
    """
    before = cloud.picture()
    image_id = flattening(cloud, server)
    with daemons.frozen(*daemons.OSDS):
        began = time.monotonic()
        cloud.failed_snapshot(server, image_id, seconds=BOUND_SECONDS)
        found.wait_seconds = time.monotonic() - began
    assert not log.lines("copied in full")
    cloud.unchanged(before, 2 * DEAD_CLIENT_SECONDS)
    assert cloud.snapshot(server).status == "active"


@pytest.mark.disturbs
def test_monitor_stops_answering(cloud: Cloud, server: Any, log: Log) -> None:
    """The same when only the monitor is silent, which every snapshot asks."""
    before = cloud.picture()
    with daemons.frozen(daemons.MONITOR):
        image_id = cloud.request(server)
        cloud.failed_snapshot(server, image_id, seconds=BOUND_SECONDS)
    assert not log.lines("copied in full")
    cloud.unchanged(before, seconds=2 * DEAD_CLIENT_SECONDS)


def test_glance_is_silent(cloud: Cloud, server: Any, proxy: GlanceProxy, log: Log) -> None:
    """A Glance that answers nothing ends the request in bounded time, and what was made is removed."""
    before = cloud.picture()
    proxy.break_(lambda request: True, held=True)
    image_id = cloud.request(server)
    log.has(f"ERROR nova_rbd_snap.*Snapshot to image {image_id} failed: step 'register'")
    proxy.behave()
    cloud.failed_snapshot(server, image_id)
    cloud.unchanged(before)
    assert not log.lines("copied in full")


@pytest.mark.parametrize("status", [401, 404])
def test_token_or_record_is_not_accepted(
    cloud: Cloud, server: Any, proxy: GlanceProxy, log: Log, status: int
) -> None:
    """Where Glance knows neither token nor record, an upload would fare no better: a clean error."""
    before = cloud.picture()
    proxy.break_(lambda request: request.method in ("POST", "PATCH"), status=status)
    image_id = cloud.request(server)
    cloud.settled(server)
    proxy.behave()
    cloud.unchanged(before)
    assert not log.lines("copied in full")
    assert cloud.image(image_id) is None or cloud.image(image_id).status == "queued"


@pytest.mark.slow
@pytest.mark.parametrize("trusted", [True, False])
def test_token_expires(cloud: Cloud, server: Any, trusted: bool) -> None:
    """The tenant's token expires while the disk is cloned: the service's own vouches for it, or the error is clean."""
    if not trusted:
        cloud.configure(*IMPATIENT, UNTRUSTED)
    cloud.delete_image(cloud.snapshot(server).id)  # so that there is an engine
    before, digest, log = cloud.picture(), cloud.disk_digest(server), Log()
    (engine,) = cloud.engines()
    os.kill(engine, signal.SIGSTOP)
    try:
        with cloud.short_tokens():
            image_id = cloud.request(server)
            expired = time.time() + SHORT_TOKEN_SECONDS
        eventually(lambda: time.time() > expired, "the token has expired")
    finally:
        os.kill(engine, signal.SIGCONT)
    cloud.settled(server)
    if trusted:
        assert cloud.image_digest(image_id) == digest
        assert_cloned(cloud, log, server, cloud.image(image_id))
    else:
        cloud.unchanged(before)
        assert not log.lines("copied in full")
        assert "401" in log.has(f"ERROR nova_rbd_snap.*Snapshot to image {image_id} failed")


@pytest.mark.slow
def test_location_lost_on_its_way(cloud: Cloud, server: Any, proxy: GlanceProxy, log: Log) -> None:
    """Nobody can know whether the location will still arrive: the data is kept, told, and goes with Glance's record."""
    before = cloud.picture()
    proxy.break_(lambda request: request.registers, held=True)
    image_id = cloud.request(server)
    log.has(f"ERROR nova_rbd_snap.*Snapshot to image {image_id} failed: .*the data is kept")
    cloud.failed_snapshot(server, image_id)
    proxy.behave()
    cloud.unchanged(before, DEAD_CLIENT_SECONDS)
