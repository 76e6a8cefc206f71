# SPDX-License-Identifier: Apache-2.0
"""Clones that are images before they are flat: what a snapshot leaves, and what the workers make of it."""

from __future__ import annotations

import threading
from typing import Any, Callable, Optional

import pytest

from nova_rbd_snap import errors
from nova_rbd_snap.flatten import means, task
from nova_rbd_snap.flatten.bounds import Bounds
from nova_rbd_snap.flatten.queue import queue_image, shared, shared_images
from nova_rbd_snap.flatten.readers import Probe
from nova_rbd_snap.flatten.task import Flattening
from nova_rbd_snap.janitor import parents
from nova_rbd_snap.janitor.purge import Purge
from nova_rbd_snap.ledger.job import AT_WORK, BACKGROUND, CLONE, FLATTEN, INLINE, NEVER, PROBE, QUEUED, Job, Owner
from nova_rbd_snap.ledger.store import OBJECT, Ledger
from nova_rbd_snap.specs import GLANCE_SNAP, ImageSpec, Location
from nova_rbd_snap.workers import lease
from nova_rbd_snap.workers.worker import Worker, keep_working
from tests.fakes.cluster import FakeCluster, Reader
from tests.fakes.engine import (
    DEST,
    DISK,
    FROZEN,
    SERVER,
    FakeImages,
    Reports,
    clone,
    delete_image,
    endless_disk,
    image,
    in_thread,
    make_engine,
    populated,
    unseal,
)
from tests.waiting import eventually

later = pytest.mark.parametrize("policy", [BACKGROUND, NEVER])
LEASE_SECONDS = 60.0
BOUND_SECONDS = 30


class Killed(BaseException):
    """The worker's process ends."""


class Clock:
    """Seconds since the epoch, as a test says."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(task, "_DELETION_SECONDS", 0.1)
    monkeypatch.setattr(task, "_READERS_SECONDS", 0.0)
    monkeypatch.setattr(means, "_LOOK_SECONDS", 0.01)


def make_worker(
    cluster: FakeCluster,
    host: str = "compute-1",
    *,
    cloud: str = "",
    images: Optional[FakeImages] = None,
    by: str = means.WORKER,
    limit: int = 4,
    lease_seconds: float = LEASE_SECONDS,
    clock: Optional[Callable[[], float]] = None,
) -> Worker:
    """A worker on a connection of its own."""
    client = cluster.another()
    return Worker(
        client,
        DISK.pool,
        Owner(host, f"machine of {host}", "life-1", client.address(), cloud),
        [
            Purge(client, clock or Clock()),
            Flattening(client, images or FakeImages(uses_it=True), means.of(by, client), clock or Clock()),
        ],
        limit=limit,
        lease_seconds=lease_seconds,
        clock=clock or Clock(),
    )


def going_on() -> bool:
    return False


class ReadingGlance:
    """Glance, which reads what it is given, or fails to."""

    def __init__(self, cluster: FakeCluster, error: Optional[Exception] = None) -> None:
        self.cluster, self.error = cluster, error
        self.seen: list[str] = []

    def read(self, image_id: str, url: str) -> bytes:
        self.seen.append(image_id)
        if self.error is not None:
            raise self.error
        return self.cluster.content(Location.parse(url).snap)[0]

    def delete(self, image_id: str) -> None:
        if isinstance(self.error, errors.GlanceError):
            raise self.error


def probe(cluster: FakeCluster, glance: ReadingGlance, now: float = 0.0) -> Worker:
    """A worker that finds out whether Glance can read."""
    client = cluster.another()
    owner = Owner("compute-1", "machine-1", "life-1", client.address())
    task = Probe(client, glance, lambda: now)
    return Worker(client, DISK.pool, owner, [task], limit=4, lease_seconds=LEASE_SECONDS, clock=lambda: now)


def jobs(cluster: FakeCluster) -> list[Job]:
    return Ledger(cluster, DISK.pool).read().jobs


def queued(cluster: FakeCluster, number: int = 0, **more: str) -> ImageSpec:
    """An image that waits to be flattened."""
    name = image(number) if number else DEST.name
    engine = make_engine(cluster, flatten=BACKGROUND, **more)
    clone(engine, image_id=name)
    engine.finish(name)
    return ImageSpec(DEST.pool, name)


def assert_flat(cluster: FakeCluster, dest: ImageSpec = DEST) -> None:
    """It holds what it shall, needs nothing, and nothing else is left."""
    assert cluster.lookup(dest).parent is None
    assert cluster.content(dest) == cluster.content(dest.snap(GLANCE_SNAP)) == FROZEN
    assert [(snap.name, snap.protected) for snap in cluster.snaps(dest)] == [(GLANCE_SNAP, True)]
    assert cluster.snaps(DISK) == []
    assert jobs(cluster) == []


# -- what a snapshot leaves --------------------------------------------------------------------------------------------


@later
def test_image_before_it_is_flat(policy: str) -> None:
    """It holds the disk's bytes as of the snapshot, whatever the guest writes later, and costs no copy; the disk's own
    snapshot stays with it; only what is to be flattened has a job."""
    cluster = populated()
    engine = make_engine(cluster, flatten=policy)
    clone(engine)
    engine.finish(DEST.name)
    cluster.write(DISK, 0, b"later")
    assert cluster.content(DEST) == cluster.content(DEST.snap(GLANCE_SNAP)) == FROZEN
    assert "flatten" not in cluster.calls
    assert [(snap.trashed, cluster.children(DISK, snap.id)) for snap in cluster.snaps(DISK)] == [(False, [DEST])]
    assert [(job.kind, job.step) for job in jobs(cluster)] == ([(FLATTEN, QUEUED)] if policy == BACKGROUND else [])


@later
def test_undone_before_it_is_flat(policy: str) -> None:
    """What no record uses goes, and with it the snapshot that waits in the trash."""
    cluster = populated()
    before = cluster.picture()
    engine = make_engine(cluster, flatten=policy)
    clone(engine)
    assert engine.rollback(DEST.name)
    assert cluster.picture() == before


@later
@pytest.mark.parametrize("settles_as", [True, False, None])
def test_dead_while_it_registered(policy: str, settles_as: Optional[bool]) -> None:
    """Glance's word alone decides: a child of the job's own snapshot may be an image in use."""
    cluster = populated()
    before = cluster.picture()
    clone(make_engine(cluster, flatten=policy))
    make_engine(cluster, life="life-2", images=FakeImages(settles_as=settles_as)).reclaim()
    if settles_as is False:
        assert cluster.picture() == before
    else:
        assert cluster.content(DEST.snap(GLANCE_SNAP)) == FROZEN
        left = {None: [AT_READY], True: [(FLATTEN, QUEUED)] if policy == BACKGROUND else []}[settles_as]
        assert [(job.kind, job.step) for job in jobs(cluster)] == left


AT_READY = ("clone", "ready")


def test_format_1_is_flat_at_once() -> None:
    """Its protected snapshot would keep the server from being deleted until then."""
    cluster = populated(clone_format=1)
    engine = make_engine(cluster, flatten=NEVER)
    clone(engine)
    engine.finish(DEST.name)
    assert_flat(cluster)


@pytest.mark.parametrize(("configured", "wanted"), [(INLINE, NEVER), (NEVER, INLINE), (BACKGROUND, INLINE)])
def test_request_may_want_another_policy(configured: str, wanted: str) -> None:
    """Then that counts, not the configured one."""
    cluster = populated()
    engine = make_engine(cluster, flatten=configured)
    engine.reserve_clone(DEST.name, DISK.name, DEST.pool, wanted)
    assert [job.flatten for job in jobs(cluster)] == [wanted]


def test_snapshot_that_could_not_be_released() -> None:
    """A frozen QEMU's disk keeps it until the image is flat, and then it goes as soon as that is possible."""
    cluster, clock = populated(), Clock()
    cluster.freeze_holder(DISK)
    queued(cluster)
    assert [snap.trashed for snap in cluster.snaps(DISK)] == [False]
    worker = make_worker(cluster, clock=clock)
    assert worker.work(going_on)
    assert cluster.lookup(DEST).parent is None
    (job,) = jobs(cluster)
    assert "does not answer" in job.failures[0]
    cluster.freeze_holder(DISK, frozen=False)
    clock.now = job.not_before
    assert worker.work(going_on)
    assert_flat(cluster)


