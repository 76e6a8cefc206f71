# SPDX-License-Identifier: Apache-2.0
"""What an engine is put together from, in its own process and in the command line's.

librados and librbd are imported when they are needed, keystone's and Glance's clients with the first question to them.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Callable, Optional

from nova_rbd_snap import errors
from nova_rbd_snap.ceph.interface import Cluster
from nova_rbd_snap.conf import Settings, Store
from nova_rbd_snap.engine.copying import Chunks, Target
from nova_rbd_snap.engine.service import Engine
from nova_rbd_snap.flatten.readers import ScratchImages
from nova_rbd_snap.janitor.jobs import Images
from nova_rbd_snap.ledger.job import Owner

if TYPE_CHECKING:
    from nova_rbd_snap.openstack.glance import Glance, Record
    from nova_rbd_snap.openstack.servers import Servers


def need_bindings() -> None:
    """:raises errors.EngineUnavailable: this Python has no Ceph bindings."""
    try:
        import rados
        import rbd
    except ImportError as error:
        raise errors.EngineUnavailable(
            f"{sys.executable} cannot import Ceph's Python bindings ({error}); install the distribution's packages "
            "python3-rados and python3-rbd for it"
        ) from error
    del rados, rbd


#: How many objects a flatten in the background copies at once, so that what somebody waits for goes first: with more, a
#: snapshot beside it takes a quarter longer (``make bench-policies``).
_FLATTEN_OBJECTS = 1


def connect(settings: Settings, objects_at_once: Optional[int] = None) -> Cluster:
    """A new connection to the cluster, as nova-compute's Ceph user; see :class:`LibrbdCluster`."""
    return _connect(settings, settings.ceph_conf, settings.ceph_user, objects_at_once)


def connect_to_store(settings: Settings, store: Store) -> Cluster:
    """A new connection to the cluster of a store of Glance's, as the Ceph user for that."""
    return _connect(settings, store.ceph_conf, store.ceph_user)


def _connect(settings: Settings, conf: str, user: Optional[str], objects_at_once: Optional[int] = None) -> Cluster:
    from nova_rbd_snap.ceph.librbd import LibrbdCluster

    return LibrbdCluster(
        conf=conf,
        user=user,
        timeout_seconds=settings.operation_timeout,
        clone_format=settings.clone_format,
        objects_at_once=objects_at_once,
    )


def glance(nova_conf: Any, settings: Settings) -> Glance:
    """Glance as the service's user. :raises errors.GlanceError: it cannot be asked, or not about every image."""
    from nova_rbd_snap.openstack import keystone

    return keystone.glance_as_service(nova_conf, settings)


def nova(nova_conf: Any, settings: Settings) -> Servers:
    """Nova's API as the service's user. :raises errors.NotAuthorized: it cannot be asked about every server."""
    from nova_rbd_snap.openstack import keystone

    return keystone.nova_as_service(nova_conf, settings)


class _Glance:
    """Glance as the engine asks it; nothing that it takes is imported before the first question.

    See :class:`nova_rbd_snap.janitor.jobs.Images`, :class:`nova_rbd_snap.engine.copying.Uploads` and
    :class:`nova_rbd_snap.flatten.readers.ScratchImages`.
    """

    def __init__(self, nova_conf: Any, settings: Settings) -> None:
        self._nova_conf, self._settings = nova_conf, settings

    @functools.cached_property
    def _images(self) -> Images:
        from nova_rbd_snap.openstack import registration

        return registration.Images(lambda: glance(self._nova_conf, self._settings), self._settings.operation_timeout)

    @functools.cached_property
    def _scratch(self) -> ScratchImages:
        from nova_rbd_snap.openstack import scratch

        timeout = self._settings.operation_timeout
        return scratch.ScratchImages(lambda: glance(self._nova_conf, self._settings), timeout)

    def store_type(self) -> Optional[str]:
        return glance(self._nova_conf, self._settings).store_type()

    def send(self, target: Target, length: int, chunks: Chunks, waiting: Callable[[], object]) -> None:
        from nova_rbd_snap.openstack import keystone, upload
        from nova_rbd_snap.openstack.glance import repeat

        as_user = keystone.glance_with_access(self._nova_conf, target.access, self._settings)

        def read(image_id: str) -> Record:
            try:
                return as_user.record(image_id)
            except errors.NotAuthorized:  # Glance may have taken all of it before the token expired
                return glance(self._nova_conf, self._settings).record(image_id)

        timeout = self._settings.operation_timeout
        properties = {**target.properties, "disk_format": target.disk_format}
        repeat(as_user.set_properties, target.image_id, properties, timeout_seconds=timeout)
        upload.upload(
            as_user,
            target.image_id,
            lambda: upload.Body(length, chunks(), upload.USUAL_ALGORITHM),
            attempts=self._settings.copy_attempts,
            timeout_seconds=timeout,
            read=read,
            waiting=waiting,
        )

    def give_up(self, target: Target) -> None:
        from nova_rbd_snap.openstack import keystone, upload

        as_user = keystone.glance_with_access(self._nova_conf, target.access, self._settings)
        upload.give_up(as_user, target.image_id, timeout_seconds=self._settings.operation_timeout)

    def uses(self, image_id: str, url: str) -> Optional[bool]:
        return self._images.uses(image_id, url)

    def settle(self, image_id: str, url: str, server: str) -> Optional[bool]:
        return self._images.settle(image_id, url, server)

    def read(self, image_id: str, url: str) -> bytes:
        return self._scratch.read(image_id, url)

    def delete(self, image_id: str) -> None:
        self._scratch.delete(image_id)


def images(nova_conf: Any, settings: Settings) -> Images:
    """Glance's word on images, asked as the service's user once it is needed."""
    return _Glance(nova_conf, settings)


def engine(nova_conf: Any, settings: Settings, owner: Callable[[str], Owner], held: Iterable[str] = ()) -> Engine:
    """An engine for *owner*; see :class:`Engine`."""
    asked = _Glance(nova_conf, settings)
    return Engine(
        settings,
        owner,
        held=held,
        connect=lambda: connect(settings),
        connect_to_work=lambda: connect(settings, _FLATTEN_OBJECTS),
        connect_to_store=functools.partial(connect_to_store, settings),
        images=asked,
        uploads=asked,
        scratch=asked,
    )
