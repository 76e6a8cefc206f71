# SPDX-License-Identifier: Apache-2.0
"""How long chains of clones may grow, and how many snapshots may hang on a disk.

Every read of what was not written since goes down the chain, and every rbd image of it is opened with the first;
each snapshot of a disk makes the header that QEMU holds, and every later snapshot, a little more expensive.
"""

from __future__ import annotations

from dataclasses import dataclass

from nova_rbd_snap.ledger.job import BACKGROUND, INLINE


@dataclass(frozen=True)
class Bounds:
    """As the options say.

    :ivar depth_soft: a clone that reads through more rbd images than this does not stay so.
    :ivar depth_hard: nor may it come to be.
    :ivar snapshots_soft: past as many snapshots of a disk its oldest image is flattened.
    :ivar snapshots_hard: past as many a new image is flattened at once.
    """

    depth_soft: int
    depth_hard: int
    snapshots_soft: int
    snapshots_hard: int


def policy_within(bounds: Bounds, wanted: str, depth: int, snap_count: int) -> str:
    """The policy that keeps a new clone within *bounds*.

    :param depth: through how many rbd images the clone will read.
    :param snap_count: how many snapshots its disk has already.
    """
    if depth > bounds.depth_hard or snap_count >= bounds.snapshots_hard:
        return INLINE
    return BACKGROUND if depth > bounds.depth_soft and wanted != INLINE else wanted
