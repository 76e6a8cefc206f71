# SPDX-License-Identifier: Apache-2.0
"""A world of fakes, in which everything of :mod:`tests.faults.matrix` can happen."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Callable, NoReturn, Optional

from keystoneauth1 import exceptions as ksa

from nova_rbd_snap import errors
from nova_rbd_snap.conf import Store as GlanceStore
from nova_rbd_snap.engine import unheard
from nova_rbd_snap.engine.service import Engine
from nova_rbd_snap.ledger.job import INLINE, SNAP_PREFIX
from nova_rbd_snap.ledger.store import OBJECT
from nova_rbd_snap.openstack import registration
from nova_rbd_snap.openstack.glance import Glance
from nova_rbd_snap.specs import GLANCE_SNAP, ImageSpec, Location
from tests.fakes.cluster import FakeCluster
from tests.fakes.engine import DEST, DISK, FROZEN, SERVER, make_engine, populated
from tests.fakes.glance import Answer, FakeImageService
from tests.faults import world
from tests.faults.guest import FakeGuest
from tests.faults.matrix import ENGINE, Cell
from tests.faults.request import Request
from tests.faults.sabotage import Adapter, Mischief, images_in

TIMEOUT_SECONDS = 60
THEIRS = ImageSpec("vms", "theirs")


class Store:
    """Glance's pool in the cluster."""

    def __init__(self, cluster: FakeCluster) -> None:
        self._cluster = cluster

    def holds(self, url: str) -> bool:
        snap = Location.parse(url).snap
        return self._cluster.exists(snap.image) and any(
            found.name == snap.name and not found.trashed for found in self._cluster.snaps(snap.image)
        )

    def write(self, image_id: str, data: Any) -> str:
        image = ImageSpec(DEST.pool, image_id)
        self._cluster._pool(image.pool, grows=True)
        if self._cluster.exists(image):
            raise errors.AlreadyThere(f"{image} is there")
        self._cluster.create_disk(image)
        for number, text in data.items():
            self._cluster.write(image, number, text)
        self._cluster.create_snap(image.snap(GLANCE_SNAP))
        self._cluster.protect_snap(image.snap(GLANCE_SNAP))
        return Location(self._cluster.fsid(), image.snap(GLANCE_SNAP)).url

    def remove(self, url: str) -> None:
        if not url.startswith("rbd:"):
            return
        snap = Location.parse(url).snap
        if not self._cluster.exists(snap.image):
            return
        if self.holds(url):
            self._cluster.unprotect_snap(snap)
            self._cluster.remove_snap(snap)
        self._cluster.remove(snap.image)


class Time:
    """A clock that only moves when there is a pause."""

    def __init__(self) -> None:
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def hurry(monkeypatch: Any, guest_module: Any, cell: Cell) -> None:
    """Let no waiting for Glance take any time, and a guest be given up soon."""
    time = Time()
    for name in ("register", "settle"):
        hurried = functools.partial(getattr(registration, name), clock=time.clock, sleep=time.sleep)
        monkeypatch.setattr(registration, name, hurried)
    monkeypatch.setattr(registration, "uses", functools.partial(registration.uses, sleep=time.sleep))
    seconds = {"_ANSWER_SECONDS": 0.1, "_FREEZE_SECONDS": 0.1, "_AT_ONCE_SECONDS": 0.0}
    monkeypatch.setattr(guest_module, "_PAUSES_SECONDS", (0.01, 0.05))
    if cell.cause.kind == "guest_thaws_early":
        seconds.update(_STILL_SECONDS=0.1, _MARGIN_SECONDS=0.05)
    for name, value in seconds.items():
        monkeypatch.setattr(guest_module, name, value)


#: Where Glance keeps images, for an engine that is told of it as of one elsewhere.
_STORE = GlanceStore("near", "", "nova", DEST.pool)

#: Raises what a call meets, if it meets something.
Hindrance = Callable[[str, Sequence[Any]], None]