@later
def test_image_that_glance_cannot_read(policy: str) -> None:
    """It is flattened before it is registered after all, and once Glance took it so is what follows, in every engine,
    until Glance was seen to read one that is not; else it is as ever."""
    cluster = populated()
    engine = make_engine(cluster, flatten=policy)
    clone(engine)
    assert engine.make_flat(DEST.name, Reports())
    assert not engine.make_flat(DEST.name, Reports())
    assert [job.kind for job in jobs(cluster)] == [CLONE]
    engine.distrust(DEST.name)
    engine.finish(DEST.name)
    assert [(job.kind, job.flatten) for job in jobs(cluster)] == [(PROBE, INLINE)]
    clone(make_engine(cluster, host="another host", flatten=policy), image_id=image(2))
    assert cluster.lookup(ImageSpec(DEST.pool, image(2))).parent is None
    assert probe(cluster, ReadingGlance(cluster)).work(going_on)
    assert not [job for job in jobs(cluster) if job.kind == PROBE]
    clone(engine, image_id=image(3))
    assert cluster.lookup(ImageSpec(DEST.pool, image(3))).parent is not None


def test_image_that_cannot_be_made_flat() -> None:
    """nova-compute still has the say, and rolls it back."""
    cluster = populated()
    before = cluster.picture()
    engine = make_engine(cluster, flatten=NEVER)
    clone(engine)
    cluster.fail_on("flatten", errors.NoSpace)
    with pytest.raises(errors.NoSpace):
        engine.make_flat(DEST.name, Reports())
    assert engine.rollback(DEST.name)
    assert cluster.picture() == before


# -- bounds ------------------------------------------------------------------------------------------------------------


def boot(cluster: FakeCluster, source: ImageSpec, number: int) -> ImageSpec:
    """A server's disk that is made of an image."""
    disk = ImageSpec(DISK.pool, f"{image(number)}_disk")
    cluster.clone(source.snap(GLANCE_SNAP), disk, None)
    return disk


def test_chain_of_servers_booted_from_snapshots() -> None:
    """It never gets longer than the hard bound, and what is past the soft one is queued to be flattened."""
    cluster = populated()
    engine = make_engine(cluster, flatten=NEVER, bounds=Bounds(3, 5, 250, 450))
    disk, depths, waiting = DISK, [], []
    for number in range(1, 9):
        dest = ImageSpec(DEST.pool, image(number))
        clone(engine, image_id=dest.name, disk=disk.name)
        engine.finish(dest.name)
        depths.append(len(cluster.ancestors(dest)))
        waiting.append(dest.name in {job.id for job in jobs(cluster)})
        disk = boot(cluster, dest, number)
        assert cluster.content(disk) == FROZEN
    assert depths == [2, 4, 0, 2, 4, 0, 2, 4]
    assert waiting == [False, True, False, False, True, False, False, True]


def test_depth_counts_what_is_in_the_trash() -> None:
    """A server that was deleted is still read through."""
    cluster = populated()
    engine = make_engine(cluster, flatten=NEVER, bounds=Bounds(4, 4, 250, 450))
    clone(engine)
    engine.finish(DEST.name)
    disk = boot(cluster, DEST, 1)
    assert engine.remove_disks(SERVER) == []
    assert len(cluster.ancestors(disk)) == 3
    for number, depth in ((2, 4), (3, 0)):
        dest = ImageSpec(DEST.pool, image(number))
        clone(engine, image_id=dest.name, disk=disk.name)
        engine.finish(dest.name)
        assert len(cluster.ancestors(dest)) == depth
        disk = boot(cluster, dest, number)


def test_disk_with_many_snapshots() -> None:
    """Past the soft bound the oldest image is queued with each new one, past the hard one the new image is flat."""
    cluster = populated()
    engine = make_engine(cluster, flatten=NEVER, bounds=Bounds(4, 8, 2, 5))
    cluster.create_snap(DISK.snap("operators"))
    waiting = []
    for number in range(1, 7):
        cluster.now = float(number)
        clone(engine, image_id=image(number))
        engine.finish(image(number))
        waiting.append([job.id for job in jobs(cluster)])
    first, second, third = ([image(number) for number in range(1, last)] for last in (2, 3, 4))
    assert waiting == [[], first, second, third, third, third]
    dests = [ImageSpec(DEST.pool, image(number)) for number in range(1, 7)]
    assert [len(cluster.ancestors(dest)) for dest in dests] == [2, 2, 2, 2, 0, 0]
    worker = make_worker(cluster)
    while worker.work(going_on):
        pass
    assert [len(cluster.ancestors(dest)) for dest in dests] == [0, 0, 0, 2, 0, 0]
    assert all(cluster.content(dest.snap(GLANCE_SNAP)) == FROZEN for dest in dests)


# -- workers -----------------------------------------------------------------------------------------------------------


def test_worker_flattens_what_waits() -> None:
    """One image after the other, until none waits; the oldest first."""
    cluster = populated()
    images = [queued(cluster, number) for number in (1, 2)]
    seen: list[bool] = []
    cluster.do_on("flatten", lambda *args: seen.extend(cluster.lookup(each).parent is None for each in images), nth=2)
    worker = make_worker(cluster, "another host")
    assert worker.work(going_on)
    assert seen == [True, False]
    assert not worker.work(going_on)
    for each in images:
        assert_flat(cluster, each)


