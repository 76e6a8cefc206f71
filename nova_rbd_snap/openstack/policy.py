# SPDX-License-Identifier: Apache-2.0
"""When a server's snapshots are flattened, as its flavor or its image may choose.

Nova's object of image properties drops those it does not know; the server's system metadata keeps them, with a prefix
(``nova.utils.get_system_metadata_from_image``). A snapshot inherits its image's property as any other: it says what is
wanted, and nothing about what is.
"""

from __future__ import annotations

from typing import Any, Optional

import nova.conf
from oslo_log import log as logging

from nova_rbd_snap.ledger.job import POLICIES

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

EXTRA_SPEC = "rbd_snap:flatten"
IMAGE_PROPERTY = "rbd_snap_flatten"


def override(instance: Any) -> Optional[str]:
    """What the server's flavor, else its image, chooses; None where neither does, or may."""
    chosen = {
        "flavor": (EXTRA_SPEC, (instance.flavor.extra_specs or {}).get(EXTRA_SPEC)),
        "image": (IMAGE_PROPERTY, instance.system_metadata.get(f"image_{IMAGE_PROPERTY}")),
    }
    for where, (name, value) in chosen.items():
        if value is None or where not in CONF.rbd_snap.flatten_overrides:
            continue
        if value in POLICIES:
            return str(value)
        LOG.warning(
            "The %s says %s = %r, which is none of %s, so it is not heeded; correct or remove it",
            where, name, value, ", ".join(POLICIES), instance=instance,
        )
    return None
