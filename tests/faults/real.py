# SPDX-License-Identifier: Apache-2.0
"""A world of real servers, and what of :mod:`tests.faults.matrix` they can be made to do. No Nova, no guest."""

from __future__ import annotations

import contextlib
import json
from typing import Any, Callable, NoReturn, Optional

import rbd

from nova_rbd_snap import errors
from nova_rbd_snap.ceph.librbd import LibrbdCluster
from nova_rbd_snap.engine import unheard
from nova_rbd_snap.engine.service import Engine
from nova_rbd_snap.ledger.job import INLINE, SNAP_PREFIX, copy_id
from nova_rbd_snap.openstack import registration
from nova_rbd_snap.specs import GLANCE_SNAP, ImageSpec, Location
from tests import daemons
from tests.fakes.glance_proxy import Request as HttpRequest
from tests.faults import world
from tests.faults.matrix import Cell
from tests.faults.request import Request
from tests.faults.sabotage import Adapter, Mischief
from tests.functional.world import CEPH_CONF, HURRIED_SECONDS, MIB, TIMEOUT_SECONDS, World
from tests.holder import Holder
from tests.trash import trashed
from tests.waiting import eventually, promised_seconds

_DISK_BYTES = 16 * MIB
#: Of a cluster that will not answer.
_SHORT_SECONDS = 5
#: What a request takes to which nothing happens, at most.
_UNDISTURBED_SECONDS = 5
#: What the names of RADOS objects that belong to one rbd image begin with.
_PER_IMAGE = ("rbd_id", "rbd_header", "rbd_data", "rbd_object_map")
_DAEMONS = {"osds": daemons.OSDS, "monitor": (daemons.MONITOR,), "manager": (daemons.MANAGER,)}


def _every(request: HttpRequest) -> bool:
    return True


