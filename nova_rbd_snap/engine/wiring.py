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
from nova_rbd_snap.conf import Settings
from nova_rbd_snap.engine.service import Engine
from nova_rbd_snap.flatten.readers import ScratchImages
from nova_rbd_snap.janitor.jobs import Images
from nova_rbd_snap.ledger.job import Owner

if TYPE_CHECKING:
    from nova_rbd_snap.openstack.glance import Glance
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
    from nova_rbd_snap.ceph.librbd import LibrbdCluster

    return LibrbdCluster(
        conf=settings.ceph_conf,
        user=settings.ceph_user,
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

    See :class:`nova_rbd_snap.janitor.jobs.Images` and :class:`nova_rbd_snap.flatten.readers.ScratchImages`.
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
        images=asked,
        scratch=asked,
    )
