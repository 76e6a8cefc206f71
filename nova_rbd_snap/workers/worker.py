# SPDX-License-Identifier: Apache-2.0
"""Does what is queued in the ledger, one job at a time, under one of the cloud's leases.

A job is *queued*, or at work under a numbered lease. Who has the lease of a job that another client has at work knows
that this client lost it: it is cut off, and the job goes on here. All else is in the cluster: what was done stays so,
and beginning again is harmless.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Container, Sequence
from typing import Any, Callable, Optional, Protocol

from nova_rbd_snap import errors
from nova_rbd_snap.ceph.interface import Cluster
from nova_rbd_snap.ledger.job import AT_WORK, QUEUED, Job, Owner
from nova_rbd_snap.ledger.store import Ledger
from nova_rbd_snap.workers import lease

LOG = logging.getLogger(__name__)

#: What the names of the leases begin with; the kind of job and a number follow.
LEASE = "nova_rbd_snap"

#: So much more must be done before it is worth a note in the ledger.
_NOTED_PERCENT = 5
#: Seconds until a job that failed is tried again: the first, doubled with each failure, and the most.
_BACK_OFF_SECONDS = (60.0, 3600.0)
_DOUBLINGS = 10
#: How long a lease is had at most that is only taken to see whether it is free.
_ASKED_SECONDS = 5.0


class Current:
    """The job at work.

    :ivar job: as the ledger has it.
    :ivar is_repeated: somebody has been at it before.
    """

    def __init__(self, job: Job, ledger: Ledger, is_repeated: bool) -> None:
        self.job, self.is_repeated = job, is_repeated
        self._ledger = ledger

    def note(self, percent: int) -> None:
        """Write down how much is done, now and again. :raises errors.LedgerConflict: the job is another's by now."""
        if percent >= self.job.percent + _NOTED_PERCENT:
            self.change(percent=percent)

    def change(self, **changes: Any) -> None:
        """Write *changes* into the job. :raises errors.LedgerConflict: it is another's by now."""
        self.job = self._ledger.advance(self.job, **changes)


class Task(Protocol):
    """What is done with the jobs of a kind.

    :ivar fails_as: what to say of a job that could not be done, before the reason.
    """

    kind: str
    fails_as: str

    def do(self, current: Current, stopped: Callable[[], bool]) -> None:
        """Do it, whether or not it was begun before; returns when nothing is left to do.

        :raises errors.Cancelled: *stopped* came true.
        :raises errors.Later: it is to go on later, without anything being wrong.
        """