def test_nobody_touches_another_clouds() -> None:
    """Its Glance alone knows what its images are."""
    cluster = populated()
    queued(cluster, cloud="theirs")
    assert not make_worker(cluster, cloud="ours").work(going_on)
    assert cluster.lookup(DEST).parent is not None


def test_limit_of_the_cloud() -> None:
    """No more images are flattened at once than there are leases, whoever would."""
    cluster = populated()
    images = [queued(cluster, number) for number in (1, 2)]
    first, others = make_worker(cluster, limit=1), [make_worker(cluster, "another host", limit=1) for _ in range(2)]
    did, stopped = [], threading.Event()

    def others_come(*args: object) -> None:
        did.extend(other.work(going_on) for other in others)

    cluster.do_on("flatten", others_come)
    cluster.do_on("flatten", lambda *args: stopped.set(), applied=True)
    assert first.work(stopped.is_set)
    assert did == [False, False]
    assert [cluster.lookup(each).parent is None for each in images] == [True, False]
    assert others[0].work(going_on)
    assert_flat(cluster, images[1])


def killed_amid(cluster: FakeCluster, *, applied: bool = False) -> Worker:
    """A worker that is killed while it flattens, with its lease, or right after."""
    dead = make_worker(cluster, "dead host")

    def die(*args: object) -> None:
        raise Killed

    cluster.do_on("flatten", die, applied=applied)
    # Nothing of a process that is killed gives the lease back.
    cluster.do_on("end_lease", die)
    with pytest.raises(Killed):
        dead.work(going_on)
    cluster.heal()
    return dead


def test_dead_worker() -> None:
    """As long as its lease lasts nobody touches its job; then exactly its client is cut off, and another goes on."""
    cluster = populated()
    queued(cluster)
    killed_amid(cluster)
    (job,) = jobs(cluster)
    assert (job.step, job.owner.host) == (AT_WORK, "dead host")
    worker = make_worker(cluster)
    assert not worker.work(going_on)
    assert cluster.fenced == set()
    cluster.let_pass(LEASE_SECONDS)
    assert worker.work(going_on)
    assert cluster.fenced == {job.owner.client}
    assert_flat(cluster)


def test_dead_worker_that_cannot_be_cut_off() -> None:
    """Then its job is left alone, and others go on."""
    cluster = populated()
    queued(cluster)
    killed_amid(cluster)
    cluster.let_pass(LEASE_SECONDS)
    worker = make_worker(cluster)
    worker._cluster.may_fence = False
    queued(cluster, 2)
    assert worker.work(going_on)
    assert [cluster.lookup(each).parent is None for each in (DEST, ImageSpec(DEST.pool, image(2)))] == [False, True]


def test_lease_is_kept_while_the_work_lasts() -> None:
    """However long that is, nobody else gets it."""
    cluster = populated()
    queued(cluster)
    other = make_worker(cluster, "another host")

    def lasts(*args: object) -> None:
        eventually(lambda: cluster.calls.count("renew_lease") > 4, "the lease is renewed again and again", pause=0.01)
        assert not other.work(going_on)

    cluster.do_on("flatten", lasts)
    assert make_worker(cluster, lease_seconds=0.2).work(going_on)
    assert cluster.fenced == set()
    assert_flat(cluster)


