# SPDX-License-Identifier: Apache-2.0
"""What a clone of a server's disk is to be: whether there may be one, where its data lie, and when it is flattened."""

from __future__ import annotations

import contextlib
from typing import Optional

from nova_rbd_snap import errors
from nova_rbd_snap.ceph.interface import Cluster, ImageInfo
from nova_rbd_snap.conf import Settings
from nova_rbd_snap.engine.notices import Notices
from nova_rbd_snap.flatten import readers
from nova_rbd_snap.flatten.bounds import policy_within
from nova_rbd_snap.ledger.job import BACKGROUND, INLINE, NEVER
from nova_rbd_snap.ledger.store import Ledger
from nova_rbd_snap.specs import ImageSpec


def refuse_uncloneable(disk: ImageSpec, info: ImageInfo) -> None:
    """:raises errors.Refused: for disks whose clones nobody has tried."""
    if info.mirrored:
        raise errors.Refused(f"{disk} is mirrored; snapshots by cloning are not supported for mirrored disks")
    if info.journaling:
        raise errors.Refused(f"{disk} has the journaling feature; snapshots by cloning are not supported with it")


def data_pool(cluster: Cluster, settings: Settings, dest: ImageSpec, disk: ImageInfo) -> Optional[str]:
    """Where the data of *dest* are to lie: as Glance's own images have it; None for the pool of *dest*."""
    if settings.glance_data_pool:
        return settings.glance_data_pool
    if disk.parent is not None and disk.parent.image.pool == dest.pool:
        with contextlib.suppress(errors.Missing):  # Glance may have moved the base image to the trash
            return cluster.lookup(disk.parent.image).data_pool
    return cluster.usual_data_pool(dest.pool)


class Flattenings:
    """By which policy clones are flattened."""

    def __init__(self, settings: Settings, notices: Notices) -> None:
        self._settings, self._notices = settings, notices

    def policy(self, cluster: Cluster, disk: ImageSpec, dest: ImageSpec, info: ImageInfo, wanted: str) -> str:
        """The one that is *wanted*, or a stricter one where that cannot be.

        In format 1 a clone that is not flat would keep its server from being deleted.
        """
        if wanted == INLINE or self._settings.clone_format == 1:
            return INLINE
        if not readers.are_trusted(Ledger(cluster, self._settings.pool), dest.pool):
            return INLINE
        if wanted == NEVER and self._is_full(cluster, disk.pool):
            wanted = BACKGROUND
        depth = 1 + len(cluster.ancestors(disk))
        return policy_within(self._settings.bounds, wanted, depth, info.snap_count)

    def _is_full(self, cluster: Cluster, pool: str) -> bool:
        """Whether disks of deleted servers would be one thing too many in the pool."""
        most = self._settings.never_max_used_percent
        if most == 100:
            return False
        try:
            used = 100 * cluster.used(pool)
        except errors.NoPermission as error:
            text = f"not known, and so taken for little: {error.report()}"
            self._notices.tell("how full the pool is", text)
            return False
        if used < most:
            self._notices.withdraw(f"pool {pool}")
            return False
        text = f"[rbd_snap] never_max_used_percent is reached: images are flattened ({most} %)"
        self._notices.tell(f"pool {pool}", text)
        return True
