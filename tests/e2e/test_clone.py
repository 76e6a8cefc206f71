# SPDX-License-Identifier: Apache-2.0
"""The clone way: which image a snapshot ends in, from every kind of disk, guest and Glance."""

from __future__ import annotations

import contextlib
import json
import struct
import threading
from collections.abc import Iterator
from typing import Any, Optional

import pytest
import rbd
from cloud import GIB, MIB, PREFIX, SNAPSHOTS, THROUGH_PROXY, Cloud, Log, Options, eventually, run

from tests.fakes.glance_proxy import GlanceProxy

UNTRUSTED = {"service_user": {"send_service_user_token": "false"}}


def assert_cloned(cloud: Cloud, log: Log, server: Any, image: Any, pool: Optional[str] = None) -> None:
    """*image* is what the clone way makes of the disk of *server*, and nothing else is left of its making."""
    pool = pool or cloud.images
    (line,) = log.lines(f"Snapshot to image {image.id}")
    assert "cloned in" in line
    assert log.ours() == []
    assert image.locations[0]["url"] == f"rbd://{cloud.ceph.fsid}/{pool}/{image.id}/snap"
    assert (image.disk_format, image.container_format) == ("raw", "bare")
    with cloud.ceph.image(pool, image.id) as opened:
        assert [snap["name"] for snap in opened.list_snaps()] == ["snap"]
        assert opened.is_protected_snap("snap")
        assert opened.features() & rbd.RBD_FEATURE_DEEP_FLATTEN
        assert cloud.ceph.parent(opened) is None
    with cloud.ceph.image(pool, image.id, "snap") as opened:
        assert cloud.ceph.parent(opened) is None
    with cloud.ceph.image(cloud.vms, f"{server.id}_disk") as disk:
        assert list(disk.list_snaps()) == []
    assert cloud.ceph.ledger(cloud.vms) == {}


def assert_boots_alike(cloud: Cloud, image: Any, digest: str) -> None:
    """A new server boots from the snapshot and starts with the same bytes."""
    again = cloud.boot(image.id, data=False)
    assert cloud.disk_digest(again) == digest


@pytest.mark.parametrize(
    ("state", "base"),
    [
        pytest.param("running", "base", marks=pytest.mark.core),
        ("paused", "base"),
        ("stopped", "base"),
        ("running", "base-ami"),
    ],
)
def test_guest_in_every_state(cloud: Cloud, log: Log, state: str, base: str) -> None:
    """Whatever the guest does, it is not touched; the image has the disk's bytes and a new server boots from it."""
    cloud.configure()
    server = cloud.boot(base)
    if state != "running":
        server = getattr(cloud, state)(server)
    digest, interruptions = cloud.disk_digest(server), cloud.guests.interruptions(server.id)
    local_files = SNAPSHOTS.stat().st_mtime_ns

    image = cloud.snapshot(server)

    assert cloud.guests.interruptions(server.id) == interruptions
    assert SNAPSHOTS.stat().st_mtime_ns == local_files
    assert cloud.image_digest(image.id) == digest
    assert_cloned(cloud, log, server, image)
    assert_boots_alike(cloud, image, digest)


@contextlib.contextmanager
def writing(cloud: Cloud, server: Any) -> Iterator[None]:
    """Meanwhile the disk is written to without a pause: a number at its begin, then the same at its end."""
    stop = threading.Event()

    def write() -> None:
        with cloud.ceph.image(cloud.vms, f"{server.id}_disk") as disk:
            number = 0
            while not stop.is_set():
                number += 1
                for offset in (MIB, disk.size() - MIB):
                    disk.write(struct.pack(">Q", number), offset)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def numbers_in(cloud: Cloud, image: Any) -> tuple[int, int]:
    """The two numbers of :func:`writing` that the image shows."""
    with cloud.ceph.image(cloud.images, image.id, "snap") as opened:
        first, last = (struct.unpack(">Q", opened.read(at, 8))[0] for at in (MIB, opened.size() - MIB))
        return first, last


def test_one_instant(cloud: Cloud, server: Any, log: Log) -> None:
    """The image shows the disk at one instant, though it is written to all the time."""
    cloud.configure()
    with writing(cloud, server):
        image = cloud.snapshot(server)
    first, last = numbers_in(cloud, image)
    assert first > 0
    assert first - last in (0, 1)
    assert_cloned(cloud, log, server, image)


@pytest.mark.core
def test_shelve_and_unshelve(cloud: Cloud, log: Log) -> None:
    """Shelving clones, the unshelved server has its bytes back, and its disk, now without a parent, clones as well."""
    cloud.configure()
    server = cloud.boot()
    digest = cloud.disk_digest(server)
    shelved = cloud.shelve(server)
    assert cloud.image_digest(shelved.id) == digest
    assert "cloned in" in log.has(f"Snapshot to image {shelved.id}")

    cloud.unshelve(server)
    assert cloud.disk_digest(server) == digest
    with cloud.ceph.image(cloud.vms, f"{server.id}_disk") as disk:
        assert cloud.ceph.parent(disk) is None
    image = cloud.snapshot(server)
    assert cloud.image_digest(image.id) == digest
    assert_cloned(cloud, log, server, image)


