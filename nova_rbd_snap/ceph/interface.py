# SPDX-License-Identifier: Apache-2.0
"""What the middle layer may ask of a Ceph cluster. ``librbd.py`` does it for real, the tests' fake in memory.

The docstrings are the contract: ``tests/contract`` runs the same cases on both. Every method may raise
:class:`~nova_rbd_snap.errors.Unreachable` (its change may or may not have happened), ``Blocklisted``,
``NoPermission`` and ``NoSpace``; only what is special is listed. Every method may be called from several threads.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Callable, Optional, Protocol

from nova_rbd_snap import errors
from nova_rbd_snap.copy.extents import OnProgress, Sink, Source
from nova_rbd_snap.specs import ImageSpec, SnapSpec, client_address


def one_client(address: str) -> str:
    """*address* as the blocklist takes it.

    :raises errors.Refused: it is not the address of a single client, see :meth:`Cluster.fence`.
    """
    try:
        return client_address(address)
    except ValueError as error:
        raise errors.Refused(f"nobody is fenced: {error}") from error


@dataclass(frozen=True)
class ImageInfo:
    """An rbd image as it stands.

    :ivar id: survives renames, and is what identifies the rbd image in the ledger.
    :ivar created: seconds since the epoch.
    :ivar parent: the snapshot it is a clone of. A trashed snapshot carries a UUID instead of its own name.
    :ivar snap_count: of snapshots, trashed ones included.
    :ivar data_pool: pool of its data objects, as a rule its own.
    """

    id: str
    size_bytes: int
    created: float
    parent: Optional[SnapSpec]
    snap_count: int
    data_pool: str
    deep_flatten: bool
    journaling: bool
    mirrored: bool


@dataclass(frozen=True)
class SnapInfo:
    """A snapshot as it stands.

    :ivar name: the name it was made with, also once it is trashed.
    :ivar created: seconds since the epoch.
    :ivar trashed: removed, but kept by librbd while a clone depends on it.
    """

    id: int
    name: str
    created: float
    protected: bool
    trashed: bool


@dataclass(frozen=True)
class TrashInfo:
    """An rbd image in the trash of its pool.

    :ivar name: the one it had, which may be another's by now.
    :ivar is_parent: it was removed, and is there only until no clone depends on it.
    :ivar kept_until: seconds since the epoch.
    """

    id: str
    name: str
    is_parent: bool
    kept_until: float


@dataclass(frozen=True)
class FlattenTask:
    """A flatten in the queue of the Ceph manager.

    :ivar done: how much of it is, from 0 to 1.
    :ivar failure: what its last attempt failed of, if it did; the manager tries again by itself.
    """

    id: str
    done: float = 0.0
    failure: str = ""


class Cluster(Protocol):
    """One connection to one cluster as one user."""

    def keep_open(self, image: ImageSpec) -> contextlib.AbstractContextManager[None]:
        """Within the block, what this thread asks of *image* goes over one opened rbd image: opening one is dear.

        It is opened by the first call that needs it, and is in the way of its removal until the block ends.
        """

    def fsid(self) -> str:
        """The id of the cluster."""

    def address(self) -> str:
        """This client's address with nonce, as :meth:`fence` takes it."""

    def fence(self, address: str) -> None:
        """Cut off the one client with this address for a day.

        Once this has returned, whatever the fencing client touches is closed to the fenced one: the operation carries
        the new map to its OSD. What nobody has touched since may take a last write, until that OSD hears of the map by
        itself: look before you trust. Implements ``ceph osd blocklist add``.

        :raises Refused: *address* is no single client's: blocklisting it would cut off every guest of a host.
        :raises MayNotFence: the user lacks mon ``profile rbd``.
        """

    def has_pool(self, pool: str) -> bool:
        """Whether there is such a pool."""

    def images(self, pool: str) -> list[str]:
        """The names of all rbd images in *pool* but those in its trash."""

    def exists(self, image: ImageSpec) -> bool:
        """Whether the name is taken, be it by a half-made rbd image that cannot be opened."""

    def lookup(self, image: ImageSpec) -> ImageInfo:
        """:raises Missing: it does not exist, or is half-made and cannot be opened."""

    def ancestors(self, image: ImageSpec) -> list[ImageSpec]:
        """The rbd images that *image* reads through, nearest first, those in a trash by their former names.

        :raises Missing: no such rbd image.
        """

    def used(self, pool: str) -> float:
        """How full *pool* is, from 0 to 1: of what the cluster or its quota leaves it.

        :raises Missing: no such pool.
        """

    def strain(self) -> Optional[str]:
        """Why work that nobody waits for should wait: the cluster is slow, or copies what lacks a copy; for people."""

    def usual_data_pool(self, pool: str) -> Optional[str]:
        """The data pool of the rbd images that are in *pool*, judged by one of them; None without one."""

    def snaps(self, image: ImageSpec) -> list[SnapInfo]:
        """All snapshots, trashed ones included, oldest first. :raises Missing: no such rbd image."""

    def children(self, image: ImageSpec, snap_id: int) -> list[ImageSpec]:
        """The clones that depend on a snapshot, trashed or not. :raises Missing: no such snapshot."""

    def ask_holder(self, image: ImageSpec) -> None:
        """Ask whoever has the rbd image open for a sign of life; at once where nobody has.

        librbd takes the lock of a holder that is silent for 30 s away, and blocklists it (``docs/design/ceph.rst``).

        :raises HolderSilent: there is none, or who has the lock does not even watch the rbd image: dead or frozen. But
            whoever is fenced has no rbd image to lose.
        :raises Missing: no such rbd image.
        """

    def create_snap(self, snap: SnapSpec) -> int:
        """Freeze the rbd image now; returns the snapshot's id. About a second: a monitor's proposal.

        :raises AlreadyThere: the name is taken by another snapshot.
        :raises NoSpace: it is there, but cannot be read: the pool is full.
        """

    def protect_snap(self, snap: SnapSpec) -> None:
        """Allow clones in format 1, and forbid removal. :raises Busy: it is protected already."""

    def unprotect_snap(self, snap: SnapSpec) -> None:
        """:raises Busy: a clone depends on it."""

    def remove_snap(self, snap: SnapSpec) -> None:
        """Remove by name. With clones in format 2 it is trashed, and goes by itself with the last of them.

        :raises Busy: it is protected.
        :raises Missing: no such snapshot, or no longer under this name.
        """

    def remove_snap_by_id(self, image: ImageSpec, snap_id: int) -> None:
        """Remove by id: a live one as :meth:`remove_snap` does, a trashed one for good.

        :raises Busy: it is protected, or trashed and a clone depends on it.
        :raises Missing: no such snapshot.
        """

    def create(self, image: ImageSpec, data: bytes) -> None:
        """Make an rbd image of *data*, some blocks of 512 bytes. :raises AlreadyThere: there is one of that name."""

    def create_blank(self, image: ImageSpec, size_bytes: int, data_pool: Optional[str]) -> str:
        """Make an rbd image that is all zeros; returns its id. What it may leave behind is as of :meth:`clone`.

        :param data_pool: as :meth:`clone` takes it.
        :raises AlreadyThere: there is one of that name.
        """

    def open_snap(self, snap: SnapSpec) -> contextlib.AbstractContextManager[Source]:
        """What the rbd image was when it was frozen. :raises Missing: no such snapshot."""

    def open_blank(self, image: ImageSpec) -> contextlib.AbstractContextManager[Sink]:
        """An rbd image that is to be filled. :raises Missing: no such rbd image."""

    def clone(self, snap: SnapSpec, dest: ImageSpec, data_pool: Optional[str], *, object_map: bool = True) -> str:
        """Make *dest* a copy-on-write child of *snap*, able to be deep-flattened; returns the id of *dest*.

        A call that did not return may leave a half-made rbd image under the name (``docs/design/ceph.rst``).
        Implements ``rbd_clone3``.

        :param data_pool: where the data of *dest* is to lie; None for what the cluster's options say, which may not be
            the pool of *dest*.
        :param object_map: whether *dest* may keep a map of its objects. With one, who has a snapshot of it open reads
            zeros once it was flattened (``docs/design/ceph.rst``).
        :raises AlreadyThere: *dest* exists.
        """

    def flatten(self, image: ImageSpec, on_progress: OnProgress) -> ImageInfo:
        """Copy what is still only in the parent and cut the link, for the snapshots of *image*, too.

        Over an object map a flatten must not be repeated, or data may be lost (``docs/design/ceph.rst``).

        :returns: what it is then.
        :raises Cancelled: *on_progress* asked to stop; the parent is kept.
        """

    def queue_flatten(self, image: ImageSpec) -> FlattenTask:
        """Have the Ceph manager do as :meth:`flatten` does; returns the task that there is already, where there is one.

        :raises Missing: no such rbd image, or it has no parent.
        """

    def flatten_task(self, image: ImageSpec) -> Optional[FlattenTask]:
        """The manager's task of flattening *image*; None where it has none: done, given up, or never queued."""

    def cancel_task(self, task_id: str) -> None:
        """Have the manager drop a task, in the middle if need be. :raises Missing: it has no such task."""

    def metadata(self, image: ImageSpec, key: str) -> Optional[str]:
        """What :meth:`set_metadata` wrote; None where that is nothing."""

    def set_metadata(self, image: ImageSpec, key: str, value: str) -> None:
        """Write a word on the rbd image itself, for who may read its pool. Implements ``rbd image-meta set``."""

    def drop_object_map(self, image: ImageSpec) -> None:
        """Take the map of its objects away, where it has one."""

    def give_object_map(self, image: ImageSpec) -> None:
        """Give it the map that :meth:`clone` left out, as far as the cluster's options want one, for snapshots, too."""

    def remove(self, image: ImageSpec, on_progress: Optional[Callable[[int, int], object]] = None) -> None:
        """Remove a whole or half-made rbd image.

        One whose snapshots are all trashed, and have clones that depend on them, is moved to the trash instead, where
        librbd removes it with the last of those, if who removes or flattens that one may write to the pool.

        :param on_progress: called with objects done and objects in all; it cannot ask to stop.
        :raises Missing: the name is free.
        :raises HasSnapshots: it has others.
        :raises Busy: it is open somewhere; a dead client counts for about 30 s.
        """

    def trash(self, image: ImageSpec, keep_seconds: int) -> None:
        """Move an rbd image to its pool's trash, whoever has it open; the name is free then.

        :param keep_seconds: for how long nothing but force removes it from there, and no purge.
        :raises Missing: no such rbd image.
        """

    def trashed(self, pool: str) -> list[TrashInfo]:
        """What is in the trash of *pool*."""

    def snaps_of_trashed(self, pool: str, image_id: str) -> list[SnapInfo]:
        """The snapshots of an rbd image in the trash. :raises Missing: no such rbd image there."""

    def children_of_trashed(self, pool: str, image_id: str) -> list[ImageSpec]:
        """The clones that depend on an rbd image in the trash. :raises Missing: no such rbd image there."""

    def remove_snap_of_trashed(self, pool: str, image_id: str, name: str) -> None:
        """Remove a snapshot, protected or not, of an rbd image in the trash.

        :raises Missing: no such rbd image there, or no such snapshot of it.
        :raises Busy: clones depend on it.
        """

    def remove_trashed(self, pool: str, image_id: str) -> None:
        """Remove an rbd image from the trash for good, whatever it is kept for.

        :raises Missing: no such rbd image there.
        :raises HasSnapshots: it has snapshots, and not only trashed ones that no clone depends on.
        :raises Busy: it is open somewhere.
        """

    def omap_items(self, pool: str, name: str) -> dict[str, str]:
        """All pairs of the RADOS object *name*; empty where there is no object.

        Bytes that are no UTF-8 are shown escaped; :meth:`omap_replace` does not take that for what is there.
        """

    def omap_item(self, pool: str, name: str, key: str) -> Optional[str]:
        """What *key* has in the RADOS object *name*, as :meth:`omap_items` tells; None where there is no such key."""

    def omap_replace(self, pool: str, name: str, key: str, old: Optional[str], new: Optional[str]) -> None:
        """Set *key* to *new*, or remove it, in one step and only while it is *old* (None: absent).

        :raises LedgerConflict: it is something else; nothing was changed.
        """

    def take_lease(self, pool: str, name: str, seconds: float) -> None:
        """Become, for so long, the one client that has the lease on the RADOS object *name*, which is made if need be.

        The OSD's clock counts, and nobody's else.

        :raises Busy: somebody has it, be it this client.
        """

    def renew_lease(self, pool: str, name: str, seconds: float) -> None:
        """Have the lease for so long from now. :raises LeaseLost: this client has it no more."""

    def end_lease(self, pool: str, name: str) -> None:
        """Give the lease back, if it is still this client's."""
