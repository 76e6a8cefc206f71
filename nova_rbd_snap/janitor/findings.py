# SPDX-License-Identifier: Apache-2.0
"""What a sweep looks at, and how it tells what it found: the words that ``leftovers.py`` and its kinds share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Callable, Optional, Protocol

from nova_rbd_snap.ceph.interface import Cluster
from nova_rbd_snap.ledger.store import Contents, Ledger

#: What is to become of a finding: nothing, gone for good, gone to its pool's trash.
KEEP, REMOVE, TRASH = "keep", "remove", "trash"


class Glance(Protocol):
    """Glance as a user who sees every project's images: what of ``openstack.glance.Glance`` is needed."""

    def record(self, image_id: str) -> object:
        """The image record. :raises errors.RecordGone: "not found", whoever says so."""

    def answers(self) -> bool:
        """Whether it is Glance that says so."""


class Nova(Protocol):
    """Nova's API as a user who sees every project's servers."""

    def knows(self, server: str) -> bool:
        """Whether there is such a server. :raises errors.NovaSilent: it does not say."""


@dataclass(frozen=True)
class Folder:
    """A folder of the snapshots directory.

    :ivar files: names of the regular files in it.
    :ivar others: names of what else is in it.
    :ivar changed: when the folder or one of its files last was, in seconds since the epoch.
    """

    files: tuple[str, ...]
    others: tuple[str, ...]
    changed: float


class Machine(Protocol):
    """This machine's local disk and processes. Every method raises ``SnapError`` where it cannot tell.

    :ivar directory: Nova's snapshots directory; empty where the configuration does not tell.
    """

    directory: str

    def folders(self) -> list[str]:
        """The names of the folders in the snapshots directory."""

    def look(self, name: str) -> Optional[Folder]:
        """What is in the folder; None where there is no such folder."""

    def is_open(self, name: str) -> bool:
        """Whether a process has the folder, or something in it, open."""

    def nova_since(self) -> Optional[float]:
        """When the oldest nova-compute that runs was started, in seconds since the epoch; None where none runs."""

    def remove(self, name: str, files: Sequence[str]) -> None:
        """Remove the files, then the folder if it is empty then."""


@dataclass(frozen=True)
class Scene:
    """Where a sweep looks.

    :ivar pool: Nova's.
    :ivar glance_pools: where Glance keeps images.
    :ivar glance: gives Glance, or raises ``GlanceError``; called often.
    :ivar nova: the same of Nova.
    :ivar now: seconds since the epoch.
    :ivar older_than_seconds: what is younger may be somebody's work under way.
    """

    cluster: Cluster
    pool: str
    glance_pools: Sequence[str]
    glance: Callable[[], Glance]
    nova: Callable[[], Nova]
    machine: Machine
    now: float
    older_than_seconds: float

    def ledger(self) -> Contents:
        """The ledger as it is now."""
        return Ledger(self.cluster, self.pool).read()

    def age(self, moment: float) -> str:
        """For people."""
        return f"{(self.now - moment) / 3600:.1f} h old"

    def is_young(self, moment: float) -> bool:
        """Whether what is from *moment* may be somebody's work under way."""
        return self.now - moment < self.older_than_seconds


class Target(Protocol):
    """What may be a leftover; equal to another only if that is the very same thing, whatever its name."""

    def judge(self, scene: Scene) -> Optional[Finding]:
        """What it is by now; None where it is no finding any more."""

    def remove(self, scene: Scene) -> None:
        """Do what was found right. :raises errors.SnapError: it could not be done."""


@dataclass(frozen=True)
class Finding:
    """Something that is, or looks like, a leftover.

    :ivar what: as an operator would write it: pool/image@snap, a path, the id of a job.
    :ivar target: None for what a sweep never touches.
    """

    kind: str
    what: str
    action: str
    why: str
    target: Optional[Target] = field(default=None, repr=False)


@dataclass(frozen=True)
class SweepPlan:
    """What was found, in the order in which it is removed: what depends on a thing comes before it."""

    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Outcome:
    """What became of a finding.

    :ivar became: kept, removed, trashed or gone.
    :ivar why: as the finding's, or what was in the way.
    :ivar done: it is as the plan wanted it.
    """

    finding: Finding
    became: str
    why: str
    done: bool = True
