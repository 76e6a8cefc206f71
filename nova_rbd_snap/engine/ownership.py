# SPDX-License-Identifier: Apache-2.0
"""Whose a job is, and how it becomes ours."""

from __future__ import annotations

import logging
from typing import Callable

from nova_rbd_snap import errors
from nova_rbd_snap.ceph.interface import Cluster
from nova_rbd_snap.ledger.job import BACKGROUND_KINDS, Job, Owner
from nova_rbd_snap.ledger.store import Ledger
from nova_rbd_snap.snapshot import saga

LOG = logging.getLogger(__name__)


class Ownership:
    """The rules, for the jobs of one nova-compute."""

    def __init__(self, owner: Callable[[str], Owner], pool: str) -> None:
        """
        :param owner: the owner of this engine's jobs, given the address of its client.
        :param pool: the ledger's.
        """
        self.owner, self._pool = owner, pool
        self._fenced: set[str] = set()

    def is_mine(self, job: Job) -> bool:
        """Whether it is of this nova-compute, in whichever of its lives."""
        us = self.owner(job.owner.client)
        return (job.owner.cloud, job.owner.host, job.owner.machine) == (us.cloud, us.host, us.machine)

    def is_of_this_life(self, job: Job) -> bool:
        return job.owner == self.owner(job.owner.client)

    def may_be_mine(self, job: Job) -> bool:
        """Whether one that is not may well be, of before our configuration, or the machine's id, was changed."""
        us, them = self.owner(job.owner.client), job.owner
        if them.host != us.host or (them.machine != us.machine and them.cloud != us.cloud):
            return False
        return job.kind not in BACKGROUND_KINDS or them.cloud != us.cloud  # any host does its cloud's own

    def refuse_another_clouds(self, job: Job) -> None:
        """:raises errors.Refused: it is another cloud's."""
        ours = self.owner(job.owner.client).cloud
        if job.owner.cloud != ours:
            raise errors.Refused(
                f"job {job.id} is of cloud {job.owner.cloud!r}, whose Glance alone knows its image, and this is "
                f"{ours!r}; use that cloud's nova.conf, or --cloud if it is this one under a former address"
            )

    def adopt(self, job: Job, cluster: Cluster) -> Job:
        """Take over a job of an earlier engine of this nova-compute, and of no one else's.

        :raises errors.LedgerConflict: it is somebody else's, or they were faster.
        """
        if not self.is_of_this_life(job):
            raise errors.LedgerConflict(f"job {job.id} belongs to {job.owner.host} ({job.owner.machine})")
        return self.take_over(job, cluster)

    def take_over(self, job: Job, cluster: Cluster) -> Job:
        """Make the job ours: exactly the client that worked on it is cut off, then the ledger refuses its writes.

        Where nothing is left in the pools nobody works on it: the ledger's refusal is enough. So it is where an undo
        has come to its end: another may be under way, and two of them do each other no harm.
        """
        us = self.owner(cluster.address())
        if job.owner == us:
            return job
        is_at_rest = job.step == saga.RECORD or bool(job.failures)
        if not is_at_rest and job.owner.client not in (us.client, *self._fenced):
            self.cut_off(job, cluster)
        orphaned = job.orphaned or not self.is_of_this_life(job)
        return Ledger(cluster, self._pool).advance(job, owner=us, orphaned=orphaned)

    def cut_off(self, job: Job, cluster: Cluster) -> None:
        """Blocklist the client that works, or worked, on the job."""
        LOG.log(
            logging.INFO if self.is_mine(job) else logging.WARNING,
            "Job %s of host %s is taken over: the client %s of its engine is blocklisted for a day; no guest is",
            job.id, job.owner.host, job.owner.client,
        )
        cluster.fence(job.owner.client)
        self._fenced.add(job.owner.client)
