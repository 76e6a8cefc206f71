# SPDX-License-Identifier: Apache-2.0
"""The tree of errors; code branches on these classes, never on message text.

::

    SnapError
    ├── Refused             this disk cannot be taken this way, or not there; nothing was changed
    │   └── RuledOut        no disk can, as it is configured: that was told when the service started
    ├── Cancelled           somebody asked for the work to stop: the server is being deleted, or the service ends
    ├── GuestSilent         QEMU does not answer, and would be cut off from its disk by a snapshot
    ├── NotQuiesced         the guest could not be held still, which its image requires
    ├── StillAtWork         a disk that is to be removed is needed by a job of ours that does not come to its end
    ├── NotReadable         Glance cannot read an image that is not flat
    ├── Later               work that nobody waits for is to go on later
    ├── DiskError           a disk in a file, or on a volume of the host, cannot be read
    ├── CephError           a librados or librbd call failed
    │   ├── Missing         pool, rbd image or snapshot does not exist (of a removal: says nothing, look again)
    │   ├── AlreadyThere    the thing to be made exists, and this call did not make it
    │   ├── Busy            in use: a watcher, a child, a lock
    │   │   └── HasSnapshots
    │   ├── LeaseLost       a lease ran out, or was taken away: somebody else may be at work by now
    │   ├── NoPermission    cephx denied it
    │   │   └── MayNotFence a dead engine's client cannot be cut off
    │   ├── NoSpace         pool or cluster full
    │   ├── NotSupported    librbd, the image's features or the cluster cannot do it
    │   ├── HolderSilent    who has the lock of an rbd image does not answer, and would be cut off from it
    │   └── Unreachable     no answer in time; whether it happened is unknown
    │       ├── StoreSilent it is the cluster of a store of Glance's that does not answer
    │       └── Blocklisted this client was cut off and must reconnect
    ├── LedgerError         the ledger's record is not what was expected
    │   ├── LedgerConflict  somebody else wrote first
    │   └── NoRecord        there is no such job
    ├── EngineError         the engine process
    │   ├── EngineUnavailable   cannot be started, or waits before it is started again
    │   └── EngineLost      ended while it worked; what it did is in the ledger
    │       └── EngineStuck was ended because it made no progress
    ├── NovaSilent          Nova's API did not say whether there is a server
    └── GlanceError         registering the image
        ├── RecordGone      the image record was deleted
        ├── NotAuthorized   the token is not accepted (401)
        ├── GlanceSilent    no answer in time; nothing that matters had been asked for
        ├── NotRegistered   Glance refused, and the record does not point at our data
        ├── Damaged         what Glance stored is not what was sent
        ├── NotQueued       the record is no longer waiting for data, and what it has is not ours
        └── InDoubt         Glance may or may not have taken the location; the data is kept
"""

from __future__ import annotations

from typing import Any, Optional


class SnapError(Exception):
    """Base of everything this project raises on purpose.

    :ivar step: name of the step that failed, where there was one.
    :ivar undo_failures: what could not be undone afterwards, as sentences; it stays in the ledger.
    """

    #: What an operator can do about it, as a clause; empty where there is nothing to do.
    remedy = ""
    #: False where a full copy by Nova would hang, be useless, or is not wanted.
    may_fall_back = True

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.step: Optional[str] = None
        self.undo_failures: list[str] = []

    def report(self) -> str:
        """Step, cause and remedy in one sentence each, for one log line."""
        text = str(self)
        if self.step:
            text = f"step '{self.step}': {text}"
        if self.remedy:
            text += f"; remedy: {self.remedy}"
        if self.undo_failures:
            text += f"; could not be undone and is kept in the ledger: {'; '.join(self.undo_failures)}"
        return text

    def to_wire(self) -> dict[str, Any]:
        """The error as plain data, for the socket between engine and nova-compute."""
        return {
            "type": type(self).__name__,
            "message": str(self),
            "step": self.step,
            "undo_failures": self.undo_failures,
        }


class Refused(SnapError):
    """This disk cannot be taken this way, or not there; nothing was changed."""


class RuledOut(Refused):
    """No disk can be taken this way, as it is configured: that was told when the service started."""


class Cancelled(SnapError):
    """Somebody asked for the work to stop; what was done has been undone."""

    may_fall_back = False


class GuestSilent(SnapError):
    """QEMU does not answer its monitor: a snapshot would take its disk's lock away, and cut the guest off from it."""

    remedy = "find out why QEMU hangs"
    may_fall_back = False


class NotQuiesced(SnapError):
    """The guest's file systems could not be held still for the snapshot, which its image requires."""

    remedy = "see that qemu-guest-agent runs in the guest, or unset the image property os_require_quiesce"
    may_fall_back = False


class StillAtWork(SnapError):
    """A disk that is to be removed is needed by a job of ours that does not come to its end."""

    remedy = "'nova-rbd-snap job list' tells what is in its way; delete the server again once the job is gone"
    may_fall_back = False


class NotReadable(SnapError):
    """Glance cannot read an image that is not flat."""

    remedy = "give the readers' Ceph users the capabilities that 'nova-rbd-snap caps' prints, or set flatten = inline"


class Later(SnapError):
    """Work that nobody waits for is to go on later; the message is for people.

    :ivar seconds: how much later.
    """

    def __init__(self, message: str, seconds: float = 60.0) -> None:
        super().__init__(message)
        self.seconds = seconds


