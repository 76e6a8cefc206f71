# SPDX-License-Identifier: Apache-2.0
"""Servers that move to another compute host: for theirs loses its power amid a snapshot, or with images on their disk.

The other host is a container with its own libvirtd, QEMU and nova-compute, in the network of the cloud's container.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from breakpoints import AMID_FLATTEN
from cloud import NOVA_CONF, Cloud, Log, eventually, run
from test_deaths import DEAD_CLIENT_SECONDS
from test_flatten import FLATTEN, Images
from test_qemu import qemu_of

OTHER = "other-host"
#: Containers that share a network share their host name, too; Placement wants one for each.
DRIVER = f"""
from nova.virt.libvirt import host

host.Host.get_hostname = lambda self: "{OTHER}"
from nova_rbd_snap.openstack.driver import LibvirtDriver
"""
OPTIONS = f"""
[DEFAULT]
host = {OTHER}
compute_driver = other_host.LibvirtDriver
"""


class OtherHost:
    """A second compute host of the cloud."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud
        ours = socket.gethostname()
        self._container = f"{ours}-{OTHER}"
        run(
            # Nobody else would bury QEMU, and libvirt wait for it.
            "docker", "run", "-d", "--init", "--name", self._container,
            "--network", f"container:{ours}", "--volumes-from", ours,
            "-e", f"CLOUD={cloud.release}", "-e", f"OPTIONS={NOVA_CONF.read_text()}{OPTIONS}", "-e", f"DRIVER={DRIVER}",
            run("docker", "inspect", "-f", "{{.Config.Image}}", ours).strip(),
            "sh", "/src/tests/e2e/other_host.sh",
        )  # fmt: skip
        cloud.clean_up.callback(self._end)
        eventually(self._has_reported, "the other host has reported to Placement", 120)
        nova = pathlib.Path(f"/proc/{cloud.nova_compute}/cmdline").read_text().split("\0")[1]
        run(str(pathlib.Path(nova).with_name("nova-manage")), "cell_v2", "discover_hosts")

    def _has_reported(self) -> bool:
        placement = self._cloud.admin.placement
        provider = next((it for it in placement.resource_providers() if it.name == OTHER), None)
        return provider is not None and any(placement.resource_provider_inventories(provider))

    def runs(self, server: Any) -> bool:
        """Whether the guest runs there."""
        return server.id in run("docker", "exec", self._container, "virsh", "list", "--uuid", "--state-running")

    def _end(self) -> None:
        """Its servers must be gone by then."""
        run("docker", "rm", "-f", "-v", self._container)
        for service in services_of(self._cloud, OTHER):
            self._cloud.admin.compute.delete_service(service)


def services_of(cloud: Cloud, host: str) -> list[Any]:
    """Its nova-compute, if it has ever reported."""
    return [it for it in cloud.admin.compute.services(binary="nova-compute") if it.host == host]


@contextlib.contextmanager
def no_power(cloud: Cloud, server: Any) -> Iterator[None]:
    """Within the block all is dead that ran on the cloud's own host, and the cloud knows."""
    host, nova_compute, (engine,) = server.compute_host, cloud.nova_compute, cloud.engines()
    try:
        os.kill(nova_compute, signal.SIGSTOP)  # killed it would be started again at once
        os.kill(engine, signal.SIGKILL)
        os.kill(qemu_of(server), signal.SIGKILL)
        _force_down(cloud, host, True)
        yield
    finally:
        log = Log()
        os.kill(nova_compute, signal.SIGKILL)
        # By then it knows of the evacuation; sooner, Nova does not take it back.
        log.has("Looking for unclaimed instances")
        _force_down(cloud, host, False)
        cloud.nova_compute_is_back(log)


def _force_down(cloud: Cloud, host: str, is_down: bool) -> None:
    (service,) = services_of(cloud, host)
    cloud.admin.compute.update_service_forced_down(service, host, "nova-compute", is_down)


def evacuate(cloud: Cloud, server: Any) -> None:
    """Until it runs on the other host."""
    # Later versions leave it stopped.
    answer = cloud.admin.compute.post(f"/servers/{server.id}/action", json={"evacuate": {}}, microversion="2.14")
    assert answer.ok, answer.text

    def has_come() -> bool:
        now = cloud.server(server)
        assert now.status != "ERROR", now.fault
        return bool((now.compute_host, now.status, now.task_state) == (OTHER, "ACTIVE", None))

    eventually(has_come, f"server {server.id} is evacuated", 120)


@pytest.mark.slow
@pytest.mark.parametrize("returns", [True, False])
def test_evacuated_amid_a_snapshot(cloud: Cloud, held_at: Any, returns: bool) -> None:
    """The server goes on elsewhere with its disk, and is snapshotted there. What its old host was at is left alone
    until that returns, which touches nothing else of the server's; or until the server is deleted."""
    server = cloud.boot()
    before, digest = cloud.picture(), cloud.disk_digest(server)
    other = OtherHost(cloud)
    cloud.clean_up.callback(cloud.delete_server, server)
    image_id = held_at(server, AMID_FLATTEN)
    with no_power(cloud, server):
        held_at.go_on()
        evacuate(cloud, server)
        assert cloud.disk_digest(server) == digest
        image = cloud.snapshot(server)
        assert cloud.image_digest(image.id) == digest
        assert list(cloud.ceph.ledger(cloud.vms)) == [image_id]
        cloud.delete_image(image.id)
        if not returns:
            cloud.delete_server(server)
            assert_nothing_left(cloud, image_id)
    assert_nothing_left(cloud, image_id)
    if returns:
        cloud.unchanged(before)
        assert cloud.server(server).status == "ACTIVE"
        assert other.runs(server)
        assert cloud.disk_digest(server) == digest


@pytest.mark.slow
def test_moves_with_images_that_need_its_disk(cloud: Cloud, log: Log, readers: None) -> None:
    """Evacuated and migrated back a server has its disk, and the images of it stay as they were."""
    cloud.configure(FLATTEN["never"])
    server = cloud.boot()
    digest, images = cloud.disk_digest(server), Images(cloud, server)
    images.take()
    other = OtherHost(cloud)
    cloud.clean_up.callback(cloud.delete_server, server)
    with no_power(cloud, server):
        evacuate(cloud, server)
        images.take()
    cloud.admin.compute.migrate_server(server)
    cloud.wait_for_status(server, "VERIFY_RESIZE")
    cloud.admin.compute.confirm_server_resize(server)
    cloud.wait_for_status(server, "ACTIVE")
    assert not other.runs(server)
    images.take()
    assert cloud.disk_digest(server) == digest
    images.assert_as_before()
    images.outlive_the_server()
    assert log.ours() == []


def assert_nothing_left(cloud: Cloud, image_id: str) -> None:
    """Neither of the job nor of its image."""
    eventually(lambda: cloud.ceph.ledger(cloud.vms) == {}, "no job is left", DEAD_CLIENT_SECONDS)
    assert cloud.image(image_id) is None
    assert cloud.ceph.about(cloud.images, image_id) == "cannot be opened"
