# SPDX-License-Identifier: Apache-2.0
"""The way 'copy': into an rbd store of Glance's in another cluster, and uploads, of disks in Ceph and in files."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import uuid
from collections.abc import Iterator
from typing import Any, Optional

import pytest
import rados
import rbd
from cloud import MIB, THROUGH_PROXY, Cloud, Log, Options, eventually, run
from test_clone import numbers_in, writing
from test_fallback import NO_POOL

from tests.fakes.glance_proxy import GlanceProxy, Request
from tests.faults import recording

pytestmark = pytest.mark.slow

FAR_CONF = "/etc/ceph16/remote.conf"
GIVEN_UP_SECONDS = 90


def uploads(request: Request) -> bool:
    return request.method == "PUT" and request.path.endswith("/file")


def no_way_to_clone(*, ways: str = "clone,copy") -> Options:
    """Where Nova's own copy, too, is ruled out, so that none of these passes by it."""
    return {"rbd_snap": {**NO_POOL["rbd_snap"], "ways": ways}}


class Far:
    """The other cluster, and the store of Glance's that is in it."""

    def __init__(self, cloud: Cloud) -> None:
        self.pool, self.user = cloud.images, f"nova-{cloud.release}"
        self.options = {
            "glance_ceph_conf": FAR_CONF, "glance_rbd_user": self.user, "glance_pool": self.pool, "ways": "clone,copy"
        }  # fmt: skip
        self._rados = rados.Rados(rados_id="admin", conffile=FAR_CONF)
        self._rados.connect()

    def names(self) -> list[str]:
        with self._rados.open_ioctx(self.pool) as ioctx:
            return list(rbd.RBD().list(ioctx))

    @contextlib.contextmanager
    def image(self, name: str) -> Iterator[Any]:
        with self._rados.open_ioctx(self.pool) as ioctx, rbd.Image(ioctx, name, "snap", read_only=True) as opened:
            yield opened

    def caps(self, osd: Optional[str] = None) -> str:
        """What Nova's user may do there; it is given *osd* first."""
        if osd is not None:
            words = ["--conf", FAR_CONF, "auth", "caps", f"client.{self.user}", "mon", "profile rbd", "osd", osd]
            run("ceph", *words)
        text = run("ceph", "--conf", FAR_CONF, "auth", "get", f"client.{self.user}")
        return str(re.search(r'caps osd = "(.*)"', text)[1])


@pytest.fixture(scope="module")
def far(whole_cloud: Cloud) -> Far:
    return Far(whole_cloud)


@pytest.fixture
def far_store(cloud: Cloud, far: Far) -> Far:
    """Glance has a store there."""
    store = {"rbd_store_pool": far.pool, "rbd_store_user": f"glance-{cloud.release}", "rbd_store_ceph_conf": FAR_CONF}
    cloud.configure_glance({"DEFAULT": {"enabled_backends": "ceph:rbd, ec:rbd, file:file, far:rbd"}, "far": store})
    return far


def downloaded(cloud: Cloud, image_id: str) -> bytes:
    """The image's data as Glance gives it."""
    return bytes(cloud.admin.image.download_image(image_id).content)


def content(cloud: Cloud, server: Any) -> bytes:
    with cloud.ceph.image(cloud.vms, f"{server.id}_disk") as disk:
        return bytes(disk.read(0, disk.size()))


@contextlib.contextmanager
def left_as_it_was(cloud: Cloud, server: Any) -> Iterator[None]:
    """The server and its disk, the ledger, and the local disk."""
    about, before = cloud.ceph.about(cloud.vms, f"{server.id}_disk"), cloud.local_copies()
    interruptions = cloud.guests.interruptions(server.id)
    yield
    assert cloud.ceph.about(cloud.vms, f"{server.id}_disk") == about
    assert cloud.ceph.ledger(cloud.vms) == {}
    assert cloud.guests.interruptions(server.id) == interruptions
    assert cloud.local_copies() == before


