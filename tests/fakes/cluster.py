# SPDX-License-Identifier: Apache-2.0
"""A Ceph cluster in memory that answers as a real one does; ``tests/contract`` holds both to the same cases.

One state may have several connections (:meth:`FakeCluster.another`), each with its own rights. What is on a disk is
kept as a few bytes per object, so that a test can see which instant a clone shows.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Callable, NoReturn, Optional, Union

from nova_rbd_snap import errors
from nova_rbd_snap.ceph.interface import FlattenTask, ImageInfo, SnapInfo, TrashInfo, one_client
from nova_rbd_snap.copy.extents import Extent, Extents, OnProgress
from nova_rbd_snap.specs import ImageSpec, SnapSpec

#: Size of one object of an rbd image; content is kept per object.
OBJECT_BYTES = 4 << 20

#: What is between a client and the monitors: it goes on when the OSDs no longer serve the client.
_OF_THE_MONITORS = (
    "fsid", "address", "fence", "has_pool", "used", "strain", "queue_flatten", "flatten_task", "cancel_task"
)

#: What a clone that did not return may leave behind (``docs/design/ceph.rst``): only a name; an openable, blank rbd
#: image; a child the parent does not know.
NAME_ONLY, BLANK, UNLISTED = HALF_MADE = ("name only", "blank", "unlisted")

Content = dict[int, bytes]


@dataclass(eq=False)
class _Snap:
    id: int
    name: str
    image: _Image
    objects: Content
    parent: Optional[_Snap]
    created: float = 0.0
    protected: bool = False
    trashed: bool = False
    # librbd's name for it once it is trashed.
    uuid: str = field(default_factory=lambda: str(uuid.uuid4()))

    def info(self) -> SnapInfo:
        return SnapInfo(self.id, self.name, self.created, self.protected, self.trashed)

    @property
    def spec(self) -> SnapSpec:
        return self.image.spec.snap(self.uuid if self.trashed else self.name)


@dataclass(eq=False)
class _Image:
    spec: ImageSpec
    id: str
    object_count: int
    created: float = 0.0
    data_pool: Optional[str] = None
    deep_flatten: bool = True
    journaling: bool = False
    mirrored: bool = False
    parent: Optional[_Snap] = None
    clone_format: int = 2
    objects: Content = field(default_factory=dict)
    snaps: list[_Snap] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    half: Optional[str] = None
    # How many attempts to remove it find it open somewhere.
    busy: float = 0
    # Objects that were as in a snapshot, by its id, when that was removed.
    as_in: dict[int, set[int]] = field(default_factory=dict)
    # It was removed for good.
    is_gone: bool = False
    # In the trash until nothing depends on it.
    is_parent_in_trash: bool = False
    has_map: bool = True
    # Its map says that objects are there which a flatten could not write.
    map_is_wrong: bool = False
    kept_until: float = 0.0
    # Address of who has it open and does not answer: frozen, or dead.
    silent_holder: Optional[str] = None

    def parents(self) -> set[_Snap]:
        """The snapshots that its head and its own snapshots depend on."""
        return {node.parent for node in (self, *self.snaps) if node.parent}


@dataclass
class _Pool:
    images: dict[str, _Image] = field(default_factory=dict)
    # Bytes where somebody else wrote what is no text.
    omap: dict[str, dict[Any, Any]] = field(default_factory=dict)
    # Address of who has the lease on an object, and when it runs out.
    leases: dict[str, tuple[str, float]] = field(default_factory=dict)
    full: bool = False
    used: float = 0.0
    # librbd removes by way of the trash, whose object is made by the first removal and stays.
    has_trash: bool = False
    trash: list[_Image] = field(default_factory=list)


@dataclass
class _Rule:
    call: str
    action: Callable[..., None]
    left: int
    applied: bool


@dataclass
class _State:
    pools: dict[str, _Pool]
    lock: Any = field(default_factory=threading.RLock)
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    rules: list[_Rule] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    connections: list[FakeCluster] = field(default_factory=list)
    fenced: set[str] = field(default_factory=set)
    # The manager's queue; it goes on whenever somebody looks.
    tasks: dict[ImageSpec, FlattenTask] = field(default_factory=dict)
    #: What the manager's tasks fail of, and what the cluster is strained by.
    manager_fails: str = ""
    strain: Optional[str] = None
    fsid: str = "00000000-0000-4000-8000-00000000cafe"
    #: How far the OSDs' clocks are ahead of this machine's.
    ahead: float = 0.0


def _content(node: Union[_Image, _Snap]) -> Content:
    return {**(_content(node.parent) if node.parent else {}), **node.objects}


def _text(data: Union[str, bytes]) -> str:
    return data if isinstance(data, str) else data.decode(errors="backslashreplace")


def _call(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of the interface: refused once this client is cut off, and where a test wants something to happen."""
    name = method.__name__

    @functools.wraps(method)
    def called(self: FakeCluster, *args: Any, **more: Any) -> Any:
        state = self._state
        with state.lock:
            state.calls.append(name)
            due = [rule for rule in state.rules if rule.call in (name, "*")]
            for rule in due:
                rule.left -= 1
            due = [rule for rule in due if rule.left == 0]
        for rule in due:
            if not rule.applied:
                rule.action(*args)
        if self.blocklisted and name not in _OF_THE_MONITORS:
            raise errors.Blocklisted(f"{name}: this client was cut off")
        # A flatten lets others in between two objects.
        with state.lock if name != "flatten" else nullcontext():
            result = method(self, *args, **more)
        for rule in due:
            if rule.applied:
                rule.action(*args)
        return result

    return called