class DiskError(SnapError):
    """A disk in a file, or on a volume of the host, cannot be read."""

    remedy = "see that nova-compute's user may read it, and that nobody has it open"


class CephError(SnapError):
    """A librados or librbd call failed in a way that has no class of its own."""


class Missing(CephError):
    """A pool, rbd image or snapshot does not exist."""


class AlreadyThere(CephError):
    """The thing to be made exists already, and this call did not make it."""

    remedy = "'nova-rbd-snap sweep --dry-run' tells whether it is a leftover"


class Busy(CephError):
    """In use: somebody watches it, is a child of it, or holds its lock."""

    remedy = "'rbd status' tells who has it open, 'rbd children --all' what depends on its snapshots"


class HasSnapshots(Busy):
    """The rbd image still has snapshots."""


class LeaseLost(CephError):
    """A lease ran out, or was taken away: somebody else may be at work by now."""


class NoPermission(CephError):
    """cephx denied the call."""

    remedy = "give nova-compute's Ceph user 'profile rbd' on this pool, see 'Ceph users' in the README"


class MayNotFence(NoPermission):
    """cephx denied to blocklist a client, so what that works on is left alone."""

    remedy = "give nova-compute's Ceph user mon 'profile rbd', see 'Ceph users' in the README"


class NoSpace(CephError):
    """The pool's quota or the cluster is used up."""

    remedy = "add space to the pool or raise its quota"


class NotSupported(CephError):
    """librbd, the features of the rbd image or the cluster cannot do it."""


class HolderSilent(CephError):
    """Who has the lock of an rbd image does not answer: a change of its snapshots would cut a frozen guest off."""

    remedy = "none is needed: it is tried again once the guest answers, or has ended in order"


class Unreachable(CephError):
    """The cluster did not answer in time; whether the change happened is unknown."""

    remedy = "look at 'ceph status'; the wait is bounded by [rbd_snap] operation_timeout"
    may_fall_back = False


class StoreSilent(Unreachable):
    """The cluster of a store of Glance's does not answer; the server's own does."""

    remedy = "look at 'ceph status' there, and at the options that name it"
    may_fall_back = True


class Blocklisted(Unreachable):
    """The cluster cut this client off; only a new connection can go on."""

    remedy = "find out who blocklisted this client ('ceph osd blocklist ls')"


class LedgerError(SnapError):
    """The ledger's record is not what was expected."""


class LedgerConflict(LedgerError):
    """Somebody else wrote the record first, and their write stands."""


class NoRecord(LedgerError):
    """The ledger holds no such job."""


class EngineError(SnapError):
    """The engine process could not do the work."""


class EngineUnavailable(EngineError):
    """The engine cannot be started, or waits before it is started again."""


class EngineLost(EngineError):
    """The engine ended while it worked. What it did is in the ledger."""


class EngineStuck(EngineLost):
    """The engine made no progress and was ended: the cluster does not answer, not even with an error."""

    remedy = Unreachable.remedy
    may_fall_back = False


class NovaSilent(SnapError):
    """Nova's API did not say whether there is a server."""


class GlanceError(SnapError):
    """Registering the image with Glance failed.

    :ivar status: the HTTP status that Glance answered with, where it refused.
    """

    status: Optional[int] = None


class RecordGone(GlanceError):
    """The Glance record was deleted meanwhile."""

    may_fall_back = False


class NotAuthorized(GlanceError):
    """Glance does not accept the token, so it would not accept an upload either."""

    remedy = (
        "set [service_user] send_service_user_token, so that a tenant's token that expires meanwhile stays good; "
        "of the service's own credentials, see [rbd_snap] auth_section"
    )
    may_fall_back = False


class GlanceSilent(GlanceError):
    """Glance did not answer in time, so it would not take an upload either."""

    remedy = "look at Glance's own log, and at its endpoint"
    may_fall_back = False


class NotRegistered(GlanceError):
    """Glance refused, and the record does not point at our data."""

    remedy = (
        "let Nova register locations: [service_user] with role 'service' for Glance 2024.2 and later, "
        "else show_multiple_locations = True in glance-api.conf"
    )


class Damaged(GlanceError):
    """What Glance stored is not what was sent, so the record was deleted."""

    remedy = "look for what changes data on its way: Glance's store, or what is between"
    may_fall_back = False


class NotQueued(GlanceError):
    """The record no longer waits for data, and the data it has is not ours."""

    may_fall_back = False


class InDoubt(GlanceError):
    """Glance may or may not have taken the location. The data is kept and the job stays in the ledger."""

    remedy = "none is needed: it is settled once Glance tells; 'nova-rbd-snap job list' shows it until then"
    may_fall_back = False


def known(error: Exception) -> SnapError:
    """*error* itself if it is one of ours, else an error that carries what it says: a bug must be undone, too."""
    return error if isinstance(error, SnapError) else SnapError(f"unexpected {type(error).__name__}: {error}")


def _tree(cls: type[SnapError]) -> dict[str, type[SnapError]]:
    found = {cls.__name__: cls}
    for child in cls.__subclasses__():
        found.update(_tree(child))
    return found


def from_wire(data: dict[str, Any]) -> SnapError:
    """The error that :meth:`SnapError.to_wire` described; a class unknown here becomes :class:`SnapError`."""
    error = _tree(SnapError).get(data["type"], SnapError)(data["message"])
    error.step = data["step"]
    error.undo_failures = list(data["undo_failures"])
    return error
