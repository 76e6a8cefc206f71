# SPDX-License-Identifier: Apache-2.0
"""The clone way fails and Nova's own full copy is made: from a frozen disk, with one warning that tells why."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import rbd
from cloud import MIB, THROUGH_PROXY, Cloud, Log, eventually
from test_clone import numbers_in, writing

from tests.fakes.glance_proxy import GlanceProxy, Request

NO_POOL = {"rbd_snap": {"glance_pool": "nowhere"}}


@contextlib.contextmanager
def copied(cloud: Cloud, server: Any, *reasons: str, interrupted: bool = False) -> Iterator[list[Any]]:
    """The block puts the image it makes of *server* into the list: a full copy, because of *reasons*."""
    log, before = Log(), cloud.ceph.about(cloud.vms, f"{server.id}_disk")
    digest, interruptions = cloud.disk_digest(server), cloud.guests.interruptions(server.id)
    made: list[Any] = []
    yield made
    (image,) = made
    assert log.lines(f"Snapshot to image {image.id}: copied in full by Nova")
    (warning,) = log.ours()
    assert image.id in warning
    for reason in reasons:
        assert reason in warning
    assert (image.disk_format, image.container_format) == ("raw", "bare")
    assert cloud.image_digest(image.id) == digest
    assert cloud.ceph.ledger(cloud.vms) == {}
    if cloud.server(server).status != "SHELVED_OFFLOADED":
        assert cloud.ceph.about(cloud.vms, f"{server.id}_disk") == before
        assert interrupted or cloud.guests.interruptions(server.id) == interruptions


@pytest.mark.slow
def test_no_such_pool(cloud: Cloud, server: Any) -> None:
    """glance_pool names a pool that is not there: the disk is copied, and the option is named."""
    cloud.configure(NO_POOL)
    with copied(cloud, server, "'nowhere'", "set [rbd_snap] glance_pool") as made:
        made.append(cloud.snapshot(server))


@pytest.mark.core
def test_copy_of_one_instant(cloud: Cloud, server: Any) -> None:
    """The full copy, too, shows the disk at one instant, and the guest goes on writing."""
    cloud.configure(NO_POOL)
    interruptions = cloud.guests.interruptions(server.id)
    with writing(cloud, server):
        image = cloud.snapshot(server)
    first, last = numbers_in(cloud, image)
    assert first > 0
    assert first - last in (0, 1)
    assert cloud.guests.interruptions(server.id) == interruptions


@pytest.mark.parametrize("state", ["paused", "stopped"])
def test_guest_is_left_in_its_state(cloud: Cloud, state: str) -> None:
    """A paused or stopped guest stays so through a full copy."""
    cloud.configure(NO_POOL)
    server = getattr(cloud, state)(cloud.boot())
    before = cloud.guests.state(server.id)
    with copied(cloud, server, "'nowhere'") as made:
        made.append(cloud.snapshot(server))
    assert cloud.guests.state(server.id) == before


def test_way_nova_alone(cloud: Cloud, server: Any, log: Log) -> None:
    """With ways = nova a full copy of the frozen disk is made without a word of warning."""
    cloud.configure({"rbd_snap": {"ways": "nova"}})
    interruptions = cloud.guests.interruptions(server.id)
    image = cloud.snapshot(server)
    assert cloud.image_digest(image.id) == cloud.disk_digest(server)
    assert cloud.guests.interruptions(server.id) == interruptions
    assert log.lines(f"Snapshot to image {image.id}: copied in full")
    assert log.ours() == []


def test_way_clone_alone(cloud: Cloud, server: Any, log: Log) -> None:
    """With ways = clone a snapshot that cannot be cloned fails, and says why to the tenant."""
    cloud.configure({"rbd_snap": {"ways": "clone", "glance_pool": "nowhere"}})
    before = cloud.picture()
    cloud.failed_snapshot(server, cloud.request(server))
    cloud.unchanged(before)
    assert not log.lines("copied in full")
    assert "nowhere" in log.has("ERROR nova_rbd_snap.*Snapshot to image .* failed")


@pytest.mark.slow
def test_other_image_format(cloud: Cloud, server: Any) -> None:
    """snapshot_image_format = qcow2 is what Nova's copy is for: said at the start, and done."""
    start = cloud.configure({"libvirt": {"snapshot_image_format": "qcow2"}})
    assert "[libvirt] snapshot_image_format" in start.has("WARNING nova_rbd_snap.*will not clone")
    log, digest, interruptions = Log(), cloud.disk_digest(server), cloud.guests.interruptions(server.id)
    image = cloud.snapshot(server)
    assert image.disk_format == "qcow2"
    (warning,) = log.ours()
    assert "snapshot_image_format" in warning
    assert cloud.guests.interruptions(server.id) == interruptions
    again = cloud.boot(image.id, data=False)
    assert cloud.disk_digest(again) == digest