class Reader:
    """Who has a snapshot open for reading: nobody tells it what becomes of the rbd image, or of its parents."""

    def __init__(self, snap: _Snap) -> None:
        self._snap = snap
        self._map = set(snap.objects) if snap.image.has_map else None
        self._parent = Reader(snap.parent) if snap.parent is not None else None

    def read(self, number: int) -> bytes:
        """The start of object *number*."""
        is_looked_for = self._map is None or number in self._map
        image = self._snap.image
        objects = self._snap.objects
        if image.is_gone:
            objects = {}
        elif self._snap not in image.snaps:
            # What was not written to until it was gone is not told from the head.
            objects = {key: data for key, data in image.objects.items() if key in image.as_in.get(self._snap.id, ())}
        if is_looked_for and number in objects:
            return objects[number]
        return self._parent.read(number) if self._parent is not None else b""


@dataclass
class _Source:
    """See :class:`nova_rbd_snap.copy.extents.Source`."""

    _cluster: FakeCluster
    _snap: _Snap
    size: int

    def extents(self, on_progress: OnProgress) -> Extents:
        if not on_progress(0, self.size):
            raise errors.Cancelled("nothing is read any more")
        found = sorted(_content(self._snap).items())
        return Extents(Extent(number * OBJECT_BYTES, len(data)) for number, data in found)

    def read(self, offset: int, length: int) -> bytes:
        pieces = Extents([Extent(offset, length)]).pieces(OBJECT_BYTES)
        return b"".join(self._cluster.read_data(self._snap, piece.offset, piece.length) for piece in pieces)


@dataclass
class _Sink:
    """See :class:`nova_rbd_snap.copy.extents.Sink`."""

    _cluster: FakeCluster
    _image: _Image

    def write(self, offset: int, data: bytes) -> None:
        for piece in Extents([Extent(offset, len(data))]).pieces(OBJECT_BYTES):
            start = piece.offset - offset
            self._cluster.write_data(self._image, piece.offset, data[start : start + piece.length])