class Worker:
    """One client that works; see the module."""

    def __init__(
        self,
        cluster: Cluster,
        pool: str,
        owner: Owner,
        tasks: Sequence[Task],
        *,
        limit: int,
        lease_seconds: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """
        :param cluster: a connection of its own, for whoever takes over a job of it cuts it off.
        :param pool: Nova's.
        :param owner: this client.
        :param tasks: the most urgent first.
        :param limit: how many jobs of a kind may be at work at once in the whole cloud.
        """
        self._cluster, self._pool, self._owner, self._clock = cluster, pool, owner, clock
        self._tasks, self._limit, self._lease_seconds = tasks, limit, lease_seconds
        self._ledger = Ledger(cluster, pool)

    def work(self, stopped: Callable[[], bool]) -> bool:
        """Do what is due and there is a lease for; returns whether there was anything.

        :param stopped: true once the work shall end; the job stays queued then.
        :raises errors.CephError: the cluster does not answer, or cut this client off.
        """
        full: set[str] = set()
        has_worked = False
        for job, task in self._due():
            if stopped():
                break
            if job.step == AT_WORK or job.kind not in full:
                with contextlib.ExitStack() as stack:
                    slot = self._slot(job, stack)
                    if slot is not None:
                        has_worked |= self._work(job, task, *slot, stopped)
                    elif job.step == QUEUED:
                        full.add(job.kind)
        return has_worked

    def _work(self, job: Job, task: Task, slot: int, held: lease.Lease, stopped: Callable[[], bool]) -> bool:
        """Do a job under its lease, if it is as it was when it was read; returns whether it was."""
        taken = self._take(job, slot)
        if taken is not None:
            self._do(task, Current(taken, self._ledger, job.begun), held, stopped)
        return taken is not None

    def _due(self) -> list[tuple[Job, Task]]:
        """The jobs of our cloud, those first that somebody may have left."""
        recorded, cloud, now = self._ledger.read().jobs, self._owner.cloud, self._clock()
        found = [
            (job, task) for task in self._tasks for job in recorded if is_due(job, [task.kind], cloud, now)
        ]
        return sorted(found, key=lambda pair: pair[0].step != AT_WORK)

    def _slot(self, job: Job, stack: contextlib.ExitStack) -> Optional[tuple[int, lease.Lease]]:
        """The lease for the job, held until *stack* ends; None where another has it, or all are taken."""
        numbers = [job.slot] if job.step == AT_WORK else range(self._limit)
        for number in numbers:
            held = lease.held(self._cluster, self._pool, _lease_of(job.kind, number), self._lease_seconds)
            with contextlib.suppress(errors.Busy):
                return number, stack.enter_context(held)
        return None

    def _take(self, job: Job, slot: int) -> Optional[Job]:
        """Make the job ours; None where somebody was faster, or its last client cannot be cut off."""
        try:
            if self._ledger.load(job.id) != job:  # done, or taken, since it was read: nobody is to be cut off for that
                return None
            if job.step == AT_WORK and job.owner.client != self._owner.client:
                LOG.warning(
                    "Job %s (%s) of host %s is taken over: the client %s of its worker is blocklisted for a day",
                    job.id, job.kind, job.owner.host, job.owner.client,
                )
                self._cluster.fence(job.owner.client)
            return self._ledger.advance(job, owner=self._owner, step=AT_WORK, slot=slot, percent=0, begun=True)
        except (errors.LedgerConflict, errors.NoRecord):
            return None
        except errors.MayNotFence as error:
            LOG.warning("Job %s (%s) is left alone: %s", job.id, job.kind, error.report())
            return None

    def _do(self, task: Task, current: Current, held: lease.Lease, stopped: Callable[[], bool]) -> None:
        try:
            task.do(current, lambda: stopped() or held.is_lost())
            end: Callable[[], object] = functools.partial(self._ledger.forget, current.job)
        except errors.Blocklisted:
            raise  # whoever took over goes on
        except errors.Cancelled:
            end = functools.partial(self._ledger.advance, current.job, step=QUEUED)
        except errors.Later as reason:
            end = functools.partial(self._postpone, current.job, reason)
        except Exception as cause:
            end = functools.partial(self._put_off, task, current.job, errors.known(cause))
        with contextlib.suppress(errors.LedgerConflict):  # whoever took over has the say
            end()

    def _postpone(self, job: Job, reason: errors.Later) -> None:
        if job.failures != (reason.report(),):
            LOG.info("Job %s %s", job.id, reason.report())
        not_before = self._clock() + reason.seconds
        self._ledger.advance(job, step=QUEUED, not_before=not_before, failures=(reason.report(),))

    def _put_off(self, task: Task, job: Job, error: errors.SnapError) -> None:
        first, most = _BACK_OFF_SECONDS
        pause = min(first * 2.0 ** min(job.attempts, _DOUBLINGS), most)
        LOG.warning(
            "%s of job %s, which is tried again in %.0f s: %s", task.fails_as, job.id, pause, error.report()
        )
        self._ledger.advance(
            job,
            step=QUEUED,
            attempts=job.attempts + 1,
            not_before=self._clock() + pause,
            failures=(error.report(),),
        )


def is_due(job: Job, kinds: Container[str], cloud: str, now: float) -> bool:
    """Whether a worker of *cloud* may do the job now, if nobody else is at it."""
    return job.kind in kinds and job.owner.cloud == cloud and job.not_before <= now


def is_free(job: Job, cluster: Cluster, pool: str) -> bool:
    """Whether a job that is due may be begun, or taken over: nobody has the lease under which it is at work."""
    if job.step != AT_WORK:
        return True
    name = _lease_of(job.kind, job.slot)
    try:
        cluster.take_lease(pool, name, _ASKED_SECONDS)
    except errors.Busy:
        return False
    cluster.end_lease(pool, name)
    return True


def _lease_of(kind: str, number: int) -> str:
    return f"{LEASE}.{kind}.{number}"


def keep_working(
    is_work_due: Callable[[], bool],
    make: Callable[[], Worker],
    stopped: Callable[[], bool],
    pause: Callable[[], None],
) -> None:
    """Do what there is, again and again until stopped.

    :param make: a worker on a new connection, which lasts only while there is work.
    :param pause: returns when it is worth another look.
    """
    told = ""
    while not stopped():
        try:
            if is_work_due():
                worker = make()
                while not stopped() and worker.work(stopped):
                    told = ""
                del worker
        except Exception as cause:  # the cluster may answer the next time
            text = errors.known(cause).report()
            if text != told:
                LOG.warning("What waits in the ledger is not done now: %s", text)
            told = text
        pause()
