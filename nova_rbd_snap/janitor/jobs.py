# SPDX-License-Identifier: Apache-2.0
"""Finish or undo a job whose request is over, as far as it can be known what became of it.

An rbd image is removed only where Glance's record was read and does not use it, or where the image itself proves to be
an unfinished clone of this very job; all else stays in the ledger, with the reason.
"""

from __future__ import annotations

import functools
import itertools
from typing import Callable, Optional, Protocol

from nova_rbd_snap import errors
from nova_rbd_snap.flatten.queue import queue
from nova_rbd_snap.ledger.job import BACKGROUND, NEVER, Job
from nova_rbd_snap.ledger.store import Ledger
from nova_rbd_snap.snapshot import saga, steps
from nova_rbd_snap.specs import GLANCE_SNAP, Location

#: Whether Glance's record of an image points at a location, or None where that cannot be known, or not yet.
Ask = Callable[[str, str], Optional[bool]]

_DELETE = "delete it if it does"


class Images(Protocol):
    """Glance, asked with the service's own credentials; see :data:`Ask`."""

    def uses(self, image_id: str, url: str) -> Optional[bool]:
        """As the record is; None, too, while it waits for data."""

    def settle(self, image_id: str, url: str, server: str) -> Optional[bool]:
        """As nobody else will change it any more: that of a snapshot of *server* is deleted if it waits for data."""


def location(job: Job, run: saga.Run) -> str:
    """The URL under which Glance would know the job's image; empty for a job that makes none."""
    return Location(run.dest.fsid(), job.dest.snap(GLANCE_SNAP)).url if job.dest else ""


class Unasked:
    """Glance where it is not to be waited for; see :class:`Images`."""

    def uses(self, image_id: str, url: str) -> Optional[bool]:
        return None

    def settle(self, image_id: str, url: str, server: str) -> Optional[bool]:
        return None


def finish(job: Job, ledger: Ledger, run: saga.Run) -> None:
    """End a job whose rbd image, or one in its place, is in use: that stays, and what was made before it goes.

    While it is not flat the disk's snapshot stays with it. One that is to be flattened in the background becomes the
    job to do that.

    :raises errors.SnapError: as :func:`undo`.
    """
    if job.step == steps.READY and job.flatten == BACKGROUND:
        queue(job, ledger)
        return
    if job.step == steps.READY and job.flatten == NEVER:
        ledger.forget(job)
        return
    before_clone = itertools.takewhile(lambda step: not isinstance(step, steps.Making), steps.started(job))
    _close(job, saga.undo(job, tuple(before_clone), run), ledger)


def conclude(job: Job, ledger: Ledger, run: saga.Run, images: Images) -> None:
    """End a job that nobody has the say about any more.

    The image record of an orphaned one goes with it: nobody else would ever delete that.

    :raises errors.InDoubt: something may be in use, or come to be, or could not be asked about; it is kept.
    :raises errors.SnapError: as :func:`undo`.
    """
    settle = functools.partial(images.settle, server=job.server)
    ask = functools.cache(settle if job.orphaned else images.uses)
    if _is_in_use(job, run, ask):
        finish(job, ledger, run)  # of a job that never was ready it is somebody else's: as a rule Nova's own copy
        return
    if not job.orphaned:
        undo(job, ledger, run)
        return
    failures = saga.undo(job, steps.started(job), run)
    if not failures:
        answer, why = _ask_about(job, run, ask)
        if answer is None:
            failures[saga.RECORD] = f"image {job.image_id} may wait for ever for its data; {why or _DELETE}"
    _close(job, failures, ledger)


def undo(job: Job, ledger: Ledger, run: saga.Run) -> None:
    """Undo all of a job. Never call it where Glance may use the image.

    :raises errors.SnapError: something could not be undone; the record says what.
    """
    if job.step == steps.READY:
        # Whoever comes next shall not ask again whether it is in use: that is decided.
        job = ledger.advance(job, step=steps.sequence(job)[-1].name)
    _close(job, saga.undo(job, steps.started(job), run), ledger)


def _close(job: Job, failures: dict[str, str], ledger: Ledger) -> None:
    sentences = saga.close(job, failures, ledger)
    if sentences:
        kind = errors.InDoubt if list(failures) == [saga.RECORD] else errors.SnapError
        error = kind(f"job {job.id} could not be undone")
        error.undo_failures = sentences
        raise error


def _is_in_use(job: Job, run: saga.Run, ask: Ask) -> bool:
    """Whether Glance uses the rbd image under the clone's name.

    :raises errors.InDoubt: that cannot be known.
    """
    steps_started = steps.started(job)
    if job.dest is None or not any(isinstance(step, steps.Making) for step in steps_started):
        return False
    if not run.dest.exists(job.dest):
        return False
    answer, why = _ask_about(job, run, ask)
    if answer is None and not steps.is_unfinished(job, run):
        raise errors.InDoubt(f"image {job.id} uses {job.dest}, or may come to, so it is kept{why and ': '}{why}")
    return bool(answer)


def _ask_about(job: Job, run: saga.Run, ask: Ask) -> tuple[Optional[bool], str]:
    """Glance's word, and why there is none if it cannot be asked."""
    try:
        return ask(job.image_id, location(job, run)), ""
    except errors.GlanceError as error:
        return None, error.report()