# -- into another cluster ------------------------------------------------------------------------------------------


def test_into_another_cluster(cloud: Cloud, server: Any, far_store: Far, log: Log) -> None:
    """Only what is allocated is written there; it is sealed and registered as a clone is, and can be booted."""
    cloud.configure({"rbd_snap": far_store.options})
    with left_as_it_was(cloud, server):
        image = cloud.snapshot(server)
    assert log.lines(f"Snapshot to image {image.id}: copied into store 'glance' in")
    assert log.ours() == log.lines("will not clone")
    assert (image.disk_format, image.container_format) == ("raw", "bare")
    with far_store.image(image.id) as opened, cloud.ceph.image(cloud.vms, f"{server.id}_disk") as disk:
        assert (opened.size(), opened.is_protected_snap("snap")) == (disk.size(), True)
        written: list[int] = []
        opened.diff_iterate(0, opened.size(), None, lambda o, n, e: written.append(n), whole_object=False)
        allocated: list[int] = []
        disk.diff_iterate(0, disk.size(), None, lambda o, n, e: allocated.append(n), True, False)
    assert sum(written) <= sum(allocated) * 1.02
    again = cloud.boot(image.id, data=False)
    assert cloud.disk_digest(again) == cloud.disk_digest(server)
    cloud.delete_image(image.id)
    assert image.id not in far_store.names()


def test_further_stores(cloud: Cloud, server: Any, far_store: Far, log: Log) -> None:
    """They are tried one after the other, by name."""
    here = {"ceph_conf": "/etc/ceph/ceph.conf", "rbd_user": far_store.user, "pool": "not-there"}
    there = {"ceph_conf": FAR_CONF, "rbd_user": far_store.user, "pool": far_store.pool}
    stores = {"rbd_snap_store_here": here, "rbd_snap_store_there": there}
    cloud.configure(no_way_to_clone(), {"rbd_snap": {"glance_stores": "here, there"}, **stores})
    with left_as_it_was(cloud, server):
        image = cloud.snapshot(server)
    assert "has no pool 'not-there'" in log.has("cannot be copied into store 'here'")
    assert log.lines(f"Snapshot to image {image.id}: copied into store 'there'")
    assert image.id in far_store.names()


def test_no_right_to_write_there(cloud: Cloud, server: Any, far_store: Far, log: Log) -> None:
    """What cannot be written to is uploaded to, and the right that is missing is named."""
    before, names = far_store.caps(), far_store.names()
    far_store.caps(before.replace("profile rbd ", "profile rbd-read-only "))
    try:
        cloud.configure({"rbd_snap": far_store.options})
        cloud.kill_engine()
        with left_as_it_was(cloud, server):
            image = cloud.snapshot(server)
    finally:
        far_store.caps(before)
        cloud.kill_engine()
    assert "profile rbd" in log.has("cannot be copied into store 'glance'")
    assert log.lines(f"Snapshot to image {image.id}: uploaded in")
    assert cloud.image_digest(image.id) == cloud.disk_digest(server)
    assert far_store.names() == names


def test_no_such_store_at_glance(cloud: Cloud, server: Any, far: Far, log: Log) -> None:
    """Glance refuses a location in a cluster that it does not know: what was copied there is removed."""
    cloud.configure({"rbd_snap": far.options})
    names = far.names()
    with left_as_it_was(cloud, server):
        image = cloud.snapshot(server)
    assert "step 'register'" in log.has("cannot be copied into store 'glance'")
    assert log.lines(f"Snapshot to image {image.id}: uploaded in")
    assert far.names() == names


@pytest.mark.disturbs
def test_other_cluster_is_down(cloud: Cloud, server: Any, far_store: Far, log: Log) -> None:
    """The image is made another way, soon enough; nothing is left there once it is back."""
    cloud.configure({"rbd_snap": {**far_store.options, "operation_timeout": 5}})
    names = far_store.names()
    run("docker", "pause", "nova-rbd-snap-ceph16")
    try:
        with left_as_it_was(cloud, server):
            image = cloud.snapshot(server)
    finally:
        run("docker", "unpause", "nova-rbd-snap-ceph16")
    assert log.lines("cannot be copied into store 'glance'")
    assert log.lines(f"Snapshot to image {image.id}: uploaded in")
    eventually(lambda: far_store.names() == names, "nothing is left there")


