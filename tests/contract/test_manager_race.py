# SPDX-License-Identifier: Apache-2.0
"""The tenant deletes an image while the Ceph manager flattens it: afterwards it is gone, or usable.

As ``tests/functional/test_deletion_race.py`` has it for a worker that copies itself. Where the manager survives a
flatten there is no Glance; its store's driver deletes.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from nova_rbd_snap.flatten import means
from nova_rbd_snap.flatten.queue import queue_image, shared
from nova_rbd_snap.flatten.task import Flattening
from nova_rbd_snap.ledger.job import SNAP_PREFIX, Owner
from nova_rbd_snap.ledger.store import Ledger
from nova_rbd_snap.specs import GLANCE_SNAP, ImageSpec
from nova_rbd_snap.workers.worker import Worker
from tests.contract.worlds import CEPH_CONF, RealWorld, need_manager
from tests.faults.recording import cell
from tests.waiting import eventually

#: At how many instants of a flatten the image is deleted, and which of them CI tries.
INSTANTS, QUICK = 20, (3, 12, 19)
#: Enough objects for a flatten that lasts for a while.
OBJECTS = 512
BOUND_SECONDS = 60
_DAY_SECONDS = 24 * 3600.0


class Glance:
    """The record of one image, in a store of *world*."""

    def __init__(self, world: RealWorld, image: ImageSpec) -> None:
        import glance_store
        from glance_store._drivers import rbd
        from oslo_config import cfg

        conf = cfg.ConfigOpts()
        glance_store.register_opts(conf)
        conf([])
        for name, value in {"pool": image.pool, "user": "admin", "ceph_conf": str(CEPH_CONF)}.items():
            conf.set_override(f"rbd_store_{name}", value, "glance_store")
        self._store = rbd.Store(conf)
        self._store.configure()
        where = {"fsid": world.connect().fsid(), "pool": image.pool, "image": image.name, "snapshot": GLANCE_SNAP}
        self._location = SimpleNamespace(store_location=rbd.StoreLocation(where, conf))
        self.is_alive = True

    def uses(self, image_id: str, url: str) -> bool:
        return self.is_alive

    settle = uses

    def delete(self) -> bool:
        """Whether that is done; else the record lives on."""
        import glance_store

        try:
            self._store.delete(self._location)
        except glance_store.InUseByStore:
            return False
        except glance_store.NotFound:  # it is gone already, which is as good
            pass
        self.is_alive = False
        return True


class Queued:
    """An image that waits to be flattened by the manager, and a worker that sees to it."""

    def __init__(self, world: RealWorld) -> None:
        self._world = world
        self._later_seconds = 0.0
        self.cluster = cluster = world.connect()
        self.disk = ImageSpec(world.vms, f"{uuid.uuid4()}_disk")
        self.image = ImageSpec(world.images, str(uuid.uuid4()))
        world.create(self.disk, OBJECTS)
        for number in range(OBJECTS):
            world.write(self.disk, number, b"%d" % number)
        frozen = self.disk.snap(f"{SNAP_PREFIX}{self.image.name}")
        cluster.create_snap(frozen)
        cluster.clone(frozen, self.image, None, object_map=False)
        cluster.create_snap(self.image.snap(GLANCE_SNAP))
        cluster.protect_snap(self.image.snap(GLANCE_SNAP))
        self.glance = Glance(world, self.image)
        owner = Owner("compute-1", "machine-1", "life-1", cluster.address())
        found = shared(cluster, self.image)
        assert found is not None
        queue_image(found, Ledger(cluster, world.vms), owner, 0.0)
        by = means.of(means.MANAGER, cluster)
        flattening = Flattening(cluster, self.glance, by, self._now)
        self._worker = Worker(
            cluster, world.vms, owner, [flattening], limit=4, lease_seconds=60.0, clock=self._now
        )

    def _now(self) -> float:
        return time.time() + self._later_seconds

    def await_progress(self, share: float) -> None:
        """Return when the manager has done that much of the image, or has come to its end."""
        other = self._world.connect()

        def has_come() -> bool:
            task = other.flatten_task(self.image)
            return task.done >= share if task else other.lookup(self.image).parent is None

        eventually(has_come, "the manager flattens", BOUND_SECONDS, pause=0.02)

    def work(self) -> None:
        """Do all that is due."""
        while self._worker.work(lambda: False):
            pass

    def end(self) -> None:
        """Nobody reads the image from before it was flat any more."""
        self._later_seconds += _DAY_SECONDS
        eventually(lambda: self.work() or self.jobs() == [], "the job is done")

    def jobs(self) -> list[str]:
        return [job.id for job in Ledger(self.cluster, self.disk.pool).read().jobs]

    def assert_usable(self) -> None:
        expected = {number: b"%d" % number for number in range(OBJECTS)}
        assert self._world.content(self.image.snap(GLANCE_SNAP)) == expected
        (snap,) = self.cluster.snaps(self.image)
        assert (snap.name, snap.protected) == (GLANCE_SNAP, True)


@pytest.fixture
def world_of_manager(real_world: RealWorld) -> Iterator[RealWorld]:
    """Its manager copies one object after the other, so that a flatten lasts."""
    need_manager()
    name = {"who": "mgr", "name": "rbd_concurrent_management_ops"}
    real_world.mon("config set", value="1", **name)
    yield real_world
    real_world.mon("config rm", **name)


@pytest.mark.real
@pytest.mark.parametrize(
    "instants", [pytest.param(QUICK, id="some"), pytest.param(range(INSTANTS), id="all", marks=pytest.mark.slow)]
)
def test_deleted_while_the_manager_flattens(world_of_manager: RealWorld, instants: Iterable[int]) -> None:
    """At instants all over it."""
    got_through = {delete_at(world_of_manager, instant) for instant in instants}
    assert False in got_through, "the manager was in the way"


def delete_at(world: RealWorld, instant: int) -> bool:
    """Whether the image could be deleted at once."""
    with cell(f"deleted at instant {instant} of {INSTANTS} of the manager's flatten", real=True):
        queued = Queued(world)

        def delete_it() -> bool:
            queued.await_progress(instant / (INSTANTS - 1))
            return queued.glance.delete()

        with ThreadPoolExecutor() as pool:
            deletion = pool.submit(delete_it)
            queued.work()
            got_through = deletion.result(BOUND_SECONDS)
        if not got_through:
            queued.work()
            queued.assert_usable()
            assert queued.glance.delete()
        queued.end()
        assert not queued.cluster.exists(queued.image)
        assert queued.cluster.snaps(queued.disk) == []
        assert queued.cluster.flatten_task(queued.image) is None
    return got_through
