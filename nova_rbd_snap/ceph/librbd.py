# SPDX-License-Identifier: Apache-2.0
"""A real cluster through librados and librbd: the only place that imports their bindings.

Time-outs are set on this connection alone. They do not belong into ceph.conf, which QEMU reads as well: a guest
must wait for a slow cluster, not get I/O errors from it.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import logging
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Callable, Optional

import rados
import rbd

from nova_rbd_snap import errors
from nova_rbd_snap.ceph import lease, reports, translate, trash
from nova_rbd_snap.ceph.interface import FlattenTask, ImageInfo, SnapInfo, TrashInfo, one_client
from nova_rbd_snap.copy.extents import Extent, Extents, OnProgress
from nova_rbd_snap.specs import ImageSpec, SnapSpec, client_address

LOG = logging.getLogger(__name__)

_OMAP_PAGE = 1000
#: How long a client may take to confirm a message.
_SIGN_OF_LIFE_SECONDS = 5
#: How librbd's own locks begin; others are people's (``rbd lock add``), and are never taken away.
_EXCLUSIVE_LOCK = "auto "
#: What goes by the map of an rbd image's objects.
_MAP_FEATURES = rbd.RBD_FEATURE_OBJECT_MAP | rbd.RBD_FEATURE_FAST_DIFF
_MAP_IS_WRONG = rbd.RBD_FLAG_OBJECT_MAP_INVALID | rbd.RBD_FLAG_FAST_DIFF_INVALID
#: Bytes of a disk that are asked about in one call, and so between two signs of progress.
_LISTED_AT_ONCE = 64 << 30
_OF_USERS = rbd.RBD_SNAP_NAMESPACE_TYPE_USER
#: Longer than anything that was frozen may be frozen and still be expected to wake.
_FENCE_SECONDS = 24 * 3600


def _translated(doing: str) -> contextlib.AbstractContextManager[None]:
    return translate.translated(doing, rados.Error, rbd.Error)


def _seconds(moment: datetime.datetime) -> float:
    """The bindings give UTC without saying so."""
    return moment.replace(tzinfo=datetime.timezone.utc).timestamp()


def _feature_bits(text: str) -> int:
    """``rbd_default_features`` as a number: librbd accepts a number or names."""
    text = text.strip()
    if text.isdigit():
        return int(text)
    names = (name.strip().replace("-", "_").upper() for name in text.split(","))
    return sum(getattr(rbd, f"RBD_FEATURE_{name}") for name in names if name)


def _raw(pairs: Iterator[tuple[str, bytes]]) -> Iterator[tuple[bytes, bytes]]:
    """What the binding lists, with the keys that it cannot decode, whose values it does not tell."""
    while True:
        try:
            key, value = next(pairs)
        except StopIteration:
            return
        except UnicodeDecodeError as error:  # it has gone on to the next one all the same
            yield error.object, b""
        else:
            yield key.encode(), value


def _not_after(key: bytes) -> str:
    """*key*, or the nearest before it that is text: the binding of Ceph 16 takes nothing else to begin after."""
    try:
        return key.decode()
    except UnicodeDecodeError as error:
        return key[: error.start].decode()


def _text(data: bytes) -> str:
    """Anybody may have written it; no text of ours has such escapes, so none is taken for it."""
    return data.decode(errors="backslashreplace")


@dataclass
class _Kept:
    """An rbd image that a thread keeps open, from the first call on that needs it."""

    stack: contextlib.ExitStack
    opened: Any = None


class FrozenDisk:
    """See :class:`nova_rbd_snap.copy.extents.Source`."""

    def __init__(self, opened: Any, snap: SnapSpec) -> None:
        self._opened, self._snap = opened, snap
        self.size = int(opened.size())

    def extents(self, on_progress: OnProgress) -> Extents:
        with _translated(f"list what is allocated of {self._snap}"):
            found, whole = Extents(), self._objects()
            done, total = 0, whole.total
            # An object may be there in part, which the map of the objects does not tell.
            for piece in whole.pieces(_LISTED_AT_ONCE):
                if not on_progress(done, total):
                    raise errors.Cancelled(f"nothing is read of {self._snap} any more")
                self._list(piece.offset, piece.length, found, whole_object=False)
                done += piece.length
        return found

    def _objects(self) -> Extents:
        """The objects that are there, by their map; the whole disk where that is wrong, or there is none."""
        everything = Extents([Extent(0, self.size)])
        if not self._opened.features() & rbd.RBD_FEATURE_FAST_DIFF:
            return everything
        if self._opened.flags() & _MAP_IS_WRONG:
            LOG.warning("The object map of %s is invalid, so all of it is looked at; see 'rbd object-map'", self._snap)
            return everything
        found = Extents()
        self._list(0, self.size, found, whole_object=True)
        return found

    def _list(self, offset: int, length: int, found: Extents, *, whole_object: bool) -> None:
        def add(offset: int, length: int, exists: bool) -> None:
            if exists:
                found.add(offset, min(offset + length, self.size))

        self._opened.diff_iterate(offset, length, None, add, include_parent=True, whole_object=whole_object)

    def read(self, offset: int, length: int) -> bytes:
        with _translated(f"read {self._snap} at {offset}"):
            return bytes(self._opened.read(offset, length))


class BlankDisk:
    """See :class:`nova_rbd_snap.copy.extents.Sink`."""

    def __init__(self, opened: Any, image: ImageSpec) -> None:
        self._opened, self._image = opened, image

    def write(self, offset: int, data: bytes) -> None:
        with _translated(f"write {self._image} at {offset}"):
            self._opened.write(data, offset)


class LibrbdCluster:
    """See :class:`nova_rbd_snap.ceph.interface.Cluster`."""

    def __init__(
        self,
        *,
        conf: str,
        user: Optional[str],
        timeout_seconds: int,
        clone_format: int,
        objects_at_once: Optional[int] = None,
    ) -> None:
        """Connect.

        :param conf: path of ceph.conf; empty for librados' own search.
        :param user: cephx user without ``client.``.
        :param timeout_seconds: bound of each single RADOS operation; one librbd call takes several.
        :param objects_at_once: how many objects a flatten or a removal has under way; None for Ceph's own number.
        :raises errors.Unreachable: no monitor answered.
        :raises errors.Missing: no configuration file or keyring.
        """
        options = {
            "client_mount_timeout": str(timeout_seconds),
            "rados_mon_op_timeout": str(timeout_seconds),
            "rados_osd_op_timeout": str(timeout_seconds),
            "rbd_default_clone_format": str(clone_format),
            "rbd_move_parent_to_trash_on_remove": "true",
            # What is read and written here is so once: a cache costs memory, and answers for what is not written yet.
            "rbd_cache": "false",
        }
        if objects_at_once is not None:
            options["rbd_concurrent_management_ops"] = str(objects_at_once)
        with _translated(f"connect to Ceph as {user or 'the default user'} with {conf or 'the default ceph.conf'}"):
            self._rados = rados.Rados(rados_id=user, conffile=conf, conf=options)
            self._rados.connect()
        self._of_thread = threading.local()

    @contextlib.contextmanager
    def _pool(self, pool: str) -> Iterator[Any]:
        ioctx = self._rados.open_ioctx(pool)
        try:
            # A full pool answers EDQUOT or ENOSPC at once instead of holding the call until there is room.
            ioctx.set_osdmap_full_try()
            yield ioctx
        finally:
            ioctx.close()

    @contextlib.contextmanager
    def _image(self, image: ImageSpec, doing: str, *, read_only: bool = False) -> Iterator[Any]:
        keeping = self._kept.get(image)
        with _translated(doing), contextlib.ExitStack() as stack:
            if keeping is None:
                yield self._open(image, stack, read_only)
                return
            if keeping.opened is None:
                keeping.opened = self._open(image, keeping.stack, read_only=False)
            yield keeping.opened

    def _open(self, image: ImageSpec, stack: contextlib.ExitStack, read_only: bool) -> Any:
        ioctx = stack.enter_context(self._pool(image.pool))
        return stack.enter_context(rbd.Image(ioctx, image.name, read_only=read_only))

    @contextlib.contextmanager
    def _image_by_id(self, pool: str, image_id: str, doing: str, *, read_only: bool = False) -> Iterator[Any]:
        """One in the trash, or whose name may be another's by now."""
        with _translated(doing), self._pool(pool) as ioctx:
            opened = rbd.Image(ioctx, image_id=image_id, read_only=read_only)
            with opened:
                yield opened

    @property
    def _kept(self) -> dict[ImageSpec, _Kept]:
        """The rbd images that this thread keeps open."""
        kept: dict[ImageSpec, _Kept] = self._of_thread.__dict__.setdefault("kept", {})
        return kept

    @contextlib.contextmanager
    def keep_open(self, image: ImageSpec) -> Iterator[None]:
        with _translated(f"close {image}"), contextlib.ExitStack() as stack:
            self._kept[image] = _Kept(stack)
            stack.callback(self._kept.pop, image)
            yield

    def fsid(self) -> str:
        with _translated("ask for the cluster's fsid"):
            return str(self._rados.get_fsid())

    def address(self) -> str:
        with _translated("ask for this client's address"):
            return client_address(self._rados.get_addrs())

    def fence(self, address: str) -> None:
        client = one_client(address)
        try:
            with _translated(f"blocklist client {client}"):
                self._rados.blocklist_add(client, _FENCE_SECONDS)
                # What follows carries the new map, so no OSD serves it before it has heard.
                self._rados.wait_for_latest_osdmap()
        except errors.NoPermission as error:
            raise errors.MayNotFence(str(error)) from error

    def has_pool(self, pool: str) -> bool:
        with _translated(f"look up pool {pool}"):
            return bool(self._rados.pool_exists(pool))

    def images(self, pool: str) -> list[str]:
        with _translated(f"list pool {pool}"), self._pool(pool) as ioctx:
            return [str(name) for name in rbd.RBD().list(ioctx)]

    def exists(self, image: ImageSpec) -> bool:
        with _translated(f"look for {image}"), self._pool(image.pool) as ioctx:
            try:
                # It stands for half-made images, too, whatever else of them is there.
                ioctx.stat(f"rbd_id.{image.name}")
            except rados.ObjectNotFound:
                return False
            return True

    def lookup(self, image: ImageSpec) -> ImageInfo:
        with self._image(image, f"look up {image}", read_only=True) as opened:
            return self._info(image.pool, opened)

    def _info(self, pool: str, opened: Any) -> ImageInfo:
        features = opened.features()
        mirroring = opened.mirror_image_get_info()["state"]
        return ImageInfo(
            id=opened.id(),
            size_bytes=opened.size(),
            created=_seconds(opened.create_timestamp()),
            parent=self._parent(opened),
            snap_count=len(list(opened.list_snaps())),
            data_pool=self._data_pool(opened),
            deep_flatten=bool(features & rbd.RBD_FEATURE_DEEP_FLATTEN),
            journaling=bool(features & rbd.RBD_FEATURE_JOURNALING),
            mirrored=mirroring == rbd.RBD_MIRROR_IMAGE_ENABLED,
        )

    @staticmethod
    def _parent(opened: Any) -> Optional[SnapSpec]:
        try:
            pool, name, snap = opened.parent_info()
        except rbd.ImageNotFound:
            return None
        return ImageSpec(pool, name).snap(snap)

    def ancestors(self, image: ImageSpec) -> list[ImageSpec]:
        found, doing = [], f"look up the parents of {image}"
        with self._image(image, doing, read_only=True) as opened:
            parent = self._parent_with_id(opened)
        while parent is not None:
            spec, image_id = parent
            found.append(spec)
            with self._image_by_id(spec.pool, image_id, doing, read_only=True) as opened:
                parent = self._parent_with_id(opened)
        return found

    def _parent_with_id(self, opened: Any) -> Optional[tuple[ImageSpec, str]]:
        snap = self._parent(opened)
        return (snap.image, str(opened.parent_id())) if snap is not None else None

    def _data_pool(self, opened: Any) -> str:
        return str(self._rados.pool_reverse_lookup(opened.data_pool_id()))

    def usual_data_pool(self, pool: str) -> Optional[str]:
        with _translated(f"look at an rbd image in pool {pool}"), self._pool(pool) as ioctx:
            for entry in rbd.RBD().list2(ioctx):
                try:
                    opened = rbd.Image(ioctx, image_id=entry["id"], read_only=True)
                except (rbd.ImageNotFound, rbd.PermissionError):
                    continue  # deleted, half-made, or a clone whose parent is not ours to read: it says nothing
                with opened:
                    return self._data_pool(opened)
        return None

    def snaps(self, image: ImageSpec) -> list[SnapInfo]:
        with self._image(image, f"list the snapshots of {image}", read_only=True) as opened:
            return [self._snap_info(opened, snap) for snap in opened.list_snaps()]

    @staticmethod
    def _snap_info(opened: Any, snap: dict[str, Any]) -> SnapInfo:
        trashed = snap["namespace"] == rbd.RBD_SNAP_NAMESPACE_TYPE_TRASH
        return SnapInfo(
            id=snap["id"],
            name=snap["trash"]["original_name"] if trashed else snap["name"],
            created=_seconds(opened.get_snap_timestamp(snap["id"])),
            protected=snap["namespace"] == rbd.RBD_SNAP_NAMESPACE_TYPE_USER
            and opened.is_protected_snap(snap["name"]),
            trashed=trashed,
        )

    def children(self, image: ImageSpec, snap_id: int) -> list[ImageSpec]:
        with self._image(image, f"list the clones of snapshot {snap_id} of {image}", read_only=True) as opened:
            opened.set_snap_by_id(snap_id)
            return [ImageSpec(child["pool"], child["image"]) for child in opened.list_children2()]

    def ask_holder(self, image: ImageSpec) -> None:
        doing = f"ask who has {image} open"
        with self._image(image, doing, read_only=True) as opened, self._pool(image.pool) as ioctx:
            try:
                # Without a text it says that the header has changed, which every librbd confirms.
                ioctx.notify(f"rbd_header.{opened.id()}", "", _SIGN_OF_LIFE_SECONDS * 1000)
            except rados.TimedOut as error:
                raise errors.HolderSilent(f"who has {image} open does not answer") from error
            lockers = opened.list_lockers()
            watchers = {f"client.{watcher['id']}" for watcher in opened.watchers_list()}
        for client, cookie, address in lockers["lockers"] if lockers else ():
            if cookie.startswith(_EXCLUSIVE_LOCK) and client not in watchers and not self._is_fenced(address):
                raise errors.HolderSilent(f"{client} ({address}) has the lock of {image}, and is dead or frozen")

    def _is_fenced(self, address: str) -> bool:
        """Whether the client is cut off already; False where that is not told."""
        # As text, for as JSON Ceph 18 sends two lists without anything between them.
        code, answer, _ = self._rados.mon_command(json.dumps({"prefix": "osd blocklist ls"}), b"")
        return code == 0 and any(line.split()[:1] == [address] for line in answer.decode().splitlines())

    def create_snap(self, snap: SnapSpec) -> int:
        doing = f"create snapshot {snap}"
        with self._image(snap.image, doing) as opened, self._pool(snap.image.pool) as ioctx:
            opened.create_snap(snap.name)
            snap_id = int(opened.snap_get_id(snap.name))
            if opened.features() & rbd.RBD_FEATURE_OBJECT_MAP:
                try:
                    ioctx.stat(f"rbd_object_map.{opened.id()}.{snap_id:016x}")
                except rados.ObjectNotFound as error:
                    # librbd makes it all the same where there was no room for its object map.
                    raise errors.NoSpace(f"{doing}: it cannot be read, as in a pool that is full") from error
            return snap_id

    def protect_snap(self, snap: SnapSpec) -> None:
        with self._image(snap.image, f"protect snapshot {snap}") as opened:
            opened.protect_snap(snap.name)

    def unprotect_snap(self, snap: SnapSpec) -> None:
        with self._image(snap.image, f"unprotect snapshot {snap}") as opened:
            opened.unprotect_snap(snap.name)

    def remove_snap(self, snap: SnapSpec) -> None:
        with self._image(snap.image, f"remove snapshot {snap}") as opened:
            opened.remove_snap(snap.name)

    def remove_snap_by_id(self, image: ImageSpec, snap_id: int) -> None:
        with self._image(image, f"remove snapshot {snap_id} of {image}") as opened:
            opened.remove_snap_by_id(snap_id)

    def create(self, image: ImageSpec, data: bytes) -> None:
        with _translated(f"create {image}"), self._pool(image.pool) as ioctx:
            rbd.RBD().create(ioctx, image.name, len(data), old_format=False, features=self._clone_features())
            with rbd.Image(ioctx, image.name) as opened:
                opened.write(data, 0)

    def create_blank(self, image: ImageSpec, size_bytes: int, data_pool: Optional[str]) -> str:
        features = self._clone_features()
        with _translated(f"create {image}"), self._pool(image.pool) as ioctx:
            rbd.RBD().create(
                ioctx, image.name, size_bytes, old_format=False, features=features, data_pool=data_pool
            )
            return self._id(ioctx, image.name)

    @contextlib.contextmanager
    def open_snap(self, snap: SnapSpec) -> Iterator[FrozenDisk]:
        with _translated(f"open {snap}"), self._pool(snap.image.pool) as ioctx:
            opened = rbd.Image(ioctx, snap.image.name, snapshot=snap.name, read_only=True)
            with opened:
                yield FrozenDisk(opened, snap)

    @contextlib.contextmanager
    def open_blank(self, image: ImageSpec) -> Iterator[BlankDisk]:
        with self._image(image, f"open {image}") as opened:
            yield BlankDisk(opened, image)

    def clone(self, snap: SnapSpec, dest: ImageSpec, data_pool: Optional[str], *, object_map: bool = True) -> str:
        source = snap.image
        features = self._clone_features() & ~(0 if object_map else _MAP_FEATURES)
        with _translated(f"clone {snap} to {dest}"), self._pool(source.pool) as src, self._pool(dest.pool) as dst:
            rbd.RBD().clone(src, source.name, snap.name, dst, dest.name, features=features, data_pool=data_pool)
            return self._id(dst, dest.name)

    @staticmethod
    def _id(ioctx: Any, name: str) -> str:
        """The id of an rbd image, without opening it, and its parent with it."""
        (length,) = struct.unpack_from("<I", content := ioctx.read(f"rbd_id.{name}"))
        return str(content[4 : 4 + length].decode())

    def _clone_features(self) -> int:
        """The operator's default features and what a clone of ours must have, without what it must not."""
        wanted = _feature_bits(self._rados.conf_get("rbd_default_features"))
        wanted |= rbd.RBD_FEATURE_LAYERING | rbd.RBD_FEATURE_DEEP_FLATTEN
        return int(wanted & ~rbd.RBD_FEATURE_JOURNALING)

    def flatten(self, image: ImageSpec, on_progress: OnProgress) -> ImageInfo:
        with self._image(image, f"flatten {image}") as opened:
            object_bytes = opened.stat()["obj_size"]

            def step(done: int, total: int) -> int:
                # librbd counts objects. Only a negative number stops it; an exception in here would be swallowed.
                return 0 if on_progress(done * object_bytes, total * object_bytes) else -errno.ECANCELED

            try:
                opened.flatten(on_progress=step)
            except rbd.OperationCanceled as error:
                raise errors.Cancelled(f"the flatten of {image} was cancelled") from error
            except rbd.InvalidArgument:
                # librbd's answer for an image without a parent: flat already, or half-made; the caller can tell.
                if self._parent(opened) is not None:
                    raise
            return self._info(image.pool, opened)

    def queue_flatten(self, image: ImageSpec) -> FlattenTask:
        return reports.decode_task(self._tell_manager("add flatten", image_spec=str(image)))

    def flatten_task(self, image: ImageSpec) -> Optional[FlattenTask]:
        return reports.flatten_task(self._tell_manager("list"), image)

    def cancel_task(self, task_id: str) -> None:
        self._tell_manager("cancel", task_id=task_id)

    def _tell_manager(self, what: str, **arguments: str) -> Any:
        return self._command(self._rados.mgr_command, f"rbd task {what}", **arguments)

    def _command(self, tell: Callable[..., tuple[int, bytes, str]], prefix: str, **arguments: str) -> Any:
        """What a daemon answers to a command."""
        doing = " ".join((prefix, *arguments.values()))
        with _translated(doing):
            code, answer, text = tell(json.dumps({"prefix": prefix, "format": "json", **arguments}), b"")
        if code:
            raise translate.class_for(code)(f"{doing}: {text or errno.errorcode.get(abs(code), code)}")
        return json.loads(answer) if answer else None

    def used(self, pool: str) -> float:
        share = reports.used(self._command(self._rados.mon_command, "df", detail="detail"), pool)
        if share is None:
            raise errors.Missing(f"no pool {pool}")
        return share

    def strain(self) -> Optional[str]:
        return reports.strain(self._command(self._rados.mon_command, "status"))

    def metadata(self, image: ImageSpec, key: str) -> Optional[str]:
        with self._image(image, f"read {key} of {image}", read_only=True) as opened:
            try:
                return str(opened.metadata_get(key))
            except KeyError:
                return None

    def set_metadata(self, image: ImageSpec, key: str, value: str) -> None:
        with self._image(image, f"write {key} on {image}") as opened:
            opened.metadata_set(key, value)

    def drop_object_map(self, image: ImageSpec) -> None:
        with self._image(image, f"take the object map of {image} away") as opened:
            if opened.features() & _MAP_FEATURES:
                opened.update_features(opened.features() & _MAP_FEATURES, False)

    def give_object_map(self, image: ImageSpec) -> None:
        with self._image(image, f"give {image} an object map") as opened:
            wanted = self._clone_features() & _MAP_FEATURES
            if wanted & ~opened.features():
                opened.update_features(wanted & ~opened.features(), True)
            if not wanted or not opened.flags() & _MAP_IS_WRONG:
                return
            snaps = [snap["name"] for snap in opened.list_snaps() if snap["namespace"] == _OF_USERS]
            opened.rebuild_object_map()
            for snap in snaps:
                opened.set_snap(snap)
                opened.rebuild_object_map()
            opened.set_snap(None)

    @contextlib.contextmanager
    def _removing(self, doing: str, image: ImageSpec) -> Iterator[Any]:
        try:
            with _translated(doing), self._pool(image.pool) as ioctx:
                yield ioctx
        except errors.Missing as error:
            # On a full pool librbd says "not found" of an image that is there.
            if self.exists(image):
                raise errors.CephError(f"{doing}: librbd says not found, but it is still there") from error
            raise

    def remove(self, image: ImageSpec, on_progress: Optional[Callable[[int, int], object]] = None) -> None:
        def step(done: int, total: int) -> int:
            if on_progress is not None:
                on_progress(done, total)
            return 0

        with self._removing(f"remove {image}", image) as ioctx:
            rbd.RBD().remove(ioctx, image.name, on_progress=step)

    def trash(self, image: ImageSpec, keep_seconds: int) -> None:
        with self._removing(f"move {image} to the trash", image) as ioctx:
            rbd.RBD().trash_move(ioctx, image.name, keep_seconds)

    def trashed(self, pool: str) -> list[TrashInfo]:
        with _translated(f"list the trash of pool {pool}"), self._pool(pool) as ioctx:
            found = self._omap(ioctx, trash.OBJECT)
        return [trash.decode(_text(key), value) for key, value in found.items() if key.startswith(trash.KEY.encode())]

    def snaps_of_trashed(self, pool: str, image_id: str) -> list[SnapInfo]:
        doing = f"list the snapshots of {image_id} in the trash of pool {pool}"
        with self._image_by_id(pool, image_id, doing, read_only=True) as opened:
            return [self._snap_info(opened, snap) for snap in opened.list_snaps()]

    def children_of_trashed(self, pool: str, image_id: str) -> list[ImageSpec]:
        found, doing = [], f"list the clones of {image_id} in the trash of pool {pool}"
        with self._image_by_id(pool, image_id, doing, read_only=True) as opened:
            for snap in list(opened.list_snaps()):
                opened.set_snap_by_id(snap["id"])
                found += [ImageSpec(child["pool"], child["image"]) for child in opened.list_children2()]
        return found

    def remove_snap_of_trashed(self, pool: str, image_id: str, name: str) -> None:
        snap = f"snapshot {name} of {image_id} in the trash of pool {pool}"
        with self._image_by_id(pool, image_id, f"remove {snap}") as opened:
            opened.set_snap(name)
            if list(opened.list_children2()):
                raise errors.Busy(f"{snap} has clones")
            opened.set_snap(None)
            if opened.is_protected_snap(name):
                opened.unprotect_snap(name)
            opened.remove_snap(name)

    def remove_trashed(self, pool: str, image_id: str) -> None:
        with _translated(f"remove {image_id} from the trash of pool {pool}"), self._pool(pool) as ioctx:
            rbd.RBD().trash_remove(ioctx, image_id, True)

    def omap_items(self, pool: str, name: str) -> dict[str, str]:
        with _translated(f"read {pool}/{name}"), self._pool(pool) as ioctx:
            return {_text(key): _text(value) for key, value in self._omap(ioctx, name).items()}

    def omap_item(self, pool: str, name: str, key: str) -> Optional[str]:
        doing = f"read {key} in {pool}/{name}"
        with _translated(doing), self._pool(pool) as ioctx, rados.ReadOpCtx() as operation:
            pairs, _ = ioctx.get_omap_vals_by_keys(operation, (key,))
            with contextlib.suppress(rados.ObjectNotFound):
                ioctx.operate_read_op(operation, name)
                for _, value in pairs:
                    return _text(value)
        return None

    def _omap(self, ioctx: Any, name: str) -> dict[bytes, bytes]:
        """All pairs; none where there is no object."""
        found: dict[bytes, bytes] = {}
        with contextlib.suppress(rados.ObjectNotFound):
            while (page := self._omap_page(ioctx, name, after=max(found, default=b""))).keys() - found.keys():
                found.update(page)
        return found

    @staticmethod
    def _omap_page(ioctx: Any, name: str, after: bytes) -> dict[bytes, bytes]:
        with rados.ReadOpCtx() as operation:
            pairs, _ = ioctx.get_omap_vals(operation, _not_after(after), "", _OMAP_PAGE)
            ioctx.operate_read_op(operation, name)
            return dict(_raw(pairs))

    def omap_replace(self, pool: str, name: str, key: str, old: Optional[str], new: Optional[str]) -> None:
        with _translated(f"write {key} in {pool}/{name}"), self._pool(pool) as ioctx, rados.WriteOpCtx() as operation:
            operation.new(rados.LIBRADOS_CREATE_IDEMPOTENT)
            # A key that is absent compares as the empty string.
            operation.omap_cmp(key, old or "", rados.LIBRADOS_CMPXATTR_OP_EQ)
            if new is None:
                ioctx.remove_omap_keys(operation, (key,))
            else:
                ioctx.set_omap(operation, (key,), (new,))
            try:
                ioctx.operate_write_op(operation, name)
            except rados.Error as error:
                if getattr(error, "errno", None) != errno.ECANCELED:
                    raise
                raise errors.LedgerConflict(f"{pool}/{name}: {key} is not what it was") from error

    def take_lease(self, pool: str, name: str, seconds: float) -> None:
        try:
            self._lock(f"take the lease {pool}/{name}", pool, name, lease.LOCK, lease.taking(seconds))
        except errors.AlreadyThere as error:
            raise errors.Busy(str(error)) from error

    def renew_lease(self, pool: str, name: str, seconds: float) -> None:
        try:
            self._lock(f"renew the lease {pool}/{name}", pool, name, lease.LOCK, lease.renewing(seconds))
        except (errors.Missing, errors.Busy) as error:
            raise errors.LeaseLost(str(error)) from error

    def end_lease(self, pool: str, name: str) -> None:
        with contextlib.suppress(errors.Missing):
            self._lock(f"end the lease {pool}/{name}", pool, name, lease.UNLOCK, lease.ending())

    def _lock(self, doing: str, pool: str, name: str, method: str, request: bytes) -> None:
        with _translated(doing), self._pool(pool) as ioctx:
            ioctx.execute(name, lease.CLASS, method, request)