# -- uploads -------------------------------------------------------------------------------------------------------


def test_upload_of_one_instant(cloud: Cloud, server: Any, log: Log) -> None:
    """It shows the disk at one instant, and the guest goes on writing; as raw, for Glance's store is an rbd one."""
    cloud.configure(no_way_to_clone())
    with left_as_it_was(cloud, server), writing(cloud, server):
        image = cloud.snapshot(server)
    first, last = numbers_in(cloud, image)
    assert first > 0
    assert first - last in (0, 1)
    assert log.lines(f"Snapshot to image {image.id}: uploaded in .* bytes as raw")
    assert (image.disk_format, image.container_format) == ("raw", "bare")


@pytest.mark.parametrize("state", ["paused", "stopped"])
def test_guest_is_left_in_its_state(cloud: Cloud, state: str) -> None:
    cloud.configure(no_way_to_clone())
    server = getattr(cloud, state)(cloud.boot())
    before = cloud.guests.state(server.id)
    with left_as_it_was(cloud, server):
        image = cloud.snapshot(server)
    assert cloud.image_digest(image.id) == cloud.disk_digest(server)
    assert cloud.guests.state(server.id) == before


@pytest.mark.parametrize("told_by", ["format", "option", "store"])
def test_qcow2(cloud: Cloud, server: Any, told_by: str, log: Log) -> None:
    """Where Nova's option asks for it, or ours, or Glance keeps images in files; only what is allocated is sent."""
    asked: dict[str, Options] = {
        "format": {"libvirt": {"snapshot_image_format": "qcow2"}, "rbd_snap": {"ways": "clone,copy"}},
        "option": {"rbd_snap": {"copy_format": "qcow2"}},
        "store": {},
    }
    if told_by == "store":
        server = cloud.boot_flat()  # else its parent would tell that Glance's images are in Ceph
        cloud.configure_glance({"glance_store": {"default_backend": "file"}})
    cloud.configure(no_way_to_clone(), asked[told_by])
    log = Log()
    with left_as_it_was(cloud, server):
        image = cloud.snapshot(server)
    assert (image.disk_format, image.container_format) == ("qcow2", "bare")
    sent, allocated = map(int, re.search(r"(\d+) bytes as qcow2 for (\d+)", log.has("uploaded in")).groups())
    assert sent <= allocated * 1.02 + MIB
    again = cloud.boot(image.id, data=False)
    assert cloud.disk_digest(again) == cloud.disk_digest(server)


@pytest.mark.parametrize("how", ["backup", "shelve"])
def test_others_that_make_images(cloud: Cloud, how: str, log: Log) -> None:
    cloud.configure(no_way_to_clone())
    server = cloud.boot()
    digest = cloud.disk_digest(server)
    image = getattr(cloud, how)(server)
    assert cloud.image_digest(image.id) == digest
    assert log.lines(f"Snapshot to image {image.id}: uploaded in")


@pytest.mark.parametrize("cut", [1, 3 * MIB, 200 * MIB])
def test_connection_is_lost(cloud: Cloud, server: Any, proxy: GlanceProxy, log: Log, cut: int) -> None:
    """The upload is begun again."""
    cloud.configure(no_way_to_clone(), THROUGH_PROXY)
    proxy.break_(uploads, cut=cut, times=2)
    with left_as_it_was(cloud, server):
        image = cloud.snapshot(server)
    assert len(proxy.seen) == 2
    assert len(log.lines(f"The upload to image {image.id} was broken off")) == 2
    assert cloud.image_digest(image.id) == cloud.disk_digest(server)