def test_worker_that_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a call of librbd that does not come back it keeps its lease no longer: it is cut off, and another goes on."""
    monkeypatch.setattr(lease, "_STUCK_SECONDS", 0.5)
    cluster = populated()
    queued(cluster)
    stuck, other = make_worker(cluster, "stuck", lease_seconds=0.2), make_worker(cluster, "other")

    def hang(*args: object) -> None:
        cluster.heal()
        eventually(lambda: other.work(going_on), "another goes on", pause=0.01)

    cluster.do_on("flatten", hang)
    with pytest.raises(errors.Blocklisted):
        stuck.work(going_on)
    assert_flat(cluster)


def test_progress_is_in_the_ledger() -> None:
    """For people, who need not find the worker first; it starts anew with the flatten."""
    cluster = populated()
    queued(cluster)
    seen: list[int] = []

    def lasts(dest: ImageSpec, on_progress: Callable[[int, int], bool]) -> None:
        for done in (30, 60):
            on_progress(done, 100)
            seen.append(eventually(lambda done=done: jobs(cluster)[0].percent == done and done, "noted", pause=0.01))

    cluster.do_on("flatten", lasts)
    assert make_worker(cluster).work(going_on)
    assert seen == [30, 60]
    assert_flat(cluster)


def test_worker_that_lost_its_lease() -> None:
    """It stops, and whoever took over goes on."""
    cluster = populated()
    queued(cluster)
    slow, other = make_worker(cluster, "slow"), make_worker(cluster, "other")

    def others_come(*args: object) -> None:
        cluster.let_pass(LEASE_SECONDS)
        other.work(going_on)

    cluster.do_on("flatten", others_come)
    with pytest.raises(errors.Blocklisted):
        slow.work(going_on)
    assert_flat(cluster)


@pytest.mark.parametrize("step", [QUEUED, AT_WORK])
def test_operators_word(step: str) -> None:
    """A job is queued to be done at once; who had it at work is cut off, and nobody who only queued it."""
    cluster = populated()
    queued(cluster)
    ledger = Ledger(cluster, DISK.pool)
    (job,) = ledger.read().jobs
    job = ledger.advance(job, step=step, attempts=5, not_before=10**10)
    assert make_engine(cluster, host="operator").end(job.id, "") == "queued"
    assert cluster.fenced == ({job.owner.client} if step == AT_WORK else set())
    assert make_worker(cluster).work(going_on)
    assert_flat(cluster)


def test_worker_that_is_stopped() -> None:
    """It stops between two objects, and the job waits for the next one."""
    cluster = populated()
    queued(cluster)
    stopped = threading.Event()
    cluster.do_on("flatten", lambda *args: stopped.set())
    assert make_worker(cluster).work(stopped.is_set)
    assert [job.step for job in jobs(cluster)] == [QUEUED]
    assert cluster.content(DEST) == FROZEN
    assert make_worker(cluster, "another host").work(going_on)
    assert cluster.fenced == set()
    assert_flat(cluster)


def test_flatten_that_fails() -> None:
    """The image stays usable; it is tried again later and later, and what is in its way is on record."""
    cluster, clock = populated(), Clock()
    queued(cluster)
    cluster.fill(DEST.pool)
    worker, pauses = make_worker(cluster, clock=clock), []
    for attempt in range(1, 10):
        assert worker.work(going_on)
        assert not worker.work(going_on)
        (job,) = jobs(cluster)
        assert (job.step, job.attempts) == (QUEUED, attempt)
        assert "is full" in job.failures[0]
        pauses.append(job.not_before - clock.now)
        clock.now = job.not_before
    assert pauses == sorted(pauses)
    assert pauses[0] < pauses[-1] == pauses[-2]
    assert cluster.content(DEST.snap(GLANCE_SNAP)) == FROZEN
    cluster.fill(DEST.pool, full=False)
    assert worker.work(going_on)
    assert_flat(cluster)


# -- the tenant deletes the image meanwhile ----------------------------------------------------------------------------


@pytest.mark.parametrize("uses_it", [False, None])
def test_hostile_record(uses_it: Optional[bool]) -> None:
    """It makes nobody seal, or remove, what is no clone of the disk that it names; nor does it stay for ever, unless
    Glance never says whether it uses that."""
    cluster = populated()
    queued(cluster)
    (job,) = jobs(cluster)
    theirs = ImageSpec(DEST.pool, image(9))
    cluster.create_disk(theirs)
    text = job.encode().replace(job.id, theirs.name).replace(str(job.dest_id), cluster.lookup(theirs).id)
    cluster.omap_replace(DISK.pool, OBJECT, theirs.name, None, text)
    before = cluster.picture()["images"]["images"][theirs.name]
    worker = make_worker(cluster, images=FakeImages(uses_it=uses_it), clock=lambda: 10.0**10)
    for _ in range(3):
        worker.work(going_on)
    assert cluster.picture()["images"]["images"][theirs.name] == before
    assert [found.id for found in jobs(cluster)] == [theirs.name] * (uses_it is None)


def test_deletion_amid_the_look_at_it() -> None:
    """Glance gets through just as it is asked."""
    cluster = populated()
    before = cluster.picture()
    queued(cluster)
    unseal(cluster, DEST)

    class Slow(FakeImages):
        def uses(self, image_id: str, url: str) -> Optional[bool]:
            cluster.remove(DEST)
            return False

    assert make_worker(cluster, images=Slow()).work(going_on)
    assert cluster.picture() == before


around = pytest.mark.parametrize("when", ["before", "flatten", "give_object_map"])


def unseal_around_flatten(cluster: FakeCluster, when: str) -> None:
    if when == "before":
        unseal(cluster, DEST)
    else:
        cluster.do_on(when, lambda *args: unseal(cluster, DEST), applied=True)


@around
@pytest.mark.parametrize("uses_it", [True, None])
def test_deletion_that_fails_over_the_flatten(when: str, uses_it: Optional[bool]) -> None:
    """Glance could not remove what is open here, so the record lives, or may: it gets back what its location names."""
    cluster = populated()
    queued(cluster)
    worker = make_worker(cluster, images=FakeImages(uses_it=uses_it))
    unseal_around_flatten(cluster, when)
    assert worker.work(going_on)
    assert_flat(cluster)


@pytest.mark.usefixtures("real_days")
@pytest.mark.parametrize("uses_it", [True, False])
def test_deletion_that_fails_over_somebody_else(uses_it: bool) -> None:
    """Of a flat image, as long as its job waits for readers: it is made whole, if Glance's record lives. If not it
    goes, and what was kept for it."""
    cluster, clock = populated(), Clock()
    before = cluster.picture()
    queued(cluster)
    worker = make_worker(cluster, images=FakeImages(uses_it=uses_it), clock=clock)
    assert worker.work(going_on)
    unseal(cluster, DEST)
    clock.now = jobs(cluster)[0].not_before
    assert worker.work(going_on)
    if not uses_it:
        assert cluster.picture() == before
        return
    assert [snap.name for snap in cluster.snaps(DEST)] == [GLANCE_SNAP]
    clock.now += DAY
    assert worker.work(going_on)
    assert_flat(cluster)


@pytest.mark.parametrize("uses_it", [True, False])
def test_deletion_that_fails_over_a_worker_that_died(uses_it: bool) -> None:
    """After the flatten, and before it had said so: what is flat, and without its snapshot, is known by its mark."""
    cluster = populated()
    before = cluster.picture()
    queued(cluster)
    killed_amid(cluster, applied=True)
    unseal(cluster, DEST)
    cluster.let_pass(LEASE_SECONDS)
    assert make_worker(cluster, images=FakeImages(uses_it=uses_it)).work(going_on)
    if uses_it:
        assert_flat(cluster)
    else:
        assert cluster.picture() == before


@pytest.mark.parametrize("uses_it", [True, False])
def test_deletion_ends_the_flatten(uses_it: bool) -> None:
    """It is not waited for: of a large image that would take hours."""
    cluster = populated()
    huge = endless_disk(cluster)
    engine = make_engine(cluster, flatten=BACKGROUND)
    clone(engine, disk=huge.name)
    engine.finish(DEST.name)
    stopped = threading.Event()
    cluster.do_on("flatten", lambda *args: unseal(cluster, DEST))
    working = in_thread(make_worker(cluster, images=FakeImages(uses_it=uses_it)).work, stopped.is_set)
    if uses_it:
        # It is whole again, and flattened on.
        eventually(lambda: cluster.calls.count("flatten") == 2, "the flatten goes on", pause=0.01)
        assert [(snap.name, snap.protected) for snap in cluster.snaps(DEST)] == [(GLANCE_SNAP, True)]
    else:
        eventually(lambda: not cluster.exists(DEST), "the image is removed", pause=0.01)
    stopped.set()
    assert working.result(BOUND_SECONDS)


@around
def test_deletion_that_gets_through(when: str) -> None:
    """The record is gone: so is the image then, and all that was kept for it."""
    cluster = populated()
    before = cluster.picture()
    queued(cluster)
    worker = make_worker(cluster, images=FakeImages(uses_it=False))
    unseal_around_flatten(cluster, when)
    assert worker.work(going_on)
    assert cluster.picture() == before


def test_image_that_is_gone() -> None:
    """Its job goes, too."""
    cluster = populated()
    before = cluster.picture()
    queued(cluster)
    unseal(cluster, DEST)
    cluster.remove(DEST)
    assert make_worker(cluster).work(going_on)
    assert cluster.picture() == before


def test_image_that_is_another_by_now() -> None:
    """It is left alone."""
    cluster = populated()
    queued(cluster)
    unseal(cluster, DEST)
    cluster.remove(DEST)
    cluster.create_disk(DEST)
    after = cluster.picture()["images"]
    assert make_worker(cluster).work(going_on)
    assert cluster.picture()["images"] == after
    assert jobs(cluster) == []


# -- the server is deleted ---------------------------------------------------------------------------------------------


def clear(cluster: FakeCluster, now: float) -> None:
    """As one engine of all does, once an hour."""
    list(parents.clear(cluster, DISK.pool, [DEST.pool], FakeImages(uses_it=True), now))


def work_for_days(cluster: FakeCluster) -> None:
    """All that waits for a while is done, too."""
    clock = Clock()
    for _ in range(3):
        clock.now += DAY
        while make_worker(cluster, clock=clock).work(going_on):
            pass
        clear(cluster, clock.now)


@later
def test_server_of_an_image_that_is_not_flat(policy: str) -> None:
    """Its disk is gone for Nova at once; the image is whole, and with its last one the disk is gone for good."""
    cluster = populated()
    engine = make_engine(cluster, flatten=policy)
    images = [ImageSpec(DEST.pool, image(number)) for number in (1, 2)]
    for each in images:
        clone(engine, image_id=each.name)
        engine.finish(each.name)
    assert engine.cancel(SERVER) == []
    assert engine.remove_disks(SERVER) == []
    assert not cluster.exists(DISK)
    for each in images:
        assert [waiting.name for waiting in cluster.trashed(DISK.pool)] == [DISK.name]
        assert cluster.content(each.snap(GLANCE_SNAP)) == FROZEN
        delete_image(cluster, each)
    work_for_days(cluster)
    assert cluster.trashed(DISK.pool) == []
    assert jobs(cluster) == []


@later
@pytest.mark.parametrize("is_registered", [True, False])
def test_server_that_is_deleted_before_the_image_is_registered(policy: str, is_registered: bool) -> None:
    """What is ready needs the disk no more: the deletion does not wait for Glance, and nothing is left either way."""
    cluster = populated()
    engine = make_engine(cluster, flatten=policy)
    clone(engine)
    assert engine.cancel(SERVER) == []
    assert engine.remove_disks(SERVER) == []
    assert not cluster.exists(DISK)
    if is_registered:
        engine.finish(DEST.name)
        assert cluster.content(DEST.snap(GLANCE_SNAP)) == FROZEN
        make_worker(cluster).work(going_on)
        assert cluster.content(DEST.snap(GLANCE_SNAP)) == FROZEN
        delete_image(cluster, DEST)
        work_for_days(cluster)
    else:
        assert engine.rollback(DEST.name)
    assert not cluster.exists(DEST)
    assert cluster.trashed(DISK.pool) == []
    assert jobs(cluster) == []


@later
def test_server_is_deleted_amid_its_snapshot(policy: str) -> None:
    """The deletion wins: nothing is left, not even in the trash."""
    cluster, report = populated(), Reports(hold_at="seal")
    engine = make_engine(cluster, flatten=policy)
    working = in_thread(clone, engine, report)
    assert report.reached.wait(BOUND_SECONDS)
    cancelling = in_thread(engine.cancel, SERVER)
    eventually(engine._busy[DEST.name].cancelled.is_set, "it is cancelled", pause=0.01)
    report.go_on.set()
    cancelling.result(BOUND_SECONDS)
    working.exception(BOUND_SECONDS)
    engine.rollback(DEST.name)  # as nova-compute does once the server is gone
    assert engine.remove_disks(SERVER) == []
    assert cluster.images(DISK.pool) == []
    assert cluster.trashed(DISK.pool) == []
    assert not cluster.exists(DEST)


# -- an engine's own workers -------------------------------------------------------------------------------------------


def test_engine_flattens_what_it_made() -> None:
    """At once, and what others made at its next look; it ends when the engine does."""
    cluster = populated()
    engine = make_engine(cluster, flatten=BACKGROUND, images=FakeImages(uses_it=True))
    working = in_thread(engine.upkeep.keep_working, FLATTEN)
    clone(engine)
    engine.finish(DEST.name)
    eventually(lambda: not jobs(cluster), "the engine flattens its image", pause=0.01)
    assert_flat(cluster)
    engine.stop(BOUND_SECONDS)
    working.result(BOUND_SECONDS)


def test_engine_that_is_stopped_amid_a_flatten() -> None:
    """It waits until the flatten has stopped, and leaves the job to others."""
    cluster = populated()
    huge = endless_disk(cluster)
    engine = make_engine(cluster, flatten=BACKGROUND)
    working = in_thread(engine.upkeep.keep_working, FLATTEN)
    clone(engine, disk=huge.name)
    engine.finish(DEST.name)
    eventually(lambda: [job.step for job in jobs(cluster)] == [AT_WORK], "the engine flattens", pause=0.01)
    engine.stop(BOUND_SECONDS)
    assert [job.step for job in jobs(cluster)] == [QUEUED]
    working.result(BOUND_SECONDS)


def test_cluster_that_does_not_answer(caplog: pytest.LogCaptureFixture) -> None:
    """It is told once, and tried again on a new connection at each look."""
    cluster, refusals = populated(), 3
    queued(cluster)
    attempts: list[object] = []

    def make() -> Worker:
        attempts.append(object())
        if len(attempts) <= refusals:
            raise errors.Unreachable("no answer")
        return make_worker(cluster)

    keep_working(lambda: True, make, lambda: not jobs(cluster), lambda: None)
    assert len(attempts) == refusals + 1
    assert len([record for record in caplog.records if "no answer" in record.message]) == 1
    assert_flat(cluster)


# -- who has the image open from before --------------------------------------------------------------------------------

DAY = 24 * 3600.0


@pytest.fixture
def real_days(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "_READERS_SECONDS", DAY)


def with_zeros(cluster: FakeCluster) -> ImageSpec:
    """An image that waits to be flattened, of a disk that has zeros written to it."""
    cluster.write(DISK, 1, b"")
    return queued(cluster)


def read(reader: Reader) -> dict[int, bytes]:
    return {number: data for number in range(4) if (data := reader.read(number))}


@pytest.mark.usefixtures("real_days")
def test_download_goes_on() -> None:
    """It began before the image was flat, and gets what was frozen, not what the server writes meanwhile: for a day the
    disk's snapshot stays, and then goes."""
    cluster, clock = populated(), Clock()
    with_zeros(cluster)
    reader = cluster.open_reader(DEST.snap(GLANCE_SNAP))
    worker = make_worker(cluster, clock=clock)
    assert worker.work(going_on)
    assert cluster.lookup(DEST).parent is None
    for number in range(4):
        cluster.write(DISK, number, b"later")
    assert read(reader) == FROZEN
    flat_at = clock.now
    while clock.now < flat_at + DAY:
        (job,) = jobs(cluster)
        assert (job.step, job.attempts) == (QUEUED, 0)
        assert "stays" in job.failures[0]
        assert not worker.work(going_on)
        clock.now = job.not_before
        assert worker.work(going_on)
    assert clock.now == flat_at + DAY
    assert_flat(cluster)


