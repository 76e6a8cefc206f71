# SPDX-License-Identifier: Apache-2.0
"""The engine's life beside nova-compute's."""

from __future__ import annotations

import configparser
import os
import pathlib
import re
import signal
from typing import Any

import pytest
from cloud import Cloud, Log, eventually, run
from test_clone import assert_cloned
from test_deaths import gone


@pytest.mark.core
def test_parallel_snapshots_share_one_client(cloud: Cloud) -> None:
    """However many snapshots run, nova-compute has one engine, that has one librados client, and itself none."""
    cloud.configure()
    servers = [cloud.standing_server(), cloud.boot(), cloud.boot()]
    digests = [cloud.disk_digest(server) for server in servers]
    log = Log()
    images = [cloud.request(server) for server in servers]
    (engine,) = cloud.engines()
    seen = set()

    def are_active() -> bool:
        seen.add(cloud.rados_clients(engine))
        # Nova asks the cluster for its size now and then, and lets go again.
        eventually(lambda: cloud.rados_clients(cloud.nova_compute) == 0, "nova-compute has no client", 10)
        return all(cloud.image(image).status == "active" for image in images)

    eventually(are_active, "all images are active", 120, pause=0)
    assert seen <= {1}
    assert cloud.engines() == [engine]
    for server, image, digest in zip(servers, images, digests):
        cloud.settled(server)
        assert cloud.image_digest(image) == digest
        assert_cloned(cloud, log, server, cloud.image(image))


def test_killed_engine_is_replaced(cloud: Cloud, server: Any) -> None:
    """The next snapshot starts another engine, and is cloned as if nothing had been."""
    cloud.configure()
    cloud.snapshot(server)
    killed = cloud.kill_engine()
    eventually(lambda: gone(killed), "the engine is dead")
    log = Log()
    image = cloud.snapshot(server)
    assert_cloned(cloud, log, server, image)
    assert cloud.engines() != [killed]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_engine_ends_with_nova_compute(cloud: Cloud, server: Any, number: int) -> None:
    """However nova-compute ends, its engine does, too, and the next nova-compute has its own."""
    cloud.configure()
    cloud.snapshot(server)
    (engine,), nova_compute = cloud.engines(), cloud.nova_compute
    log = Log()
    if number == signal.SIGTERM:
        cloud.restart_nova_compute()
    else:
        os.kill(nova_compute, number)
        cloud.nova_compute_is_back(log)
    eventually(lambda: gone(engine), "the engine has ended")
    log.has("nova-rbd-snap is ready")
    (successor,) = cloud.engines()
    parent = pathlib.Path(f"/proc/{successor}/stat").read_text().rpartition(")")[2].split()[1]
    assert int(parent) == cloud.nova_compute != nova_compute


def test_no_secret_is_told(cloud: Cloud, server: Any) -> None:
    """Neither the tenant's token, nor the service's password or token, nor the Ceph key: not in nova-compute's log,
    however talkative, and not on a command line."""
    log = cloud.configure({"DEFAULT": {"debug": "true"}})
    cloud.snapshot(server)
    parsed = configparser.ConfigParser(strict=False, interpolation=None)
    parsed.read("/etc/nova/nova.conf")
    key = run("ceph", "auth", "print-key", f"client.nova-{cloud.release}").strip()
    secrets = [cloud.demo.auth_token, key, parsed["service_user"]["password"]]
    lines = log.lines("nova_rbd_snap|keystoneauth|Snapshot to image")
    assert lines
    for pid in (cloud.nova_compute, *cloud.engines()):
        lines.append(pathlib.Path(f"/proc/{pid}/cmdline").read_text())
    assert not [line for line in lines if any(secret in line for secret in secrets)]
    assert not [line for line in lines if re.search(r"gAAAA\w{20}", line)], "a Fernet token"