@pytest.mark.slow
def test_journaling(cloud: Cloud) -> None:
    """A disk with the journaling feature is not cloned."""
    cloud.configure()
    server = cloud.stopped(cloud.boot())
    with cloud.ceph.image(cloud.vms, f"{server.id}_disk") as disk:
        disk.update_features(rbd.RBD_FEATURE_JOURNALING, True)
    with copied(cloud, server, "journaling") as made:
        made.append(cloud.snapshot(server))


@pytest.mark.slow
def test_mirroring(cloud: Cloud) -> None:
    """Nor is a disk that is mirrored to another cluster."""
    cloud.configure()
    server = cloud.stopped(cloud.boot_flat())  # a parent would have to be mirrored, too
    with cloud.ceph.pool(cloud.vms) as ioctx:
        rbd.RBD().mirror_mode_set(ioctx, rbd.RBD_MIRROR_MODE_IMAGE)
    cloud.clean_up.callback(cloud.ceph.stop_mirroring, cloud.vms, f"{server.id}_disk")
    with cloud.ceph.image(cloud.vms, f"{server.id}_disk") as disk:
        disk.mirror_image_enable(rbd.RBD_MIRROR_IMAGE_MODE_SNAPSHOT)
    with copied(cloud, server, "mirrored") as made:
        made.append(cloud.snapshot(server))


@pytest.mark.slow
def test_base_image_in_another_cluster(cloud: Cloud) -> None:
    """The base image's location names another cluster: its pool says nothing of ours, and the option is named."""
    cloud.configure()
    server = cloud.boot_flat()
    reasons = ("neither a store nor the base image tells the pool", "[rbd_snap] glance_pool")
    with cloud.image_elsewhere("base"), copied(cloud, server, *reasons) as made:
        made.append(cloud.snapshot(server))


def test_name_is_taken(cloud: Cloud, server: Any) -> None:
    """An rbd image of the image's name is somebody else's: it is left alone, even by the fallback, which then fails."""
    cloud.configure()
    before = cloud.picture()
    log, nova_compute = Log(), cloud.nova_compute
    os.kill(nova_compute, signal.SIGSTOP)
    try:
        image_id = cloud.request(server)
        with cloud.ceph.pool(cloud.images) as ioctx:
            cloud.clean_up.callback(rbd.RBD().remove, cloud.ceph.rados.open_ioctx(cloud.images), image_id)
            rbd.RBD().create(ioctx, image_id, 4 * MIB)
    finally:
        os.kill(nova_compute, signal.SIGCONT)
    taken = cloud.ceph.about(cloud.images, image_id)
    cloud.failed_snapshot(server, image_id)
    assert "left alone" in log.has("the way 'clone' failed")
    after = cloud.picture()
    assert after[cloud.images]["rbd images"].pop(image_id) == taken
    after[cloud.images]["ids"].remove(taken["id"])
    assert after == before