class FakeCluster:
    """See :class:`nova_rbd_snap.ceph.interface.Cluster`; what a test may do besides comes first."""

    def __init__(
        self, *pools: str, clone_format: int = 2, state: Optional[_State] = None, fsid: Optional[str] = None
    ) -> None:
        self._state = state or _State({pool: _Pool() for pool in pools})
        if fsid is not None:
            self._state.fsid = fsid
        #: What was blocklisted through this or any other connection.
        self.fenced = self._state.fenced
        self._nonce = next(self._state.numbers)
        self.clone_format = clone_format
        self.blocklisted = False
        #: Whether this connection's user may blocklist others.
        self.may_fence = True
        #: Where the data of a clone lies that is told nothing else, if not in its own pool.
        self.default_data_pool: Optional[str] = None
        #: Seconds since the epoch, for what is made from now on.
        self.now = 0.0
        self._state.connections.append(self)
        #: Pools this connection's user has no rights in; those where it may only read, and detach clones.
        self.forbidden: set[str] = set()
        self.read_only: set[str] = set()
        #: Whether its removals move parents to the trash, as ours do.
        self.moves_parents = True

    # -- the world, as tests make and see it -----------------------------------------------------------------------

    def another(self, clone_format: Optional[int] = None) -> FakeCluster:
        """Another connection to the same cluster."""
        return FakeCluster(clone_format=clone_format or self.clone_format, state=self._state)

    @property
    def calls(self) -> list[str]:
        """Names of all calls so far, of every connection."""
        return self._state.calls

    def do_on(self, call: str, action: Callable[..., None], nth: int = 1, applied: bool = False) -> None:
        """Run *action* with the arguments of the *nth* *call* from now ("*": any) before or after its change."""
        self._state.rules.append(_Rule(call, action, nth, applied))

    def fail_on(self, call: str, error: type[BaseException], nth: int = 1, applied: bool = False) -> None:
        """Raise *error* from the *nth* *call* from now, before its change, or after it: the answer was lost."""

        def fail(*args: object) -> NoReturn:
            raise error(f"injected into {call}")

        self.do_on(call, fail, nth, applied)

    def fail_clone(self, half: str, error: type[BaseException]) -> None:
        """Let the next clone leave its target half-made and raise *error*."""

        def fail(snap: SnapSpec, dest: ImageSpec, data_pool: Optional[str]) -> NoReturn:
            self.make_half_clone(half, snap, dest)
            raise error("injected into clone")

        self.do_on("clone", fail)

    def heal(self) -> None:
        """Forget what was to happen and has not."""
        self._state.rules.clear()

    def create_pool(self, name: str) -> None:
        """Make a pool."""
        self._state.pools[name] = _Pool()

    def create_disk(self, spec: ImageSpec, object_count: int = 4, **more: Any) -> None:
        """Make an rbd image."""
        pool = self._pool(spec.pool)
        image_id = f"{next(self._state.numbers):012x}"
        pool.images[spec.name] = _Image(spec, image_id, object_count, **{"created": self.now, **more})

    def write(self, spec: ImageSpec, number: int, data: bytes) -> None:
        """Write to the start of object *number*."""
        self._open(spec).objects[number] = data

    def content(self, spec: Union[ImageSpec, SnapSpec]) -> Content:
        """What was written, by object."""
        return _content(self._open(spec) if isinstance(spec, ImageSpec) else self._snap(spec))

    def open_reader(self, spec: SnapSpec) -> Reader:
        """Let somebody have the snapshot open for reading, as a server that was booted from it does."""
        return Reader(self._snap(spec))

    def hold(self, spec: ImageSpec, attempts: float) -> None:
        """Let somebody have the rbd image open for that many attempts to remove it."""
        self._open(spec).busy = attempts

    def freeze_holder(self, spec: ImageSpec, frozen: bool = True, address: str = "192.0.2.2:0/1") -> None:
        """Let who has the rbd image open be silent, or answer again."""
        self._open(spec).silent_holder = address if frozen else None

    def fill(self, pool: str, full: bool = True) -> None:
        """Use up the pool's quota, or make room again."""
        self._state.pools[pool].full = full

    @contextlib.contextmanager
    def with_room(self) -> Iterator[None]:
        """Within the block no pool is full."""
        full = [pool for pool in self._state.pools.values() if pool.full]
        for pool in full:
            pool.full = False
        try:
            yield
        finally:
            for pool in full:
                pool.full = True

    def use(self, pool: str, share: float) -> None:
        """Let so much of the pool be used, from 0 to 1."""
        self._state.pools[pool].used = share

    def put_under_strain(self, strain: Optional[str]) -> None:
        """Let the cluster be slow, or no more."""
        self._state.strain = strain

    def fail_in_manager(self, failure: str) -> None:
        """Let the manager's tasks fail, or, with an empty text, no more."""
        self._state.manager_fails = failure

    def let_pass(self, seconds: float) -> None:
        """Let time pass for the OSDs, and for what is made."""
        self._state.ahead += seconds
        for connection in self._state.connections:
            connection.now += seconds

    def make_half_clone(self, half: str, snap: SnapSpec, dest: ImageSpec) -> None:
        """What a clone that did not return may leave behind."""
        source = self._snap(snap)
        self.create_disk(dest, source.image.object_count, half=half, parent=source if half == UNLISTED else None)

    def write_omap(self, pool: str, name: str, key: bytes, value: bytes) -> None:
        """What somebody else may write, which is no text."""
        try:
            text: Any = key.decode()
        except UnicodeDecodeError:
            text = key
        self._pool(pool).omap.setdefault(name, {})[text] = value

    def picture(self) -> dict[str, Any]:
        """All that is in the pools, comparable."""
        return {
            name: {
                "images": {image.spec.name: self._portrait(image) for image in pool.images.values()},
                "trash": [self._portrait(image) for image in pool.trash],
                "omap": {key: dict(pairs) for key, pairs in pool.omap.items() if pairs},
            }
            for name, pool in self._state.pools.items()
        }

    @staticmethod
    def _portrait(image: _Image) -> dict[str, Any]:
        return {
            "id": image.id,
            "half": image.half,
            "content": _content(image),
            "parent": image.parent and str(image.parent.spec),
            "snaps": [(snap.id, snap.name, snap.protected, snap.trashed, _content(snap)) for snap in image.snaps],
        }

    # -- helpers ---------------------------------------------------------------------------------------------------

    def _pool(self, name: str, *, grows: bool = False) -> _Pool:
        if name not in self._state.pools:
            raise errors.Missing(f"no pool {name}")
        if name in self.forbidden:
            raise errors.NoPermission(f"no rights in pool {name}")
        pool = self._state.pools[name]
        if grows and pool.full:
            raise errors.NoSpace(f"pool {name} is full")
        return pool

    def _open(self, spec: ImageSpec) -> _Image:
        image = self._pool(spec.pool).images.get(spec.name)
        if image is None or image.half == NAME_ONLY:
            raise errors.Missing(f"no rbd image {spec}")
        if image.parent is not None and image.parent not in image.parent.image.snaps:
            raise errors.Missing(f"the parent of {spec} is gone")
        return image

    def _snap(self, spec: SnapSpec) -> _Snap:
        for snap in self._open(spec.image).snaps:
            if snap.name == spec.name and not snap.trashed:
                return snap
        raise errors.Missing(f"no snapshot {spec}")

    def _children(self, snap: _Snap) -> list[_Image]:
        pools = self._state.pools.values()
        images = (image for pool in pools for image in (*pool.images.values(), *pool.trash))
        return [image for image in images if image.half != UNLISTED and snap in image.parents()]

    @staticmethod
    def _drop(snap: _Snap) -> None:
        image = snap.image
        image.snaps.remove(snap)
        image.as_in[snap.id] = {key for key, data in snap.objects.items() if image.objects.get(key) == data}

    def _is_waiting(self, snap: _Snap) -> bool:
        """Whether it is there only for its clones."""
        return snap.trashed and bool(self._children(snap))

    def _detached(self, snaps: set[_Snap]) -> None:
        """Trashed snapshots go with their last child, and with the last of them the parent that waits in the trash.

        But not by the hand of a user who may only read there.
        """
        for snap in snaps:
            image, pool = snap.image, self._state.pools[snap.image.spec.pool]
            if snap.image.spec.pool in self.read_only or not snap.trashed or self._children(snap):
                continue
            self._drop(snap)
            if image.is_parent_in_trash and not image.snaps:
                pool.trash.remove(image)
                image.is_gone = True
                self._detached(image.parents())

    @contextlib.contextmanager
    def keep_open(self, image: ImageSpec) -> Iterator[None]:
        yield

    # -- the interface ---------------------------------------------------------------------------------------------

    @_call
    def fsid(self) -> str:
        return self._state.fsid

    @_call
    def address(self) -> str:
        return f"192.0.2.1:0/{self._nonce}"

    @_call
    def fence(self, address: str) -> None:
        client = one_client(address)
        if not self.may_fence:
            raise errors.MayNotFence(f"blocklist client {client}: denied")
        self.fenced.add(client)
        for connection in self._state.connections:
            if f"192.0.2.1:0/{connection._nonce}" == client:
                connection.blocklisted = True

    @_call
    def has_pool(self, pool: str) -> bool:
        return pool in self._state.pools

    @_call
    def images(self, pool: str) -> list[str]:
        return [name for name, image in self._pool(pool).images.items()]

    @_call
    def exists(self, image: ImageSpec) -> bool:
        return image.name in self._pool(image.pool).images

    @_call
    def lookup(self, image: ImageSpec) -> ImageInfo:
        return self._info(self._open(image))

    @staticmethod
    def _info(found: _Image) -> ImageInfo:
        return ImageInfo(
            id=found.id,
            size_bytes=found.object_count * OBJECT_BYTES,
            created=found.created,
            parent=found.parent.spec if found.parent else None,
            snap_count=len(found.snaps),
            data_pool=found.data_pool or found.spec.pool,
            deep_flatten=found.deep_flatten,
            journaling=found.journaling,
            mirrored=found.mirrored,
        )

    @_call
    def ancestors(self, image: ImageSpec) -> list[ImageSpec]:
        found, parent = [], self._open(image).parent
        while parent is not None:
            found.append(parent.image.spec)
            parent = parent.image.parent
        return found

    @_call
    def usual_data_pool(self, pool: str) -> Optional[str]:
        for _, image in sorted(self._pool(pool).images.items()):
            if image.half != NAME_ONLY:
                return image.data_pool or pool
        return None

    @_call
    def snaps(self, image: ImageSpec) -> list[SnapInfo]:
        return [snap.info() for snap in self._open(image).snaps]

    @_call
    def children(self, image: ImageSpec, snap_id: int) -> list[ImageSpec]:
        for snap in self._open(image).snaps:
            if snap.id == snap_id:
                return [child.spec for child in self._children(snap)]
        raise errors.Missing(f"no snapshot {snap_id} of {image}")

    @_call
    def ask_holder(self, image: ImageSpec) -> None:
        if self._open(image).silent_holder not in (None, *self.fenced):
            raise errors.HolderSilent(f"who has {image} open does not answer")

    @_call
    def create_snap(self, snap: SnapSpec) -> int:
        image = self._open(snap.image)
        if any(other.name == snap.name and not other.trashed for other in image.snaps):
            raise errors.AlreadyThere(f"{snap} exists")
        made = _Snap(next(self._state.numbers), snap.name, image, dict(image.objects), image.parent, self.now)
        image.snaps.append(made)
        if self._pool(snap.image.pool).full:
            raise errors.NoSpace(f"{snap} cannot be read")
        return made.id

    @_call
    def protect_snap(self, snap: SnapSpec) -> None:
        found = self._snap(snap)
        if found.protected:
            raise errors.Busy(f"{snap} is protected")
        found.protected = True

    @_call
    def unprotect_snap(self, snap: SnapSpec) -> None:
        found = self._snap(snap)
        if not found.protected:
            raise errors.CephError(f"{snap} is not protected")
        if any(child.clone_format == 1 for child in self._children(found)):
            raise errors.Busy(f"{snap} has clones")
        found.protected = False

    @_call
    def remove_snap(self, snap: SnapSpec) -> None:
        found = self._snap(snap)
        if found.protected:
            raise errors.Busy(f"{snap} is protected")
        if self._children(found):
            found.trashed = True
        else:
            self._drop(found)

    @_call
    def remove_snap_by_id(self, image: ImageSpec, snap_id: int) -> None:
        snaps = self._open(image).snaps
        for snap in snaps:
            if snap.id == snap_id:
                if snap.protected or (snap.trashed and self._children(snap)):
                    raise errors.Busy(f"snapshot {snap_id} of {image} is in use")
                if self._children(snap):
                    snap.trashed = True
                else:
                    self._drop(snap)
                return
        raise errors.Missing(f"no snapshot {snap_id} of {image}")

    @_call
    def create(self, image: ImageSpec, data: bytes) -> None:
        if image.name in self._pool(image.pool, grows=True).images:
            raise errors.AlreadyThere(f"{image} exists")
        self.create_disk(image, object_count=1, objects={0: data})

    @_call
    def create_blank(self, image: ImageSpec, size_bytes: int, data_pool: Optional[str]) -> str:
        if image.name in self._pool(image.pool, grows=True).images:
            raise errors.AlreadyThere(f"{image} exists")
        self.create_disk(image, -(-size_bytes // OBJECT_BYTES), data_pool=data_pool or self.default_data_pool)
        return self._open(image).id

    @contextlib.contextmanager
    def open_snap(self, snap: SnapSpec) -> Iterator[_Source]:
        found = self._snap(snap)
        yield _Source(self, found, found.image.object_count * OBJECT_BYTES)

    @contextlib.contextmanager
    def open_blank(self, image: ImageSpec) -> Iterator[_Sink]:
        yield _Sink(self, self._open(image))

    @_call
    def read_data(self, snap: _Snap, offset: int, length: int) -> bytes:
        """Of what :meth:`open_snap` opened, within one object."""
        number, start = divmod(offset, OBJECT_BYTES)
        return _content(snap).get(number, b"")[start : start + length].ljust(length, b"\0")

    @_call
    def write_data(self, image: _Image, offset: int, data: bytes) -> None:
        """Of what :meth:`open_blank` opened, within one object."""
        number, start = divmod(offset, OBJECT_BYTES)
        self._pool(image.data_pool or image.spec.pool, grows=True)
        before = image.objects.get(number, b"").ljust(start, b"\0")
        image.objects[number] = before[:start] + data + before[start + len(data) :]

    @_call
    def clone(self, snap: SnapSpec, dest: ImageSpec, data_pool: Optional[str], *, object_map: bool = True) -> str:
        source = self._snap(snap)
        if self.clone_format == 1 and not source.protected:
            raise errors.CephError(f"{snap} is not protected")
        if dest.name in self._pool(dest.pool, grows=True).images:
            raise errors.AlreadyThere(f"{dest} exists")
        data_pool = data_pool or self.default_data_pool
        if data_pool:
            self._pool(data_pool, grows=True)
        self.create_disk(
            dest,
            source.image.object_count,
            parent=source,
            data_pool=data_pool,
            clone_format=self.clone_format,
            has_map=object_map,
        )
        self._open(dest).metadata.update(source.image.metadata)
        return self._open(dest).id

    @_call
    def flatten(self, image: ImageSpec, on_progress: OnProgress) -> ImageInfo:
        found = self._open(image)
        if found.parent is None:
            return self._info(found)
        found.map_is_wrong |= found.has_map and self._pool(found.data_pool or image.pool).full
        self._pool(found.data_pool or image.pool, grows=True)
        source, size_bytes = _content(found.parent), found.object_count * OBJECT_BYTES
        found.busy += float("inf")
        try:
            for number in range(found.object_count):
                if not on_progress(number * OBJECT_BYTES, size_bytes):
                    raise errors.Cancelled(f"the flatten of {image} was cancelled")
                with self._state.lock:
                    if source.get(number) and not found.map_is_wrong:  # what is all zeros is not copied
                        found.objects.setdefault(number, source[number])
        finally:
            found.busy = 0
        with self._state.lock:
            before = found.parents()
            found.parent = None
            if found.deep_flatten:
                for snap in found.snaps:
                    snap.objects = {number: data for number, data in _content(snap).items() if data}
                    snap.parent = None
            self._detached(before - found.parents())
            return self._info(found)

    @_call
    def queue_flatten(self, image: ImageSpec) -> FlattenTask:
        found = self._open(image)
        if found.parent is None:
            raise errors.Missing(f"{image} has no parent")
        return self._state.tasks.setdefault(image, FlattenTask(f"task-{next(self._state.numbers)}"))

    @_call
    def flatten_task(self, image: ImageSpec) -> Optional[FlattenTask]:
        task = self._state.tasks.get(image)
        if task is None:
            return None
        if self._state.manager_fails:
            task = self._state.tasks[image] = FlattenTask(task.id, 0.0, self._state.manager_fails)
        elif task.done < 1:
            found = self._pool(image.pool).images.get(image.name)
            if found is not None:
                found.busy = float("inf")
            task = self._state.tasks[image] = FlattenTask(task.id, task.done + 0.25)
        else:
            self._end_task(image)
            with contextlib.suppress(errors.Missing):
                self.another().flatten(image, lambda done, total: True)
            return None
        return task

    @_call
    def cancel_task(self, task_id: str) -> None:
        for image, task in list(self._state.tasks.items()):
            if task.id == task_id:
                self._end_task(image)
                return
        raise errors.Missing(f"no task {task_id}")

    def _end_task(self, image: ImageSpec) -> None:
        del self._state.tasks[image]
        found = self._pool(image.pool).images.get(image.name)
        if found is not None:
            found.busy = 0

    @_call
    def used(self, pool: str) -> float:
        if pool not in self._state.pools:
            raise errors.Missing(f"no pool {pool}")
        return self._state.pools[pool].used

    @_call
    def strain(self) -> Optional[str]:
        return self._state.strain

    @_call
    def metadata(self, image: ImageSpec, key: str) -> Optional[str]:
        return self._open(image).metadata.get(key)

    @_call
    def set_metadata(self, image: ImageSpec, key: str, value: str) -> None:
        self._pool(image.pool, grows=True)
        self._open(image).metadata[key] = value

    @_call
    def drop_object_map(self, image: ImageSpec) -> None:
        self._open(image).has_map = self._open(image).map_is_wrong = False

    @_call
    def give_object_map(self, image: ImageSpec) -> None:
        self._open(image).has_map = True

    @_call
    def remove(self, image: ImageSpec, on_progress: Optional[Callable[[int, int], object]] = None) -> None:
        pool = self._pool(image.pool)
        found = pool.images.get(image.name)
        if found is None:
            raise errors.Missing(f"no rbd image {image}")
        if found.snaps and not (self.moves_parents and all(map(self._is_waiting, found.snaps))):
            raise errors.HasSnapshots(f"{image} has snapshots")
        if found.busy:
            found.busy -= 1
            raise errors.Busy(f"{image} is open somewhere")
        self._make_trash(image)
        if found.snaps:
            found.is_parent_in_trash = True
            pool.trash.append(pool.images.pop(image.name))
            return
        if on_progress is not None:
            on_progress(found.object_count, found.object_count)
        del pool.images[image.name]
        found.is_gone = True
        self._detached(found.parents())

    def _make_trash(self, image: ImageSpec) -> None:
        pool = self._pool(image.pool)
        if pool.full and not pool.has_trash:
            raise errors.CephError(f"{image}: not found, says librbd, of an rbd image in a full pool")
        pool.has_trash = True

    @_call
    def trash(self, image: ImageSpec, keep_seconds: int) -> None:
        pool = self._pool(image.pool)
        if image.name not in pool.images:
            raise errors.Missing(f"no rbd image {image}")
        self._make_trash(image)
        trashed = pool.images.pop(image.name)
        trashed.kept_until = self.now + keep_seconds
        pool.trash.append(trashed)

    @_call
    def trashed(self, pool: str) -> list[TrashInfo]:
        return [
            TrashInfo(image.id, image.spec.name, image.is_parent_in_trash, image.kept_until)
            for image in self._pool(pool).trash
        ]

    @_call
    def snaps_of_trashed(self, pool: str, image_id: str) -> list[SnapInfo]:
        return [snap.info() for snap in self._trashed(pool, image_id).snaps]

    @_call
    def children_of_trashed(self, pool: str, image_id: str) -> list[ImageSpec]:
        return [child.spec for snap in self._trashed(pool, image_id).snaps for child in self._children(snap)]

    @_call
    def remove_snap_of_trashed(self, pool: str, image_id: str, name: str) -> None:
        image = self._trashed(pool, image_id)
        for snap in image.snaps:
            if snap.name == name and not snap.trashed:
                if self._children(snap):
                    raise errors.Busy(f"snapshot {name} of {image_id} has clones")
                self._drop(snap)
                return
        raise errors.Missing(f"no snapshot {name} of {image_id}")

    @_call
    def remove_trashed(self, pool: str, image_id: str) -> None:
        image = self._trashed(pool, image_id)
        if any(not snap.trashed or self._children(snap) for snap in image.snaps):
            raise errors.HasSnapshots(f"{image_id} has snapshots")
        self._pool(pool).trash.remove(image)
        image.is_gone = True
        self._detached(image.parents())

    def _trashed(self, pool: str, image_id: str) -> _Image:
        for image in self._pool(pool).trash:
            if image.id == image_id:
                return image
        raise errors.Missing(f"no rbd image {image_id} in the trash of {pool}")

    @_call
    def omap_items(self, pool: str, name: str) -> dict[str, str]:
        return {_text(key): _text(value) for key, value in self._pool(pool).omap.get(name, {}).items()}

    @_call
    def omap_item(self, pool: str, name: str, key: str) -> Optional[str]:
        value = self._pool(pool).omap.get(name, {}).get(key)
        return None if value is None else _text(value)

    @_call
    def omap_replace(self, pool: str, name: str, key: str, old: Optional[str], new: Optional[str]) -> None:
        objects = self._pool(pool).omap
        if objects.get(name, {}).get(key, "") not in (old or "", (old or "").encode()):
            raise errors.LedgerConflict(f"{pool}/{name}: {key} is not what it was")
        # A full pool takes no new object, but pairs of an old one.
        self._pool(pool, grows=name not in objects)
        pairs = objects.setdefault(name, {})
        if new is None:
            pairs.pop(key, None)
        else:
            pairs[key] = new

    @_call
    def take_lease(self, pool: str, name: str, seconds: float) -> None:
        leases = self._pool(pool, grows=True).leases
        if self._holder(leases, name):
            raise errors.Busy(f"somebody has the lease {pool}/{name}")
        leases[name] = self.address(), self._osd_time() + seconds

    @_call
    def renew_lease(self, pool: str, name: str, seconds: float) -> None:
        leases = self._pool(pool).leases
        if self._holder(leases, name) != self.address():
            raise errors.LeaseLost(f"the lease {pool}/{name} is lost")
        leases[name] = self.address(), self._osd_time() + seconds

    @_call
    def end_lease(self, pool: str, name: str) -> None:
        leases = self._pool(pool).leases
        if self._holder(leases, name) == self.address():
            del leases[name]

    def _osd_time(self) -> float:
        return time.monotonic() + self._state.ahead

    def _holder(self, leases: dict[str, tuple[str, float]], name: str) -> Optional[str]:
        holder, until = leases.get(name, (None, 0.0))
        return holder if until > self._osd_time() else None
