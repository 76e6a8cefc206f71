# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the end-to-end tests, which run inside a cloud's container against its real services::

    lab/lab exec 31 python3 -m pytest -p no:cacheprovider /src/tests/e2e

A test's first line configures nova-compute; that restarts it only where it ran with something else, so tests with
the same options stand together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

pytest.register_assert_rewrite("cloud")  # before it is imported, or its assertions do not show what they compared

from breakpoints import REACHED, SHIM, WANTED  # noqa: E402
from cloud import GLANCE_CONF, NOVA_CONF, PROXY_PORT, Cloud, Log, Options, eventually  # noqa: E402

from tests import monitor  # noqa: E402
from tests.fakes.glance_proxy import GlanceProxy  # noqa: E402
from tests.faults import recording  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "core: the subset that tells most in the least time")
    config.addinivalue_line("markers", "slow: only for the fault report")
    config.addinivalue_line("markers", "disturbs: stops daemons of Ceph, or uses the pool that the clouds share")


_cell = pytest.StashKey[recording.Cell]()


@pytest.fixture(autouse=True)
def found(request: pytest.FixtureRequest) -> recording.Cell:
    """The test as a cell of the fault report."""
    return request.node.stash.setdefault(_cell, recording.Cell(request.node.name, real=True))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Record the cell; what fails around the call fails the suite."""
    with recording.recorded(item.stash[_cell]):
        return (yield)


@pytest.fixture(scope="session")
def glance_proxy() -> Iterator[GlanceProxy]:
    with GlanceProxy(PROXY_PORT) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def whole_cloud(glance_proxy: GlanceProxy) -> Iterator[Cloud]:
    """The cloud, which is left as it is found."""
    cloud = Cloud()
    for_all = cloud.clean_up
    configured = NOVA_CONF.read_text() if NOVA_CONF.exists() else None
    with monitor.hurried(cloud.ceph.rados):
        yield cloud
        for_all.close()
    if GLANCE_CONF.exists():
        GLANCE_CONF.unlink()
        cloud.restart_glance()
    if configured is None:
        NOVA_CONF.unlink(missing_ok=True)
    elif NOVA_CONF.read_text() != configured:
        NOVA_CONF.write_text(configured)
    else:
        return
    cloud.restart_nova_compute()


@pytest.fixture
def cloud(whole_cloud: Cloud) -> Iterator[Cloud]:
    """The cloud; what the test makes in it is removed afterwards, and then the pools must look as before."""
    whole_cloud.configure_glance()
    whole_cloud.standing_server()
    before, for_all = whole_cloud.picture(), whole_cloud.clean_up
    try:
        with contextlib.ExitStack() as whole_cloud.clean_up:
            yield whole_cloud
        whole_cloud.unchanged(before)
    except AssertionError:
        whole_cloud.forget_jobs()
        raise
    finally:
        whole_cloud.clean_up = for_all


@pytest.fixture
def server(cloud: Cloud) -> Any:
    """A running server with known data, for tests that leave it as it is."""
    return cloud.standing_server()


@pytest.fixture
def readers(cloud: Cloud) -> None:
    """Glance may read Nova's pool, as 'background' and 'never' need it, until what the test made is removed."""
    user = cloud.vms.replace("vms", "glance")
    before = cloud.ceph.caps(user)
    cloud.clean_up.callback(cloud.restart_glance)
    cloud.clean_up.callback(lambda: cloud.ceph.set_caps(user, **before))
    cloud.ceph.set_caps(user, **{**before, "osd": f"{before['osd']}, profile rbd-read-only pool={cloud.vms}"})
    cloud.restart_glance()


@pytest.fixture
def log() -> Log:
    """nova-compute's log since the test began."""
    return Log()


@pytest.fixture
def proxy(glance_proxy: GlanceProxy) -> Iterator[GlanceProxy]:
    """A proxy to Glance, honest until the test says otherwise; see ``cloud.THROUGH_PROXY``."""
    yield glance_proxy
    glance_proxy.behave()


@pytest.fixture(scope="module")
def holding(whole_cloud: Cloud) -> Iterator[Options]:
    """What makes nova-compute and its engine ones that can be held; see ``breakpoints.py``."""
    with whole_cloud.stand_in_driver("rbd_holding", SHIM) as options:
        yield options


class Hold:
    """Holds a snapshot at a place of ``breakpoints.py``."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud

    def __call__(self, server: Any, place: str) -> str:
        """Ask for a snapshot; returns the image's id once nova-compute or its engine is held at *place*."""
        REACHED.unlink(missing_ok=True)
        WANTED.write_text(place)
        image_id = self._cloud.request(server)
        eventually(REACHED.exists, f"somebody comes to {place}", pause=0.02)
        return image_id

    def go_on(self) -> None:
        """Let whoever is held and lives go on."""
        WANTED.unlink(missing_ok=True)


@pytest.fixture
def clone_format() -> int:
    """Of the snapshots of :func:`held_at`, where the test does not say otherwise."""
    return 2


@pytest.fixture
def patience_seconds() -> int:
    """The same for their operation_timeout."""
    return 30


@pytest.fixture
def policy() -> str:
    """The same for flattening."""
    return "inline"


@pytest.fixture
def held_at(
    cloud: Cloud, holding: Options, clone_format: int, patience_seconds: int, policy: str
) -> Iterator[Hold]:
    """See :class:`Hold`."""
    options = {"operation_timeout": patience_seconds, "clone_format": clone_format}
    if policy != "inline":
        options.update(flatten=policy, reclaim_interval=5)
    cloud.configure(holding, {"rbd_snap": options})
    hold = Hold(cloud)
    yield hold
    hold.go_on()
