# SPDX-License-Identifier: Apache-2.0
"""The bare work: the calls of librbd and Glance alone, one after the other, on connections that are kept open.

A yardstick, not the least there is: who does side by side what waits for the same proposal of the monitors is faster
(``docs/design/clone.rst``). Removing the source snapshot waits for one, too, and is left until the image is active.
"""

import rbd

FEATURES = (
    rbd.RBD_FEATURE_LAYERING
    | rbd.RBD_FEATURE_EXCLUSIVE_LOCK
    | rbd.RBD_FEATURE_OBJECT_MAP
    | rbd.RBD_FEATURE_FAST_DIFF
    | rbd.RBD_FEATURE_DEEP_FLATTEN
)
PATCH = {"Content-Type": "application/openstack-images-v2.1-json-patch"}


def make_active(vms, images, glance, wait_until_active, *, disk, image_id, url, properties, flatten=True):
    """From the disk in pool *vms* to the active Glance image, whose data is in pool *images*.

    :param vms: an open ioctx, as *images*.
    :param glance: a keystoneauth adapter with the user's and the service's token.
    :param wait_until_active: told the image's id.
    :param url: of the location.
    :param flatten: whether the image becomes flat.
    """
    with rbd.Image(vms, disk) as source:
        source.create_snap(image_id)
    rbd.RBD().clone(vms, disk, image_id, images, image_id, features=FEATURES)
    with rbd.Image(images, image_id) as clone:
        if flatten:
            clone.flatten()
        clone.create_snap("snap")
        clone.protect_snap("snap")
    record = f"/v2/images/{image_id}"
    glance.patch(
        record, headers=PATCH, json=[{"op": "add", "path": f"/{k}", "value": v} for k, v in properties.items()]
    )
    glance.post(f"{record}/locations", json={"url": url, "validation_data": {}})
    wait_until_active(image_id)


def remove_source(vms, *, disk, image_id):
    """What is left to do once the image is active."""
    with rbd.Image(vms, disk) as source:
        source.remove_snap(image_id)