@pytest.mark.usefixtures("real_days")
def test_server_that_was_booted_goes_on() -> None:
    """However long it lives; one that was booted of the flat image is not waited for."""
    cluster, clock = populated(), Clock()
    dest = with_zeros(cluster)
    cluster.now = clock.now
    booted = boot(cluster, dest, 1)
    reader = cluster.open_reader(dest.snap(GLANCE_SNAP))
    worker = make_worker(cluster, clock=clock)
    while clock.now < 5 * DAY:
        assert worker.work(going_on)
        (job,) = jobs(cluster)
        cluster.write(DISK, 1, b"later")
        assert read(reader) == FROZEN
        clock.now = job.not_before
    assert str(booted) in job.failures[0]
    cluster.now = clock.now
    boot(cluster, dest, 2)
    cluster.remove(booted)
    assert worker.work(going_on)
    assert_flat(cluster)


@pytest.mark.usefixtures("real_days")
def test_server_in_the_trash_may_be_read() -> None:
    """By an image of its own that is not flat."""
    cluster, clock = populated(), Clock()
    dest = with_zeros(cluster)
    cluster.now = clock.now
    booted = boot(cluster, dest, 1)
    engine = make_engine(cluster, flatten=NEVER)
    clone(engine, image_id=image(2), disk=booted.name)
    engine.finish(image(2))
    second = ImageSpec(DEST.pool, image(2))
    reader = cluster.open_reader(second.snap(GLANCE_SNAP))
    assert engine.remove_disks(image(1)) == []
    worker = make_worker(cluster, clock=clock)
    while clock.now < 3 * DAY:
        assert worker.work(going_on)
        clock.now = jobs(cluster)[0].not_before
        cluster.write(DISK, 1, b"later")
        assert read(reader) == FROZEN
    delete_image(cluster, second)
    clear(cluster, clock.now)
    assert worker.work(going_on)
    assert_flat(cluster)


