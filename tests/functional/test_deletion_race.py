# SPDX-License-Identifier: Apache-2.0
"""The tenant deletes an image while a worker flattens it: afterwards it is gone, or usable."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable

import pytest
import rbd

from nova_rbd_snap import errors
from nova_rbd_snap.flatten import means
from nova_rbd_snap.flatten.task import Flattening
from nova_rbd_snap.ledger.job import BACKGROUND
from nova_rbd_snap.workers.worker import Worker
from tests.faults.recording import cell
from tests.functional.world import MIB, TIMEOUT_SECONDS, World, delete
from tests.waiting import eventually

#: At how many instants of a flatten the image is deleted, and which of them CI tries.
INSTANTS, QUICK = 20, (3, 12, 19)
#: Enough objects for a flatten that lasts for a while.
DISK_BYTES = 512 * MIB
BOUND_SECONDS = 60
_DAY_SECONDS = 24 * 3600.0


class Instants:
    """A connection on which each call, and each object that a flatten has copied, is an instant.

    :ivar passed: how many there were.
    """

    def __init__(self, cluster: Any) -> None:
        self._cluster = cluster
        self._lock = threading.Lock()
        self._reached: dict[int, threading.Event] = {}
        self.passed = 0

    def reached(self, number: int) -> threading.Event:
        """Set as soon as so many instants have passed."""
        with self._lock:
            event = self._reached.setdefault(number, threading.Event())
            if self.passed >= number:
                event.set()
        return event

    def _pass(self) -> None:
        with self._lock:
            self.passed += 1
            if self.passed in self._reached:
                self._reached[self.passed].set()

    def flatten(self, image: Any, on_progress: Callable[[int, int], bool]) -> None:
        def on_object(done: int, total: int) -> bool:
            self._pass()
            return on_progress(done, total)

        self._cluster.flatten(image, on_object)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._cluster, name)
        if not callable(found):
            return found

        def call(*arguments: Any, **named: Any) -> Any:
            self._pass()
            return found(*arguments, **named)

        return call


class Queued:
    """An image that waits to be flattened, and a worker for it."""

    def __init__(self, world: World, disk: str) -> None:
        self.world, self.disk = world, disk
        settings = world.settings(policy=BACKGROUND)
        who = {"host": "functional", "life": "life-1", "cloud": "deletions"}
        engine = world.engine_with(settings, connect=lambda: world.connect(settings), **who)
        self.image_id = world.new_record(disk)
        world.register(engine, world.tenant, self.image_id, world.clone(engine, disk, self.image_id))
        self._later_seconds = 0.0
        self.cluster = Instants(world.connect(settings))
        by = means.of(means.WORKER, self.cluster)
        self._worker = Worker(
            self.cluster,
            world.vms,
            world.owner(**who)(self.cluster.address()),
            [Flattening(self.cluster, world.asked_as_service(), by, self._now)],
            limit=4,
            lease_seconds=2.0 * TIMEOUT_SECONDS,
            clock=self._now,
        )

    def _now(self) -> float:
        return time.time() + self._later_seconds

    def await_hash(self) -> None:
        """Glance reads the image, to hash it; an old one keeps others from it meanwhile."""
        eventually(lambda: self.world.is_hashed(self.image_id), "Glance has hashed the image", pause=0.1)

    def work(self) -> None:
        """Do all that is due."""
        while self._worker.work(lambda: False):
            pass

    def end(self) -> None:
        """Nobody reads the image from before it was flat any more: nothing but the disk is left."""
        self._later_seconds += _DAY_SECONDS
        eventually(lambda: self.work() or self.image_id not in self.world.jobs(), "the job is done")

    def assert_usable(self) -> None:
        world = self.world
        assert world.status(self.image_id) == "active"
        assert world.content(world.images, self.image_id, "snap") == world.content(world.vms, self.disk)
        with rbd.Image(world.ioctx[world.images], self.image_id, read_only=True) as image:
            assert image.is_protected_snap("snap")


@contextlib.contextmanager
def queued(world: World) -> Iterator[Queued]:
    disk = world.new_disk(DISK_BYTES)
    with contextlib.ExitStack() as stack:
        stack.callback(world.remove_whole, world.vms, disk)
        made = Queued(world, disk)
        stack.callback(world.remove_whole, world.images, made.image_id)
        stack.callback(world.forget_jobs, made.image_id)
        yield made


@pytest.fixture(scope="module")
def instants(world: World, readers: None) -> int:
    """How many there are in a flatten that nothing disturbs."""
    with queued(world) as undisturbed:
        undisturbed.await_hash()
        undisturbed.work()
        passed = undisturbed.cluster.passed
        undisturbed.assert_usable()
        delete(world.tenant, undisturbed.image_id)
        undisturbed.end()
    return passed


def is_deleted(image: Queued) -> bool:
    """Whether Glance deletes it."""
    try:
        image.world.tenant.delete(image.image_id)
    except errors.GlanceError as error:
        print(error.report())
        return False
    return True


@pytest.mark.parametrize(
    "instant", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in range(INSTANTS)]
)
def test_deleted_amid_its_flatten(world: World, instants: int, instant: int) -> None:
    """At instants all over it, from the worker's first look into the ledger to its last call."""
    before = world.picture()
    with cell(f"deleted at instant {instant} of {INSTANTS} of a flatten", real=True), queued(world) as found:
        found.await_hash()
        moment = found.cluster.reached(1 + instant * instants // INSTANTS)

        def delete_it() -> bool:
            assert moment.wait(BOUND_SECONDS)
            return is_deleted(found)

        with ThreadPoolExecutor() as pool:
            deletion = pool.submit(delete_it)
            found.work()
            if not deletion.result(BOUND_SECONDS):
                found.assert_usable()
                delete(world.tenant, found.image_id)
        found.end()
        assert world.picture() == {**before, f"{world.vms}/{found.disk}": []}


def test_deleted_while_glance_hashes(world: World, readers: None) -> None:
    """An old Glance refuses that, with the snapshot already gone; and may delete the record when it cannot read on."""
    before = world.picture()
    with queued(world) as found:
        if not is_deleted(found):
            found.work()
            with contextlib.suppress(errors.RecordGone):
                found.assert_usable()
                delete(world.tenant, found.image_id)
        found.end()
        assert world.picture() == {**before, f"{world.vms}/{found.disk}": []}
