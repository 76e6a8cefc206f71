# SPDX-License-Identifier: Apache-2.0
"""What is made of the monitors' and the manager's answers, as real ones sent them."""

from __future__ import annotations

from typing import Any, Optional

import pytest

from nova_rbd_snap.ceph import reports
from nova_rbd_snap.ceph.interface import FlattenTask
from nova_rbd_snap.specs import ImageSpec

IMAGE = ImageSpec("images", "dst")
TASK = {
    "sequence": 1,
    "id": "4c8110d7-084a-4f68-9989-e29c030a34b7",
    "message": "Flattening image images/dst",
    "refs": {
        "action": "flatten",
        "pool_name": "images",
        "pool_namespace": "",
        "image_name": "dst",
        "image_id": "107a62565e22",
    },
}


def status(*states: tuple[str, int], **checks: str) -> dict[str, Any]:
    return {
        "health": {
            "status": "HEALTH_OK",
            "checks": {
                name: {"severity": "HEALTH_WARN", "summary": {"message": message, "count": 1}, "muted": False}
                for name, message in checks.items()
            },
            "mutes": [],
        },
        "pgmap": {"pgs_by_state": [{"state_name": name, "count": count} for name, count in states], "num_pgs": 177},
    }


@pytest.mark.parametrize(
    ("answer", "strain"),
    [
        (status(("active+clean", 177)), None),
        (status(), None),
        (status(("active+clean", 170), ("active+remapped+backfilling", 7)), None),
        (status(("active+undersized+degraded", 177), PG_DEGRADED="Degraded data redundancy"), None),
        (status(("active+clean", 170), ("active+recovering+degraded", 7)), "Ceph recovers 7 placement groups"),
        (status(("active+recovery_wait+undersized+degraded", 2)), "Ceph recovers 2 placement groups"),
        (status(("active+clean", 1), SLOW_OPS="3 slow ops, oldest one blocked for 33 sec"), "Ceph reports 3 slow ops"),
    ],
)
def test_strain(answer: dict[str, Any], strain: Optional[str]) -> None:
    """Slow operations, and recovery; not what merely moves, nor what a small cluster lacks for ever."""
    told = reports.strain(answer)
    assert (told is None) == (strain is None)
    assert (told or "").startswith(strain or "")


@pytest.mark.parametrize(
    ("stats", "share"),
    [
        ({"stored": 40, "percent_used": 0.25, "quota_bytes": 0}, 0.25),
        ({"stored": 40, "percent_used": 0.25, "quota_bytes": 80}, 0.5),
        ({"stored": 40, "percent_used": 0.25}, 0.25),
    ],
)
def test_how_full_a_pool_is(stats: dict[str, Any], share: float) -> None:
    """Of the cluster, or of its quota, whichever is nearer."""
    answer = {"pools": [{"name": "vms", "id": 1, "stats": stats}]}
    assert reports.used(answer, "vms") == share
    assert reports.used(answer, "images") is None


def test_flatten_task() -> None:
    """The one of that image, among whatever others are in the queue."""
    other = {**TASK, "id": "other", "refs": {"action": "trash remove", "pool_name": "images", "image_id": "107a"}}
    assert reports.flatten_task([other, TASK], IMAGE) == FlattenTask(TASK["id"])
    assert reports.flatten_task([other], IMAGE) is None
    running = {**TASK, "in_progress": True, "progress": 0.4}
    assert reports.flatten_task([running], IMAGE) == FlattenTask(TASK["id"], 0.4)
    failed = {**TASK, "retry_message": "[errno 28] no space", "retry_attempts": 1}
    assert reports.flatten_task([failed], IMAGE) == FlattenTask(TASK["id"], 0.0, "[errno 28] no space")