def test_connection_is_lost_each_time(cloud: Cloud, server: Any, proxy: GlanceProxy, log: Log) -> None:
    """The request fails, and nothing is left."""
    cloud.configure(no_way_to_clone(), THROUGH_PROXY, {"rbd_snap": {"copy_attempts": 2}})
    before = cloud.picture()
    proxy.break_(uploads, cut=5 * MIB)
    cloud.failed_snapshot(server, cloud.request(server))
    cloud.unchanged(before)
    assert len(proxy.seen) == 2
    assert "broken off each time" in log.has("ERROR nova_rbd_snap.*Snapshot to image .* failed")


@pytest.mark.parametrize("asked", [True, False])
def test_answer_is_lost(cloud: Cloud, server: Any, proxy: GlanceProxy, asked: bool) -> None:
    """Whether or not Glance has got the data: the record tells."""
    cloud.configure(no_way_to_clone(), THROUGH_PROXY)
    proxy.break_(uploads, asked=asked, times=1)
    with left_as_it_was(cloud, server):
        image = cloud.snapshot(server)
    assert cloud.image_digest(image.id) == cloud.disk_digest(server)


def test_last_way_is_still_there(cloud: Cloud, server: Any, proxy: GlanceProxy, log: Log) -> None:
    """Nova's own copy is made once both others failed."""
    cloud.configure(no_way_to_clone(ways="clone,copy,nova"), THROUGH_PROXY)
    proxy.break_(uploads, status=400, times=1)
    with left_as_it_was(cloud, server):
        image = cloud.snapshot(server)
    assert cloud.image_digest(image.id) == cloud.disk_digest(server)
    assert log.lines(f"Snapshot to image {image.id}: copied in full by Nova")
    assert log.lines("the way 'clone' failed")
    assert log.lines("the way 'copy' failed")


@contextlib.contextmanager
def upload_held(cloud: Cloud, server: Any, proxy: GlanceProxy) -> Iterator[str]:
    """Within the block an upload is under way and does not go on; the image's id."""
    proxy.break_(uploads, held=True)
    image_id = cloud.request(server)
    eventually(lambda: proxy.hits, "an upload is under way")
    try:
        yield image_id
    finally:
        proxy.behave()


def test_server_is_deleted_meanwhile(cloud: Cloud, proxy: GlanceProxy) -> None:
    """The deletion wins, and nothing is left."""
    cloud.configure(no_way_to_clone(), THROUGH_PROXY)
    before = cloud.picture()
    server = cloud.boot()
    with upload_held(cloud, server, proxy) as image_id:
        cloud.admin.compute.delete_server(server.id, force=False)
        eventually(lambda: cloud.is_gone(server), "the server is gone", GIVEN_UP_SECONDS)
    eventually(lambda: cloud.image(image_id) is None, "the image record is deleted", GIVEN_UP_SECONDS)
    cloud.unchanged(before)


@pytest.mark.parametrize("victim", ["engine", "both", "nova-compute"])
def test_killed_meanwhile(cloud: Cloud, server: Any, proxy: GlanceProxy, victim: str, found: recording.Cell) -> None:
    """Where nova-compute lives the next engine sends it anew; else nothing is left, the record neither."""
    cloud.configure(no_way_to_clone(), THROUGH_PROXY)
    found.kill = True
    before = cloud.picture()
    # One that had an upload on its hands ends once the connection is given up.
    eventually(lambda: len(cloud.engines()) <= 1, "the engine before it has ended", GIVEN_UP_SECONDS)
    with upload_held(cloud, server, proxy) as image_id:
        log, nova_compute, (engine,) = Log(), cloud.nova_compute, cloud.engines()
        for pid in {"engine": [engine], "nova-compute": [nova_compute], "both": [nova_compute, engine]}[victim]:
            os.kill(pid, signal.SIGKILL)
    if victim == "engine":
        cloud.settled(server)
        assert cloud.image_digest(image_id) == cloud.disk_digest(server)
        cloud.delete_image(image_id)
    else:
        cloud.nova_compute_is_back(log)
        eventually(lambda: cloud.image(image_id) is None, "the image record is deleted", GIVEN_UP_SECONDS)
    cloud.unchanged(before, GIVEN_UP_SECONDS)


