# SPDX-License-Identifier: Apache-2.0
"""What an engine is put together from, in its own process and in the command line's.

librados and librbd are imported when they are needed, keystone's and Glance's clients with the first question to them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Callable

from nova_rbd_snap import errors
from nova_rbd_snap.ceph.interface import Cluster
from nova_rbd_snap.conf import Settings
from nova_rbd_snap.engine.service import Engine
from nova_rbd_snap.ledger.job import Owner

if TYPE_CHECKING:
    from nova_rbd_snap.openstack.glance import Glance


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


def connect(settings: Settings) -> Cluster:
    """A new connection to the cluster, as nova-compute's Ceph user."""
    from nova_rbd_snap.ceph.librbd import LibrbdCluster

    return LibrbdCluster(
        conf=settings.ceph_conf,
        user=settings.ceph_user,
        timeout_seconds=settings.operation_timeout,
        clone_format=settings.clone_format,
    )


def glance(nova_conf: Any, settings: Settings) -> Glance:
    """Glance as the service's user. :raises errors.GlanceError: it cannot be asked, or not about every image."""
    from nova_rbd_snap.openstack import keystone

    return keystone.glance_as_service(nova_conf, settings)


def cloud(nova_conf: Any) -> str:
    """See :attr:`nova_rbd_snap.ledger.job.Owner.cloud`."""
    from nova_rbd_snap.openstack import keystone

    return keystone.cloud(nova_conf)


def engine(nova_conf: Any, settings: Settings, owner: Callable[[str], Owner], held: Iterable[str] = ()) -> Engine:
    """An engine for *owner*; see :class:`Engine`."""
    from nova_rbd_snap.openstack import registration

    return Engine(
        settings,
        owner,
        held=held,
        connect=lambda: connect(settings),
        images=registration.Images(lambda: glance(nova_conf, settings), settings.operation_timeout),
    )
