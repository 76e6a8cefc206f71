# SPDX-License-Identifier: Apache-2.0
"""Disks that a host of stock Nova left, for images depend on them: a sweep finds them, and lets them go with those."""

from __future__ import annotations

from typing import Callable

import pytest

from nova_rbd_snap import errors
from nova_rbd_snap.flatten.queue import queue_image, shared
from nova_rbd_snap.janitor.findings import KEEP, TRASH
from nova_rbd_snap.ledger.job import NEVER, Owner
from nova_rbd_snap.ledger.store import Ledger
from nova_rbd_snap.specs import GLANCE_SNAP
from tests.fakes.engine import DEST, DISK, clone, freeze, make_engine
from tests.fakes.sweep import World


@pytest.fixture
def world() -> World:
    """A server that stock Nova has deleted, with an image that is not flat."""
    world = World()
    world.cluster.write(DISK, 0, b"data")
    engine = make_engine(world.cluster, flatten=NEVER)
    clone(engine)
    engine.finish(DEST.name)
    world.glance.known.add(DEST.name)
    world.nova.known.clear()
    return world


def test_disk_of_a_server_that_is_gone(world: World) -> None:
    """It goes to the trash, from where it goes with its image, which is whole."""
    assert world.plan()[str(DISK)][0] == TRASH
    assert world.sweep()[str(DISK)].became == "trashed"
    assert not world.cluster.exists(DISK)
    assert [each.is_parent for each in world.cluster.trashed(DISK.pool)] == [True]
    assert world.cluster.content(DEST.snap(GLANCE_SNAP)) == {0: b"data"}
    assert str(DISK) not in world.plan()
    world.cluster.flatten(DEST, lambda done, total: True)
    assert world.cluster.trashed(DISK.pool) == []
    assert world.cluster.content(DEST.snap(GLANCE_SNAP)) == {0: b"data"}


def server_is_there(world: World) -> None:
    world.nova.known.add(DISK.name.partition("_")[0])


def nova_is_silent(world: World) -> None:
    world.nova.error = errors.NovaSilent("no answer")


def glance_is_silent(world: World) -> None:
    world.glance.error = errors.GlanceSilent("no answer")


def image_is_another_clouds(world: World) -> None:
    world.glance.known.discard(DEST.name)


def operator_has_a_snapshot(world: World) -> None:
    world.cluster.create_snap(DISK.snap("keep this"))


def job_needs_it(world: World) -> None:
    freeze(make_engine(world.cluster))


def flatten_needs_it(world: World) -> None:
    found = shared(world.cluster, DEST)
    assert found is not None
    owner = Owner("compute-1", "machine-1", "life-1", world.cluster.address())
    queue_image(found, Ledger(world.cluster, DISK.pool), owner, 0.0)


@pytest.mark.parametrize(
    "reason",
    [
        server_is_there,
        nova_is_silent,
        glance_is_silent,
        image_is_another_clouds,
        operator_has_a_snapshot,
        job_needs_it,
        flatten_needs_it,
    ],
)
def test_disk_that_stays(world: World, reason: Callable[[World], None]) -> None:
    """Whatever may need it."""
    reason(world)
    assert world.plan().get(str(DISK), (KEEP, ""))[0] == KEEP
    world.sweep()
    assert world.cluster.content(DISK) == {0: b"data"}
    assert not any(snap.trashed for snap in world.cluster.snaps(DISK))


def test_disk_that_is_open(world: World) -> None:
    """Somebody runs on it, whatever Nova says: it stays, and the sweep says so."""
    world.cluster.hold(DISK, float("inf"))
    outcome = world.sweep()[str(DISK)]
    assert (outcome.became, outcome.done) == ("kept", False)
    assert world.cluster.content(DISK) == {0: b"data"}


def test_server_that_comes_back(world: World) -> None:
    """Each disk is judged anew right before it is touched."""
    world.cluster.do_on("images", lambda *args: server_is_there(world), nth=2)
    world.sweep()
    assert world.cluster.content(DISK) == {0: b"data"}