@contextlib.contextmanager
def read_only_images(cloud: Cloud) -> Iterator[None]:
    """Meanwhile Nova's cephx user may only read Glance's pool."""
    user = f"nova-{cloud.release}"
    caps = cloud.ceph.caps(user)
    osd = caps["osd"].replace(f"profile rbd pool={cloud.images}", f"profile rbd-read-only pool={cloud.images}")
    assert osd != caps["osd"]
    cloud.ceph.set_caps(user, **{**caps, "osd": osd})
    try:
        # What a user may do is decided when it connects.
        cloud.kill_engine()
        yield
    finally:
        cloud.ceph.set_caps(user, **caps)
        cloud.kill_engine()


def test_no_right_to_write(cloud: Cloud, server: Any) -> None:
    """Nova's cephx user may not write to Glance's pool: copied, and the warning says which right is missing."""
    cloud.configure()
    with read_only_images(cloud), copied(cloud, server, "profile rbd", "remedy", "step 'clone'") as made:
        made.append(cloud.snapshot(server))


@pytest.mark.parametrize(
    "status", [pytest.param(403, marks=pytest.mark.slow), pytest.param(409, marks=pytest.mark.core)]
)
def test_glance_refuses_the_location(cloud: Cloud, server: Any, proxy: GlanceProxy, status: int) -> None:
    """Whatever Glance has against the location, what was cloned is removed and the disk is copied."""
    cloud.configure(THROUGH_PROXY)
    proxy.break_(lambda request: request.registers, status=status)
    with copied(cloud, server, "step 'register'", f"Glance answered {status}", "remedy") as made:
        made.append(cloud.snapshot(server))
    # The old way is tried where the new one is not offered, and no request is repeated.
    assert [request.method for request in proxy.seen] == (["POST", "PATCH"] if status == 403 else ["POST"])


@pytest.mark.slow
def test_glance_refuses_a_backup(cloud: Cloud, server: Any, proxy: GlanceProxy) -> None:
    """The same from the task states of a backup."""
    cloud.configure(THROUGH_PROXY)
    proxy.break_(lambda request: request.registers, status=409)
    with copied(cloud, server, "step 'register'", "Glance answered 409") as made:
        made.append(cloud.backup(server))


def test_glance_refuses_what_is_shelved(cloud: Cloud, proxy: GlanceProxy) -> None:
    """And from those of shelving, which ends with the server offloaded, and its image whole."""
    cloud.configure(THROUGH_PROXY)
    server = cloud.boot()
    proxy.break_(lambda request: request.registers, status=409)
    with copied(cloud, server, "step 'register'", "Glance answered 409") as made:
        made.append(cloud.shelve(server))


def test_lost_answer(cloud: Cloud, server: Any, proxy: GlanceProxy, log: Log) -> None:
    """The location arrived but the answer did not: the record is re-read, and the image kept as it is."""
    cloud.configure(THROUGH_PROXY)
    proxy.break_(lambda request: request.registers, asked=True)
    image = cloud.snapshot(server)
    assert proxy.hits == 1
    assert cloud.image_digest(image.id) == cloud.disk_digest(server)
    assert log.lines(f"Snapshot to image {image.id}: cloned in")
    assert log.ours() == []


def uploads(request: Request) -> bool:
    return request.method == "PUT" and request.path.endswith("/file")


def test_copy_fails_too(cloud: Cloud, server: Any, proxy: GlanceProxy, log: Log) -> None:
    """When Glance takes neither the location nor the upload, the request fails and leaves nothing."""
    cloud.configure(THROUGH_PROXY)
    before, interruptions = cloud.picture(), cloud.guests.interruptions(server.id)
    proxy.break_(lambda request: request.registers or uploads(request), status=409)
    cloud.failed_snapshot(server, cloud.request(server))
    cloud.unchanged(before)
    assert cloud.guests.interruptions(server.id) == interruptions
    assert log.lines("the way 'clone' failed")
    eventually(lambda: not any(cloud.local_copies()), "no local copy is left")
