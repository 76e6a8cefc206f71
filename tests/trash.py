# SPDX-License-Identifier: Apache-2.0
"""What is in a real pool's trash: Python's binding cannot list one that holds a parent."""

from __future__ import annotations

from typing import Any

import rados

from nova_rbd_snap.ceph import trash
from nova_rbd_snap.ceph.interface import TrashInfo


def trashed(ioctx: Any) -> list[TrashInfo]:
    """All entries."""
    with rados.ReadOpCtx() as operation:
        pairs, _ = ioctx.get_omap_vals(operation, "", trash.KEY, 1000)
        try:
            ioctx.operate_read_op(operation, trash.OBJECT)
        except rados.ObjectNotFound:
            return []
        return [trash.decode(key, value) for key, value in pairs]
