# SPDX-License-Identifier: Apache-2.0
"""Whatever is snapshot, booted, deleted, flattened and killed in whatever order: no byte is lost, no chain grows too
long, and in the end nothing is left."""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
import uuid
from typing import Any, Callable

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from nova_rbd_snap import errors
from nova_rbd_snap.engine.service import Engine
from nova_rbd_snap.flatten.bounds import Bounds
from nova_rbd_snap.flatten.means import ByWorker
from nova_rbd_snap.flatten.task import Flattening
from nova_rbd_snap.janitor import parents
from nova_rbd_snap.janitor.purge import Purge
from nova_rbd_snap.ledger.job import POLICIES, Owner
from nova_rbd_snap.ledger.store import Ledger
from nova_rbd_snap.specs import GLANCE_SNAP, ImageSpec
from nova_rbd_snap.workers.worker import Worker
from tests.contract.worlds import World
from tests.fakes.engine import make_settings

DEPTH_HARD = 4
DAY = 24 * 3600.0
OBJECTS = 4
#: What is written, and read, of each object.
ROOM_BYTES = 16

#: By object what it begins with, where that is not zeros.
Content = dict[int, bytes]


class Killed(BaseException):
    """The process ends."""


#: At which step of a snapshot its process is killed, if at all.
KILLS = st.sampled_from(["", "", "", "seal", "ready"])


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


class Mortal:
    """A connection whose process is killed as it makes a call, before or after that is done."""

    def __init__(self, cluster: Any, call: str, applied: bool) -> None:
        self._cluster, self._call, self._applied = cluster, call, applied

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._cluster, name)

        def die(*arguments: Any, **named: Any) -> None:
            if self._applied and name == self._call:
                found(*arguments, **named)
            raise Killed

        # Nothing of a process that is killed gives the lease back.
        return die if name in (self._call, "end_lease") else found


class Reading:
    """Somebody has a snapshot open, who is to read *content*."""

    def __init__(self, world: World, image: ImageSpec, content: Content) -> None:
        self._stack = contextlib.ExitStack()
        self._read = self._stack.enter_context(world.reader(image.snap(GLANCE_SNAP)))
        self.image, self._content = image, dict(content)

    def check(self) -> None:
        assert without_zeros({number: self._read(number) for number in range(OBJECTS)}) == without_zeros(self._content)

    def end(self) -> None:
        self._stack.close()


