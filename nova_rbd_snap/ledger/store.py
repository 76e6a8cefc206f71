# SPDX-License-Identifier: Apache-2.0
"""The ledger: one omap object in Nova's pool, one key per job.

Every write carries the text it replaces and fails if that is not there any more, so a late writer loses instead
of winning. Nothing is changed in a pool before its intent is written here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from nova_rbd_snap import errors
from nova_rbd_snap.ceph.interface import Cluster
from nova_rbd_snap.ledger.job import Job

#: Name of the RADOS object.
OBJECT = "nova_rbd_snap.ledger"


@dataclass(frozen=True)
class Contents:
    """What a ledger holds.

    :ivar jobs: those that this release can read, oldest first.
    :ivar strange: key to what is wrong with its record; such are never touched, and in nobody's way.
    """

    jobs: list[Job]
    strange: dict[str, str]


def _text(job: Job) -> str:
    """What stands in the ledger for a job as it was read, or written, last."""
    return job.text or job.encode()


class Ledger:
    """The ledger of one pool."""

    def __init__(self, cluster: Cluster, pool: str) -> None:
        self._cluster = cluster
        self._pool = pool

    def reserve(self, job: Job) -> Job:
        """Write the first record of *job*.

        :raises errors.LedgerConflict: there is a job with this id, whatever its state.
        """
        job = dataclasses.replace(job, text="")
        try:
            self._cluster.omap_replace(self._pool, OBJECT, job.id, None, job.encode())
        except errors.LedgerConflict as error:
            raise errors.LedgerConflict(f"the ledger of pool {self._pool} has a job {job.id} already") from error
        except errors.CephError as error:
            # Perhaps it was written and only the answer is lost. Nothing has been changed for it yet.
            try:
                self.forget(job)
            except errors.LedgerConflict:
                pass  # it was not written
            except errors.CephError as failure:
                error.undo_failures.append(f"ledger: {failure}")
            raise
        return job

    def advance(self, job: Job, **changes: Any) -> Job:
        """Replace the record of *job* by one with *changes*; returns the new state.

        :raises errors.LedgerConflict: the record is no longer the one given.
        """
        changed = dataclasses.replace(job, generation=job.generation + 1, text="", **changes)
        self._cluster.omap_replace(self._pool, OBJECT, job.id, _text(job), changed.encode())
        return changed

    def forget(self, job: Job) -> None:
        """Remove the record. :raises errors.LedgerConflict: it is no longer the one given."""
        self._cluster.omap_replace(self._pool, OBJECT, job.id, _text(job), None)

    def load(self, job_id: str) -> Job:
        """The job as recorded. :raises errors.NoRecord: there is none that this release can read."""
        text = self._cluster.omap_item(self._pool, OBJECT, job_id)
        if text is None:
            raise errors.NoRecord(f"no job {job_id} in the ledger of pool {self._pool}")
        try:
            return self._decode(job_id, text)
        except ValueError as error:
            raise errors.NoRecord(f"record {job_id} is never touched: {error}") from error

    def has(self, job_id: str) -> bool:
        """Whether there is such a record, readable or not."""
        return self._cluster.omap_item(self._pool, OBJECT, job_id) is not None

    def read(self) -> Contents:
        """All that is in the ledger."""
        jobs, strange = [], {}
        for key, text in self._cluster.omap_items(self._pool, OBJECT).items():
            try:
                jobs.append(self._decode(key, text))
            except ValueError as error:
                strange[key] = str(error)
        return Contents(sorted(jobs, key=lambda job: job.created), strange)

    def _decode(self, key: str, text: str) -> Job:
        job = Job.decode(text)
        if job.id != key:
            raise ValueError(f"the record of {job.id}")
        if job.disk.pool != self._pool:
            raise ValueError(f"{job.disk} is not in this pool")
        return job
