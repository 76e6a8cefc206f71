# SPDX-License-Identifier: Apache-2.0
"""Run a job's steps with the intent of each written to the ledger first, and undo them from the record alone.

The first error is the one the caller gets; what could not be undone rides along and stays in the ledger.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Callable, Optional, Protocol

from nova_rbd_snap import errors
from nova_rbd_snap.ceph.interface import Cluster
from nova_rbd_snap.copy.limits import Limits
from nova_rbd_snap.engine import Report, unheard
from nova_rbd_snap.ledger.job import Job
from nova_rbd_snap.ledger.store import Ledger

LOG = logging.getLogger(__name__)

#: Name of the state in which all is undone, but for the Glance record of a request that died: it still waits for data.
RECORD = "record"


@dataclass(frozen=True)
class Run:
    """What a step works with.

    :ivar to_store: of a copy, connects to the cluster of its store.
    :ivar limits: of what is copied.
    :ivar note: writes down how many percent of a long step are done.
    :ivar report: told the step's name, bytes done and bytes in all, whenever there is progress.
    :ivar cancelled: true once the work shall stop.
    :ivar orphaned: true once the nova-compute that asked for the image is no more.
    :ivar too_late: true once a snapshot is of no use any more: the guest was quiesced for it, and is so no longer.
    """

    cluster: Cluster
    report: Report = unheard
    cancelled: Callable[[], bool] = lambda: False
    orphaned: Callable[[], bool] = lambda: False
    too_late: Callable[[], bool] = lambda: False
    to_store: Optional[Callable[[], Cluster]] = None
    limits: Limits = field(default_factory=Limits)
    note: Callable[[int], None] = lambda percent: None

    @property
    def dest(self) -> Cluster:
        """The cluster that the job's image is in."""
        return self.cluster if self.to_store is None else self.to_store()

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
    """Do *steps* in order; returns the job with *final* as its step under way.

    :param job: reserved, with the first step's name as its ``step``.
    :raises errors.SnapError: the first error, with ``step`` and ``undo_failures``; everything was undone that
        could be, and the record is gone unless something is left.
    """
    following = [step.name for step in steps[1:]] + [final]
    with contextlib.ExitStack() as opened:
        if job.dest is not None:
            opened.enter_context(run.dest.keep_open(job.dest))
        return _perform(job, list(zip(steps, following)), ledger, run, opened)


def _perform(
    job: Job, steps: Sequence[tuple[Step, str]], ledger: Ledger, run: Run, opened: contextlib.ExitStack
) -> Job:
    """
    :param steps: each with the name of the one that follows.
    :param opened: what is closed before anything is undone, for it is in the way.
    """

    def note(percent: int) -> None:
        nonlocal job
        job = ledger.advance(job, percent=percent)

    noting = dataclasses.replace(run, note=note)
    for count, (step, next_name) in enumerate(steps, start=1):
        try:
            if run.cancelled():
                raise errors.Cancelled("the snapshot was cancelled")
            run.report(step.name, 0, 0)
            learnt = step.do(job, noting)
            job = ledger.advance(job, step=next_name, **learnt)
        except Exception as cause:
            error = errors.known(cause)
            error.step = step.name
            happened = count - 1 if isinstance(error, errors.AlreadyThere) else count
            opened.close()
            failures = undo(job, [done for done, _ in steps[:happened]], run)
            if not failures and run.orphaned():
                failures = {RECORD: f"image {job.image_id} may wait for ever for its data"}
            error.undo_failures += close(job, failures, ledger)
            raise error from cause.__cause__ if error is cause else cause
    return job


def undo(job: Job, steps: Sequence[Step], run: Run) -> dict[str, str]:
    """Undo *steps* in reverse. :returns: the steps that could not be undone, with what was in the way."""
    failures = {}
    for step in reversed(steps):
        run.report(f"undo {step.name}", 0, 0)
        try:
            step.undo(job, run)
        except Exception as error:
            failures[step.name] = str(errors.known(error))
    return failures


def close(job: Job, failures: Mapping[str, str], ledger: Ledger) -> list[str]:
    """Remove the record, or note in it what is left and from which step on it is to be undone again.

    What was undone is not looked for a second time: somebody else may have made something of the same name by then.

    :param failures: as :func:`undo` returns them.
    :returns: what is left, as sentences.
    """
    sentences = [f"{step}: {text}" for step, text in failures.items()]
    try:
        _close(job, next(iter(failures), job.step), sentences, ledger)
    except Exception as error:  # lest it hide what led here
        sentences.append(f"ledger: {errors.known(error)}")
    if tuple(sentences) != job.failures and list(failures) != [RECORD]:
        for sentence in sentences:
            LOG.warning("Job %s: could not undo %s", job.id, sentence)
    return sentences


def _close(job: Job, step: str, failures: Sequence[str], ledger: Ledger) -> None:
    try:
        # Read again: the last write may have been applied although it seemed to fail.
        recorded = ledger.load(job.id)
    except errors.NoRecord:
        if failures:  # somebody else saw nothing left, and removed it
            ledger.reserve(dataclasses.replace(job, step=step, failures=tuple(failures)))
        return
    if recorded.owner != job.owner:
        raise errors.LedgerConflict(f"job {job.id} now belongs to {recorded.owner.host}")
    if not failures:
        ledger.forget(recorded)
    elif (recorded.step, recorded.failures) != (step, tuple(failures)):
        ledger.advance(recorded, step=step, failures=tuple(failures))
