# SPDX-License-Identifier: Apache-2.0
"""Many snapshots at once, and what else the API allows meanwhile."""

from __future__ import annotations

import contextlib
import pathlib
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import rbd
from cloud import THROUGH_PROXY, Cloud, Log, eventually

from tests.fakes.glance_proxy import GlanceProxy
from tests.faults import recording

SIXTEEN = 16
#: Of the engine, with sixteen snapshots under way.
MEMORY_BOUND_MIB = 192


@pytest.mark.slow
def test_sixteen_at_once(cloud: Cloud, found: recording.Cell) -> None:
    """Each is a whole image of its own disk, through one connection and in bounded memory."""
    cloud.configure({"DEFAULT": {"max_concurrent_snapshots": SIXTEEN}})
    with ThreadPoolExecutor(4) as pool:
        servers = list(pool.map(lambda _: cloud.boot(), range(SIXTEEN)))
    digests = [cloud.disk_digest(server) for server in servers]
    interruptions = sum(cloud.guests.interruptions(server.id) for server in servers)
    log = Log()
    with ThreadPoolExecutor(SIXTEEN) as pool:
        images = list(pool.map(cloud.request, servers))
    (engine,) = cloud.engines()
    connections, memory = set(), {0}

    def are_cloned() -> bool:
        connections.add(cloud.rados_clients(engine))
        status = pathlib.Path(f"/proc/{engine}/status").read_text()
        memory.add(int(re.search(r"VmRSS:\s+(\d+)", status)[1]) >> 10)
        assert not log.ours()
        return all(log.lines(f"Snapshot to image {image}: cloned in") for image in images)

    eventually(are_cloned, "all are cloned", 300, pause=0)
    assert connections <= {1}
    assert max(memory) < MEMORY_BOUND_MIB
    for server, image, digest in zip(servers, images, digests):
        cloud.settled(server)
        assert cloud.image_digest(image) == digest
    found.guest_suspensions = sum(cloud.guests.interruptions(server.id) for server in servers) - interruptions


@pytest.mark.parametrize("then", [pytest.param("stop", marks=pytest.mark.slow), "snapshot"])
def test_reset_amid_a_snapshot(cloud: Cloud, held_at: Any, then: str) -> None:
    """An operator resets the server's state, and the tenant goes on with it. Nova takes back the image of the request
    whose task state is not its own any more, which is one of the two; what there is in the end is whole."""
    server = cloud.boot()
    before, digest = cloud.picture(), cloud.disk_digest(server)
    images = [held_at(server, "flatten")]
    cloud.admin.compute.reset_server_state(server.id, "active")
    if then == "snapshot":
        images.append(cloud.request(server))
    held_at.go_on()
    if then == "stop":
        server = cloud.stopped(server)
    cloud.settled(server)
    eventually(lambda: cloud.ceph.ledger(cloud.vms) == {}, "no job is left")

    def is_whole(image_id: str) -> bool:
        """Or gone, or on its way."""
        image = cloud.image(image_id)
        with contextlib.suppress(rbd.ImageNotFound):
            return image is None or (image.status == "active" and cloud.image_digest(image_id) == digest)
        return False

    eventually(lambda: all(map(is_whole, images)), "what there is of images is whole")
    made = [image_id for image_id in images if cloud.image(image_id)]
    assert made or then == "stop"
    for image_id in made:
        cloud.delete_image(image_id)
    cloud.unchanged(before)
    assert cloud.disk_digest(server) == digest


def test_shelve_that_fails_keeps_the_server(cloud: Cloud, proxy: GlanceProxy, log: Log) -> None:
    """shelved_offload_time = 0 deletes the disk once there is an image of it; without one nothing is offloaded."""
    cloud.configure(THROUGH_PROXY, {"DEFAULT": {"shelved_offload_time": 0}, "rbd_snap": {"operation_timeout": 10}})
    server = cloud.boot()
    digest = cloud.disk_digest(server)
    proxy.break_(lambda request: request.method in ("POST", "PATCH", "PUT"), status=401)
    cloud.demo.compute.shelve_server(server)
    image = eventually(lambda: cloud.image_called(f"{server.name}-shelved"), "the image record")
    cloud.clean_up.callback(cloud.delete_image, image.id)
    log.has(f"ERROR nova_rbd_snap.*Snapshot to image {image.id} failed")
    eventually(lambda: cloud.server(server).vm_state not in ("shelved", "shelved_offloaded"), "it is not shelved", 20)
    assert cloud.server(server).compute_host
    assert cloud.disk_digest(server) == digest
    assert cloud.ceph.ledger(cloud.vms) == {}
    proxy.behave()
