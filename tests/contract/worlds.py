# SPDX-License-Identifier: Apache-2.0
"""The two clusters that every case runs on: the fake, and a real one, which ``/etc/ceph/ceph.conf`` names.

There all is done as client.admin, in pools of this session.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, Optional, Protocol, Union

import pytest

from nova_rbd_snap import errors
from nova_rbd_snap.ceph.interface import Cluster
from nova_rbd_snap.specs import ImageSpec, SnapSpec
from tests import monitor
from tests.fakes import cluster as fake
from tests.holder import holding
from tests.waiting import eventually

CEPH_CONF = Path("/etc/ceph/ceph.conf")
OBJECT_BYTES = fake.OBJECT_BYTES

#: Without any for the OSDs a client gets no ticket for them, and its calls time out instead of being denied.
_CAPS_ELSEWHERE = ["mon", "profile rbd", "osd", "profile rbd pool=elsewhere"]
#: All rights but that of the monitor's profile for rbd: to blocklist.
_CAPS_TO_READ_MAPS = ["mon", "allow r", "osd", "profile rbd"]


class Guest(Protocol):
    """A server's QEMU: a client of its own, on the same machine, that has a disk open and writes to it."""

    address: str

    def write(self, number: int, data: bytes) -> None:
        """Write to the start of object *number*. :raises Exception: it may not any more."""


class Holder(Protocol):
    """See :class:`tests.holder.Holder`."""

    address: str

    def freeze(self) -> None: ...
    def go_on(self) -> None: ...
    def assert_writing(self) -> None: ...
    def die(self) -> None: ...


class World(Protocol):
    """A cluster with pools of its own, and what a case may do to it beside the interface."""

    #: Nova's pool; Glance's; one for rbd images whose data is elsewhere; and where that is.
    vms: str
    images: str
    ec_free: str
    ec_data: str

    def new_pool(self) -> str:
        """A pool in which nothing was ever done."""

    def connect(self, clone_format: int = 2) -> Cluster:
        """A connection with all rights."""

    def disconnect(self) -> None:
        """End all connections that were made."""

    def let_pass(self, seconds: float) -> None:
        """Move the cluster's clock on, where that can be done."""

    def let_leases_end(self, seconds: float) -> None:
        """Return when those have ended that lasted so long at most when this was called."""

    def connect_with_data_pool(self, pool: str) -> Cluster:
        """A connection whose options say where the data of new rbd images lies."""

    def connect_without_rights(self) -> Cluster:
        """A connection of a user who may use none of the pools."""

    def connect_without_fencing(self) -> Cluster:
        """A connection of a user who may do all but blocklist."""

    def connect_reader(self) -> Cluster:
        """A connection of a user who may write to Glance's pool, and only read Nova's."""

    def guest(self, disk: ImageSpec) -> contextlib.AbstractContextManager[Guest]:
        """Let a guest run on *disk*."""

    def holder(self, image: ImageSpec) -> contextlib.AbstractContextManager[Holder]:
        """Let somebody have the rbd image open, and write to it."""

    def reader(self, snap: SnapSpec) -> contextlib.AbstractContextManager[Callable[[int], bytes]]:
        """Let somebody have a snapshot open for reading, who gives the start of an object."""

    def is_trimming(self) -> bool:
        """Whether the OSDs are about to remove what a snapshot held that is gone."""

    def blocklist(self) -> set[str]:
        """The addresses that are cut off."""

    def connect_cut_off(self) -> Cluster:
        """A connection whose client is on the blocklist."""

    def create(self, image: ImageSpec, object_count: int = 4, **more: Any) -> None:
        """Make an rbd image; *more* is ``data_pool``, ``journaling``, ``mirrored`` or ``deep_flatten``."""

    def write(self, image: ImageSpec, number: int, data: bytes) -> None:
        """Write to the start of object *number*."""

    def content(self, spec: Union[ImageSpec, SnapSpec]) -> dict[int, bytes]:
        """What was written, by object."""

    def open(self, image: ImageSpec) -> contextlib.AbstractContextManager[None]:
        """Let another client have the rbd image open."""

    def fill(self, pool: str) -> contextlib.AbstractContextManager[None]:
        """Use up the pool's quota, for a while."""

    def clone_without_deep_flatten(self, snap: SnapSpec, dest: ImageSpec) -> None:
        """A clone as somebody else may make it."""

    def write_omap(self, pool: str, name: str, key: bytes, value: bytes) -> None:
        """Write a pair as somebody else may."""

    def half_clone(self, half: str, snap: SnapSpec, dest: ImageSpec) -> None:
        """Leave what a clone that did not return leaves."""


