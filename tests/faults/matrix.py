# SPDX-License-Identifier: Apache-2.0
"""The fault matrix: the steps of the ways, what can go wrong in each, and what is promised then.

``test_fake.py`` runs all of it on fakes, ``tests/functional/test_faults.py`` on real servers what those can be made to
do. ``test_matrix.py`` fails where the way makes a call, or an error has a class, that is not named here.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Optional

from nova_rbd_snap import errors
from nova_rbd_snap.ledger.job import INLINE, POLICIES


class Outcome(enum.Enum):
    """How a request ends. In each case both pools, the ledger, the guest and the local disk are else as before."""

    FORWARD = "the image is active, and its data is the clone"
    BACK = "the clone is undone, and the image is active with a full copy"
    ENDS = "the clone is undone, the request fails without a copy, and its image record is gone"
    KEPT = "the clone and its job are kept and the request fails; what Glance comes to say settles it"
    UNHEARD = "nothing had been done when all died; only the image record is left, as it is with Nova alone"


# -- where -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """The *nth* call of its name within a step.

    :ivar first: it is the first call of the step.
    :ivar of_store: it is to the cluster of a store of Glance's.
    """

    step: str
    call: str
    nth: int = 1
    first: bool = field(default=False, compare=False)
    of_store: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        return f"{self.step}.{self.call}" + (f".{self.nth}" if self.nth > 1 else "")


@dataclass(frozen=True)
class Step:
    """One step, with the calls that only ask and those that change something."""

    name: str
    asks: frozenset[str]
    changes: frozenset[str]

    @property
    def calls(self) -> frozenset[str]:
        return self.asks | self.changes


def _steps(*rows: tuple[str, str, str]) -> dict[str, Step]:
    return {name: Step(name, frozenset(asks.split()), frozenset(changes.split())) for name, asks, changes in rows}


#: What the engine asks of the cluster; ``create`` and ``copy`` are of a copy into a store of Glance's. That a step is
#: done is told the ledger in the step itself; ``release`` is beside ``seal``.
ENGINE = _steps(
    ("connect", "connect fsid lookup", ""),
    ("reserve", "fsid address has_pool lookup exists usual_data_pool omap_item used ancestors", "omap_replace"),
    ("snap", "", "create_snap omap_replace"),
    ("protect", "", "protect_snap omap_replace"),
    ("clone", "exists", "clone omap_replace"),
    ("flatten", "", "flatten omap_replace"),
    ("create", "exists open_snap", "create_blank omap_replace"),
    ("copy", "open_snap open_blank", "omap_replace"),
    ("release", "exists snaps ask_holder", "unprotect_snap remove_snap"),
    ("seal", "", "create_snap protect_snap omap_replace"),
    ("forget", "omap_item address exists snaps lookup", "omap_replace"),
)
#: What nova-compute asks of the guest, before and after the snap.
GUEST = _steps(("quiesce", "answer can", "freeze thaw"))
#: What nova-compute asks of Glance, once the clone is sealed and before the job is forgotten.
GLANCE = _steps(("metadata", "", "properties"), ("register", "", "post patch"), ("wait", "get schemas", ""))
STEPS = {**ENGINE, **GUEST, **GLANCE}

#: There is an rbd image of the image's name, in the way of a full copy until it is undone.
AFTER_CLONE = ("flatten", "copy", "release", "seal", *GLANCE)
#: The pivot: the image is active, and stays so.
AFTER_PIVOT = ("forget",)


# -- what --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cause:
    """Something that goes wrong at one place of a request.

    :ivar kind: which method of a world does it, given *what*.
    :ivar error: what the clone way fails with; None if it does not.
    :ivar steps: where it is tried.
    :ivar calls: where within them; None for the first call of each.
    :ivar lasts: longer than the request: what it keeps from being undone is in the ledger, and goes once it is over.
    :ivar bars_undo: it keeps the clone from being removed, which is then in the way of a full copy.
    :ivar bars_copy: a full copy meets it as well.
    :ivar suspends: nor can the disk be frozen for a full copy, so that Nova suspends the guest meanwhile.
    :ivar dead: nova-compute is: its engine, or that of the next one, sees to what is left.
    :ivar formats: of clones.
    :ivar policies: of flattening.
    :ivar only_real: on fakes it means nothing.
    """

    kind: str
    what: Any = None
    error: Optional[type[errors.SnapError]] = None
    steps: Iterable[str] = tuple(ENGINE)
    calls: Optional[frozenset[str]] = None
    lasts: bool = False
    bars_undo: bool = False
    bars_copy: bool = False
    suspends: bool = False
    dead: bool = False
    formats: tuple[int, ...] = (1, 2)
    policies: tuple[str, ...] = POLICIES
    only_real: bool = False

    def __str__(self) -> str:
        what = getattr(self.what, "__name__", self.what)
        return self.kind if what is None else f"{self.kind} {what}"

    @property
    def kills(self) -> bool:
        """Whether a process of ours dies."""
        return self.kind.endswith("_killed")

    def meets(self, place: Place) -> bool:
        if place.step not in self.steps:
            return False
        return place.first if self.calls is None else place.call in self.calls


def _all(steps: dict[str, Step]) -> frozenset[str]:
    return frozenset().union(*(step.calls for step in steps.values()))


_CHANGES = frozenset().union(*(step.changes for step in ENGINE.values()))
_BEFORE_PIVOT = tuple(name for name in ENGINE if name not in AFTER_PIVOT)

#: Every class of error that librados or librbd may answer with; but those that only some calls meet: ``AlreadyThere``,
#: ``HolderSilent`` (``holder_frozen``), ``MayNotFence`` (``engine_killed unfenced``); no request has a lease.
ANSWERS = (
    errors.CephError, errors.Missing, errors.Busy, errors.HasSnapshots, errors.NoPermission, errors.NoSpace,
    errors.NotSupported, errors.Unreachable, errors.Blocklisted,
)  # fmt: skip
#: What Glance may refuse with, and what that comes to while the record waits for data.
STATUSES = {
    400: errors.NotRegistered, 401: errors.NotAuthorized, 403: errors.NotRegistered, 404: errors.NotRegistered,
    409: errors.NotRegistered, 413: errors.NotRegistered, 500: errors.NotRegistered, 503: errors.NotRegistered,
}  # fmt: skip


def _of_the_cluster() -> Iterator[Cause]:
    """What calls to the cluster meet once."""
    everywhere = _all(ENGINE)
    for error in ANSWERS:
        yield Cause("raises", error, error, calls=everywhere)
    # Only what makes something under a name finds the name taken.
    made = frozenset({"create_snap", "clone", "create_blank"})
    yield Cause("raises", errors.AlreadyThere, errors.AlreadyThere, calls=made)
    yield Cause("raises", errors.LedgerConflict, errors.LedgerConflict, calls=frozenset({"omap_replace"}))
    yield Cause("raises", ZeroDivisionError, errors.SnapError, calls=everywhere)
    for error in (errors.Unreachable, errors.Blocklisted):
        yield Cause("loses_the_answer", error, error, calls=_CHANGES)
    # A bug just after the first record leaves that.
    yield Cause("loses_the_answer", ZeroDivisionError, errors.SnapError, ("reserve",), _CHANGES, lasts=True)
    yield Cause("loses_the_answer", ZeroDivisionError, errors.SnapError, tuple(ENGINE)[2:], _CHANGES)


def _of_the_servers() -> Iterator[Cause]:
    """What happens to the cluster, or in it, as a step begins."""
    # The monitor is needed to connect, and for snapshots: one is still made, and one removed, in the seal.
    yield Cause("frozen", "osds", errors.Unreachable, lasts=True)
    yield Cause("frozen", "monitor", errors.Unreachable, lasts=True)
    yield Cause("frozen", "manager")
    for daemons in ("osds", "monitor", "manager"):
        yield Cause("killed", daemons, only_real=True)
    yield Cause("blocklisted", None, errors.Blocklisted, tuple(ENGINE)[1:])
    for kind in ("denied", "denied_writes"):
        yield Cause(kind, "images", errors.NoPermission, _BEFORE_PIVOT, lasts=True, bars_undo=True)
        yield Cause(kind, "vms", errors.NoPermission, lasts=True, suspends=True)
    # Without the right to cut the dead engine's client off nothing of it is touched.
    yield Cause("engine_killed", "unfenced", errors.EngineLost, _BEFORE_PIVOT[2:], lasts=True, bars_undo=True)
    # A snapshot in a full pool would have no object map, and could never be read; what exists is written to.
    yield Cause("full", "images", errors.NoSpace, _BEFORE_PIVOT, lasts=True, bars_undo=True, bars_copy=True)
    yield Cause("full", "vms", errors.NoSpace, ("connect", "reserve", "snap"), lasts=True, suspends=True)
    yield Cause("full", "vms", None, ("protect", "clone", "flatten", "release", "seal", "forget"))
    for_all = {"lasts": True, "bars_undo": True, "bars_copy": True, "suspends": True}
    yield Cause("full_cluster", None, errors.NoSpace, _BEFORE_PIVOT, **for_all)
    until_cloned = ("connect", "reserve", "snap", "protect", "clone", "create")
    yield Cause("name_taken", None, errors.AlreadyThere, until_cloned, lasts=True, bars_copy=True)
    yield Cause("snap_taken", None, errors.AlreadyThere, ("connect", "reserve", "snap"), lasts=True)
    yield Cause("seal_taken", None, errors.AlreadyThere, ("flatten", "copy", "seal"), lasts=True, bars_undo=True)
    yield Cause("clone_open", None, errors.CephError, ("flatten", "copy", "seal"), lasts=True, bars_undo=True)
    # The image is good without; what would cut the guest off from its disk is done once that answers.
    yield Cause("holder_frozen", None, None, ("release",), frozenset({"ask_holder"}), lasts=True)
    for clone_format, error in ((1, errors.Busy), (2, errors.CephError)):
        steps = ("clone", "flatten", "release")
        # Of an image that is not flattened at once the disk's snapshot stays anyhow.
        yield Cause("frozen_has_child", None, error, steps, lasts=True, formats=(clone_format,), policies=(INLINE,))
    # The clone goes to the trash, and from there with its child.
    yield Cause("seal_has_child", None, errors.NotRegistered, ("metadata", "register"), lasts=True)


def _of_the_processes() -> Iterator[Cause]:
    """``kill -9`` of the engine, of nova-compute and of both, before a call and after it."""
    for when in ("before", "after"):
        yield Cause("engine_killed", when, errors.EngineLost, calls=_all(ENGINE))
        yield Cause("both_killed", when, steps=tuple(STEPS), calls=_all(STEPS), dead=True)
        yield Cause("compute_killed", when, steps=tuple(GLANCE), calls=_all(GLANCE), dead=True)
    yield Cause("compute_killed", "meanwhile", calls=_all(ENGINE), dead=True)
    yield Cause("engine_killed", "meanwhile", steps=tuple(GLANCE), calls=_all(GLANCE))
    yield Cause("engine_killed", "meanwhile", errors.LedgerConflict, ("quiesce",), calls=frozenset({"freeze"}))


def _of_the_guest() -> Iterator[Cause]:
    """Where the image does not require that the guest be held still, a snapshot is better than none."""
    ask = frozenset({"answer"})
    for kind in ("guest_refuses", "guest_hangs"):
        yield Cause(kind, None, errors.GuestSilent, ("quiesce",), ask)
        yield Cause(kind, None, None, ("quiesce",), frozenset({"thaw"}), lasts=True)
    for what, error in (("optional", None), ("required", errors.NotQuiesced)):
        yield Cause("guest_refuses", what, error, ("quiesce",), frozenset({"can", "freeze"}))
        yield Cause("guest_hangs", what, error, ("quiesce",), frozenset({"freeze"}))
        yield Cause("guest_loses_the_answer", what, error, ("quiesce",), frozenset({"freeze"}))
        yield Cause("guest_thaws_early", what, error, ("snap",))


def _of_glance() -> Iterator[Cause]:
    """What every request of a step meets, or one."""
    for status, error in STATUSES.items():
        yield Cause("answers", status, error, ("metadata", "register"))
        yield Cause("answers", status, errors.InDoubt, ("wait",), lasts=True)
        yield Cause("answers_once", status, None, ("wait",))
    for status in (403, 404, 405, 501):  # this Glance has, or allows, only the other interface
        yield Cause("answers_once", status, None, ("register",), frozenset({"post"}))
    for how in ("reset", "hang"):
        yield Cause("is_silent", how, errors.GlanceSilent, ("metadata",))
        yield Cause("is_silent", how, errors.InDoubt, ("register",))
        yield Cause("is_silent", how, errors.InDoubt, ("wait",), lasts=True)
        yield Cause("is_silent_once", how, None, ("wait",))
        yield Cause("loses_the_reply", how, None, ("register",))
    # What may be repeated is, where there is time left for it.
    yield Cause("is_silent_once", "reset", None, ("metadata",))
    yield Cause("loses_the_reply", "reset", None, ("metadata",))
    yield Cause("task_fails", None, errors.NotRegistered, ("register",), frozenset({"post"}))
    yield Cause("never_active", None, errors.InDoubt, ("register",), frozenset({"post"}), lasts=True)
    yield Cause("record_deleted", None, errors.RecordGone, tuple(STEPS))
    yield Cause("other_data", None, errors.NotQueued, ("metadata", "register"), frozenset({"properties", "post"}))


CAUSES = [
    *_of_the_cluster(), *_of_the_servers(), *_of_the_processes(), *_of_the_guest(), *_of_glance(),
]  # fmt: skip


# -- what is promised --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Promise:
    """How the request of a cell ends.

    :ivar error: what the clone way fails with; None if it does not.
    """

    outcome: Outcome
    error: Optional[type[errors.SnapError]]


@dataclass(frozen=True)
class Cell:
    """One cause at one place.

    :ivar variant: of the world it is in: ``clone_format``, ``old_glance``, ``flat_disk``, ``flatten``, ``to_store``.
    """

    place: Place
    cause: Cause
    variant: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        variant = "".join(f" ({name} {value})" for name, value in self.variant.items())
        return f"{self.place}: {self.cause}{variant}"

    @property
    def is_late(self) -> bool:
        """The image is active: what is left of its job goes when the engine next looks."""
        return self.place.step in AFTER_PIVOT

    @property
    def promise(self) -> Promise:
        """The rules."""
        for exemption in EXEMPTIONS:
            if exemption.is_for(self):
                return exemption.promise
        if self.cause.dead:
            return Promise(self._outcome_of_death, None)
        error = self.cause.error
        if self.place.of_store and error in (errors.Unreachable, errors.Blocklisted):
            error = errors.StoreSilent
        if self.is_late or error is None:
            return Promise(Outcome.FORWARD, None)
        if error is errors.InDoubt:
            return Promise(Outcome.KEPT, error)
        in_the_way = self.cause.bars_undo and self.place.step in AFTER_CLONE
        if not error.may_fall_back or self.cause.bars_copy or in_the_way:
            return Promise(Outcome.ENDS, error)
        return Promise(Outcome.BACK, error)

    @property
    def _outcome_of_death(self) -> Outcome:
        """Whose nova-compute is dead is copied by nobody."""
        step, made = self.place.step, self.cause.what != "before"
        if step == "connect" or (step == "reserve" and not (made and self.place.call == "omap_replace")):
            return Outcome.UNHEARD
        if self.is_late or step == "wait" or (step == "register" and made):
            return Outcome.FORWARD
        return Outcome.ENDS


@dataclass(frozen=True)
class Exemption:
    """Cells to which the rules do not apply, and why."""

    why: str
    cause: str
    places: tuple[str, ...]
    promise: Promise

    def is_for(self, cell: Cell) -> bool:
        return str(cell.cause) == self.cause and str(cell.place) in self.places


EXEMPTIONS = (
    Exemption(
        "a mere question is asked anew on a new connection",
        "raises Blocklisted",
        ("connect.connect", "connect.fsid", "connect.lookup"),
        Promise(Outcome.FORWARD, None),
    ),
    Exemption(
        "the disk's base image may have been deleted; then another image tells the data pool",
        "raises Missing",
        ("reserve.lookup.2",),
        Promise(Outcome.FORWARD, None),
    ),
    Exemption(
        "how full a pool is need not be known",
        "raises NoPermission",
        ("reserve.used",),
        Promise(Outcome.FORWARD, None),
    ),
    Exemption(
        "a removal says that there is nothing, and yet there is",
        "raises Missing",
        ("release.ask_holder", "release.unprotect_snap", "release.remove_snap"),
        Promise(Outcome.BACK, errors.CephError),
    ),
    Exemption(
        "the image was active when it was deleted, with its data",
        "record_deleted",
        ("forget.omap_item",),
        Promise(Outcome.ENDS, None),
    ),
)


#: The kinds that are tried of a copy into a store, which is in the same cluster here; what happens to all of a cluster
#: is no other than with a clone.
_OF_STORES = (
    "raises", "loses_the_answer", "engine_killed", "both_killed", "compute_killed", "denied", "denied_writes", "full",
    "name_taken", "seal_taken", "clone_open",
)  # fmt: skip


def cells(trace: Iterable[Place], **variant: Any) -> Iterator[Cell]:
    """The cells of a request that calls what is in *trace*."""
    for place in trace:
        for cause in CAUSES:
            fits = variant.get("clone_format", 2) in cause.formats and variant.get("flatten", INLINE) in cause.policies
            fits = fits and (cause.kind in _OF_STORES or not variant.get("to_store"))
            if fits and cause.meets(place):
                yield Cell(place, cause, variant)
