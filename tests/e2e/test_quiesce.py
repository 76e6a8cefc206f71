# SPDX-License-Identifier: Apache-2.0
"""Guests that are held still: a real QEMU guest agent, in a guest that writes to its ext4 all the time.

While it is mounted and not frozen, ext4 says in its superblock that its journal is to be replayed. So the image itself
tells whether the guest was held still when it was taken.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import uuid
from collections.abc import Iterator
from typing import Any, Callable

import pytest
from breakpoints import AMID_FLATTEN
from cloud import MIB, PREFIX, Cloud, Log, eventually, run
from test_qemu import qemu_of, watchers

GUEST = pathlib.Path("/usr/local/share/lab/guest.img")
#: Where the guest's ext4 has its s_feature_incompat, and EXT4_FEATURE_INCOMPAT_RECOVER in it.
_INCOMPATIBLE, _RECOVER = 33 * MIB + 1024 + 0x60, 0x4

Boot = Callable[..., Any]


@pytest.fixture(scope="module")
def flavor(whole_cloud: Cloud) -> Iterator[str]:
    """Large enough for the guest."""
    made = whole_cloud.admin.compute.create_flavor(name=f"{PREFIX}agent", ram=192, vcpus=1, disk=1)
    yield made.id
    whole_cloud.admin.compute.delete_flavor(made)


@pytest.fixture
def boot(cloud: Cloud, flavor: str) -> Boot:
    """A function that boots the guest from an image with these properties; returns it once it writes to its disk."""

    def make(**properties: str) -> Any:
        base = cloud.admin.image.create_image(
            PREFIX + "guest", filename=str(GUEST), disk_format="raw", container_format="bare", visibility="public",
            validate_checksum=False, **properties,
        )
        cloud.clean_up.callback(cloud.delete_image, base.id)
        server = cloud.demo.compute.create_server(
            name=PREFIX + uuid.uuid4().hex[:8], image_id=base.id, flavor_id=flavor, networks="none"
        )
        cloud.clean_up.callback(cloud.delete_server, server)
        server = cloud.wait_for_status(server, "ACTIVE")
        if "hw_qemu_guest_agent" in properties:
            eventually(lambda: agent(server, "guest-ping") == {}, "the guest's agent answers")
        eventually(lambda: must_be_replayed(cloud, cloud.vms, f"{server.id}_disk"), "its disk is mounted")
        return server

    return make


def agent(server: Any, command: str) -> Any:
    """What the guest's agent answers; None where it does not."""
    with contextlib.suppress(subprocess.CalledProcessError):
        text = run("virsh", "qemu-agent-command", server.id, json.dumps({"execute": command}))
        return json.loads(text)["return"]
    return None


def must_be_replayed(cloud: Cloud, pool: str, name: str, snap: Any = None) -> bool:
    """Whether the file system on it was in use at that instant, and not held still."""
    with cloud.ceph.image(pool, name, snap) as opened:
        return bool(int.from_bytes(opened.read(_INCOMPATIBLE, 4), "little") & _RECOVER)


def assert_thawed(server: Any) -> None:
    eventually(lambda: agent(server, "guest-fsfreeze-status") == "thawed", "the guest is thawed", 20)


AGENT = {"hw_qemu_guest_agent": "yes"}
REQUIRED = {**AGENT, "os_require_quiesce": "yes"}


@pytest.mark.core
def test_guest_with_an_agent_is_held_still(cloud: Cloud, boot: Boot, log: Log) -> None:
    """The image needs no journal replayed, and the guest goes on; without an agent it does, as after a crash."""
    cloud.configure()
    server = boot(**REQUIRED)
    interruptions = cloud.guests.interruptions(server.id)
    image = cloud.snapshot(server)
    assert not must_be_replayed(cloud, cloud.images, image.id, "snap")
    assert_thawed(server)
    assert cloud.guests.interruptions(server.id) == interruptions
    assert log.ours() == []
    image = cloud.snapshot(boot())
    assert must_be_replayed(cloud, cloud.images, image.id, "snap")


