# SPDX-License-Identifier: Apache-2.0
"""Run a job's steps with the intent of each written to the ledger first, and undo them from the record alone.

The first error is the one the caller gets; what could not be undone rides along and stays in the ledger.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Callable, Protocol

from nova_rbd_snap import errors
from nova_rbd_snap.ceph.interface import Cluster
from nova_rbd_snap.ledger.job import Job
from nova_rbd_snap.ledger.store import Ledger

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What a step works with.

    :ivar report: told the step's name, bytes done and bytes in all, whenever there is progress.
    :ivar cancelled: true once the work shall stop.
    """

    cluster: Cluster
    report: Callable[[str, int, int], None]
    cancelled: Callable[[], bool]


class Step(Protocol):
    """One change in the cluster and its inverse. Steps keep no state: what they learn goes into the record."""

    #: How the step is called in the ledger, the log and the docs.
    name: str

    def do(self, job: Job, run: Run) -> Mapping[str, Any]:
        """Make the change; returns what the record shall remember.

        :raises errors.AlreadyThere: what the step makes exists and is not this job's; :meth:`undo` will not run.
        """

    def undo(self, job: Job, run: Run) -> None:
        """Take the change back, whether it happened, half happened, never happened, or is undone already."""


def perform(job: Job, steps: Sequence[Step], final: str, ledger: Ledger, run: Run) -> Job:
    """Reserve *job* and do *steps* in order; returns the job with *final* as its step under way.

    :param job: with the first step's name as its ``step``.
    :raises errors.SnapError: the first error, with ``step`` and ``undo_failures``; everything was undone that
        could be, and the record is gone unless something is left.
    """
    try:
        ledger.reserve(job)
    except errors.SnapError as refused:
        refused.step = "reserve"
        raise
    following = [step.name for step in steps[1:]] + [final]
    for count, (step, next_name) in enumerate(zip(steps, following), start=1):
        try:
            if run.cancelled():
                raise errors.Cancelled("the snapshot was cancelled")
            run.report(step.name, 0, 0)
            job = ledger.advance(job, step=next_name, **step.do(job, run))
        except Exception as cause:
            error = errors.known(cause)
            error.step = step.name
            happened = count - 1 if isinstance(error, errors.AlreadyThere) else count
            error.undo_failures += undo(job, steps[:happened], ledger, run)
            raise error from cause.__cause__ if error is cause else cause
    return job


def undo(job: Job, steps: Sequence[Step], ledger: Ledger, run: Run) -> list[str]:
    """Undo *steps* in reverse and remove the record, or note in it what is left.

    :returns: what could not be undone, as sentences; empty when nothing of the job is left.
    """
    failures = []
    for step in reversed(steps):
        run.report(f"undo {step.name}", 0, 0)
        try:
            step.undo(job, run)
        except Exception as error:
            failures.append(f"{step.name}: {errors.known(error)}")
    try:
        _close(job, failures, ledger)
    except errors.SnapError as error:
        failures.append(f"ledger: {error}")
    for failure in failures:
        LOG.warning("Job %s: could not undo %s", job.id, failure)
    return failures


def _close(job: Job, failures: Sequence[str], ledger: Ledger) -> None:
    try:
        # Read again: the last write may have been applied although it seemed to fail.
        recorded = ledger.load(job.id)
    except errors.NoRecord:
        if failures:  # somebody else saw nothing left, and removed it
            ledger.reserve(dataclasses.replace(job, failures=tuple(failures)))
        return
    if recorded.owner != job.owner:
        raise errors.LedgerConflict(f"job {job.id} now belongs to {recorded.owner.host}")
    if failures:
        ledger.advance(recorded, failures=tuple(failures))
    else:
        ledger.forget(recorded)