def test_token_expires_meanwhile(cloud: Cloud, server: Any, proxy: GlanceProxy) -> None:
    """Glance, Keystone and the service token see to it that the image is made all the same."""
    with cloud.short_tokens():
        cloud.configure(no_way_to_clone(), THROUGH_PROXY, {"rbd_snap": {"copy_bandwidth": 64}})
        image = cloud.snapshot(server)
    assert cloud.image_digest(image.id) == cloud.disk_digest(server)


def test_progress_is_shown(cloud: Cloud, log: Log) -> None:
    """To the server's owner, in the log, and in the list of jobs."""
    cloud.configure(no_way_to_clone(), {"rbd_snap": {"copy_bandwidth": 32}})
    server = cloud.boot()
    image_id = cloud.request(server)
    eventually(lambda: cloud.server(server).progress not in (0, None, 100), "the server tells of progress")
    assert re.search(r"\d+ % \(\d+ of \d+ MiB\)", log.has("Uploading .*%"))
    (job,) = cloud.command("job", "list")
    assert (job["ID"], job["Percent"] > 0) == (f"{image_id}-copy", True)
    cloud.settled(server)
    assert cloud.image(image_id).status == "active"


def test_token_is_nowhere_to_be_seen(cloud: Cloud, server: Any, proxy: GlanceProxy, log: Log) -> None:
    """Neither on a command line, nor in the log, nor in a file of the engine's."""
    cloud.configure(no_way_to_clone(), THROUGH_PROXY, {"DEFAULT": {"debug": "true"}})
    token = cloud.demo.auth_token
    with upload_held(cloud, server, proxy):
        (engine,) = cloud.engines()
        for name in ("cmdline", "environ"):
            assert token.encode() not in pathlib.Path(f"/proc/{engine}/{name}").read_bytes()
        assert not log.lines(re.escape(token))
        for entry in pathlib.Path(f"/proc/{engine}/fd").iterdir():
            with contextlib.suppress(OSError):
                target = os.readlink(entry)
                assert not target.startswith("/tmp"), target


# -- disks in files ------------------------------------------------------------------------------------------------


@pytest.fixture
def on_file(cloud: Cloud) -> Iterator[None]:
    """Nova keeps disks in files meanwhile."""
    yield
    cloud.configure()


@pytest.mark.usefixtures("on_file")
@pytest.mark.parametrize("images_type", ["qcow2", "raw"])
def test_disk_in_a_file(cloud: Cloud, images_type: str, log: Log) -> None:
    """Of a server that is off: with what it is based on, allocated bytes only, and without a file on the local disk."""
    cloud.configure({"libvirt": {"images_type": images_type}, "rbd_snap": {"ways": "copy", "copy_format": "qcow2"}})
    server = cloud.boot(data=False)
    server = cloud.stopped(server)
    path = disk_file(server)
    written = uuid.uuid4().int % 200 + 1
    run("qemu-io", "-f", images_type, "-c", f"write -P {written} 100M 3M", path)
    before = cloud.local_copies()
    image = cloud.snapshot(server)
    assert log.lines(f"Snapshot to image {image.id}: uploaded in .* as qcow2")
    assert image.disk_format == "qcow2"
    assert cloud.local_copies() == before
    target = pathlib.Path(f"/tmp/{image.id}")
    try:
        target.write_bytes(downloaded(cloud, image.id))
        subprocess.run(["qemu-img", "check", "-q", target], check=True)
        subprocess.run(["qemu-img", "compare", "-q", "-F", images_type, "-f", "qcow2", target, path], check=True)
    finally:
        target.unlink(missing_ok=True)


def disk_file(server: Any) -> str:
    return f"/var/lib/nova/instances/{server.id}/disk"
