# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the functional tests: the engine in this process on a real Ceph, and a real Glance; no Nova.

They run inside a cloud's container, with the Ceph users and pools of its nova-compute and its glance-api::

    lab/lab exec 34 python3 -m pytest -p no:cacheprovider /src/tests/functional
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import rbd

from tests import monitor
from tests.fakes.glance_proxy import GlanceProxy
from tests.functional.world import World


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
