# SPDX-License-Identifier: Apache-2.0
"""Images that are not flat when the tenant gets them: they are as any other, and nothing is left of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import pytest
from cloud import Cloud, Log, eventually, run

FLATTEN = {policy: {"rbd_snap": {"flatten": policy}} for policy in ("background", "never")}


@pytest.fixture
def readers(cloud: Cloud) -> Iterator[None]:
    """Glance may read Nova's pool, as 'background' and 'never' need it."""
    user = cloud.vms.replace("vms", "glance")
    before = cloud.ceph.caps(user)
    cloud.ceph.set_caps(user, **{**before, "osd": f"{before['osd']}, profile rbd-read-only pool={cloud.vms}"})
    restart_glance(cloud)
    yield
    cloud.ceph.set_caps(user, **before)
    restart_glance(cloud)


def restart_glance(cloud: Cloud) -> None:
    """What a client may do is settled when it connects."""
    run("supervisorctl", "restart", "glance-api")
    cloud.wait_for_glance()


def is_flat(cloud: Cloud, image: Any) -> bool:
    with cloud.ceph.image(cloud.images, image.id, "snap") as opened:
        return cloud.ceph.parent(opened) is None


def downloaded(cloud: Cloud, image: Any) -> str:
    """The checksum of what Glance gives out."""
    digest = hashlib.sha256()
    for chunk in cloud.admin.image.download_image(image, stream=True).iter_content(4 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def on_disk(cloud: Cloud, server: Any) -> str:
    digest = hashlib.sha256()
    with cloud.ceph.image(cloud.vms, f"{server.id}_disk") as opened:
        for offset in range(0, opened.size(), 4 << 20):
            digest.update(opened.read(offset, 4 << 20))
    return digest.hexdigest()


def waits(cloud: Cloud, server: Any) -> bool:
    """Whether the server's disk is kept for images; what is kept for none is cleared away first, as an engine does."""
    cloud.command("trash", "purge")
    return any(row["Name"] == f"{server.id}_disk" for row in cloud.command("trash", "list"))


@pytest.mark.core
def test_background(cloud: Cloud, log: Log, readers: None) -> None:
    """The image is active, and boots, before it is flat; soon it is, and nothing else is left."""
    cloud.configure(FLATTEN["background"], {"rbd_snap": {"flatten_workers": "0"}})
    server = cloud.boot()
    digest = cloud.disk_digest(server)
    image = cloud.snapshot(server)
    assert "cloned in" in log.has(f"Snapshot to image {image.id}")
    assert not is_flat(cloud, image)
    cloud.write(server, 4, step=4 << 20)
    assert cloud.image_digest(image.id) == digest
    assert cloud.disk_digest(cloud.boot(image.id, data=False)) == digest
    ((row),) = cloud.command("image", "list", "--glance-pool", cloud.images)
    assert (row["ID"], row["State"]) == (image.id, "queued")

    cloud.configure(FLATTEN["background"])
    eventually(lambda: is_flat(cloud, image), "the image is flattened")
    eventually(lambda: cloud.ceph.ledger(cloud.vms) == {}, "its job is done")
    assert cloud.image_digest(image.id) == digest
    with cloud.ceph.image(cloud.vms, f"{server.id}_disk") as disk:
        assert list(disk.list_snaps()) == []
    assert log.ours() == []


@pytest.mark.parametrize(
    "first", [pytest.param("server", marks=pytest.mark.core), pytest.param("image", marks=pytest.mark.slow)]
)
def test_never(cloud: Cloud, log: Log, readers: None, first: str) -> None:
    """The image costs no copy, and is as any other, also once its server is gone; and with the last image of it the
    server's disk is gone for good."""
    cloud.configure(FLATTEN["never"])
    server = cloud.boot()
    digest, content = cloud.disk_digest(server), on_disk(cloud, server)
    image = cloud.snapshot(server)
    assert cloud.ceph.ledger(cloud.vms) == {}
    if first == "server":
        cloud.delete_server(server)
        assert waits(cloud, server)
    booted = cloud.boot(image.id, data=False)
    assert cloud.disk_digest(booted) == digest
    assert downloaded(cloud, image) == content
    assert not is_flat(cloud, image)
    cloud.delete_server(booted)
    cloud.delete_image(image.id)
    cloud.delete_server(server)
    eventually(lambda: not waits(cloud, server), "the disk is not kept any more")
    assert log.ours() == []


def test_glance_that_may_not_read_the_disks(cloud: Cloud, log: Log) -> None:
    """Its images are flattened before it gets them, and the log says what it lacks."""
    cloud.configure(FLATTEN["never"])
    server = cloud.boot()
    digest = cloud.disk_digest(server)
    image = cloud.snapshot(server)
    assert is_flat(cloud, image)
    assert cloud.image_digest(image.id) == digest
    log.has(rf"WARNING nova_rbd_snap.*'profile rbd-read-only' on pool {cloud.vms}")
    again = cloud.snapshot(server)
    assert is_flat(cloud, again)
    assert len(log.ours()) == 1


@pytest.mark.slow
def test_flavor_and_image_choose(cloud: Cloud, readers: None) -> None:
    """The property of the server's image counts, where its flavor says nothing."""
    cloud.configure()
    base = cloud.image_called("base")
    cloud.admin.image.update_image(base.id, rbd_snap_flatten="never")
    try:
        server = cloud.boot()
    finally:
        cloud.admin.image.patch(
            f"/images/{base.id}",
            json=[{"op": "remove", "path": "/rbd_snap_flatten"}],
            headers={"Content-Type": "application/openstack-images-v2.1-json-patch"},
        )
    image = cloud.snapshot(server)
    assert not is_flat(cloud, image)
    cloud.delete_image(image.id)
    cloud.command("trash", "purge")
