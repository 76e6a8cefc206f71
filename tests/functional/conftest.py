# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the functional tests: the engine in this process on a real Ceph, and a real Glance; no Nova.

They run inside a cloud's container, with the Ceph users and pools of its nova-compute and its glance-api::

    lab/lab exec 34 python3 -m pytest -p no:cacheprovider /src/tests/functional
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator

import pytest
import rbd

from tests import monitor
from tests.fakes.glance_proxy import GlanceProxy
from tests.functional.world import World
from tests.waiting import eventually


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick: of the fault matrix, what tells most in the least time")
    config.addinivalue_line("markers", "slow: the whole fault matrix")
    config.addinivalue_line("markers", "disturbs: stops daemons or fills pools: the cluster must be its own")


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    with contextlib.ExitStack() as stack:
        world = World(stack)
        stack.enter_context(monitor.hurried(world.rados))
        yield world


@pytest.fixture(scope="module")
def readers(world: World) -> Iterator[None]:
    """Glance may read Nova's pool, as images that are not flat need it."""
    user = f"client.{world.vms.replace('vms', 'glance')}"
    before = world.caps(user)
    world.set_caps(user, {**before, "osd": f"{before['osd']}, profile rbd-read-only pool={world.vms}"})
    _restart_glance(world)
    yield
    world.set_caps(user, before)
    _restart_glance(world)


def _restart_glance(world: World) -> None:
    """What a client may do is settled when it connects."""
    subprocess.run(["supervisorctl", "restart", "glance-api"], check=True, stdout=subprocess.DEVNULL)
    eventually(world.service.answers, "Glance answers", pause=0.1)


@pytest.fixture
def disk(world: World) -> Iterator[str]:
    name = world.new_disk()
    yield name
    with contextlib.suppress(rbd.ImageNotFound):
        rbd.RBD().remove(world.ioctx[world.vms], name)


@pytest.fixture
def image_id(world: World, disk: str) -> Iterator[str]:
    found = world.new_record(disk)
    yield found
    world.delete_image(found)


@pytest.fixture
def proxy(world: World) -> Iterator[GlanceProxy]:
    """Honest until the test says otherwise."""
    yield world.proxy
    world.proxy.behave()