#: What changes the cluster, and what the monitor is asked: alone, or besides the OSDs.
_CHANGES = frozenset().union(*(step.changes for step in ENGINE.values())) | {"remove", "remove_snap_by_id"}
_OF_THE_MONITOR = ("connect", "fsid", "address", "has_pool", "fence")
_OF_BOTH = ("create_snap", "remove_snap", "remove_snap_by_id")


class Hindered:
    """A connection to *cluster* whose calls may meet hindrances."""

    def __init__(self, cluster: FakeCluster, hindrances: list[Hindrance]) -> None:
        self._cluster, self._hindrances = cluster, hindrances

    def hinder(self, call: str, *arguments: Any) -> None:
        for hindrance in list(self._hindrances):
            hindrance(call, arguments)

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            self.hinder(name, *arguments)
            return getattr(self._cluster, name)(*arguments, **more)

        return call


class FakeWorld(world.World):
    """See :class:`tests.faults.world.World`; besides, there is a running guest."""

    vms, images, image_id = DISK.pool, DEST.pool, DEST.name

    def __init__(
        self,
        guest_module: Any,
        clone_format: int = 2,
        old_glance: bool = False,
        flat_disk: bool = False,
        *,
        flatten: str = INLINE,
        to_store: bool = False,
    ) -> None:
        """
        :param old_glance: Glance has only the older of its two interfaces for locations.
        :param flat_disk: the server's disk is no clone of an image of Glance's.
        :param flatten: by which policy.
        :param to_store: the disk is copied into a store of Glance's, which is its own pool here.
        """
        super().__init__(DISK.name, flatten)
        self._store = _STORE if to_store else None
        self._guest_module = guest_module
        self.cluster = populated(clone_format)
        # Not the first snapshot here: the ledger's object is there.
        self.cluster.omap_replace(DISK.pool, OBJECT, "none", None, None)
        if flat_disk:
            self.cluster.flatten(DISK, lambda done, total: True)
        self.service = FakeImageService(offers_post=not old_glance, store=Store(self.cluster))
        self.service.add(DEST.name, instance_uuid=SERVER)
        on = guest_module.power_state.RUNNING
        self.guest = FakeGuest(self.saboteur, self.compute, guest_module.exception.NovaException, on)
        self._files: set[str] = set()
        #: Pools that nova-compute's Ceph user may not use.
        self._no_use: set[str] = set()
        self._may_fence = True
        self._hindrances: list[Hindrance] = []

    # -- nova-compute --------------------------------------------------------------------------------------------------

    def connect(self) -> Hindered:
        made = self.cluster.another()
        made.forbidden, made.may_fence = self._no_use, self._may_fence
        hindered = Hindered(made, self._hindrances)
        hindered.hinder("connect")
        return hindered

    def engine(self, **options: Any) -> Engine:
        more: dict[str, Any] = {"operation_timeout": TIMEOUT_SECONDS, "flatten": self.policy}
        if self._store is not None:
            connect = options["connect"]
            more |= {"stores": (self._store,), "connect_to_store": lambda store: connect(of_store=True)}
        return make_engine(self.cluster, images=self.asked_as_service(), **more, **options)

    @staticmethod
    def _glance(adapter: Any) -> Glance:
        return Glance(adapter, ["http://glance"])

    def request(self) -> Request:
        guest = self._guest_module.Guest(self.guest, None, self.guest, self.guest)
        return Request(
            self.compute,
            self._glance(Adapter(self.service, self.saboteur)),
            self.saboteur,
            image_id=DEST.name,
            disk=DISK.name,
            dest_pool=DEST.pool,
            timeout_seconds=TIMEOUT_SECONDS,
            perform=lambda job_id: guest.perform(self.compute, job_id, unheard),
            copy=self._copy,
            delete_record=self.delete_record,
            store=self._store and self._store.name,
        )

    def _copy(self, snap: Optional[str]) -> None:
        """Nova's own: through a local file, and of a suspended guest where there is no snapshot to read."""
        if snap is None:
            self.guest.suspended = True
            self.suspensions += 1
        self._files.add(DEST.name)
        try:
            data = self.cluster.content(DISK if snap is None else DISK.snap(snap))
            answer = self.service.request(f"/v2/images/{DEST.name}/file", "PUT", raise_exc=False, data=data)
            if answer.status_code >= 400:
                raise errors.SnapError(f"Glance does not take the copy: {answer.status_code}")
        finally:
            self._files.discard(DEST.name)
            self.guest.suspended = False

    def delete_record(self) -> None:
        if self.deletes_records:
            self.service.request(f"/v2/images/{DEST.name}", "DELETE", raise_exc=False)

    # -- what became of it ---------------------------------------------------------------------------------------------

    def surroundings(self) -> dict[str, Any]:
        found: dict[str, Any] = {"guest": self.guest.hold(), "files": set(self._files)}
        for pool, things in self.cluster.picture().items():
            found.update((f"{pool}/{name}", image) for name, image in things["images"].items() if name != DEST.name)
            found.update((f"{pool}: {name}", pairs) for name, pairs in things["omap"].items())
            found[f"{pool}: trash"] = things["trash"]
        return found

    def status(self) -> Optional[str]:
        record = self.service.records.get(DEST.name)
        return record["status"] if record else None

    def has_data(self) -> bool:
        return self.cluster.exists(DEST)

    def was_active(self) -> bool:
        return self.service.was_active(DEST.name)

    def bystander(self) -> FakeCluster:
        return self.cluster.another()

    def asked_as_service(self) -> registration.Images:
        return registration.Images(lambda: self._glance(self.service), TIMEOUT_SECONDS)

    def drain(self) -> None:
        with self.cluster.with_room():
            super().drain()

    def assert_whole(self) -> None:
        portrait = self.cluster.picture()[DEST.pool]["images"][DEST.name]
        (snap,) = portrait["snaps"]
        assert snap[1:] == (GLANCE_SNAP, True, False, FROZEN)
        assert (portrait["content"], portrait["parent"], portrait["half"]) == (FROZEN, None, None)
        (location,) = self.service.records[DEST.name]["locations"]
        assert Location.parse(location["url"]).snap == DEST.snap(GLANCE_SNAP)

    def heal(self) -> None:
        self.guest.over.set()
        super().heal()

    # -- mischief: the cluster -----------------------------------------------------------------------------------------

    def _hinder(self, hindrance: Hindrance) -> Mischief:
        return self._begins(
            lambda: self._hindrances.append(hindrance), lambda: self._hindrances.remove(hindrance)
        )

    def frozen(self, daemons: str) -> Mischief:
        def hindrance(call: str, arguments: Sequence[Any]) -> None:
            answering = _OF_THE_MONITOR if daemons == "osds" else ()
            asked = _OF_THE_MONITOR + _OF_BOTH if daemons == "monitor" else ()
            if call in asked or (daemons == "osds" and call not in answering):
                raise errors.Unreachable(f"{call}: no answer")

        return self._hinder(hindrance)

    def blocklisted(self) -> Mischief:
        def cut_off() -> None:
            for connection in self.compute.connections():
                self.cluster.fence(connection._cluster.address())

        return self._begins(cut_off)

    def denied(self, pool: str) -> Mischief:
        return self._begins(lambda: self._no_use.add(pool), self._no_use.clear)

    def denied_writes(self, pool: str) -> Mischief:
        def hindrance(call: str, arguments: Sequence[Any]) -> None:
            if call in _CHANGES and pool in [*arguments, *(image.pool for image in images_in(arguments)[-1:])]:
                raise errors.NoPermission(f"{call}: pool {pool} is read-only")

        return self._hinder(hindrance)

    def engine_killed(self, when: str) -> Mischief:
        if when != "unfenced":
            return super().engine_killed(when)
        killed = super().engine_killed("after")

        def mischief(do: Callable[[], Any]) -> Any:
            self._may_fence = False
            self._ends.append(self._let_fence)
            return killed(do)

        return mischief

    def _let_fence(self) -> None:
        self._may_fence = True
        for connection in self.cluster._state.connections:
            connection.may_fence = True

    def full(self, *pools: str) -> Mischief:
        def mischief(do: Callable[[], Any]) -> Any:
            for pool in pools:
                self.cluster.fill(pool)
                self._ends.append(functools.partial(self.cluster.fill, pool, full=False))
            return do()

        return mischief

    def full_cluster(self) -> Mischief:
        return self.full("vms", "images")

    def holder_frozen(self) -> Mischief:
        return self._begins(
            lambda: self.cluster.freeze_holder(DISK), lambda: self.cluster.freeze_holder(DISK, frozen=False)
        )

    def name_taken(self) -> Mischief:
        return self._begins(lambda: self.cluster.create_disk(DEST), lambda: self.cluster.remove(DEST))

    def _snap_taken(self, image: ImageSpec, name: str) -> Mischief:
        made: list[int] = []

        def end() -> None:
            (snap_id,) = made
            assert [(snap.id, snap.name) for snap in self.cluster.snaps(image)] == [(snap_id, name)]
            self.cluster.remove_snap_by_id(image, snap_id)

        return self._begins(lambda: made.append(self.cluster.create_snap(image.snap(name))), end)

    def snap_taken(self) -> Mischief:
        return self._snap_taken(DISK, f"{SNAP_PREFIX}{DEST.name}")

    def seal_taken(self) -> Mischief:
        return self._snap_taken(DEST, GLANCE_SNAP)

    def clone_open(self) -> Mischief:
        def mischief(do: Callable[[], Any]) -> NoReturn:
            self.cluster.hold(DEST, float("inf"))
            self._ends.append(lambda: self.cluster.hold(DEST, 0))
            raise errors.CephError("injected")

        return mischief

    def _has_child(self, image: ImageSpec, name: str) -> Mischief:
        return self._begins(
            lambda: self.cluster.clone(image.snap(name), THEIRS, None), lambda: self.cluster.remove(THEIRS)
        )

    def frozen_has_child(self) -> Mischief:
        return self._has_child(DISK, f"{SNAP_PREFIX}{DEST.name}")

    def seal_has_child(self) -> Mischief:
        has_child = self._has_child(DEST, GLANCE_SNAP)

        def mischief(do: Callable[[], Any]) -> Answer:
            has_child(lambda: None)
            return Answer(409)

        return mischief

    # -- mischief: the guest -------------------------------------------------------------------------------------------

    def guest_refuses(self, what: str = "") -> Mischief:
        self.guest.required = what == "required"
        return lambda do: self.guest.refuse()

    def guest_hangs(self, what: str = "") -> Mischief:
        self.guest.required = what == "required"
        return lambda do: self.guest.hang()

    def guest_loses_the_answer(self, what: str) -> Mischief:
        self.guest.required = what == "required"

        def mischief(do: Callable[[], Any]) -> NoReturn:
            do()
            self.guest.refuse()

        return mischief

    def guest_thaws_early(self, what: str) -> Mischief:
        self.guest.required = what == "required"

        def mischief(do: Callable[[], Any]) -> Any:
            assert self.guest.thawed.wait(30)
            return do()

        return mischief

    # -- mischief: Glance ----------------------------------------------------------------------------------------------

    def answers_once(self, status: int) -> Mischief:
        return lambda do: Answer(status, reason="injected")

    def _silently(self, do: Callable[[], Any], how: str, *, asked: bool) -> NoReturn:
        if asked:
            do()
        raise {"reset": ksa.ConnectFailure, "hang": ksa.ConnectTimeout}[how]("injected")

    def task_fails(self) -> Mischief:
        return self._begins(lambda: setattr(self.service, "task_fails", True))

    def never_active(self) -> Mischief:
        return self._begins(
            lambda: setattr(self.service, "polls_until_active", -1),
            lambda: setattr(self.service, "polls_until_active", 0),
        )

    def other_data(self) -> Mischief:
        theirs = {"status": "active", "locations": [{"url": "file:///theirs"}]}
        return self._begins(lambda: self.service.records[DEST.name].update(theirs))