@pytest.mark.usefixtures("real_days")
def test_nothing_waits_for_readers_of_what_is_gone() -> None:
    """With the image goes the snapshot."""
    cluster, clock = populated(), Clock()
    with_zeros(cluster)
    worker = make_worker(cluster, clock=clock)
    assert worker.work(going_on)
    delete_image(cluster, DEST)
    clock.now = jobs(cluster)[0].not_before
    assert worker.work(going_on)
    assert jobs(cluster) == []
    assert cluster.snaps(DISK) == []


@pytest.mark.usefixtures("real_days")
@pytest.mark.parametrize("is_flat", [True, False])
@pytest.mark.parametrize("is_rebuilt", [True, False])
def test_server_is_deleted_while_its_image_is_read(is_flat: bool, is_rebuilt: bool) -> None:
    """Its disk stays in the trash until the reading has ended: what is zeros there is something else in its base."""
    cluster, clock = populated(), Clock()
    cluster.write(DISK, 0, b"")
    content = {number: data for number, data in cluster.content(DISK).items() if data}
    queued(cluster)
    reader = cluster.open_reader(DEST.snap(GLANCE_SNAP))
    worker = make_worker(cluster, clock=clock)
    assert is_flat == (is_flat and worker.work(going_on))
    cluster.write(DISK, 0, b"later")
    assert make_engine(cluster).remove_disks(SERVER) == []
    assert not cluster.exists(DISK)
    if is_rebuilt:
        cluster.create_disk(DISK)
    worker.work(going_on)
    assert cluster.lookup(DEST).parent is None
    assert read(reader) == content
    clock.now += DAY / 2
    worker.work(going_on)
    assert read(reader) == content
    work_for_days(cluster)
    assert cluster.trashed(DISK.pool) == []
    assert jobs(cluster) == []


@pytest.mark.usefixtures("real_days")
def test_image_of_a_deleted_server_is_not_flattened() -> None:
    """Where librbd would remove the disk with that, while somebody reads."""
    cluster, clock = populated(), Clock()
    engine = make_engine(cluster, flatten=NEVER)
    clone(engine)
    engine.finish(DEST.name)
    assert engine.remove_disks(SERVER) == []
    found = shared(cluster, DEST)
    assert found is not None
    queue_image(found, Ledger(cluster, DISK.pool), Owner("host", "machine", "life", cluster.address()), clock.now)
    worker = make_worker(cluster, clock=clock)
    assert worker.work(going_on)
    (job,) = jobs(cluster)
    assert "is not made flat" in job.failures[0]
    assert cluster.lookup(DEST).parent is not None
    delete_image(cluster, DEST)
    work_for_days(cluster)
    assert cluster.trashed(DISK.pool) == []
    assert jobs(cluster) == []


def test_map_of_the_objects() -> None:
    """There is none until the image is flat, and then there is, also where the worker died in between."""
    cluster = populated()
    queued(cluster)
    assert not cluster._open(DEST).has_map
    cluster.fail_on("give_object_map", errors.Unreachable)
    clock = Clock()
    worker = make_worker(cluster, clock=clock)
    assert worker.work(going_on)
    assert not cluster._open(DEST).has_map
    clock.now = jobs(cluster)[0].not_before
    assert worker.work(going_on)
    assert cluster._open(DEST).has_map
    assert_flat(cluster)


def test_map_that_somebody_gave() -> None:
    """It is taken away before the image is flattened, for it would hide what is copied."""
    cluster = populated()
    queued(cluster)
    cluster.give_object_map(DEST)
    reader: list[Reader] = []
    cluster.do_on("flatten", lambda *args: reader.append(cluster.open_reader(DEST.snap(GLANCE_SNAP))))
    assert make_worker(cluster).work(going_on)
    assert read(reader[0]) == FROZEN


# -- what the reviews found --------------------------------------------------------------------------------------------


def test_glance_that_cannot_be_asked() -> None:
    """Over a deletion that failed: the record may be alive, so it gets its data back."""
    cluster = populated()
    queued(cluster)
    images = FakeImages()
    images.error = errors.NotAuthorized("no role")
    unseal_around_flatten(cluster, "flatten")
    assert make_worker(cluster, images=images).work(going_on)
    assert_flat(cluster)


def test_image_without_its_snapshot_does_not_wait_long() -> None:
    """Whatever was in the way: until it is made again the image cannot be used."""
    cluster, clock = populated(), Clock()
    queued(cluster)
    unseal_around_flatten(cluster, "flatten")
    for nth in range(1, 4):
        cluster.fail_on("create_snap", errors.CephError, nth=nth)
    worker = make_worker(cluster, clock=clock)
    for _ in range(3):
        assert worker.work(going_on)
        (job,) = jobs(cluster)
        assert job.not_before - clock.now <= 60
        clock.now = job.not_before
    assert worker.work(going_on)
    assert_flat(cluster)


def test_deletions_over_and_over() -> None:
    """Each that does not succeed leaves the image whole."""
    cluster, clock = populated(), Clock()
    queued(cluster)
    cluster.do_on("flatten", lambda *args: unseal(cluster, DEST), applied=True)
    for nth in range(1, 4):
        cluster.do_on("protect_snap", lambda *args: unseal(cluster, DEST), nth=nth, applied=True)
    assert make_worker(cluster, clock=clock).work(going_on)
    assert_flat(cluster)