def test_flattened_disk(cloud: Cloud, log: Log) -> None:
    """A disk whose link to its base image was cut goes where the base image is."""
    cloud.configure()
    server = cloud.boot_flat()
    digest = cloud.disk_digest(server)
    image = cloud.snapshot(server)
    assert cloud.image_digest(image.id) == digest
    assert_cloned(cloud, log, server, image)


def test_backup(cloud: Cloud, server: Any, log: Log) -> None:
    """A backup clones and carries what rotation needs; the next one replaces it."""
    cloud.configure()
    digest = cloud.disk_digest(server)
    first = cloud.backup(server)
    assert cloud.image_digest(first.id) == digest
    assert first.properties["backup_type"] == "daily"
    assert_cloned(cloud, log, server, first)
    second = cloud.backup(server)
    assert second.status == "active"
    eventually(lambda: cloud.image(first.id) is None, "the first backup is rotated out")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("schnappschuß 快照 ñandú", id="unicode"),
        pytest.param("""it's a "name" `with` $(quotes) %s {0} \\ <&>""", id="quotes", marks=pytest.mark.slow),
        pytest.param("../../etc/passwd @snap#1?a=b", id="slashes"),
        pytest.param("n" * 255, id="long", marks=pytest.mark.slow),
    ],
)
def test_names(cloud: Cloud, log: Log, name: str) -> None:
    """Names of servers and images are the tenant's own business, whatever they hold."""
    cloud.configure()
    server = cloud.boot(name=name)
    image = cloud.snapshot(server, name)
    assert image.name == name
    assert_cloned(cloud, log, server, image)


def test_huge_thin_disk(cloud: Cloud, log: Log) -> None:
    """Of a disk of 1 TiB only what was written counts: the image is as thin, and made in seconds."""
    cloud.configure()
    server = cloud.boot(data=False)
    with cloud.ceph.image(cloud.vms, f"{server.id}_disk") as disk:
        disk.resize(1024 * GIB)  # Placement has no room for a flavor of this size
    cloud.write(server, 15, step=65 * GIB + 5 * MIB)
    digest = cloud.disk_digest(server)
    image = cloud.snapshot(server)
    assert image.size == 1024 * GIB
    assert cloud.image_digest(image.id) == digest
    used = json.loads(run("rbd", "du", "--format", "json", f"{cloud.images}/{image.id}@snap"))["images"]
    assert sum(entry["used_size"] for entry in used) < 300 * MIB
    assert_cloned(cloud, log, server, image)


def test_properties_are_kept(cloud: Cloud, server: Any, log: Log) -> None:
    """The image has what the tenant asked for, what the base image handed down, and what Nova says of its origin."""
    cloud.configure()
    asked = cloud.demo.compute.create_server_image(server, f"{PREFIX}properties", {"colour": "green", "empty": ""})
    cloud.clean_up.callback(cloud.delete_image, asked.id)
    cloud.settled(server)
    found = cloud.record(asked.id)
    assert found["colour"] == "green"
    assert found["base_image_ref"] == cloud.image_called("base").id
    assert (found["image_location"], found["image_state"]) == ("snapshot", "available")
    assert found["instance_uuid"] == server.id
    assert (found["min_disk"], found["size"]) == (1, GIB)
    assert_cloned(cloud, log, server, cloud.image(asked.id))


def test_image_that_glance_hashes(cloud: Cloud, server: Any, log: Log) -> None:
    """Glance as it comes reads each new image to hash it: the image is active before, and has its hash in the end."""
    cloud.configure()
    cloud.configure_glance({"DEFAULT": {"do_secure_hash": "true"}})
    image = cloud.snapshot(server)
    assert_cloned(cloud, log, server, image)
    eventually(lambda: cloud.image(image.id).hash_value, "Glance has hashed the image")


@pytest.mark.parametrize("glance", [pytest.param("shows", marks=pytest.mark.slow), "hides"])
def test_post_locations(cloud: Cloud, server: Any, log: Log, glance: str) -> None:
    """With a service token the location goes the new way, whether or not Glance shows locations to tenants."""
    cloud.configure()
    shown = {"show_multiple_locations": glance == "shows"}
    cloud.configure_glance({"DEFAULT": {**shown, "show_image_direct_url": glance == "shows"}})
    # Nova cannot clone what Glance hides: such a disk is a copy of the base image, without a parent.
    cloud.configure({"rbd_snap": {"glance_pool": cloud.images}})
    digest = cloud.disk_digest(server)
    image = cloud.snapshot(server)
    assert cloud.image_digest(image.id) == digest
    cloud.configure_glance()
    assert_cloned(cloud, log, server, cloud.image(image.id))


