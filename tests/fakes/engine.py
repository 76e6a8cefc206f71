# SPDX-License-Identifier: Apache-2.0
"""An engine on a :class:`FakeCluster`, and the names of the things it works on."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from typing import Any, Callable, Optional

from nova_rbd_snap import errors
from nova_rbd_snap.conf import Settings, Store
from nova_rbd_snap.engine import Report
from nova_rbd_snap.engine.copying import Chunks, Target, Uploads
from nova_rbd_snap.engine.service import Engine
from nova_rbd_snap.flatten.bounds import Bounds
from nova_rbd_snap.janitor.jobs import Images
from nova_rbd_snap.ledger.job import Owner, copy_id
from nova_rbd_snap.specs import GLANCE_SNAP, ImageSpec
from tests.fakes.cluster import FakeCluster

SERVER = "11111111-1111-4111-8111-111111111111"
DISK = ImageSpec("vms", f"{SERVER}_disk")
ENDLESS = f"{SERVER}_disk.endless"
DEST = ImageSpec("images", "22222222-2222-4222-8222-222222222222")
COPY = copy_id(DEST.name)
#: A store of Glance's in another cluster.
FAR = Store("far", "far.conf", "glance", "far-images")
#: What is on the disk before any snapshot: its own bytes over its base image's.
BASE = {0: b"base 0", 3: b"base 3"}
WRITTEN = {0: b"disk 0", 2: b"disk 2"}
FROZEN = {**BASE, **WRITTEN}


def populated(clone_format: int = 2) -> FakeCluster:
    """A cluster with a server's disk that is a clone of a base image in Glance's pool."""
    cluster = FakeCluster("vms", "images", clone_format=clone_format)
    base = ImageSpec("images", "base")
    cluster.create_disk(base)
    for number, data in BASE.items():
        cluster.write(base, number, data)
    cluster.create_snap(base.snap("snap"))
    cluster.protect_snap(base.snap("snap"))
    cluster.clone(base.snap("snap"), DISK, None)
    for number, data in WRITTEN.items():
        cluster.write(DISK, number, data)
    cluster.calls.clear()
    return cluster


def far_cluster() -> FakeCluster:
    """The cluster of :data:`FAR`."""
    return FakeCluster(FAR.pool, fsid="00000000-0000-4000-8000-0000000000fa")


def endless_disk(cluster: FakeCluster) -> ImageSpec:
    """Add a disk of the same server whose flatten would take longer than any test."""
    base, disk = ImageSpec("images", "endless"), ImageSpec("vms", ENDLESS)
    cluster.create_disk(base, object_count=1 << 40)
    cluster.create_snap(base.snap("snap"))
    cluster.protect_snap(base.snap("snap"))
    cluster.clone(base.snap("snap"), disk, None)
    return disk


class FakeImages:
    """Glance as an engine asks it: says the same of every record, and remembers what it was asked.

    :ivar uses_it: what it says of a record as it is.
    :ivar settles_as: what it says once it may delete a record that waits.
    """

    def __init__(self, uses_it: Optional[bool] = None, settles_as: Optional[bool] = None) -> None:
        self.uses_it, self.settles_as = uses_it, settles_as
        self.asked: list[tuple[str, str]] = []
        self.error: Optional[Exception] = None

    def uses(self, image_id: str, url: str) -> Optional[bool]:
        return self._answer(image_id, url, self.uses_it)

    def settle(self, image_id: str, url: str, server: str) -> Optional[bool]:
        assert server == SERVER
        return self._answer(image_id, url, self.settles_as)

    def _answer(self, image_id: str, url: str, answer: Optional[bool]) -> Optional[bool]:
        self.asked.append((image_id, url))
        if self.error is not None:
            raise self.error
        return answer


class FakeUploads:
    """Glance, as it takes what an engine sends it.

    :ivar sent: what it took, by image.
    """

    def __init__(self, store: Optional[str] = "file", failure: Optional[Exception] = None) -> None:
        """
        :param store: the kind of its own; ``unknown`` where it cannot be asked.
        :param failure: what every upload meets at its end.
        """
        self.sent: dict[str, tuple[Target, bytes]] = {}
        self._store, self._failure = store, failure

    def store_type(self) -> Optional[str]:
        if self._store == "unknown":
            raise errors.NotAuthorized("no credentials")
        return self._store

    def send(self, target: Target, length: int, chunks: Chunks, waiting: Callable[[], object]) -> None:
        data = b"".join(chunks())
        assert len(data) == length
        waiting()
        if self._failure is not None:
            raise self._failure
        self.sent[target.image_id] = target, data

    def give_up(self, target: Target) -> None:
        raise AssertionError("of a disk in Ceph the ledger tells")


def make_settings(**options: Any) -> Settings:
    """What an engine is told, where a test does not say otherwise."""
    values: dict[str, Any] = {
        "pool": DISK.pool,
        "ceph_conf": "",
        "ceph_user": "nova",
        "glance_pool": None,
        "glance_data_pool": None,
        "clone_format": 2,
        "flatten": "inline",
        "flatten_engine": "worker",
        "never_max_used_percent": 80,
        "flatten_workers": 1,
        "flatten_limit": 4,
        "bounds": Bounds(4, 8, 250, 450),
        "delete": "now",
        "operation_timeout": 60,
        "reclaim_interval": 60,
        "auth_section": "service_user",
    }
    return Settings(**{**values, **options})


def make_engine(
    cluster: FakeCluster,
    *,
    host: str = "compute-1",
    machine: str = "machine-1",
    life: str = "life-1",
    cloud: str = "",
    held: Iterable[str] = (),
    images: Optional[Images] = None,
    connect: Optional[Callable[[], FakeCluster]] = None,
    far: Optional[FakeCluster] = None,
    connect_to_store: Optional[Callable[[Store], Any]] = None,
    uploads: Optional[Uploads] = None,
    **options: Any,
) -> Engine:
    """An engine of *host*, each connection of which is a new one to *cluster*.

    :param life: of nova-compute.
    :param far: the cluster of the store that is called so.
    """
    if far is not None:
        options.setdefault("stores", (FAR,))
    settings = make_settings(clone_format=cluster.clone_format, **options)
    return Engine(
        settings,
        functools.partial(Owner, host, machine, life, cloud=cloud),
        held=held,
        connect=connect or cluster.another,
        connect_to_store=connect_to_store or (None if far is None else lambda store: far.another()),
        images=images or FakeImages(),
        uploads=uploads,
        clock=lambda: 1.0,
    )


def clone(
    engine: Any,
    report: Optional[Report] = None,
    image_id: str = DEST.name,
    disk: str = DISK.name,
    dest_pool: str = DEST.pool,
) -> str:
    """Reserve and perform a clone; returns the location."""
    url = engine.reserve_clone(image_id, disk, dest_pool)
    engine.perform(image_id, None, report or Reports())
    return str(url)


def freeze(engine: Any, job_id: str = COPY, disk: str = DISK.name, report: Optional[Report] = None) -> str:
    """Reserve and perform a freeze; returns the snapshot's name."""
    snap = engine.reserve_freeze(job_id, disk)
    engine.perform(job_id, None, report or Reports())
    return str(snap)


