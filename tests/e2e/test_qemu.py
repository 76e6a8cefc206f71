# SPDX-License-Identifier: Apache-2.0
"""QEMU that hangs, dies, or ends amid a snapshot; and libvirt that restarts."""

from __future__ import annotations

import os
import pathlib
import signal
from collections.abc import Iterator
from typing import Any

import libvirt
import pytest
import rbd
from breakpoints import AMID_FLATTEN
from cloud import Cloud, Log, eventually, run
from test_clone import assert_cloned
from test_deaths import DEAD_CLIENT_SECONDS


def qemu_of(server: Any) -> int:
    """Process id of the server's QEMU."""
    for entry in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        words = entry.read_bytes().split(b"\0")
        if b"qemu-system" in words[0] and server.id.encode() in words:
            return int(entry.parent.name)
    raise AssertionError(f"no QEMU of {server.id}")


@pytest.fixture
def frozen(cloud: Cloud) -> Iterator[Any]:
    """A server whose QEMU is stopped; it goes on after the test."""
    cloud.configure()
    server = cloud.boot()
    qemu = qemu_of(server)
    os.kill(qemu, signal.SIGSTOP)
    yield server
    os.kill(qemu, signal.SIGCONT)


def watchers(cloud: Cloud, server: Any) -> list[str]:
    """The clients that have the server's disk open: a QEMU that was cut off is none of them any more."""
    with cloud.ceph.pool(cloud.vms) as ioctx, rbd.Image(ioctx, f"{server.id}_disk", read_only=True) as disk:
        return sorted(watcher["addr"] for watcher in disk.watchers_list())


@pytest.mark.core
def test_frozen_qemu_keeps_its_disk(cloud: Cloud, frozen: Any, log: Log) -> None:
    """No snapshot on any rung; when it wakes it still has its disk, and the next snapshot is as ever."""
    before, watching = cloud.picture(), watchers(cloud, frozen)
    assert watching
    image_id = cloud.request(frozen)
    line = log.has(f"ERROR nova_rbd_snap.*Snapshot to image {image_id} failed")
    assert "QEMU does not answer" in line
    cloud.failed_snapshot(frozen, image_id)
    assert cloud.picture() == before
    assert not log.lines("copied in full")
    os.kill(qemu_of(frozen), signal.SIGCONT)
    log = Log()
    image = cloud.snapshot(frozen)
    assert_cloned(cloud, log, frozen, image)
    assert watchers(cloud, frozen) == watching


@pytest.mark.slow
@pytest.mark.parametrize("how", ["crash", "power cut"])
def test_guest_ends_amid_its_snapshot(cloud: Cloud, held_at: Any, log: Log, how: str) -> None:
    """While its clone is flattened: the image is whole all the same, and the disk as before once nobody holds it."""
    server = cloud.boot()
    before, digest = cloud.ceph.about(cloud.vms, f"{server.id}_disk"), cloud.disk_digest(server)
    image_id = held_at(server, AMID_FLATTEN)
    if how == "crash":
        os.kill(qemu_of(server), signal.SIGKILL)
    else:
        run("virsh", "destroy", server.id)
    eventually(lambda: cloud.guests.state(server.id) == libvirt.VIR_DOMAIN_SHUTOFF, "the guest has ended")
    held_at.go_on()
    cloud.settled(server)
    assert cloud.image(image_id).status == "active"
    assert cloud.image_digest(image_id) == digest
    assert log.lines(f"Snapshot to image {image_id}: cloned in")
    eventually(lambda: cloud.ceph.ledger(cloud.vms) == {}, "no job is left", DEAD_CLIENT_SECONDS)
    assert cloud.ceph.about(cloud.vms, f"{server.id}_disk") == before
    assert cloud.disk_digest(server) == digest


def _answers(cloud: Cloud, server: Any) -> bool:
    try:
        return cloud.guests.state(server.id) == libvirt.VIR_DOMAIN_RUNNING
    except libvirt.libvirtError:
        return False


def test_libvirtd_restarts_amid_a_snapshot(cloud: Cloud, held_at: Any, server: Any) -> None:
    """While the clone is flattened: the guest runs on, and the request ends in an image or in a clean failure."""
    before, digest = cloud.picture(), cloud.disk_digest(server)
    qemu, interruptions = qemu_of(server), cloud.guests.interruptions(server.id)
    image_id = held_at(server, AMID_FLATTEN)
    run("supervisorctl", "restart", "libvirtd")
    eventually(lambda: _answers(cloud, server), "libvirtd answers")  # and tells of what happens from now on
    held_at.go_on()
    cloud.settled(server)
    image = cloud.image(image_id)
    if image is not None:
        assert image.status == "active"
        assert cloud.image_digest(image_id) == digest
        cloud.delete_image(image_id)
    cloud.unchanged(before)
    assert cloud.guests.interruptions(server.id) == interruptions
    assert (qemu_of(server), cloud.guests.state(server.id)) == (qemu, libvirt.VIR_DOMAIN_RUNNING)
    cloud.admin.compute.get_server_diagnostics(server)  # Nova takes no servers until it has needed libvirt again
    eventually(cloud.nova_compute_takes_servers, "nova-compute takes servers again")
