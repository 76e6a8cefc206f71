# SPDX-License-Identifier: Apache-2.0
"""Images that are not flat when the tenant gets them: they are as any other, and nothing is left of them."""

from __future__ import annotations

import hashlib
import json
import shlex
from typing import Any

import pytest
from cloud import Cloud, Log, eventually

FLATTEN = {policy: {"rbd_snap": {"flatten": policy}} for policy in ("background", "never")}


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


def wait_for_readers(cloud: Cloud) -> list[bool]:
    """Of each job whether it has flattened its image, and is not at work."""
    jobs = [json.loads(text) for text in cloud.ceph.ledger(cloud.vms).values()]
    return ["flat_at" in job and job["step"] == "queued" for job in jobs]


@pytest.mark.core
def test_background(cloud: Cloud, log: Log, readers: None) -> None:
    """The image is active, and boots, before it is flat; soon it is, and whoever was booted before reads on; nothing
    else is left, once nobody can have it open from before."""
    cloud.configure(FLATTEN["background"], {"rbd_snap": {"flatten_workers": "0"}})
    server = cloud.boot()
    digest = cloud.disk_digest(server)
    image = cloud.snapshot(server)
    assert "cloned in" in log.has(f"Snapshot to image {image.id}")
    assert not is_flat(cloud, image)
    cloud.write(server, 4, step=4 << 20)
    assert cloud.image_digest(image.id) == digest
    booted = cloud.boot(image.id, data=False)
    assert cloud.disk_digest(booted) == digest
    ((row),) = cloud.command("image", "list", "--glance-pool", cloud.images)
    assert (row["ID"], row["State"]) == (image.id, "queued")

    cloud.configure(FLATTEN["background"], {"rbd_snap": {"reclaim_interval": "5"}})
    eventually(lambda: is_flat(cloud, image), "the image is flattened")
    assert cloud.image_digest(image.id) == digest
    assert cloud.disk_digest(booted) == digest
    (waiting,) = cloud.command("job", "list")
    assert "stays until who reads it" in waiting["Left"]
    cloud.delete_server(booted)
    eventually(lambda: any(wait_for_readers(cloud)), "the job waits")
    cloud.ceph.let_a_day_pass(cloud.vms)
    eventually(lambda: cloud.ceph.ledger(cloud.vms) == {}, "its job is done", seconds=90)
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
    (probe,) = cloud.command("job", "list")
    assert probe["Kind"] == "probe"
    eventually(lambda: cloud.command("job", "list")[0]["Step"] == "queued", "nobody is at work on it")
    cloud.forget_jobs()


# Once in the usual run, on the cloud that has more time for it.
@pytest.mark.core
@pytest.mark.slow
def test_what_glance_can_read_is_found_out(cloud: Cloud, log: Log) -> None:
    """When nova-compute starts: that it cannot read a scratch image is told, and all is flat then; once its user has
    what 'caps' prints it can, and nothing is left of that."""
    policy = {**FLATTEN["never"]["rbd_snap"], "glance_pool": cloud.images, "reclaim_interval": "5"}
    cloud.configure({"rbd_snap": policy})
    line = log.has("Whether Glance can read images that are not flat is not known")
    assert "nova-rbd-snap caps" in line
    (probe,) = cloud.command("job", "list")
    assert (probe["Kind"], probe["Step"]) == ("probe", "queued")
    image = cloud.snapshot(cloud.boot())
    assert is_flat(cloud, image)
    user = cloud.vms.replace("vms", "glance")
    caps = cloud.ceph.caps(user)
    (told,) = [row for row in cloud.command("caps", "--glance-user", user) if row["User"] == user]
    words = shlex.split(told["Command"])
    assert words[:4] == ["ceph", "auth", "caps", f"client.{user}"]
    printed = dict(zip(words[4::2], words[5::2]))
    assert f"profile rbd-read-only pool={cloud.vms}" in printed["osd"]
    cloud.clean_up.callback(cloud.restart_glance)
    cloud.clean_up.callback(lambda: cloud.ceph.set_caps(user, **caps))
    cloud.ceph.set_caps(user, **printed)
    cloud.restart_glance()
    cloud.command("job", "reclaim", probe["ID"])
    eventually(lambda: cloud.ceph.ledger(cloud.vms) == {}, "it is found out")
    again = cloud.snapshot(cloud.boot())
    assert not is_flat(cloud, again)
    assert [left for left in cloud.admin.image.images(is_hidden=True) if "nova-rbd-snap" in left.name] == []