class Chains(RuleBasedStateMachine):
    """A cloud: servers and images, each with what is to be on it."""

    servers, images = Bundle("servers"), Bundle("images")

    def __init__(self, world: World, lease_seconds: float) -> None:
        """
        :param lease_seconds: how long a worker that was killed keeps others away.
        """
        super().__init__()
        self.world, self.lease_seconds = world, lease_seconds
        self.numbers = itertools.count(1)
        self.cluster = world.connect()
        self.base = ImageSpec(world.images, f"base-{uuid.uuid4()}")
        world.create(self.base, OBJECTS)
        world.write(self.base, 0, b"base")
        self.cluster.create_snap(self.base.snap(GLANCE_SNAP))
        self.cluster.protect_snap(self.base.snap(GLANCE_SNAP))
        # Glance may only read the servers' disks, and knows nothing of parents in the trash.
        self.glance = world.connect_reader()
        self.records = Records()
        self.content: dict[ImageSpec, Content] = {}
        self.days = 0
        # A server has what it was booted from open as long as it lives; a download ends within a day.
        self.of_servers: dict[ImageSpec, Reading] = {}
        self.downloads: list[Reading] = []

    def now(self) -> float:
        return time.time() + self.days * DAY

    def engine(self, delete: str = "now") -> Engine:
        """A new one, after all before it have ended."""
        return Engine(
            make_settings(pool=self.world.vms, bounds=Bounds(2, DEPTH_HARD, 2, 4), delete=delete),
            functools.partial(Owner, "compute-1", "machine-1", str(uuid.uuid4())),
            connect=self.world.connect,
            images=self.records,
            clock=self.now,
        )

    def worker(self, mortal: Callable[[Any], Any] = lambda cluster: cluster) -> Worker:
        client = mortal(self.world.connect())
        owner = Owner("compute-1", "machine-1", str(uuid.uuid4()), client.address())
        tasks = [Purge(client, self.now), Flattening(client, self.records, ByWorker(client), self.now)]
        return Worker(
            client, self.world.vms, owner, tasks, limit=2, lease_seconds=self.lease_seconds, clock=self.now
        )

    # -- what tenants do

    @initialize(target=servers)
    def boot_first(self) -> ImageSpec:
        return self.boot_from_base()

    @rule(target=servers)
    def boot_from_base(self) -> ImageSpec:
        return self.booted(self.base, {0: b"base"})

    @rule(target=servers, image=images)
    def boot(self, image: ImageSpec) -> ImageSpec:
        return self.booted(image, self.content[image]) if image in self.content else multiple()

    def booted(self, image: ImageSpec, content: Content) -> ImageSpec:
        disk = ImageSpec(self.world.vms, f"{uuid.uuid4()}_disk")
        self.cluster.clone(image.snap(GLANCE_SNAP), disk, None)
        self.content[disk] = dict(content)
        self.of_servers[disk] = Reading(self.world, image, content)
        return disk

    @rule(image=images)
    def download(self, image: ImageSpec) -> None:
        if image in self.content:
            self.downloads.append(Reading(self.world, image, self.content[image]))

    def end_downloads(self, those: Callable[[Reading], bool]) -> None:
        for each in [download for download in self.downloads if those(download)]:
            self.downloads.remove(each)
            each.end()

    def let_a_day_pass(self) -> None:
        self.end_downloads(lambda download: True)
        self.days += 1
        self.world.let_pass(DAY)

    @rule(server=servers, what=st.tuples(*OBJECTS * [st.sampled_from(["", "zeros", "data"])]))
    def write(self, server: ImageSpec, what: tuple[str, ...]) -> None:
        """To each object nothing, zeros, which are not the same, or data."""
        if server in self.content:
            for number in filter(what.__getitem__, range(OBJECTS)):
                data = str(next(self.numbers)).encode() if what[number] == "data" else b""
                self.world.write(server, number, data.ljust(ROOM_BYTES, b"\0"))
                self.content[server][number] = data

    @rule(target=images, server=servers, policy=st.sampled_from(POLICIES), kill=KILLS)
    def snapshot(self, server: ImageSpec, policy: str, kill: str) -> ImageSpec:
        if server not in self.content:
            return multiple()
        engine, image = self.engine(), ImageSpec(self.world.images, str(uuid.uuid4()))
        engine.reserve_clone(image.name, server.name, image.pool, policy)

        def report(step: str, done: int, total: int) -> None:
            if step == kill:
                raise Killed

        try:
            engine.perform(image.name, None, report)
        except Killed:
            self.engine().reclaim()
            assert not self.cluster.exists(image)
            return multiple()
        self.records.live.add(image.name)
        if kill == "ready":  # the engine has not heard of it
            self.engine().reclaim()
        else:
            engine.finish(image.name)
        self.content[image] = dict(self.content[server])
        return image

    @rule(server=consumes(servers), delete=st.sampled_from(["now", "trash"]))
    def delete_server(self, server: ImageSpec, delete: str) -> None:
        if self.content.pop(server, None) is not None:
            self.remove_server(server, delete)

    def remove_server(self, server: ImageSpec, delete: str) -> None:
        self.of_servers.pop(server).end()
        engine, server_id = self.engine(delete), server.name.partition("_")[0]
        assert engine.cancel(server_id) == []
        assert engine.remove_disks(server_id) == []
        assert not self.cluster.exists(server)

    @rule(image=consumes(images), amid=st.booleans())
    def delete_image(self, image: ImageSpec, amid: bool) -> None:
        if self.content.pop(image, None) is None:
            return
        self.records.live.discard(image.name)
        self.end_downloads(lambda download: download.image == image)
        jobs = Ledger(self.cluster, self.world.vms).read().jobs
        if amid and image.name in {job.id for job in jobs if job.flat_at is None}:
            self.unseal(image)  # a worker has it open: the record is gone, and it finishes what Glance could not
        else:
            self.remove_image(image)

    def unseal(self, image: ImageSpec) -> None:
        self.glance.unprotect_snap(image.snap(GLANCE_SNAP))
        self.glance.remove_snap(image.snap(GLANCE_SNAP))

    def remove_image(self, image: ImageSpec) -> None:
        self.unseal(image)
        try:
            self.glance.remove(image)
        except errors.HasSnapshots:
            self.glance.trash(image, 0)

    # -- what happens

    @rule(what=st.sampled_from(["work", "work", "work", "clear", "let_a_day_pass"]))
    def go_on(self, what: str) -> None:
        getattr(self, what)()

    def work(self) -> None:
        self.worker().work(lambda: False)

    @rule(call=st.sampled_from(["flatten", "remove_trashed", "remove_snap_by_id"]), applied=st.booleans())
    def kill_worker(self, call: str, applied: bool) -> None:
        with contextlib.suppress(Killed):
            self.worker(lambda cluster: Mortal(cluster, call, applied)).work(lambda: False)
        self.world.let_leases_end(self.lease_seconds)

    def clear(self) -> None:
        list(parents.clear(self.cluster, self.world.vms, [self.world.images], self.records, self.now()))

    # -- what holds

    @invariant()
    def no_byte_is_lost(self) -> None:
        for spec, content in self.content.items():
            assert without_zeros(self.world.content(spec)) == without_zeros(content)
            if spec.pool == self.world.images:
                assert without_zeros(self.world.content(spec.snap(GLANCE_SNAP))) == without_zeros(content)

    @invariant()
    def who_reads_reads_on(self) -> None:
        for each in (*self.of_servers.values(), *self.downloads):
            each.check()

    @invariant()
    def no_chain_is_too_long(self) -> None:
        for spec in self.content:
            assert len(self.cluster.ancestors(spec)) <= DEPTH_HARD + (spec.pool == self.world.vms)

    def teardown(self) -> None:
        """All is deleted: nothing is left."""
        for spec in list(self.content):
            del self.content[spec]
            if spec.pool == self.world.images:
                self.records.live.discard(spec.name)
                self.remove_image(spec)
            else:
                self.remove_server(spec, "now")
        self.world.let_leases_end(self.lease_seconds)
        for _ in range(2 * DEPTH_HARD + 2):
            self.let_a_day_pass()
            while self.worker().work(lambda: False):
                pass
            self.clear()
        # What is flat when Glance moves it there is in nobody's way, and Glance's, as with stock Nova.
        for found in self.cluster.trashed(self.world.images):
            self.cluster.remove_trashed(self.world.images, found.id)
        self.cluster.unprotect_snap(self.base.snap(GLANCE_SNAP))
        self.cluster.remove_snap(self.base.snap(GLANCE_SNAP))
        self.cluster.remove(self.base)
        for pool in (self.world.vms, self.world.images):
            assert list(self.cluster.images(pool)) == []
            assert list(self.cluster.trashed(pool)) == []
        assert Ledger(self.cluster, self.world.vms).read().jobs == []
        self.world.disconnect()