class FakeWorld:
    """See :class:`World`."""

    vms, images, ec_free, ec_data = "vms", "images", "ec-free", "ec-data"

    def __init__(self) -> None:
        self._cluster = fake.FakeCluster(self.vms, self.images, self.ec_free, self.ec_data)
        self._cluster.now = time.time()
        self._passed_seconds = 0.0

    def new_pool(self) -> str:
        self._cluster.create_pool("new")
        return "new"

    def connect(self, clone_format: int = 2) -> fake.FakeCluster:
        connection = self._cluster.another(clone_format)
        connection.now = time.time() + self._passed_seconds
        return connection

    def disconnect(self) -> None:
        """There is nothing to end."""

    def let_pass(self, seconds: float) -> None:
        self._cluster.let_pass(seconds)
        self._passed_seconds += seconds

    def let_leases_end(self, seconds: float) -> None:
        self.let_pass(seconds)

    def connect_with_data_pool(self, pool: str) -> Cluster:
        connection = self.connect()
        connection.default_data_pool = pool
        return connection

    def connect_without_rights(self) -> Cluster:
        stranger = self._cluster.another()
        stranger.forbidden = {self.vms, self.images, self.ec_free, self.ec_data}
        return stranger

    def connect_without_fencing(self) -> Cluster:
        harmless = self._cluster.another()
        harmless.may_fence = False
        return harmless

    def connect_reader(self) -> Cluster:
        reader = self._cluster.another()
        reader.read_only, reader.moves_parents = {self.vms}, False
        return reader

    @contextlib.contextmanager
    def guest(self, disk: ImageSpec) -> Iterator[Guest]:
        yield _FakeGuest(self.connect(), disk)

    @contextlib.contextmanager
    def holder(self, image: ImageSpec) -> Iterator[Holder]:
        yield _FakeHolder(self._cluster, image)

    @contextlib.contextmanager
    def reader(self, snap: SnapSpec) -> Iterator[Callable[[int], bytes]]:
        opened = self._cluster.open_reader(snap)
        yield lambda number: opened.read(number).rstrip(b"\0")

    def is_trimming(self) -> bool:
        return False

    def blocklist(self) -> set[str]:
        return self._cluster.fenced

    def connect_cut_off(self) -> Cluster:
        victim = self._cluster.another()
        self._cluster.fence(victim.address())
        return victim

    def create(self, image: ImageSpec, object_count: int = 4, **more: Any) -> None:
        self._cluster.create_disk(image, object_count, **more)

    def write(self, image: ImageSpec, number: int, data: bytes) -> None:
        self._cluster.write(image, number, data.rstrip(b"\0"))

    def content(self, spec: Union[ImageSpec, SnapSpec]) -> dict[int, bytes]:
        return self._cluster.content(spec)

    @contextlib.contextmanager
    def open(self, image: ImageSpec) -> Iterator[None]:
        self._cluster.hold(image, float("inf"))
        yield
        with contextlib.suppress(errors.Missing):
            self._cluster.hold(image, 0)

    @contextlib.contextmanager
    def fill(self, pool: str) -> Iterator[None]:
        self._cluster.fill(pool)
        yield
        self._cluster.fill(pool, full=False)

    def clone_without_deep_flatten(self, snap: SnapSpec, dest: ImageSpec) -> None:
        self._cluster.clone(snap, dest, None)
        self._cluster._open(dest).deep_flatten = False

    def write_omap(self, pool: str, name: str, key: bytes, value: bytes) -> None:
        self._cluster.write_omap(pool, name, key, value)

    def half_clone(self, half: str, snap: SnapSpec, dest: ImageSpec) -> None:
        self._cluster.make_half_clone(half, snap, dest)


class _FakeGuest:
    """See :class:`Guest`."""

    def __init__(self, client: fake.FakeCluster, disk: ImageSpec) -> None:
        self.address = client.address()
        self._client, self._disk = client, disk

    def write(self, number: int, data: bytes) -> None:
        self._client.lookup(self._disk)  # as itself
        self._client.write(self._disk, number, data)


class _FakeHolder:
    """See :class:`Holder`."""

    address = "192.0.2.3:0/7"

    def __init__(self, cluster: fake.FakeCluster, image: ImageSpec) -> None:
        self._cluster, self._image = cluster, image

    def freeze(self) -> None:
        self._cluster.freeze_holder(self._image, address=self.address)

    def go_on(self) -> None:
        self._cluster.freeze_holder(self._image, frozen=False)

    def assert_writing(self) -> None:
        self._cluster.lookup(self._image)

    die = freeze