def test_image_that_stock_nova_still_flattens() -> None:
    """It is not sealed, so it is no image yet: nobody queues it."""
    cluster = populated()
    stock = DISK.snap("0123456789abcdef" * 2)
    cluster.create_snap(stock)
    cluster.clone(stock, DEST, None)
    assert list(shared_images(cluster, DISK.pool, [DEST.pool])) == []
    cluster.create_snap(DEST.snap(GLANCE_SNAP))
    assert list(shared_images(cluster, DISK.pool, [DEST.pool])) == []
    cluster.protect_snap(DEST.snap(GLANCE_SNAP))
    assert [found.image for found in shared_images(cluster, DISK.pool, [DEST.pool])] == [DEST]


@pytest.mark.parametrize("became", ["done", "another's"])
def test_nobody_is_cut_off_for_what_was_read_before(became: str) -> None:
    """A job was done, or taken, between the reading of the ledger and the lease."""
    cluster = populated()
    queued(cluster)
    ledger = Ledger(cluster, DISK.pool)
    (job,) = ledger.read().jobs
    job = ledger.advance(job, step=AT_WORK)

    def change(*args: object) -> None:
        if became == "done":
            ledger.forget(job)
        else:
            ledger.advance(job, owner=Owner("compute-2", "machine-2", "life-1", "192.0.2.9:0/9"))

    cluster.do_on("take_lease", change)
    assert not make_worker(cluster).work(going_on)
    assert cluster.fenced == set()


def test_job_that_failed_for_years() -> None:
    """It is tried once an hour, and keeps no other from being done."""
    cluster, clock = populated(), Clock()
    queued(cluster, 1)
    queued(cluster, 2)
    ledger = Ledger(cluster, DISK.pool)
    ledger.advance(ledger.read().jobs[0], attempts=10**6)
    cluster.fail_on("flatten", errors.CephError)
    assert make_worker(cluster, clock=clock).work(going_on)
    (job,) = jobs(cluster)
    assert (job.step, job.attempts, job.not_before - clock.now) == (QUEUED, 10**6 + 1, 3600.0)


@pytest.mark.parametrize("step", [QUEUED, AT_WORK])
def test_operator_gives_a_job_to_another_cloud(step: str) -> None:
    """Keystone's address was changed, so to speak: no worker of ours takes it until then."""
    cluster = populated()
    queued(cluster, cloud="http://old")
    ledger = Ledger(cluster, DISK.pool)
    ledger.advance(ledger.read().jobs[0], step=step)
    assert not make_worker(cluster, cloud="http://new").work(going_on)
    operator = make_engine(cluster, host="operator", cloud="http://old")
    assert operator.end(DEST.name, "http://new") == "queued"
    assert make_worker(cluster, cloud="http://new").work(going_on)
    assert_flat(cluster)


def test_no_connection_is_made_for_what_others_do() -> None:
    """A job at work elsewhere, whose lease is held, is no reason to connect; once it is free it is."""
    cluster = populated()
    queued(cluster)
    dead = killed_amid(cluster)
    made: list[object] = []
    engine = make_engine(cluster, host="compute-2", reclaim_interval=0)
    engine.upkeep._connect = lambda: made.append(object()) or cluster.another()  # type: ignore[func-returns-value]
    working = in_thread(engine.upkeep.keep_working, FLATTEN)
    seen = cluster.calls.count("take_lease")
    eventually(lambda: cluster.calls.count("take_lease") > seen + 5, "it looks", pause=0.01)
    assert made == []
    cluster.let_pass(LEASE_SECONDS)
    eventually(lambda: not jobs(cluster), "it is taken over", pause=0.01)
    assert cluster.fenced == {dead._owner.client}
    engine.stop(BOUND_SECONDS)
    working.result(BOUND_SECONDS)


# -- strain ------------------------------------------------------------------------------------------------------------


def test_cluster_under_strain() -> None:
    """No flatten is begun, which is no failure; it is looked again in a minute."""
    cluster, clock = populated(), Clock()
    queued(cluster)
    cluster.put_under_strain("Ceph reports 3 slow ops")
    worker = make_worker(cluster, clock=clock)
    assert worker.work(going_on)
    (job,) = jobs(cluster)
    assert (job.step, job.attempts, job.not_before - clock.now) == (QUEUED, 0, 60.0)
    assert "3 slow ops" in job.failures[0]
    assert "flatten" not in cluster.calls
    cluster.put_under_strain(None)
    clock.now = job.not_before
    assert worker.work(going_on)
    assert_flat(cluster)