class RealWorld(world.World):
    """See :class:`tests.faults.world.World`."""

    cloud = "faults"  # for the workers of the lab's nova-compute are not to do its jobs

    def __init__(self, servers: World, cell: Cell) -> None:
        self._servers, self._kind = servers, cell.cause.kind
        self.vms, self.images = servers.vms, servers.images
        policy = cell.variant.get("flatten", INLINE)
        self.disk = servers.new_disk(_DISK_BYTES)
        self.image_id = servers.new_record(self.disk)
        self._settings = servers.settings(
            cell.variant.get("clone_format", 2),
            _SHORT_SECONDS if cell.cause.kind == "frozen" else TIMEOUT_SECONDS,
            policy,
        )
        # A task is waited for ten times as long as an answer.
        self._timeout_seconds = 1 if cell.cause.kind == "never_active" else HURRIED_SECONDS
        self._image = ImageSpec(servers.images, self.image_id)
        self._snap = f"{SNAP_PREFIX}{self.image_id}"
        self._theirs = f"theirs-{self.image_id}"
        self._content = servers.content(servers.vms, self.disk)
        self._known = self._objects()
        self._was_active = False
        super().__init__(self.disk, policy)

    def remove(self) -> None:
        """Remove all that is left, also where the cell failed."""
        with contextlib.suppress(Exception):
            self.heal()
        self._servers.proxy.behave()
        self.delete_record()
        for pool, name in (
            (self._servers.vms, self._theirs),
            (self._servers.images, self.image_id),
            (self._servers.vms, self.disk),
        ):
            self._servers.remove_whole(pool, name)
        self._servers.forget_jobs(self.image_id, copy_id(self.image_id))

    # -- nova-compute --------------------------------------------------------------------------------------------------

    def connect(self) -> LibrbdCluster:
        return self._servers.connect(self._settings)

    def engine(self, **options: Any) -> Engine:
        return self._servers.engine_with(self._settings, host="faults", cloud=self.cloud, **options)

    def request(self) -> Request:
        glance = self._servers.through_proxy()
        glance._adapter = Adapter(glance._adapter, self.saboteur)
        return Request(
            self.compute,
            glance,
            self.saboteur,
            image_id=self.image_id,
            disk=self.disk,
            dest_pool=self._servers.images,
            timeout_seconds=self._timeout_seconds,
            perform=lambda job_id: self.compute.perform(job_id, None, unheard),
            copy=self._copy,
            delete_record=self.delete_record,
        )

    def _copy(self, snap: Optional[str]) -> None:
        """Nova's own would suspend the guest where there is no snapshot to read."""
        self.suspensions += snap is None
        tenant, headers = self._servers.tenant, {"Content-Type": "application/octet-stream"}
        tenant.set_properties(self.image_id, registration.RAW)
        data = self._servers.content(self._servers.vms, self.disk, snap)
        tenant._call("PUT", f"/v2/images/{self.image_id}/file", data=data, headers=headers)

    def delete_record(self) -> None:
        if self.deletes_records:
            self._was_active |= self.status() == "active"
            self._servers.delete_image(self.image_id)

    # -- what became of it ---------------------------------------------------------------------------------------------

    def surroundings(self) -> dict[str, Any]:
        found = self._servers.picture()
        found.pop(f"{self._servers.images}/{self.image_id}", None)
        for pool, ioctx in self._servers.ioctx.items():
            found[f"{pool}: trash"] = sorted(entry.name for entry in trashed(ioctx))
        # The OSDs remove what a snapshot held in their own time.
        with contextlib.suppress(AssertionError):
            eventually(lambda: self._objects() <= self._known, "no object is left", seconds=20, pause=0.1)
        return {**found, "objects": self._objects() - self._known}

    def _objects(self) -> set[tuple[str, str]]:
        """The ids, or names, of the rbd images that RADOS objects belong to, but for those of the image."""
        own = {self.image_id}
        with contextlib.suppress(errors.Missing):
            own.add(self._servers.cluster.lookup(self._image).id)
        found = set()
        for pool, ioctx in self._servers.ioctx.items():
            parts = (entry.key.split(".") for entry in ioctx.list_objects())
            found |= {(pool, part[1]) for part in parts if part[0] in _PER_IMAGE and part[1] not in own}
        return found

    def status(self) -> Optional[str]:
        try:
            return self._servers.status(self.image_id)
        except errors.RecordGone:
            return None

    def has_data(self) -> bool:
        return self._servers.cluster.exists(self._image)

    def was_active(self) -> bool:
        return self._was_active

    def bystander(self) -> LibrbdCluster:
        return self.connect()

    def asked_as_service(self) -> registration.Images:
        return self._servers.asked_as_service()

    def assert_whole(self) -> None:
        (snap,) = self._servers.cluster.snaps(self._image)
        assert (snap.name, snap.protected, snap.trashed) == (GLANCE_SNAP, True, False)
        assert self._servers.cluster.lookup(self._image).parent is None
        assert self._servers.content(self._servers.images, self.image_id, GLANCE_SNAP) == self._content
        location = Location(self._servers.cluster.fsid(), self._image.snap(GLANCE_SNAP))
        assert location.url in (self._servers.service.record(self.image_id).urls or ())

    @property
    def promised_seconds(self) -> Optional[float]:
        """Within which the request ends when servers do not answer; None where they do.

        Of Glance (``docs/design/clone.rst``): a request goes without an answer, then the record stays as it is, or a
        task of Glance's is seen at work on it, and a last reading may be under way.
        """
        if self._kind in ("frozen", "killed", "full", "full_cluster"):
            return promised_seconds(self._settings.operation_timeout)
        if self._kind == "is_silent":
            return _UNDISTURBED_SECONDS + 3 * self._timeout_seconds
        if self._kind == "never_active":
            return _UNDISTURBED_SECONDS + 10 * self._timeout_seconds
        return None

    # -- what happens in it --------------------------------------------------------------------------------------------

    def arrive(self) -> None:
        super().arrive()
        eventually(lambda: self.status() == "active", "the image is active")

    # -- mischief: the cluster -----------------------------------------------------------------------------------------

    def frozen(self, which: str) -> Mischief:
        def end() -> None:
            daemons.signal("CONT", *_DAEMONS[which])
            self._await_service()

        return self._begins(lambda: daemons.signal("STOP", *_DAEMONS[which]), end)

    def killed(self, which: str) -> Mischief:
        # The supervisor starts them again at once.
        return self._begins(lambda: daemons.signal("KILL", *_DAEMONS[which]), self._await_service)

    def _await_service(self) -> None:
        eventually(self._serves, "the cluster serves again", seconds=120)

    def _serves(self) -> bool:
        """Whether every placement group of the two pools can be written to."""
        states = self._servers.tell_monitor("pg stat")["pg_summary"]["num_pg_by_state"]
        return all(state["name"].startswith("active+clean") for state in states)

    def blocklisted(self) -> Mischief:
        def cut_off() -> None:
            for connection in self.compute.connections():
                self._servers.cluster.fence(connection._cluster.address())
            # Whatever the administrator touches has heard of it.
            self._objects()

        return self._begins(cut_off)

    def denied(self, pool: str) -> Mischief:
        return self._with_caps({f"profile rbd pool={self._pool(pool)}": None})

    def denied_writes(self, pool: str) -> Mischief:
        name = self._pool(pool)
        return self._with_caps({f"profile rbd pool={name}": f"profile rbd-read-only pool={name}"})

    def _with_caps(self, changes: dict[str, Optional[str]], mon: Optional[str] = None) -> Mischief:
        """Meanwhile nova-compute's Ceph user has other rights: its sessions begin anew, for that is when they count."""
        user = f"client.{self._settings.ceph_user}"
        caps = self._servers.caps(user)

        def changed(text: str) -> str:
            parts = (changes.get(part.strip(), part.strip()) for part in text.split(","))
            return ", ".join(part for part in parts if part)

        def begin() -> None:
            fewer = {what: changed(text) for what, text in caps.items()}
            self._servers.set_caps(user, {**fewer, "mon": mon or caps["mon"]})
            self._connect_anew()

        def end() -> None:
            self._servers.set_caps(user, caps)
            self._connect_anew()

        return self._begins(begin, end)

    def _connect_anew(self) -> None:
        for connection in self.compute.connections():
            connection.connect_anew()

    def engine_killed(self, when: str) -> Mischief:
        if when != "unfenced":
            return super().engine_killed(when)
        without_right = self._with_caps({}, mon="allow r")
        killed = super().engine_killed("after")

        def mischief(do: Callable[[], Any]) -> Any:
            without_right(lambda: None)
            return killed(do)

        return mischief

    def full(self, pool: str) -> Mischief:
        name = self._pool(pool)
        set_quota = self._servers.set_quota
        return self._begins(lambda: self._heard(set_quota, name, 1), lambda: self._roomy(set_quota, name, 0))

    def full_cluster(self) -> Mischief:
        set_full = self._servers.set_full
        return self._begins(lambda: self._heard(set_full, full=True), lambda: self._roomy(set_full, full=False))

    def _roomy(self, change: Callable[..., None], *arguments: Any, **more: Any) -> None:
        change(*arguments, **more)
        if self.status() is None and self.image_id not in self._servers.jobs():
            eventually(lambda: not self.has_data(), "Glance gives up the upload that waited for room")

    def _heard(self, change: Callable[..., None], *arguments: Any, **more: Any) -> None:
        """Make a change of which the engine's client has heard."""
        change(*arguments, **more)
        for connection in self.compute.connections():
            connection._cluster._rados.wait_for_latest_osdmap()

    def _pool(self, name: str) -> str:
        return {"vms": self._servers.vms, "images": self._servers.images}[name]

    def name_taken(self) -> Mischief:
        return self._begins(
            lambda: rbd.RBD().create(self._ioctx("images"), self.image_id, MIB),
            lambda: rbd.RBD().remove(self._ioctx("images"), self.image_id),
        )

    def snap_taken(self) -> Mischief:
        return self._snap_taken("vms", self.disk, self._snap)

    def seal_taken(self) -> Mischief:
        return self._snap_taken("images", self.image_id, GLANCE_SNAP)

    def _snap_taken(self, pool: str, name: str, snap: str) -> Mischief:
        def change(how: str) -> None:
            with rbd.Image(self._ioctx(pool), name) as image:
                getattr(image, how)(snap)

        return self._begins(lambda: change("create_snap"), lambda: change("remove_snap"))

    def holder_frozen(self) -> Mischief:
        def mischief(do: Callable[[], Any]) -> Any:
            holder = Holder(CEPH_CONF, str(self._settings.ceph_user), self._servers.vms, self.disk)
            self._ends.append(holder.end)
            self._ends.append(holder.assert_writing)
            self._ends.append(holder.go_on)
            holder.freeze()
            return do()

        return mischief

    def clone_open(self) -> Mischief:
        def mischief(do: Callable[[], Any]) -> NoReturn:
            opened = rbd.Image(self._ioctx("images"), self.image_id)
            self._ends.append(opened.close)
            raise errors.CephError("injected")

        return mischief

    def frozen_has_child(self) -> Mischief:
        return self._has_child("vms", self.disk, self._snap)

    def seal_has_child(self) -> Mischief:
        has_child = self._has_child("images", self.image_id, GLANCE_SNAP)
        refuses = self.answers_once(409)

        def mischief(do: Callable[[], Any]) -> Any:
            has_child(lambda: None)
            return refuses(do)

        return mischief

    def _has_child(self, pool: str, name: str, snap: str) -> Mischief:
        child = (self._ioctx("vms"), self._theirs)
        return self._begins(
            lambda: rbd.RBD().clone(self._ioctx(pool), name, snap, *child, clone_format=2),
            lambda: rbd.RBD().remove(*child),
        )

    def _ioctx(self, pool: str) -> Any:
        return self._servers.ioctx[self._pool(pool)]

    # -- mischief: Glance ----------------------------------------------------------------------------------------------

    def answers_once(self, status: int) -> Mischief:
        return lambda do: self._through_proxy(do, status=status)

    def _silently(self, do: Callable[[], Any], how: str, *, asked: bool) -> Any:
        return self._through_proxy(do, asked=asked, held=how == "hang")

    def _through_proxy(self, do: Callable[[], Any], **fault: Any) -> Any:
        proxy = self._servers.proxy
        proxy.break_(_every, **fault)
        try:
            return do()
        finally:
            proxy.behave()
            assert proxy.seen

    def task_fails(self) -> Mischief:
        """Somebody removes the snapshot that the location names."""

        def remove_snap() -> None:
            with rbd.Image(self._ioctx("images"), self.image_id) as image:
                image.unprotect_snap(GLANCE_SNAP)
                image.remove_snap(GLANCE_SNAP)

        return self._begins(remove_snap)

    def never_active(self) -> Mischief:
        """As far as nova-compute is told."""
        record = {"status": "queued", "os_glance_import_task": "task", "locations": []}

        def mischief(do: Callable[[], Any]) -> Any:
            answer = do()
            self._servers.proxy.break_(lambda request: request.method == "GET", body=json.dumps(record).encode())
            self._ends.append(self._servers.proxy.behave)
            return answer

        return mischief

    def other_data(self) -> Mischief:
        def upload() -> None:
            tenant = self._servers.tenant
            tenant.set_properties(self.image_id, registration.RAW)
            headers = {"Content-Type": "application/octet-stream", "x-image-meta-store": "file"}
            tenant._call("PUT", f"/v2/images/{self.image_id}/file", data=b"other data", headers=headers)

        return self._begins(upload)