def in_thread(call: Callable[..., Any], *args: Any) -> Future[Any]:
    """What *call* comes to; a thread that hangs does not keep the tests from ending."""
    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(call(*args))
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def image(number: int) -> str:
    """The id of the image of that number."""
    return f"22222222-2222-4222-8222-{number:012}"


def unseal(cluster: FakeCluster, dest: ImageSpec) -> FakeCluster:
    """What Glance does first when an image is deleted; its connection, whose user may only read Nova's pool."""
    glance = cluster.another()
    glance.read_only = {DISK.pool}
    glance.unprotect_snap(dest.snap(GLANCE_SNAP))
    glance.remove_snap(dest.snap(GLANCE_SNAP))
    return glance


def delete_image(cluster: FakeCluster, dest: ImageSpec) -> None:
    """As Glance does."""
    unseal(cluster, dest).remove(dest)


class UntilFlattening:
    """Tells when a flatten moves."""

    def __init__(self) -> None:
        self.reached = threading.Event()

    def __call__(self, step: str, done: int, total: int) -> None:
        if step == "flatten" and total:
            self.reached.set()


class Reports:
    """Collects progress, and can hold the work at a step until a test lets it go on."""

    def __init__(self, hold_at: Optional[str] = None) -> None:
        self.steps: list[str] = []
        self.reached = threading.Event()
        self.go_on = threading.Event()
        self._hold_at = hold_at

    def __call__(self, step: str, done: int, total: int) -> None:
        self.steps.append(step)
        if step == self._hold_at:
            self.reached.set()
            if not self.go_on.wait(30):
                raise AssertionError(f"nobody let {step} go on")
