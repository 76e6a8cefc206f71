# SPDX-License-Identifier: Apache-2.0
"""What the monitors and the manager answer in JSON, as far as it matters here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Optional

from nova_rbd_snap.ceph.interface import FlattenTask
from nova_rbd_snap.specs import ImageSpec

#: Placement groups in these states copy objects that lack a copy. Those that only move some ("backfill") do so on many
#: clusters all the year.
_RECOVERING = ("recovering", "recovery_wait")


def strain(status: Mapping[str, Any]) -> Optional[str]:
    """Why others should wait, by the answer to ``status``."""
    slow = status["health"]["checks"].get("SLOW_OPS")
    if slow is not None:
        return f"Ceph reports {slow['summary']['message']}"
    states = status["pgmap"].get("pgs_by_state", ())
    count = sum(state["count"] for state in states if set(state["state_name"].split("+")) & set(_RECOVERING))
    return f"Ceph recovers {count} placement groups" if count else None


def used(df: Mapping[str, Any], pool: str) -> Optional[float]:
    """How full *pool* is, from 0 to 1, by the answer to ``df detail``; by its quota, where that is reached first."""
    for found in df["pools"]:
        if found["name"] == pool:
            stats = found["stats"]
            quota = stats.get("quota_bytes", 0)
            return max(float(stats["percent_used"]), stats["stored"] / quota if quota else 0.0)
    return None


def flatten_task(tasks: Sequence[Mapping[str, Any]], image: ImageSpec) -> Optional[FlattenTask]:
    """The task of flattening *image* among those that ``rbd task list`` tells."""
    for task in tasks:
        refs = task["refs"]
        if (refs["action"], refs.get("pool_name"), refs.get("image_name")) == ("flatten", image.pool, image.name):
            return decode_task(task)
    return None


def decode_task(task: Mapping[str, Any]) -> FlattenTask:
    """One task as the manager tells it."""
    return FlattenTask(task["id"], task.get("progress", 0.0), task.get("retry_message", ""))