class _RealGuest:
    """See :class:`Guest`."""

    def __init__(self, client: Any, opened: Any) -> None:
        self.address = _plain(client.get_addrs())
        self._opened = opened

    def write(self, number: int, data: bytes) -> None:
        self._opened.write(data, number * OBJECT_BYTES)
        self._opened.flush()


def need_manager() -> None:
    """Skip the test where the cluster's manager dies of a flatten, as that of the lab's Ceph 18 does."""
    if os.environ.get("NOVA_RBD_SNAP_MANAGER") != "1":
        pytest.skip("this cluster's manager is not given a flatten: NOVA_RBD_SNAP_MANAGER is not 1")


class RealWorld:
    """See :class:`World`."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        import rados
        import rbd

        self._rados_module, self._rbd = rados, rbd
        self._stack = stack
        self.connections = contextlib.ExitStack()
        self._rados = rados.Rados(rados_id="admin", conffile=str(CEPH_CONF))
        self._rados.connect(timeout=10)
        stack.callback(self._rados.shutdown)
        stack.enter_context(monitor.hurried(self._rados))
        session = uuid.uuid4().hex[:8]
        profile = f"contract-{session}"
        self.mon("osd erasure-code-profile set", name=profile, profile=["k=2", "m=1", "crush-failure-domain=osd"])
        stack.callback(self.mon, "osd erasure-code-profile rm", name=profile)
        self.vms, self.images, self.ec_free, self.ec_data = (
            self._create_pool(f"contract-{session}-{name}", **more)
            for name, more in (
                ("vms", {}),
                ("images", {}),
                ("ec-free", {}),
                ("ec-data", {"pool_type": "erasure", "erasure_code_profile": profile}),
            )
        )
        self.mon("osd pool set", pool=self.ec_data, var="allow_ec_overwrites", val="true")
        self._stranger = self._create_user(f"contract-{session}", _CAPS_ELSEWHERE)
        self._harmless = self._create_user(f"contract-{session}-harmless", _CAPS_TO_READ_MAPS)
        read = f"profile rbd pool={self.images}, profile rbd-read-only pool={self.vms}"
        self._reader = self._create_user(f"contract-{session}-reader", ["mon", "profile rbd", "osd", read])

    def mon(self, prefix: str, **more: Any) -> str:
        code, out, text = self._rados.mon_command(json.dumps({"prefix": prefix, **more}), b"")
        if code:
            raise AssertionError(f"{prefix} {more}: {code} {text}")
        return out.decode().strip()

    def _create_user(self, name: str, caps: list[str]) -> tuple[str, str]:
        """A cephx user; returns name and key."""
        key = self.mon("auth get-or-create-key", entity=f"client.{name}", caps=caps)
        self._stack.callback(self.mon, "auth rm", entity=f"client.{name}")
        return name, key

    def _create_pool(self, name: str, **more: Any) -> str:
        self.mon("osd pool create", pool=name, pg_num=1, **more)
        self._stack.callback(self.mon, "osd pool rm", pool=name, pool2=name, yes_i_really_really_mean_it=True)
        self.mon("osd pool application enable", pool=name, app="rbd")
        return name

    def new_pool(self) -> str:
        return self._create_pool(f"contract-{uuid.uuid4().hex[:8]}-new")

    def _connect(self, user: str, clone_format: int = 2, conf: Path = CEPH_CONF) -> Any:
        from nova_rbd_snap.ceph.librbd import LibrbdCluster

        cluster = LibrbdCluster(conf=str(conf), user=user, timeout_seconds=20, clone_format=clone_format)
        self.connections.callback(cluster._rados.shutdown)
        return cluster

    def connect(self, clone_format: int = 2) -> Cluster:
        return self._connect("admin", clone_format)

    def disconnect(self) -> None:
        self.connections.close()

    def let_pass(self, seconds: float) -> None:
        """It goes by itself."""

    def let_leases_end(self, seconds: float) -> None:
        name = f"witness-{uuid.uuid4()}"
        self.connect().take_lease(self.vms, name, seconds)
        other = self.connect()

        def has_ended() -> bool:
            try:
                other.take_lease(self.vms, name, seconds)
            except errors.Busy:
                return False
            return True

        eventually(has_ended, "the lease ends", pause=0.1)

    def connect_with_data_pool(self, pool: str) -> Cluster:
        return self._connect("admin", conf=self._conf(f"[global]\nrbd_default_data_pool = {pool}\n"))

    def connect_without_rights(self) -> Cluster:
        return self._connect_as(*self._stranger)

    def connect_without_fencing(self) -> Cluster:
        return self._connect_as(*self._harmless)

    def connect_reader(self) -> Cluster:
        return self._connect_as(*self._reader)

    def _connect_as(self, user: str, key: str) -> Cluster:
        keyring = self._folder() / "keyring"
        keyring.write_text(f"[client.{user}]\nkey = {key}\n")
        return self._connect(user, conf=self._conf(f"[client.{user}]\nkeyring = {keyring}\n"))

    def _folder(self) -> Path:
        return Path(self.connections.enter_context(tempfile.TemporaryDirectory()))

    def _conf(self, more: str) -> Path:
        """The cluster's, and *more*."""
        conf = self._folder() / "ceph.conf"
        conf.write_text(f"{CEPH_CONF.read_text()}\n{more}")
        return conf

    @contextlib.contextmanager
    def guest(self, disk: ImageSpec) -> Iterator[Guest]:
        client = self._rados_module.Rados(rados_id="admin", conffile=str(CEPH_CONF))
        client.connect(timeout=10)
        try:
            ioctx = client.open_ioctx(disk.pool)
            with self._rbd.Image(ioctx, disk.name) as opened:
                yield _RealGuest(client, opened)
            ioctx.close()
        finally:
            client.shutdown()

    def holder(self, image: ImageSpec) -> contextlib.AbstractContextManager[Holder]:
        return holding(str(CEPH_CONF), "admin", image.pool, image.name)

    @contextlib.contextmanager
    def reader(self, snap: SnapSpec) -> Iterator[Callable[[int], bytes]]:
        # Without a cache, which would keep what was read ahead.
        client = self._rados_module.Rados(rados_id="admin", conffile=str(CEPH_CONF), conf={"rbd_cache": "false"})
        client.connect(timeout=10)
        try:
            with (
                client.open_ioctx(snap.image.pool) as ioctx,
                self._rbd.Image(ioctx, snap.image.name, snapshot=snap.name, read_only=True) as opened,
            ):
                yield lambda number: opened.read(number * OBJECT_BYTES, 64).rstrip(b"\0")
        finally:
            client.shutdown()

    def is_trimming(self) -> bool:
        return "snaptrim" in self.mon("pg stat")

    def blocklist(self) -> set[str]:
        return {line.split()[0] for line in self.mon("osd blocklist ls").splitlines()}

    def connect_cut_off(self) -> Cluster:
        victim = self.connect()
        self.mon("osd blocklist", blocklistop="add", addr=victim.address())
        self.connections.callback(self.mon, "osd blocklist", blocklistop="rm", addr=victim.address())
        nothing = ImageSpec(self.vms, "nothing")

        def is_known_to_the_osds() -> bool:
            try:
                victim.exists(nothing)
            except errors.Blocklisted:
                return True
            return False

        eventually(is_known_to_the_osds, "the OSDs know the blocklist", pause=0.1)
        return victim

    @contextlib.contextmanager
    def _ioctx(self, pool: str) -> Iterator[Any]:
        ioctx = self._rados.open_ioctx(pool)
        try:
            yield ioctx
        finally:
            ioctx.close()

    def create(self, image: ImageSpec, object_count: int = 4, **more: Any) -> None:
        rbd = self._rbd
        features = rbd.RBD_FEATURE_LAYERING | rbd.RBD_FEATURE_EXCLUSIVE_LOCK
        if more.get("deep_flatten", True):
            features |= rbd.RBD_FEATURE_DEEP_FLATTEN
        if more.get("journaling"):
            features |= rbd.RBD_FEATURE_JOURNALING
        with self._ioctx(image.pool) as ioctx:
            size_bytes = object_count * OBJECT_BYTES
            rbd.RBD().create(
                ioctx, image.name, size_bytes, old_format=False, features=features, data_pool=more.get("data_pool")
            )
            if more.get("mirrored"):
                rbd.RBD().mirror_mode_set(ioctx, rbd.RBD_MIRROR_MODE_IMAGE)
                with rbd.Image(ioctx, image.name) as opened:
                    opened.mirror_image_enable(rbd.RBD_MIRROR_IMAGE_MODE_SNAPSHOT)

    def write(self, image: ImageSpec, number: int, data: bytes) -> None:
        with self._ioctx(image.pool) as ioctx, self._rbd.Image(ioctx, image.name) as opened:
            opened.write(data, number * OBJECT_BYTES)

    def content(self, spec: Union[ImageSpec, SnapSpec]) -> dict[int, bytes]:
        image, snap = (spec, None) if isinstance(spec, ImageSpec) else (spec.image, spec.name)
        with (
            self._ioctx(image.pool) as ioctx,
            self._rbd.Image(ioctx, image.name, snapshot=snap, read_only=True) as opened,
        ):
            found = {
                number: opened.read(number * OBJECT_BYTES, 64).rstrip(b"\0")
                for number in range(opened.size() // OBJECT_BYTES)
            }
        return {number: data for number, data in found.items() if data}

    @contextlib.contextmanager
    def open(self, image: ImageSpec) -> Iterator[None]:
        with self._ioctx(image.pool) as ioctx, self._rbd.Image(ioctx, image.name):
            yield

    @contextlib.contextmanager
    def fill(self, pool: str) -> Iterator[None]:
        witness = self.connect()

        def takes_writes() -> bool:
            try:
                witness.omap_replace(pool, uuid.uuid4().hex, "key", None, "new")
            except errors.NoSpace:
                return False
            return True

        self.mon("osd pool set-quota", pool=pool, field="max_objects", val="1")
        try:
            eventually(lambda: not takes_writes(), "the pool is full", pause=0.1)
            yield
        finally:
            self.mon("osd pool set-quota", pool=pool, field="max_objects", val="0")
            eventually(takes_writes, "the pool is no longer full", pause=0.1)

    def clone_without_deep_flatten(self, snap: SnapSpec, dest: ImageSpec) -> None:
        # In the format that the connection says, for the binding of Ceph 16 does not take it as an argument.
        cluster = self._connect("admin", 2)
        features, source = self._rbd.RBD_FEATURE_LAYERING, snap.image
        with cluster._pool(source.pool) as src, cluster._pool(dest.pool) as dst:
            self._rbd.RBD().clone(src, source.name, snap.name, dst, dest.name, features=features)

    def write_omap(self, pool: str, name: str, key: bytes, value: bytes) -> None:
        with self._ioctx(pool) as ioctx, self._rados_module.WriteOpCtx() as operation:
            ioctx.set_omap(operation, (key,), (value,))
            ioctx.operate_write_op(operation, name)

    def half_clone(self, half: str, snap: SnapSpec, dest: ImageSpec) -> None:
        rbd = self._rbd
        source = snap.image
        if half == fake.BLANK:
            with self._ioctx(source.pool) as ioctx, rbd.Image(ioctx, source.name, read_only=True) as opened:
                self.create(dest, opened.size() // OBJECT_BYTES)
            return
        image_id = self.connect(2).clone(snap, dest, None)
        self._forget_child(snap, dest, image_id)
        if half == fake.NAME_ONLY:
            with self._ioctx(dest.pool) as ioctx:
                ioctx.remove_object(f"rbd_header.{image_id}")

    def _forget_child(self, snap: SnapSpec, dest: ImageSpec, image_id: str) -> None:
        """Take the child off the parent's list (class ``rbd``, method ``child_detach``)."""
        import struct

        def text(value: str) -> bytes:
            return struct.pack("<I", len(value)) + value.encode()

        with self._ioctx(dest.pool) as ioctx:
            body = struct.pack("<q", ioctx.get_pool_id()) + text(image_id) + text("")
        spec = struct.pack("<BBI", 1, 1, len(body)) + body
        with self._ioctx(snap.image.pool) as ioctx:
            with self._rbd.Image(ioctx, snap.image.name, read_only=True) as opened:
                header, snap_id = f"rbd_header.{opened.id()}", opened.snap_get_id(snap.name)
            ioctx.execute(header, "rbd", "child_detach", struct.pack("<Q", snap_id) + spec)


def _plain(address: str) -> str:
    """An address as the blocklist takes it: without the messenger's version."""
    return address.strip("[]").split(",")[0].split(":", 1)[1] if address[0] in "[v" else address


def absent() -> Optional[str]:
    """Why there is no real cluster."""
    try:
        import rados
        import rbd
    except ImportError as error:
        return f"no Ceph bindings for this Python: {error}"
    del rados, rbd
    return None if CEPH_CONF.exists() else f"no {CEPH_CONF}"