def test_strain_amid_a_flatten(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stops between two objects."""
    monkeypatch.setattr(task, "_STRAIN_LOOKS", 1)
    cluster = populated()
    huge = endless_disk(cluster)
    engine = make_engine(cluster, flatten=BACKGROUND)
    clone(engine, disk=huge.name)
    engine.finish(DEST.name)
    cluster.do_on("flatten", lambda *args: cluster.put_under_strain("Ceph recovers 7 placement groups"))
    assert in_thread(make_worker(cluster).work, going_on).result(BOUND_SECONDS)
    (job,) = jobs(cluster)
    assert (job.step, job.attempts) == (QUEUED, 0)
    assert "7 placement groups" in job.failures[0]


def test_strain_that_may_not_be_asked_about() -> None:
    """It does not keep an image from being flattened."""
    cluster = populated()
    queued(cluster)
    cluster.fail_on("strain", errors.NoPermission)
    assert make_worker(cluster).work(going_on)
    assert_flat(cluster)


# -- the manager's queue -----------------------------------------------------------------------------------------------


def test_manager_flattens() -> None:
    """The worker only watches; in the end all is as if it had done it."""
    cluster = populated()
    queued(cluster)
    seen: list[Optional[str]] = []
    cluster.do_on("flatten_task", lambda *args: seen.append(jobs(cluster)[0].task), nth=3)
    assert make_worker(cluster, by=means.MANAGER).work(going_on)
    assert_flat(cluster)
    assert seen != [None]


def test_manager_that_fails() -> None:
    """Our task is cancelled, and it is tried again later."""
    cluster, clock = populated(), Clock()
    queued(cluster)
    cluster.fail_in_manager("no space")
    worker = make_worker(cluster, by=means.MANAGER, clock=clock)
    assert worker.work(going_on)
    (job,) = jobs(cluster)
    assert job.attempts == 1
    assert "no space" in job.failures[0]
    cluster.fail_in_manager("")
    assert cluster.flatten_task(DEST) is None
    clock.now = job.not_before
    assert worker.work(going_on)
    assert_flat(cluster)


@pytest.mark.parametrize("uses_it", [True, False])
def test_image_is_deleted_while_the_manager_flattens(uses_it: bool) -> None:
    """Our task is cancelled; then as ever."""
    cluster = populated()
    before = cluster.picture()
    queued(cluster)
    cluster.do_on("flatten_task", lambda *args: unseal(cluster, DEST), nth=2)
    slowly = threading.Event()
    cluster.do_on("flatten_task", lambda *args: slowly.wait(0.1), nth=3)
    assert make_worker(cluster, by=means.MANAGER, images=FakeImages(uses_it=uses_it)).work(going_on)
    if uses_it:
        assert_flat(cluster)
    else:
        assert cluster.picture() == before


def test_task_of_somebody_else() -> None:
    """It is waited for, and never cancelled, whatever happens."""
    cluster = populated()
    queued(cluster)
    theirs = cluster.queue_flatten(DEST)
    stopped = threading.Event()
    cluster.do_on("flatten_task", lambda *args: stopped.set(), nth=2)
    assert make_worker(cluster, by=means.MANAGER).work(stopped.is_set)
    assert "cancel_task" not in cluster.calls
    task_now = cluster.flatten_task(DEST)
    assert task_now is not None
    assert task_now.id == theirs.id
    assert make_worker(cluster, by=means.MANAGER).work(going_on)
    assert_flat(cluster)


def test_nobody_seals_while_somebody_else_flattens() -> None:
    """What a snapshot would show is not certain then; it is made once the task has ended."""
    cluster, clock = populated(), Clock()
    queued(cluster)
    cluster.queue_flatten(DEST)
    unseal(cluster, DEST)
    sealed: list[object] = []
    cluster.do_on("create_snap", lambda *args: sealed.append(cluster.flatten_task(DEST)))
    worker = make_worker(cluster, by=means.MANAGER, clock=clock)
    for _ in range(10):
        worker.work(going_on)
        clock.now += 3600
    assert sealed == [None]
    assert_flat(cluster)


# -- whether Glance can read -------------------------------------------------------------------------------------------


def ask(cluster: FakeCluster) -> None:
    """Have it found out, as an engine does when it starts."""
    engine = make_engine(cluster, flatten=BACKGROUND, glance_pool=DEST.pool)
    engine.upkeep.ask_readers()


def test_glance_reads() -> None:
    """It is given a clone of a disk that nobody needs, and its answer compared; nothing is left of that."""
    cluster = populated()
    before = cluster.picture()
    ask(cluster)
    ask(cluster)
    assert [job.kind for job in jobs(cluster)] == [PROBE]
    glance = ReadingGlance(cluster)
    assert probe(cluster, glance).work(going_on)
    assert len(glance.seen) == 1
    assert cluster.picture() == before


@pytest.mark.parametrize("error", [errors.NotReadable("no rights"), errors.GlanceSilent("no answer")])
def test_glance_that_does_not_read(error: errors.SnapError) -> None:
    """It is asked again and again; only if it said that it cannot all is flattened at once meanwhile."""
    cluster = populated()
    ask(cluster)
    before = cluster.picture()["images"], cluster.picture()["vms"]["images"]
    glance, now = ReadingGlance(cluster, error), 0.0
    for attempt in range(1, 4):
        assert probe(cluster, glance, now).work(going_on)
        (job,) = jobs(cluster)
        assert (job.step, job.attempts, len(glance.seen)) == (QUEUED, attempt, attempt)
        assert str(error) in job.failures[0]
        now = job.not_before
    assert len(set(glance.seen)) == 3
    assert (cluster.picture()["images"], cluster.picture()["vms"]["images"]) == before
    clone(make_engine(cluster, host="compute-2", flatten=NEVER))
    assert (cluster.lookup(DEST).parent is None) == isinstance(error, errors.NotReadable)
    glance.error = None
    assert probe(cluster, glance, now).work(going_on)
    assert not [job for job in jobs(cluster) if job.kind == PROBE]


def test_glance_that_reads_something_else() -> None:
    """That is no reading."""
    cluster = populated()
    ask(cluster)
    glance = ReadingGlance(cluster)
    glance.read = lambda image_id, url: b"zeros"  # type: ignore[method-assign]
    assert probe(cluster, glance).work(going_on)
    assert [job.flatten for job in jobs(cluster)] == [INLINE]


def test_glance_that_may_not_be_asked() -> None:
    """What it was seen not to take is believed for an hour then."""
    cluster = populated()
    engine = make_engine(cluster, flatten=NEVER)
    clone(engine)
    engine.make_flat(DEST.name, Reports())
    engine.distrust(DEST.name)
    glance = ReadingGlance(cluster, errors.NotAuthorized("no role"))
    for now in (0.0, 3000.0):
        assert probe(cluster, glance, now).work(going_on)
        assert [job.flatten for job in jobs(cluster) if job.kind == PROBE] == [INLINE]
    assert probe(cluster, glance, 10000.0).work(going_on)
    assert not [job for job in jobs(cluster) if job.kind == PROBE]


@pytest.mark.parametrize("call", ["create", "create_snap", "clone", "protect_snap", "remove", "omap_replace"])
@pytest.mark.parametrize("applied", [True, False])
def test_probe_that_is_killed(call: str, applied: bool) -> None:
    """The next one clears what it made, and begins anew."""
    cluster = populated()
    before = cluster.picture()
    ask(cluster)

    def die(*args: object) -> None:
        raise Killed

    cluster.do_on(call, die, nth=3 if call == "omap_replace" else 1, applied=applied)
    cluster.do_on("end_lease", die)
    with pytest.raises(Killed):
        probe(cluster, ReadingGlance(cluster)).work(going_on)
    cluster.heal()
    cluster.let_pass(LEASE_SECONDS)
    assert probe(cluster, ReadingGlance(cluster)).work(going_on)
    assert cluster.picture() == before


@pytest.mark.parametrize("options", [{"flatten": INLINE}, {"glance_pool": None}])
def test_nothing_to_find_out(options: dict[str, Any]) -> None:
    """Without another policy, or a pool that is known."""
    cluster = populated()
    make_engine(cluster, **{"flatten": NEVER, "glance_pool": DEST.pool, **options}).upkeep.ask_readers()
    assert jobs(cluster) == []


# -- a pool that fills -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("used", "most", "becomes"), [(0.79, 80, NEVER), (0.8, 80, BACKGROUND), (0.99, 100, NEVER), (0.1, 0, BACKGROUND)]
)
def test_never_in_a_pool_that_fills(used: float, most: int, becomes: str) -> None:
    """Disks of deleted servers would be one thing too many."""
    cluster = populated()
    cluster.use(DISK.pool, used)
    clone(make_engine(cluster, flatten=NEVER, never_max_used_percent=most))
    assert [job.flatten for job in jobs(cluster)] == [becomes]


def test_pool_whose_use_may_not_be_asked_about() -> None:
    """It is taken for empty."""
    cluster = populated()
    cluster.fail_on("used", errors.NoPermission)
    clone(make_engine(cluster, flatten=NEVER))
    assert [job.flatten for job in jobs(cluster)] == [NEVER]