class Images:
    """Of one server, none of them flat, and what is to be on each."""

    def __init__(self, cloud: Cloud, server: Any) -> None:
        self._cloud, self._server = cloud, server
        self._digests: dict[str, str] = {}

    def take(self) -> None:
        """Another one."""
        digest = self._cloud.disk_digest(self._server)
        image = self._cloud.snapshot(self._server)
        assert not is_flat(self._cloud, image)
        self._digests[image.id] = digest

    def assert_as_before(self) -> None:
        for image_id, digest in self._digests.items():
            assert self._cloud.image_digest(image_id) == digest

    def outlive_the_server(self) -> None:
        """It is deleted, and its disk stays as long as there is one of them."""
        self._cloud.delete_server(self._server)
        self.assert_as_before()
        for image_id in self._digests:
            self._cloud.delete_image(image_id)
        eventually(lambda: not waits(self._cloud, self._server), "the disk is not kept any more")


@pytest.mark.slow
def test_what_else_becomes_of_a_server(cloud: Cloud, log: Log, readers: None) -> None:
    """All that Nova does with a disk works on one that images depend on, and the images stay as they were; in the end
    nothing is left."""
    cloud.configure(FLATTEN["never"])
    server = cloud.boot()
    images = Images(cloud, server)
    compute = cloud.admin.compute
    images.take()
    compute.rescue_server(server)
    cloud.wait_for_status(server, "RESCUE")
    compute.unrescue_server(server)
    cloud.wait_for_status(server, "ACTIVE")
    images.assert_as_before()
    for confirm in (False, True):
        cloud.resize(server, "big")
        images.assert_as_before()
        if confirm:
            compute.confirm_server_resize(server)
        else:
            compute.revert_server_resize(server)
        cloud.wait_for_status(server, "ACTIVE")
        images.assert_as_before()
    images.take()
    cloud.shelve(server)
    images.assert_as_before()
    cloud.unshelve(server)
    images.take()
    base = cloud.image_called("base")
    compute.rebuild_server(server.id, image=base.id)  # to the server itself it would write its state
    cloud.wait_for_status(server, "ACTIVE")
    cloud.write(server, 3)
    images.take()
    images.assert_as_before()
    images.outlive_the_server()
    assert log.ours() == []


@pytest.mark.slow
def test_flavor_and_image_choose(cloud: Cloud, readers: None) -> None:
    """The property of the server's image counts, where it may, and its flavor says nothing."""
    cloud.configure({"rbd_snap": {"flatten_overrides": "flavor,image"}})
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


@pytest.mark.slow
def test_disk_that_stock_nova_left(cloud: Cloud, readers: None) -> None:
    """A host without this project deletes the server, and cannot remove its disk: a sweep lets it go with its image,
    which stays whole; not that of a server that there is."""
    cloud.configure(FLATTEN["never"])
    server, other = cloud.boot(), cloud.boot()
    digest, image = cloud.disk_digest(server), cloud.snapshot(server)
    kept = cloud.snapshot(other)
    cloud.configure({"DEFAULT": {"compute_driver": "libvirt.LibvirtDriver"}})
    cloud.delete_server(server)
    disk = f"{cloud.vms}/{server.id}_disk"
    plan = {row["What"]: row for row in cloud.command("sweep", "--dry-run", "--glance-pool", cloud.images)}
    assert plan[disk]["Action"] == "trash"
    assert f"{cloud.vms}/{other.id}_disk" not in plan
    done = {row["What"]: row for row in cloud.command("sweep", "--glance-pool", cloud.images)}
    assert done[disk]["Action"] == "trashed"
    assert waits(cloud, server)
    assert cloud.image_digest(image.id) == digest
    cloud.delete_image(image.id)
    cloud.configure(FLATTEN["never"])
    cloud.delete_image(kept.id)
    eventually(lambda: not waits(cloud, server), "the disk is not kept any more")
