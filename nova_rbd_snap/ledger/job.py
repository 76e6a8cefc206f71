# SPDX-License-Identifier: Apache-2.0
"""One job of the ledger: small, versioned, and enough to finish or undo the job without anything else."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import dataclass, field
from typing import Any, Optional

from nova_rbd_snap.specs import UUID, ImageSpec, SnapSpec, client_address

#: Version of the record's format. A record of a newer one is kept and never touched.
VERSION = 1

#: Kinds of job: a clone that becomes a Glance image; a copy in a store of Glance's that becomes one; a frozen snapshot
#: that an upload or Nova's full copy reads; a clone that is a Glance image already, and is to be flattened; the disk of
#: a deleted server, in the trash; the question whether Glance can read an image that is not flat.
CLONE = "clone"
COPY = "copy"
FREEZE = "freeze"
FLATTEN = "flatten"
PURGE = "purge"
PROBE = "probe"

#: Those that any worker may do, the most urgent first; the others are those of a snapshot request.
BACKGROUND_KINDS = PROBE, PURGE, FLATTEN

#: The steps of a job that any worker may do.
QUEUED, AT_WORK = "queued", "at work"

#: When a clone's link to the server's disk is cut: before it becomes an image; soon after that; not by us.
POLICIES = INLINE, BACKGROUND, NEVER = "inline", "background", "never"

#: What the names of our snapshots of disks begin with.
SNAP_PREFIX = "nova-rbd-snap-"

#: What an id of each kind looks like, the image's id being the group: a clone bears it as its name, so a record
#: can name nothing for removal that is not named like an image; and what a server's disk looks like.
_IDS = {
    CLONE: re.compile(f"({UUID})"),
    COPY: re.compile(f"({UUID})"),
    FREEZE: re.compile(f"({UUID})-copy"),
    FLATTEN: re.compile(f"({UUID})"),
    PURGE: re.compile("([0-9a-f]+)-purge"),
    PROBE: re.compile("probe-.+"),
}
_DISK = re.compile(f"{UUID}_[^/@]+")


def copy_id(image_id: str) -> str:
    """Id of the freeze that a full copy to the image *image_id* reads."""
    return f"{image_id}-copy"


def purge_id(image_id: str) -> str:
    """Id of the job that removes the rbd image *image_id* from the trash."""
    return f"{image_id}-purge"


def probe_id(glance_pool: str) -> str:
    """Id of the job that finds out whether Glance can read clones in a pool of its."""
    return f"probe-{glance_pool}"


def probe_disk(image_id: str) -> str:
    """Name of the scratch disk of a probe, whose clone is the image *image_id*."""
    return f"{image_id}_probe"


@dataclass(frozen=True)
class Owner:
    """Who works on a job.

    :ivar host: [DEFAULT] host of nova-compute.
    :ivar machine: id of the machine (Nova's compute id where it has one), since two clouds may share a host name.
    :ivar incarnation: id of one life of nova-compute, shared by the engines it starts.
    :ivar client: address with nonce of the engine's librados client, for fencing exactly this client.
    :ivar cloud: whose Glance knows the image: Keystone's URL and the region, as far as the configuration tells.
    """

    host: str
    machine: str
    incarnation: str
    client: str
    cloud: str = ""


@dataclass(frozen=True)
class Job:
    """One job.

    :ivar id: of most kinds the id of the Glance image, so that one image record can never have two jobs.
    :ivar step: the step under way. All before it are done, it may or may not have happened, none after it has.
    :ivar generation: grows with each write, so that no two states of a job are the same text.
    :ivar created: seconds since the epoch.
    :ivar snap_id: id of the snapshot of the disk, once known.
    :ivar flatten: which of :data:`POLICIES` the clone was made by; of a probe, whether others may be made but INLINE.
    :ivar dest: the clone or copy, also the Glance image's name in Glance's pool. None for a freeze.
    :ivar dest_id: its id. Only set when ``clone`` returned, so the link to the parent was whole.
    :ivar store: of a copy, the name of the store of Glance's that *dest* is in; see ``conf.Settings.stores``.
    :ivar orphaned: the nova-compute that was asked for the image is no more, so nobody else looks after its record.
    :ivar failures: what could not be undone, or done, for people.
    :ivar slot: number of the lease under which the owner is at work, or was.
    :ivar percent: how much of it is done.
    :ivar begun: somebody has been at work on it.
    :ivar attempts: how often it has failed.
    :ivar not_before: when it may be tried again, in seconds since the epoch.
    :ivar flat_at: when the flatten was done, in seconds since the epoch.
    :ivar task: id of the Ceph manager's task that does it.
    :ivar text: as it was read, which another release may have written otherwise; empty where it is :meth:`encode`'s.
    """

    id: str
    kind: str
    owner: Owner
    created: float
    disk: ImageSpec
    clone_format: int
    step: str
    flatten: str = INLINE
    dest: Optional[ImageSpec] = None
    store: Optional[str] = None
    data_pool: Optional[str] = None
    snap_id: Optional[int] = None
    dest_id: Optional[str] = None
    orphaned: bool = False
    failures: tuple[str, ...] = ()
    slot: int = 0
    percent: int = 0
    begun: bool = False
    attempts: int = 0
    not_before: float = 0.0
    task: Optional[str] = None
    flat_at: Optional[float] = None
    generation: int = 0
    text: str = field(default="", compare=False, repr=False)

    @property
    def image_id(self) -> str:
        """Id of the Glance image that was asked for; of a purge, of the rbd image that goes."""
        if self.dest is not None:
            return self.dest.name
        found = _IDS[self.kind].fullmatch(self.id)
        return found[1] if found else self.id

    @property
    def server(self) -> str:
        """Uuid of the server whose disk it is."""
        return self.disk.name.partition("_")[0]

    @property
    def snap(self) -> SnapSpec:
        """The snapshot of the disk; named after the job, so that it is recognised without the ledger."""
        return self.disk.snap(f"{SNAP_PREFIX}{self.id}")

    def encode(self) -> str:
        """The record as text."""
        # Without what is as usual: a release that knows more of such leaves the text of an older one as it is.
        usual = {known.name: known.default for known in dataclasses.fields(self)}
        told = {name: value for name, value in dataclasses.asdict(self).items() if value != usual[name]}
        told.pop("text", None)
        return json.dumps({"version": VERSION, **told}, sort_keys=True)

    @classmethod
    def decode(cls, text: str) -> Job:
        """The job that *text* records.

        :raises ValueError: not a record, one of a newer version, or one that asks for what no job does.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            version = data.pop("version")
            if version != VERSION:
                raise ValueError(f"record version {version}, this release reads {VERSION}")
            data["owner"] = Owner(**data["owner"])
            data["disk"] = ImageSpec(**data["disk"])
            data["dest"] = ImageSpec(**data["dest"]) if data.get("dest") else None
            data["failures"] = tuple(data.get("failures", ()))
            if "text" in data:
                raise ValueError("a record within a record")
            job = cls(**data, text=text)
            job._validate()
        except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"not a record of the ledger: {error!r}") from error
        return job

    def _fits(self, dest: ImageSpec) -> bool:
        if not isinstance(dest.pool, str):
            return False
        if self.kind == PROBE:
            names_fit = re.fullmatch(UUID, dest.name) and self.disk.name == probe_disk(dest.name)
            return bool(names_fit) and self.id == probe_id(dest.pool)
        return dest.name == self.id

    def _validate(self) -> None:
        """Anybody who may write to the pool may have written the record; what it names is removed on its word.

        :raises ValueError: it names what no job of ours names.
        """
        for name, value, kind in (
            ("id", self.id, str),
            ("step", self.step, str),
            ("host", self.owner.host, str),
            ("machine", self.owner.machine, str),
            ("incarnation", self.owner.incarnation, str),
            ("cloud", self.owner.cloud, str),
            ("pool", self.disk.pool, str),
            ("disk", self.disk.name, str),
            ("generation", self.generation, int),
            ("slot", self.slot, int),
            ("percent", self.percent, int),
            ("attempts", self.attempts, int),
            ("created", self.created, (int, float)),
            ("not_before", self.not_before, (int, float)),
            ("orphaned", self.orphaned, bool),
            ("begun", self.begun, bool),
            ("snap_id", self.snap_id, (int, type(None))),
            ("dest_id", self.dest_id, (str, type(None))),
            ("data_pool", self.data_pool, (str, type(None))),
            ("store", self.store, (str, type(None))),
            ("task", self.task, (str, type(None))),
            ("flat_at", self.flat_at, (int, float, type(None))),
        ):
            if not isinstance(value, kind):
                raise TypeError(f"{name} is {value!r}")
        for moment in (self.created, self.not_before, self.flat_at or 0.0):
            if not math.isfinite(moment):
                raise ValueError(f"at {moment!r}")
        if self.kind not in _IDS or self.clone_format not in (1, 2):
            raise ValueError(f"kind {self.kind!r} in format {self.clone_format!r}")
        if self.flatten not in POLICIES or (self.flatten != INLINE and self.clone_format != 2):
            raise ValueError(f"flatten {self.flatten!r} in format {self.clone_format}")
        if not _IDS[self.kind].fullmatch(self.id):
            raise ValueError(f"{self.id!r} is no id of a {self.kind}")
        if not _DISK.fullmatch(self.disk.name):
            raise ValueError(f"{self.disk} is no server's disk")
        if (self.kind in (FREEZE, PURGE)) != (self.dest is None):
            raise ValueError(f"a {self.kind} to {self.dest}")
        if (self.kind == COPY) != (self.store is not None):
            raise ValueError(f"a {self.kind} to store {self.store!r}")
        if self.dest is not None and not self._fits(self.dest):
            raise ValueError(f"{self.dest} is not named like the image of {self.id}")
        if not all(isinstance(failure, str) for failure in self.failures):
            raise ValueError(f"failures are {self.failures!r}")
        client_address(self.owner.client)
