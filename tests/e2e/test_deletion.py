# SPDX-License-Identifier: Apache-2.0
"""Deleting a server: soon, wholly, and whatever was left on its disk; what somebody needs stays and is named."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import rbd
from cloud import Cloud, Log, eventually

#: Twice what is promised: seconds. Stock Nova waits a minute for a disk that has a snapshot, and then leaks it.
BOUND_SECONDS = 20


@pytest.fixture(autouse=True)
def configured(cloud: Cloud) -> None:
    cloud.configure()


def deleted(cloud: Cloud, server: Any) -> None:
    """Delete the server, in time."""
    began = time.monotonic()
    cloud.delete_server(server)
    assert time.monotonic() - began < BOUND_SECONDS


def leave(cloud: Cloud, server: Any, *names: str, protected: bool = False) -> None:
    """Snapshots on the server's disk."""
    with cloud.ceph.image(cloud.vms, f"{server.id}_disk") as disk:
        for name in names:
            disk.create_snap(name)
            if protected:
                disk.protect_snap(name)


@pytest.mark.core
def test_stray_snapshots_go_with_the_disk(cloud: Cloud, log: Log) -> None:
    """Stock Nova's and ours, protected or not."""
    before = cloud.picture()
    server = cloud.boot()
    leave(cloud, server, uuid.uuid4().hex, f"nova-rbd-snap-{uuid.uuid4()}", protected=True)
    leave(cloud, server, uuid.uuid4().hex, f"nova-rbd-snap-{uuid.uuid4()}")
    deleted(cloud, server)
    assert cloud.picture() == before
    assert log.ours() == []


def remove_disk(cloud: Cloud, server: Any) -> None:
    """By hand, when what needed it is gone."""
    with cloud.ceph.pool(cloud.vms) as ioctx, contextlib.suppress(rbd.ImageNotFound):
        with rbd.Image(ioctx, f"{server.id}_disk") as disk:
            for snap in disk.list_snaps():
                if disk.is_protected_snap(snap["name"]):
                    disk.unprotect_snap(snap["name"])
                disk.remove_snap_by_id(snap["id"])
        rbd.RBD().remove(ioctx, f"{server.id}_disk")


def test_operators_snapshot_stays(cloud: Cloud, log: Log) -> None:
    """The server is gone, its disk stays as it is under its name, and the log says why."""
    server = cloud.boot()
    leave(cloud, server, "before-upgrade")
    cloud.clean_up.callback(remove_disk, cloud, server)
    digest = cloud.disk_digest(server)
    deleted(cloud, server)
    line = log.has(r"WARNING nova_rbd_snap.*snapshot before-upgrade")
    assert f"{cloud.vms}/{server.id}_disk" in line
    assert cloud.disk_digest(server) == digest


def test_clone_stays(cloud: Cloud, log: Log) -> None:
    """A child of one of its snapshots keeps the disk, even of a snapshot that would else go; and is named."""
    server = cloud.boot()
    snap, child = uuid.uuid4().hex, f"e2e-{uuid.uuid4().hex[:8]}"
    leave(cloud, server, snap, protected=True)
    cloud.clean_up.callback(remove_disk, cloud, server)
    with cloud.ceph.pool(cloud.vms) as ioctx:
        rbd.RBD().clone(ioctx, f"{server.id}_disk", snap, ioctx, child)
    cloud.clean_up.callback(remove_image, cloud, child)
    digest = cloud.ceph.digest(cloud.vms, child)
    deleted(cloud, server)
    assert child in log.has(r"WARNING nova_rbd_snap.*its clones")
    assert cloud.ceph.digest(cloud.vms, child) == digest


def remove_image(cloud: Cloud, name: str) -> None:
    with cloud.ceph.pool(cloud.vms) as ioctx:
        rbd.RBD().remove(ioctx, name)


def test_disk_is_removed_later(cloud: Cloud, log: Log) -> None:
    """With ``delete = trash`` it goes to the trash first, whatever is on it, and soon nothing is left."""
    cloud.configure({"rbd_snap": {"delete": "trash"}})
    before = cloud.picture()
    server = cloud.boot()
    leave(cloud, server, f"nova-rbd-snap-{uuid.uuid4()}")
    deleted(cloud, server)
    log.has(rf"{server.id}_disk is in the trash of its pool, from where")
    cloud.unchanged(before)
    assert log.ours() == []


@contextlib.contextmanager
def open_elsewhere(cloud: Cloud, server: Any) -> Iterator[None]:
    with cloud.ceph.image(cloud.vms, f"{server.id}_disk"):
        yield


@pytest.mark.slow
def test_disk_that_somebody_has_open(cloud: Cloud, log: Log) -> None:
    """A watcher that stays does not keep the server: its disk goes to the trash, and the log says so."""
    server = cloud.boot()
    with open_elsewhere(cloud, server):
        cloud.delete_server(server)
        log.has(rf"WARNING nova_rbd_snap.*{server.id}_disk is in the trash")
        (purge,) = eventually(lambda: [job for job in cloud.command("job", "list") if job["Left"]], "it is kept")
    assert (purge["Kind"], purge["Step"]) == ("purge", "queued")
    cloud.command("job", "reclaim", purge["ID"])
    eventually(lambda: cloud.ceph.ledger(cloud.vms) == {}, "the disk is gone")


@pytest.mark.parametrize("how", ["force", "reset"])
def test_other_deletions_during_a_snapshot(cloud: Cloud, log: Log, how: str) -> None:
    """Force-deleted, or its state reset and then deleted, amid its snapshot: nothing is left of either."""
    before = cloud.picture()
    server = cloud.boot()
    image_id = cloud.request(server)
    # Where the server goes before its nova-compute has begun, Nova leaves the image's record.
    eventually(lambda: cloud.server(server).task_state != "image_snapshot_pending", "the snapshot has begun", pause=0.1)
    if how == "reset":
        cloud.admin.compute.reset_server_state(server.id, "error")
    cloud.admin.compute.delete_server(server.id, force=how == "force")
    eventually(lambda: cloud.is_gone(server), "the server is gone")
    eventually(lambda: cloud.ceph.ledger(cloud.vms) == {}, "no job is left")
    image = cloud.image(image_id)
    if image is not None and image.status == "active":  # it was quicker
        cloud.delete_image(image_id)
    eventually(lambda: cloud.image(image_id) is None, "no image record is left")
    cloud.unchanged(before)