@pytest.mark.slow
def test_full_copy_is_of_a_guest_held_still(cloud: Cloud, boot: Boot) -> None:
    """The snapshot that Nova's copy reads is taken of a guest that is held still, too."""
    cloud.configure({"rbd_snap": {"ways": "nova"}})
    server = boot(**REQUIRED)
    image = cloud.snapshot(server)
    assert not must_be_replayed(cloud, cloud.images, image.id, "snap")
    assert_thawed(server)


def test_required_of_a_guest_without_an_agent(cloud: Cloud, boot: Boot) -> None:
    """A clear failure, no copy, and nothing left."""
    cloud.configure()
    server = boot(os_require_quiesce="yes")
    before, log = cloud.picture(), Log()
    image_id = cloud.request(server)
    assert "os_require_quiesce" in log.has(f"ERROR nova_rbd_snap.*Snapshot to image {image_id} failed")
    cloud.failed_snapshot(server, image_id)
    assert not log.lines("copied in full")
    cloud.unchanged(before)


@pytest.mark.parametrize("required", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_snapshot_that_takes_too_long(cloud: Cloud, boot: Boot, held_at: Any, required: bool) -> None:
    """The guest is let go in time whatever the cluster does. A snapshot that comes later is dropped where stillness is
    required, and else kept, and called crash-consistent."""
    server = boot(**(REQUIRED if required else AGENT))
    before, log = cloud.picture(), Log()
    image_id = held_at(server, "snap")
    assert agent(server, "guest-fsfreeze-status") == "frozen"
    assert_thawed(server)
    held_at.go_on()
    cloud.settled(server)
    if required:
        assert cloud.image(image_id) is None
        log.has("ERROR nova_rbd_snap.*had to be let go")
        cloud.unchanged(before)
    else:
        assert must_be_replayed(cloud, cloud.images, image_id, "snap")
        log.has("WARNING nova_rbd_snap.*crash-consistent only")
    assert not log.lines("copied in full")


def test_nova_compute_dies_while_it_holds_the_guest_still(cloud: Cloud, boot: Boot, held_at: Any) -> None:
    """Its next life lets the guest go, and nothing else is left."""
    server = boot(**AGENT)
    before, log = cloud.picture(), Log()
    image_id = held_at(server, "snap")
    os.kill(cloud.nova_compute, signal.SIGKILL)
    assert agent(server, "guest-fsfreeze-status") == "frozen"
    held_at.go_on()
    cloud.nova_compute_is_back(log)
    log.has(f"the guest of server {server.id} was frozen")
    assert_thawed(server)
    eventually(lambda: cloud.image(image_id) is None, "the image record is deleted")
    cloud.unchanged(before)


@pytest.mark.slow
def test_guest_that_freezes_amid_its_snapshot(cloud: Cloud, boot: Boot, held_at: Any) -> None:
    """The snapshot of its disk is not removed, neither then nor once Ceph takes it for dead: that would cost it this.
    The image is good, and what is left goes by itself when the guest wakes."""
    server = boot()
    qemu, before, log = qemu_of(server), cloud.picture(), Log()
    image_id = held_at(server, AMID_FLATTEN)
    os.kill(qemu, signal.SIGSTOP)
    try:
        held_at.go_on()
        cloud.settled(server)
        assert cloud.image(image_id).status == "active"
        assert must_be_replayed(cloud, cloud.images, image_id, "snap")
        log.has(f"Job {image_id}: stays in the ledger.*does not answer")
        eventually(lambda: not watchers(cloud, server), "its watch has timed out")
        log.has(f"Job {image_id}: stays in the ledger.*dead or frozen")
    finally:
        os.kill(qemu, signal.SIGCONT)
    eventually(lambda: watchers(cloud, server), "it has its disk again")
    cloud.delete_image(image_id)
    cloud.unchanged(before, 60)
    image = cloud.snapshot(server)
    assert image.status == "active"
    assert qemu_of(server) == qemu
