# SPDX-License-Identifier: Apache-2.0
"""Which cells of the matrix there are, and which of them are tried on real servers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from nova_rbd_snap.ledger.job import BACKGROUND, INLINE, NEVER
from tests.faults.fake import FakeWorld
from tests.faults.guest import guest_module
from tests.faults.matrix import ENGINE, GLANCE, GUEST, Cell, Outcome, Place, cells

GUEST_MODULE = guest_module()


def trace_of(**variant: Any) -> list[Place]:
    """What a request calls in which nothing goes wrong."""
    world = FakeWorld(GUEST_MODULE, **variant)
    request = world.request()
    assert (request.run(), request.failure) == (None, None)
    return world.saboteur.trace


def _all() -> Iterator[Cell]:
    yield from cells(trace_of())
    yield from cells((place for place in trace_of(clone_format=1) if place.step in ENGINE), clone_format=1)
    old = (replace(place, first=True) for place in trace_of(old_glance=True) if place.call == "patch")
    yield from cells(old, old_glance=True)
    flat = (place for place in trace_of(flat_disk=True) if place.call == "usual_data_pool")
    yield from cells(flat, flat_disk=True)
    for policy in (BACKGROUND, NEVER):
        shared = (place for place in trace_of(flatten=policy) if place.step in (*ENGINE, *GLANCE))
        yield from cells(shared, flatten=policy)
    copied = (place for place in trace_of(to_store=True) if place.step in _OF_A_COPY)
    yield from cells(copied, to_store=True)


#: The steps of a copy into a store of Glance's that are not as a clone's.
_OF_A_COPY = ("reserve", "create", "copy", "release", "seal", "forget")

#: What is tried on fakes.
FAKE = [cell for cell in _all() if not cell.cause.only_real]

#: What is tried on real servers: of each cause the places, a ``*`` for all it meets. None of them needs a guest.
_REAL = {
    "loses_the_answer Unreachable": "*",
    "engine_killed before": "connect.connect snap.create_snap forget.omap_item",
    "engine_killed after": (
        "reserve.omap_replace snap.create_snap clone.clone flatten.flatten release.remove_snap seal.create_snap "
        "seal.protect_snap seal.omap_replace forget.omap_replace"
    ),
    "engine_killed meanwhile": "metadata.properties register.post wait.get",
    "engine_killed unfenced": "snap.create_snap flatten.flatten",
    "both_killed before": "connect.connect reserve.omap_replace register.post wait.get forget.omap_item",
    "both_killed after": (
        "reserve.omap_replace snap.create_snap clone.clone flatten.flatten release.remove_snap seal.create_snap "
        "seal.protect_snap seal.omap_replace metadata.properties register.post forget.omap_replace"
    ),
    "compute_killed before": "register.post",
    "compute_killed after": "register.post",
    "compute_killed meanwhile": "snap.create_snap flatten.flatten seal.create_snap forget.omap_replace",
    "blocklisted": "*",
    "denied images": "reserve.has_pool clone.exists flatten.flatten seal.create_snap",
    "denied_writes images": "clone.exists flatten.flatten seal.create_snap",
    "denied vms": "reserve.has_pool snap.create_snap seal.create_snap forget.omap_item",
    "denied_writes vms": "reserve.has_pool snap.create_snap forget.omap_item",
    "name_taken": "reserve.has_pool clone.exists",
    "snap_taken": "reserve.has_pool snap.create_snap",
    "seal_taken": "*",
    "clone_open": "*",
    "frozen_has_child": "*",
    "holder_frozen": "*",
    "seal_has_child": "*",
    "record_deleted": "*",
    "other_data": "*",
    **{f"answers {status}": "metadata.properties register.post" for status in (400, 401, 403, 404, 409, 413, 500, 503)},
    "answers_once 403": "register.post",
    "answers_once 404": "register.post",
    "answers_once 500": "wait.get",
    "is_silent reset": "*",
    "is_silent hang": "*",
    "is_silent_once reset": "*",
    "loses_the_reply reset": "*",
    "loses_the_reply hang": "*",
    "task_fails": "*",
    "never_active": "*",
    "full images": "clone.exists flatten.flatten seal.create_snap",
    "full vms": "reserve.has_pool snap.create_snap clone.exists seal.create_snap",
    "full_cluster": "connect.connect snap.create_snap clone.exists flatten.flatten seal.create_snap",
    "frozen osds": "connect.connect snap.create_snap flatten.flatten seal.create_snap forget.omap_item",
    "frozen monitor": "connect.connect snap.create_snap seal.create_snap forget.omap_item",
    "frozen manager": "snap.create_snap",
    "killed osds": "snap.create_snap flatten.flatten forget.omap_item",
    "killed monitor": "snap.create_snap seal.create_snap",
    "killed manager": "snap.create_snap",
}
for _status in (401, 404, 500):
    _REAL[f"answers {_status}"] += " wait.get"

#: Of what only clones in format 1 need, all places.
_ONLY_FORMAT_1 = ("protect_snap", "unprotect_snap")
_REAL_FORMAT_1 = ("loses_the_answer Unreachable", "engine_killed after", "both_killed after")

#: By the other policies of flattening, where those are not the same.
_SHARED_STEPS = ("clone", "seal", *GLANCE, "forget")
_REAL_SHARED = (
    "loses_the_answer Unreachable", "engine_killed after", "engine_killed meanwhile", "both_killed after",
    "compute_killed meanwhile", "blocklisted", "clone_open", "record_deleted", "answers 500", "is_silent reset",
    "loses_the_reply reset", "task_fails", "never_active",
)  # fmt: skip

#: Whose cells stop or hinder the servers for everybody.
_DISTURBING = ("full", "full_cluster", "frozen", "killed")

#: A slice that tells most in the least time.
_QUICK = {
    "loses_the_answer Unreachable": "reserve.omap_replace clone.clone flatten.flatten seal.protect_snap",
    "engine_killed after": "snap.create_snap flatten.flatten seal.omap_replace forget.omap_replace",
    "both_killed after": "clone.clone register.post",
    "compute_killed meanwhile": "seal.create_snap",
    "blocklisted": "snap.create_snap flatten.flatten",
    "denied_writes images": "clone.exists",
    "name_taken": "clone.exists",
    "frozen_has_child": "release.ask_holder",
    "record_deleted": "flatten.flatten wait.get",
    "answers 403": "register.post",
    "answers 404": "metadata.properties",
    "answers 409": "register.post",
    "answers 503": "metadata.properties",
    "is_silent reset": "register.post",
    "loses_the_reply reset": "register.post",
    "task_fails": "register.post",
    "frozen osds": "connect.connect",
    "frozen monitor": "snap.create_snap",
    "killed monitor": "seal.create_snap",
}


def _is_in(cell: Cell, table: dict[str, str]) -> bool:
    places = table.get(str(cell.cause), "").split()
    return places == ["*"] or str(cell.place) in places


def real_cells() -> list[Cell]:
    """What is tried on real servers. Their disks have no parent."""
    places = (place for place in trace_of(flat_disk=True) if place.step not in GUEST)
    found = [cell for cell in cells(places) if _is_in(cell, _REAL)]
    places = (place for place in trace_of(clone_format=1, flat_disk=True) if place.call in _ONLY_FORMAT_1)
    found += [cell for cell in cells(places, clone_format=1) if str(cell.cause) in _REAL_FORMAT_1]
    for policy in (BACKGROUND, NEVER):
        shared = (place for place in trace_of(flatten=policy, flat_disk=True) if place.step in _SHARED_STEPS)
        more = cells(shared, flatten=policy)
        found += [cell for cell in more if str(cell.cause) in _REAL_SHARED and _is_in(cell, _REAL)]
    return found


def missed() -> set[str]:
    """What is selected by name, and is none of the cells that are tried on real servers."""
    found = {
        " at ".join((str(cell.cause), place, cell.variant.get("flatten", INLINE)))
        for cell in real_cells()
        for place in ("*", str(cell.place))
    }
    wanted = {(cause, place, INLINE) for table in (_REAL, _QUICK) for cause in table for place in table[cause].split()}
    wanted |= {(cause, "*", INLINE) for cause in _REAL_FORMAT_1}
    wanted |= {(cause, "*", policy) for cause in _REAL_SHARED for policy in (BACKGROUND, NEVER)}
    return {" at ".join(each) for each in wanted} - found


def is_disturbing(cell: Cell) -> bool:
    """Whether the cell must have the servers to itself."""
    return cell.cause.kind in _DISTURBING


def is_quick(cell: Cell) -> bool:
    """Whether it is in the slice for every day."""
    return _is_in(cell, _QUICK) and cell.variant.get("flatten") != NEVER  # as BACKGROUND, but for its end


def both_ends(cells: list[Cell]) -> list[tuple[Cell, bool]]:
    """Each cell, and those in doubt twice: Glance turns out not to have the location, or to have it."""
    ends = {Outcome.KEPT: (False, True)}
    return [(cell, arrives) for cell in cells for arrives in ends.get(cell.promise.outcome, (False,))]
