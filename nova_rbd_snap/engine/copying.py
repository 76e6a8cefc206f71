# SPDX-License-Identifier: Apache-2.0
"""Copies of a frozen disk: the stores that they go into, and uploads through Glance's API."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import threading
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Callable, Optional, Protocol

from nova_rbd_snap import errors
from nova_rbd_snap.ceph.interface import Cluster, ImageInfo
from nova_rbd_snap.conf import QCOW2, RAW, Settings, Store
from nova_rbd_snap.copy.body import Layout, Raw
from nova_rbd_snap.copy.extents import OnProgress, Source
from nova_rbd_snap.copy.limits import Limits, Memory, Throttle
from nova_rbd_snap.copy.qcow2 import Qcow2
from nova_rbd_snap.copy.stream import stream
from nova_rbd_snap.engine.connection import Connection
from nova_rbd_snap.snapshot.steps import of_store
from nova_rbd_snap.specs import ImageSpec

LOG = logging.getLogger(__name__)


#: Makes the bytes of an image from their start.
Chunks = Callable[[], Generator[bytes, None, None]]


@dataclass(frozen=True)
class Target:
    """The image record that an upload is for.

    :ivar access: Glance as who asked for it, as :meth:`nova_rbd_snap.openstack.glance.Glance.access` makes it.
    :ivar properties: what the record is to have, but for the format.
    :ivar disk_format: ``raw`` or ``qcow2``; None for what suits Glance's store.
    """

    image_id: str
    access: Mapping[str, Any]
    properties: Mapping[str, Optional[str]]
    disk_format: Optional[str]


class Uploads(Protocol):
    """Glance, as it is sent the data of images."""

    def send(self, target: Target, length: int, chunks: Chunks, waiting: Callable[[], object]) -> None:
        """Set the record's properties and send the data; returns once the image is active with just that.

        :param chunks: makes the bytes from their start, once for each attempt, and is closed after it.
        :param waiting: called now and again while nothing is sent, and Glance is waited for.
        :raises errors.SnapError: as :func:`nova_rbd_snap.openstack.upload.upload`.
        """

    def give_up(self, target: Target) -> None:
        """Delete a record that waits for data, for nobody else will. Nothing is raised."""

    def store_type(self) -> Optional[str]:
        """What kind of store images go to; None where Glance does not tell."""


def refuse_uncopyable(disk: ImageSpec, info: ImageInfo) -> None:
    """:raises errors.Refused: nobody has tried to take snapshots of such a disk."""
    if info.journaling:
        raise errors.Refused(f"{disk} has the journaling feature; its snapshots are not supported")


def limits(settings: Settings) -> Limits:
    """What all copies of an engine share."""
    return Limits(Memory(settings.copy_memory), Throttle(settings.copy_bandwidth))


class Stores:
    """The rbd stores of Glance's that copies go into, each with one connection."""

    def __init__(self, stores: Sequence[Store], connect: Callable[[Store], Cluster]) -> None:
        self._stores = {store.name: store for store in stores}
        self._connect = connect
        self._connections: dict[str, Connection] = {}
        self._lock = threading.Lock()

    def store(self, name: str) -> Store:
        """:raises errors.Refused: there is none of that name any more."""
        if name not in self._stores:
            raise errors.Refused(f"no rbd store of Glance's is called {name!r}; see [rbd_snap] glance_stores")
        return self._stores[name]

    def cluster(self, name: str) -> Cluster:
        """The connection to it. :raises errors.StoreSilent: there is none, and none can be made."""
        store = self.store(name)
        with self._lock:
            connection = self._connections.setdefault(name, Connection(functools.partial(self._connect, store)))
        with of_store(name):
            return connection.cluster()

    def drop(self, name: str) -> None:
        """Make a new connection the next time."""
        with self._lock:
            self._connections.pop(name, None)


class Upload:
    """One image, as it is sent."""

    def __init__(self, uploads: Uploads, shared: Limits, on_progress: OnProgress) -> None:
        """
        :param on_progress: of the bytes sent.
        """
        self._uploads, self._limits, self._on_progress = uploads, shared, on_progress

    def send(self, target: Target, source: Source) -> dict[str, Any]:
        """Send the disk.

        :returns: its ``format``, and how many bytes were ``allocated`` and ``sent``.
        """
        disk_format = target.disk_format or self._suitable_format()
        extents = source.extents(lambda done, total: self._on_progress(0, total))
        layout: Layout = Raw(source.size, extents) if disk_format == RAW else Qcow2(source.size, extents)

        def chunks() -> Generator[bytes, None, None]:
            done = 0
            with contextlib.closing(stream(source, layout.parts(), self._limits)) as streamed:
                for chunk in streamed:
                    if not self._on_progress(done, layout.length):
                        raise errors.Cancelled("the upload was cancelled")
                    yield chunk
                    done += len(chunk)

        self._uploads.send(
            dataclasses.replace(target, disk_format=disk_format),
            layout.length,
            chunks,
            lambda: self._on_progress(layout.length, layout.length),
        )
        return {"format": disk_format, "allocated": extents.total, "sent": layout.length}

    def _suitable_format(self) -> str:
        """What suits Glance's store: raw where that is an rbd one."""
        try:
            return RAW if self._uploads.store_type() == "rbd" else QCOW2
        except errors.SnapError as error:  # a qcow2 can be booted everywhere
            LOG.info("The kind of Glance's store is not known, so a copy is qcow2: %s", error.report())
            return QCOW2
