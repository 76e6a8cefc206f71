# SPDX-License-Identifier: Apache-2.0
"""One job of the ledger: small, versioned, and enough to finish or undo the job without anything else."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Optional

from nova_rbd_snap.specs import ImageSpec, SnapSpec

#: Version of the record's format. A record of a newer one is kept and never touched.
VERSION = 1

#: Kinds of job: a clone that becomes a Glance image; a frozen snapshot that Nova's full copy reads.
CLONE = "clone"
FREEZE = "freeze"


@dataclass(frozen=True)
class Owner:
    """Who works on a job.

    :ivar host: [DEFAULT] host of nova-compute.
    :ivar machine: id of the machine (Nova's compute id where it has one), since two clouds may share a host name.
    :ivar incarnation: id of the engine process.
    :ivar client: address with nonce of the engine's librados client, for fencing exactly this client.
    """

    host: str
    machine: str
    incarnation: str
    client: str


@dataclass(frozen=True)
class Job:
    """One job.

    :ivar id: id of the Glance image, so that one image record can never have two jobs.
    :ivar step: the step under way. All before it are done, it may or may not have happened, none after it has.
    :ivar generation: grows with each write, so that no two states of a job are the same text.
    :ivar created: seconds since the epoch.
    :ivar snap_id: id of the snapshot of the disk, once known.
    :ivar dest: the clone, also the Glance image's name in Glance's pool. None for a freeze.
    :ivar dest_id: id of the clone. Only set when ``clone`` returned, so the link to the parent was whole.
    :ivar failures: what could not be undone, for people.
    """

    id: str
    kind: str
    owner: Owner
    created: float
    disk: ImageSpec
    clone_format: int
    step: str
    dest: Optional[ImageSpec] = None
    data_pool: Optional[str] = None
    snap_id: Optional[int] = None
    dest_id: Optional[str] = None
    failures: tuple[str, ...] = ()
    generation: int = 0

    @property
    def snap(self) -> SnapSpec:
        """The snapshot of the disk; named after the job, so that it is recognised without the ledger."""
        return self.disk.snap(f"nova-rbd-snap-{self.id}")

    def encode(self) -> str:
        """The record as text."""
        return json.dumps({"version": VERSION, **dataclasses.asdict(self)}, sort_keys=True)

    @classmethod
    def decode(cls, text: str) -> Job:
        """The job that *text* records.

        :raises ValueError: not a record, or one of a newer version.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            version = data.pop("version")
            if version != VERSION:
                raise ValueError(f"record version {version}, this release reads {VERSION}")
            data["owner"] = Owner(**data["owner"])
            data["disk"] = ImageSpec(**data["disk"])
            data["dest"] = ImageSpec(**data["dest"]) if data["dest"] else None
            data["failures"] = tuple(data["failures"])
            return cls(**data)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a record of the ledger: {error!r}") from error