@pytest.mark.disturbs
def test_erasure_coded_destination(cloud: Cloud, server: Any, log: Log) -> None:
    """In a pool whose data lies in an erasure-coded one the clone's does, too; Glance knows it by its store."""
    cloud.configure({"rbd_snap": {"glance_pool": cloud.images_ec}})
    digest = cloud.disk_digest(server)
    image = cloud.snapshot(server)
    assert cloud.image_digest(image.id, cloud.images_ec) == digest
    with cloud.ceph.image(cloud.images_ec, image.id) as opened:
        assert cloud.ceph.rados.pool_reverse_lookup(opened.data_pool_id()) == "images-ec-data"
    assert cloud.record(image.id)["stores"] == "ec"
    assert_cloned(cloud, log, server, image, cloud.images_ec)
    assert_boots_alike(cloud, image, digest)


@pytest.mark.disturbs
def test_data_pool_of_choice(cloud: Cloud, server: Any, log: Log) -> None:
    """[rbd_snap] glance_data_pool decides where the clone's data lies."""
    cloud.configure({"rbd_snap": {"glance_data_pool": "images-ec-data"}})
    digest = cloud.disk_digest(server)
    image = cloud.snapshot(server)
    assert cloud.image_digest(image.id) == digest
    with cloud.ceph.image(cloud.images, image.id) as opened:
        assert cloud.ceph.rados.pool_reverse_lookup(opened.data_pool_id()) == "images-ec-data"
    assert_cloned(cloud, log, server, image)


@pytest.mark.disturbs
def test_pool_of_a_store(cloud: Cloud, log: Log) -> None:
    """A disk without a parent goes where [libvirt] images_rbd_glance_store_name says, if Glance tells who asks."""
    cloud.configure({"libvirt": {"images_rbd_glance_store_name": "ec"}})
    server = cloud.boot_flat()
    digest = cloud.disk_digest(server)
    asked_by_admin = cloud.admin.compute.create_server_image(server, f"{PREFIX}by-admin")
    cloud.clean_up.callback(cloud.delete_image, asked_by_admin.id)
    cloud.settled(server)
    assert cloud.image_digest(asked_by_admin.id, cloud.images_ec) == digest
    assert_cloned(cloud, log, server, cloud.image(asked_by_admin.id), cloud.images_ec)
    # Glance tells nobody else; then the base image's pool is as good.
    assert_cloned(cloud, log, server, cloud.snapshot(server))


def test_clone_format_1(cloud: Cloud, server: Any, log: Log) -> None:
    """The older format of clones yields the same image, and frees the protected snapshot of the disk."""
    cloud.configure({"rbd_snap": {"clone_format": 1}})
    digest = cloud.disk_digest(server)
    image = cloud.snapshot(server)
    assert cloud.image_digest(image.id) == digest
    assert_cloned(cloud, log, server, image)
    assert_boots_alike(cloud, image, digest)


@pytest.mark.core
def test_patch_location(cloud: Cloud, server: Any, log: Log) -> None:
    """Without a service token Glance refuses the new way, and the old one is taken."""
    cloud.configure(UNTRUSTED)
    digest = cloud.disk_digest(server)
    image = cloud.snapshot(server)
    assert cloud.image_digest(image.id) == digest
    assert_cloned(cloud, log, server, image)


#: Nova's own driver, but for the class of its disks.
RBD_ALONE = """
from nova.virt.libvirt import driver

from nova_rbd_snap.openstack import imagebackend


class LibvirtDriver(driver.LibvirtDriver):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.image_backend.BACKEND["rbd"] = imagebackend.Rbd
"""


@pytest.fixture(scope="module")
def rbd_alone(whole_cloud: Cloud) -> Iterator[Options]:
    """What makes nova-compute run with Nova's own driver and our Rbd class."""
    with whole_cloud.stand_in_driver("rbd_alone", RBD_ALONE) as options:
        yield options


def test_rbd_class_alone(cloud: Cloud, server: Any, rbd_alone: Options) -> None:
    """Nova's own driver registers what our class clones; that the job is over shows in Glance's record."""
    cloud.configure(rbd_alone)
    digest, interruptions = cloud.disk_digest(server), cloud.guests.interruptions(server.id)
    image_id = cloud.request(server)
    cloud.settled(server)
    eventually(lambda: cloud.image(image_id).status == "active", "the image is active")
    assert cloud.image_digest(image_id) == digest
    assert cloud.guests.interruptions(server.id) == interruptions
    eventually(lambda: cloud.ceph.ledger(cloud.vms) == {}, "the engine closed the job")
    assert cloud.image_digest(image_id) == digest


def test_rbd_class_alone_is_refused(
    cloud: Cloud, server: Any, proxy: GlanceProxy, log: Log, rbd_alone: Options
) -> None:
    """What Glance does not take is removed when Nova tells our class so; the request then fails, as Nova's do."""
    cloud.configure(rbd_alone, THROUGH_PROXY, {"rbd_snap": {"operation_timeout": 10}})
    before = cloud.picture()
    proxy.break_(lambda request: request.registers, status=403)
    cloud.failed_snapshot(server, cloud.request(server))
    assert proxy.seen
    cloud.unchanged(before)
    assert not log.lines("Kept rbd://")
