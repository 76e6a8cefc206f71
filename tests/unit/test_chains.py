# SPDX-License-Identifier: Apache-2.0
"""Whatever is snapshot, booted, deleted, flattened and killed in whatever order: no byte is lost, no chain grows too
long, and in the end nothing is left."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from nova_rbd_snap import errors
from nova_rbd_snap.engine.service import Engine
from nova_rbd_snap.flatten import task
from nova_rbd_snap.flatten.bounds import Bounds
from nova_rbd_snap.flatten.means import ByWorker
from nova_rbd_snap.flatten.task import Flattening
from nova_rbd_snap.janitor import parents
from nova_rbd_snap.janitor.purge import Purge
from nova_rbd_snap.ledger.job import POLICIES, Owner
from nova_rbd_snap.ledger.store import Ledger
from nova_rbd_snap.specs import GLANCE_SNAP, ImageSpec
from nova_rbd_snap.workers.worker import Worker
from tests.fakes.cluster import Content, FakeCluster, Reader
from tests.fakes.engine import make_engine

DEPTH_HARD = 4
LEASE_SECONDS = 60.0
NOW = 10.0**9
DAY = 24 * 3600.0
BASE = ImageSpec("images", "base")


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "_LOOK_SECONDS", 0.001)
    monkeypatch.setattr(task, "_DELETION_SECONDS", 0.0)


class Killed(BaseException):
    """The process ends."""


class Records:
    """Glance, as engines and workers ask it: it uses the images that are registered with it."""

    def __init__(self) -> None:
        self.live: set[str] = set()

    def uses(self, image_id: str, url: str) -> bool:
        return image_id in self.live

    def settle(self, image_id: str, url: str, server: str) -> bool:
        return image_id in self.live


def without_zeros(content: Content) -> Content:
    return {number: data for number, data in content.items() if data}


class Chains(RuleBasedStateMachine):
    """A cloud: servers and images, each with what is to be on it."""

    servers, images = Bundle("servers"), Bundle("images")

    def __init__(self) -> None:
        super().__init__()
        self.numbers = itertools.count(1)
        self.cluster = FakeCluster("vms", "images")
        self.cluster.create_disk(BASE)
        self.cluster.write(BASE, 0, b"base")
        self.cluster.create_snap(BASE.snap(GLANCE_SNAP))
        self.cluster.protect_snap(BASE.snap(GLANCE_SNAP))
        # Glance may only read the servers' disks, and knows nothing of parents in the trash.
        self.glance = self.cluster.another()
        self.glance.read_only, self.glance.moves_parents = {"vms"}, False
        self.records = Records()
        self.content: dict[ImageSpec, Content] = {}
        self.now = NOW
        # A server has what it was booted from open as long as it lives; a download ends within a day.
        self.of_servers: dict[ImageSpec, tuple[Reader, Content]] = {}
        self.downloads: list[tuple[ImageSpec, Reader, Content]] = []

    def uuid(self) -> str:
        return f"22222222-2222-4222-8222-{next(self.numbers):012}"

    def engine(self, delete: str = "now") -> Engine:
        return make_engine(self.cluster, bounds=Bounds(2, DEPTH_HARD, 2, 4), delete=delete, life=self.uuid())

    def worker(self) -> Worker:
        client = self.cluster.another()
        owner = Owner("compute-1", "machine-1", self.uuid(), client.address())
        tasks = [
            Purge(client, lambda: self.now),
            Flattening(client, self.records, ByWorker(client), lambda: self.now),
        ]
        return Worker(client, "vms", owner, tasks, limit=2, lease_seconds=LEASE_SECONDS, clock=lambda: self.now)

    # -- what tenants do

    @rule(target=servers)
    def boot_from_base(self) -> ImageSpec:
        return self.booted(BASE, {0: b"base"})

    @rule(target=servers, image=images)
    def boot(self, image: ImageSpec) -> ImageSpec:
        return self.booted(image, self.content[image]) if image in self.content else multiple()

    def booted(self, image: ImageSpec, content: Content) -> ImageSpec:
        disk = ImageSpec("vms", f"{self.uuid()}_disk")
        self.cluster.now = self.now
        self.cluster.clone(image.snap(GLANCE_SNAP), disk, None)
        self.content[disk] = dict(content)
        self.of_servers[disk] = self.cluster.open_reader(image.snap(GLANCE_SNAP)), dict(content)
        return disk

    @rule(image=images)
    def download(self, image: ImageSpec) -> None:
        if image in self.content:
            self.downloads.append((image, self.cluster.open_reader(image.snap(GLANCE_SNAP)), dict(self.content[image])))

    @rule()
    def let_a_day_pass(self) -> None:
        self.downloads.clear()
        self.now += DAY + 1

    @rule(server=servers, number=st.integers(0, 3), is_zeros=st.booleans())
    def write(self, server: ImageSpec, number: int, is_zeros: bool) -> None:
        if server in self.content:
            data = b"" if is_zeros else str(next(self.numbers)).encode()
            self.cluster.write(server, number, data)
            self.content[server][number] = data

    @rule(target=images, server=servers, policy=st.sampled_from(POLICIES), kill=st.sampled_from(["", "seal", "ready"]))
    def snapshot(self, server: ImageSpec, policy: str, kill: str) -> ImageSpec:
        if server not in self.content:
            return multiple()
        engine, image = self.engine(), ImageSpec("images", self.uuid())
        engine.reserve_clone(image.name, server.name, image.pool, policy)

        def report(step: str, done: int, total: int) -> None:
            if step == kill:
                raise Killed

        try:
            engine.perform(image.name, None, report)
        except Killed:
            make_engine(self.cluster, life="next", images=self.records).reclaim()
            assert not self.cluster.exists(image)
            return multiple()
        self.records.live.add(image.name)
        if kill == "ready":  # the engine has not heard of it
            make_engine(self.cluster, life="next", images=self.records).reclaim()
        else:
            engine.finish(image.name)
        self.content[image] = dict(self.content[server])
        return image

    @rule(server=consumes(servers), delete=st.sampled_from(["now", "trash"]))
    def delete_server(self, server: ImageSpec, delete: str) -> None:
        if self.content.pop(server, None) is not None:
            self.remove_server(server, delete)

    def remove_server(self, server: ImageSpec, delete: str) -> None:
        self.of_servers.pop(server, None)
        engine, uuid = self.engine(delete), server.name.partition("_")[0]
        assert engine.cancel(uuid) == []
        assert engine.remove_disks(uuid) == []
        assert not self.cluster.exists(server)

    @rule(image=consumes(images), amid=st.booleans())
    def delete_image(self, image: ImageSpec, amid: bool) -> None:
        if self.content.pop(image, None) is None:
            return
        self.records.live.discard(image.name)
        self.downloads = [each for each in self.downloads if each[0] != image]
        if amid:  # while a worker has it open: the record is gone, and the worker finishes what Glance could not
            self.unseal(image)
            return
        self.remove_image(image)

    def unseal(self, image: ImageSpec) -> None:
        self.glance.unprotect_snap(image.snap(GLANCE_SNAP))
        self.glance.remove_snap(image.snap(GLANCE_SNAP))
        if image.name not in {job.id for job in Ledger(self.cluster, "vms").read().jobs if job.flat_at is None}:
            self.finish_removal(image)

    def remove_image(self, image: ImageSpec) -> None:
        self.glance.unprotect_snap(image.snap(GLANCE_SNAP))
        self.glance.remove_snap(image.snap(GLANCE_SNAP))
        self.finish_removal(image)

    def finish_removal(self, image: ImageSpec) -> None:
        try:
            self.glance.remove(image)
        except errors.HasSnapshots:
            self.glance.trash(image, 0)

    # -- what happens

    @rule()
    def work(self) -> None:
        self.worker().work(lambda: False)

    @rule(call=st.sampled_from(["flatten", "remove_trashed", "remove_snap_by_id"]), applied=st.booleans())
    def kill_worker(self, call: str, applied: bool) -> None:
        def die(*args: object) -> None:
            raise Killed

        self.cluster.do_on(call, die, applied=applied)
        self.cluster.do_on("end_lease", die)
        try:
            self.worker().work(lambda: False)
        except Killed:
            self.cluster.let_pass(LEASE_SECONDS)
        self.cluster.heal()

    @rule()
    def clear(self) -> None:
        list(parents.clear(self.cluster, "vms", ["images"], self.records, self.now))

    # -- what holds

    @invariant()
    def no_byte_is_lost(self) -> None:
        for spec, content in self.content.items():
            assert without_zeros(self.cluster.content(spec)) == without_zeros(content)
            if spec.pool == "images":
                assert without_zeros(self.cluster.content(spec.snap(GLANCE_SNAP))) == without_zeros(content)

    @invariant()
    def who_reads_reads_on(self) -> None:
        for *_, reader, content in (*self.of_servers.values(), *self.downloads):
            assert without_zeros({number: reader.read(number) for number in range(4)}) == without_zeros(content)

    @invariant()
    def no_chain_is_too_long(self) -> None:
        for spec in self.content:
            assert len(self.cluster.ancestors(spec)) <= DEPTH_HARD + (spec.pool == "vms")

    def teardown(self) -> None:
        """All is deleted: nothing is left but the base image."""
        for spec in list(self.content):
            del self.content[spec]
            if spec.pool == "images":
                self.records.live.discard(spec.name)
                self.remove_image(spec)
            else:
                self.remove_server(spec, "now")
        self.downloads.clear()
        self.cluster.let_pass(LEASE_SECONDS)
        self.now += DAY + 1
        while self.worker().work(lambda: False):
            pass
        for _ in range(2 * DEPTH_HARD + 2):
            list(parents.clear(self.cluster, "vms", ["images"], self.records, self.now))
        picture = self.cluster.picture()
        assert picture["vms"] == {"images": {}, "trash": [], "omap": {}}
        assert list(picture["images"]["images"]) == [BASE.name]
        # What is flat when Glance moves it there is in nobody's way, and Glance's, as with stock Nova.
        assert all(not image["snaps"] and image["parent"] is None for image in picture["images"]["trash"])
        assert [snap[1] for snap in picture["images"]["images"][BASE.name]["snaps"]] == [GLANCE_SNAP]


Chains.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
test_chains = Chains.TestCase
