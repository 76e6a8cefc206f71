# SPDX-License-Identifier: Apache-2.0
"""What a snapshot request needs of Glance, with the token it came with."""

from __future__ import annotations

from typing import Any, Optional

import nova.conf
from nova import service_auth

from nova_rbd_snap import errors
from nova_rbd_snap.conf import RAW
from nova_rbd_snap.openstack.glance import Glance, repeat
from nova_rbd_snap.specs import Location

CONF = nova.conf.CONF


def glance_for(context: Any) -> Glance:
    """Glance as the user of the request *context*, with Nova's service token where Nova is set up to send one."""
    # Nova 33 renamed it.
    plugin = getattr(service_auth, "get_service_user_token_auth_plugin", None) or service_auth.get_auth_plugin
    return Glance.connect(
        CONF, plugin(context), CONF.rbd_snap.operation_timeout, global_request_id=context.global_id
    )


def destination_pool(glance: Glance, disk: dict[str, Any], base_image_id: Optional[str]) -> str:
    """The pool of Glance's that the clone belongs in.

    :param disk: what the engine's ``describe`` says.
    :raises errors.Refused: it cannot be told.
    """
    if CONF.rbd_snap.glance_pool:
        return str(CONF.rbd_snap.glance_pool)
    if disk["parent_pool"] and disk["parent_pool"] != disk["pool"]:
        return str(disk["parent_pool"])
    try:
        pool = _pool_of_store(glance) or _pool_of_image(glance, base_image_id, disk["fsid"])
    except errors.GlanceSilent as error:
        raise errors.Refused(f"Glance does not tell its pool; set [rbd_snap] glance_pool: {error}") from error
    if not pool:
        raise errors.Refused(
            "the disk has no parent in a pool of Glance's, and neither a store nor the base image tells the pool; "
            "set [rbd_snap] glance_pool"
        )
    return pool


def _pool_of_store(glance: Glance) -> Optional[str]:
    store = CONF.libvirt.images_rbd_glance_store_name
    return repeat(glance.pool_of_store, store, timeout_seconds=CONF.rbd_snap.operation_timeout) if store else None


def _pool_of_image(glance: Glance, image_id: Optional[str], fsid: str) -> Optional[str]:
    """The pool of the first location of the image that is in cluster *fsid*."""
    if not image_id:
        return None
    try:
        urls = repeat(glance.record, image_id, timeout_seconds=CONF.rbd_snap.operation_timeout).urls or ()
    except (errors.RecordGone, errors.NotRegistered):
        return None
    for url in urls:
        try:
            location = Location.parse(url)
        except ValueError:
            continue
        if location.fsid == fsid:
            return location.snap.image.pool
    return None


def upload_format(disk: dict[str, Any]) -> Optional[str]:
    """The format that is set for uploads, or that the disk tells; None where neither does.

    :param disk: what the engine's ``describe`` says.
    """
    told = CONF.libvirt.snapshot_image_format or CONF.rbd_snap.copy_format
    if told:
        return str(told)
    # Glance's own images are in Ceph: only of a raw one can servers' disks be cloned.
    return RAW if disk["parent_pool"] not in (None, disk["pool"]) else None


def properties(metadata: dict[str, Any]) -> dict[str, Optional[str]]:
    """Nova's snapshot metadata as image properties: what Nova itself would set, but always of raw bytes.

    :param metadata: as ``LibvirtDriver._create_snapshot_metadata`` makes it.
    """
    found: dict[str, Optional[str]] = {name: str(value) for name, value in metadata["properties"].items()}
    # Ids, which Glance takes as such or as null; Nova says '' or None where there is none.
    found.update({name: metadata["properties"][name] or None for name in ("kernel_id", "ramdisk_id")})
    # Glance couples the formats ami, aki and ari of the one to those of the other, and the bytes are raw.
    container = metadata["container_format"]
    coupled = container in (None, "ami", "aki", "ari")
    return {**found, "disk_format": "raw", "container_format": "bare" if coupled else container}
