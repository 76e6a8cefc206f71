# SPDX-License-Identifier: Apache-2.0
"""The bare work: what no tool that makes an image by cloning inside Ceph can do without, on connections it keeps open.

The order is the fastest that was measured (``docs/design/clone.rst``): removing the source snapshot waits for a
proposal of the monitors, and nobody needs it gone before the image is active.
"""

import time

import rbd

FEATURES = (
    rbd.RBD_FEATURE_LAYERING
    | rbd.RBD_FEATURE_EXCLUSIVE_LOCK
    | rbd.RBD_FEATURE_OBJECT_MAP
    | rbd.RBD_FEATURE_FAST_DIFF
    | rbd.RBD_FEATURE_DEEP_FLATTEN
)
PATCH = {"Content-Type": "application/openstack-images-v2.1-json-patch"}


def make_active(vms, images, glance, *, disk, image_id, url, properties):
    """From the disk in pool *vms* to the active Glance image, whose data is in pool *images*.

    :param vms: an open ioctx, as *images*.
    :param glance: a keystoneauth adapter with the user's and the service's token.
    :param url: of the location.
    """
    with rbd.Image(vms, disk) as source:
        source.create_snap(image_id)
    rbd.RBD().clone(vms, disk, image_id, images, image_id, features=FEATURES)
    with rbd.Image(images, image_id) as clone:
        clone.flatten()
        clone.create_snap("snap")
        clone.protect_snap("snap")
    record = f"/v2/images/{image_id}"
    glance.patch(
        record, headers=PATCH, json=[{"op": "add", "path": f"/{k}", "value": v} for k, v in properties.items()]
    )
    glance.post(f"{record}/locations", json={"url": url, "validation_data": {}})
    while glance.get(record).json()["status"] != "active":
        time.sleep(0.02)


def remove_source(vms, *, disk, image_id):
    """What is left to do once the image is active."""
    with rbd.Image(vms, disk) as source:
        source.remove_snap(image_id)
