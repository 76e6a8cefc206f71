# SPDX-License-Identifier: Apache-2.0
"""What the ways ask of the engine and of Glance, whoever takes them; what fails is undone."""

from __future__ import annotations

import functools
import logging
from typing import Callable, Optional, Protocol

from nova_rbd_snap import errors
from nova_rbd_snap.engine import Report
from nova_rbd_snap.openstack import registration
from nova_rbd_snap.openstack.glance import Glance

LOG = logging.getLogger(__name__)


class Engine(Protocol):
    """An engine: nova-compute's, in a process of its own, or one in this process."""

    def reserve_clone(self, image_id: str, disk: str, dest_pool: str, flatten: Optional[str] = None) -> str: ...
    def reserve_copy(self, image_id: str, disk: str, store: str) -> str: ...
    def reserve_freeze(self, job_id: str, disk: str) -> str: ...
    def perform(self, job_id: str, snap_before: Optional[float], report: Report) -> None: ...
    def make_flat(self, image_id: str, report: Report) -> bool: ...
    def distrust(self, image_id: str) -> None: ...
    def finish(self, image_id: str) -> None: ...
    def rollback(self, job_id: str) -> bool: ...
    def leave(self, job_id: str) -> None: ...


#: Does a reserved job, told its id: as a rule ``engine.perform``, with what is to be done about the guest around it.
Perform = Callable[[str], None]


def make(
    engine: Engine, image_id: str, disk: str, dest_pool: str, perform: Perform, *, flatten: Optional[str] = None
) -> str:
    """Clone *disk* into *dest_pool* as *image_id*; returns the location, which :func:`register` is to be given next.

    :param flatten: as the engine's ``reserve_clone`` takes it.
    :raises errors.SnapError: nothing is left of the attempt but what ``undo_failures`` says.
    """
    return _take(engine, image_id, lambda: engine.reserve_clone(image_id, disk, dest_pool, flatten), perform)


def copy(engine: Engine, image_id: str, disk: str, store: str, perform: Perform) -> str:
    """As :func:`make`, but copy it into a store of Glance's, by its name."""
    return _take(engine, image_id, lambda: engine.reserve_copy(image_id, disk, store), perform)


def freeze(engine: Engine, job_id: str, disk: str, perform: Perform) -> str:
    """Take a snapshot of *disk* for a full copy to read; returns its name. ``engine.rollback`` removes it.

    :raises errors.SnapError: as :func:`make`.
    """
    return _take(engine, job_id, lambda: engine.reserve_freeze(job_id, disk), perform)


def _take(engine: Engine, job_id: str, reserve: Callable[[], str], perform: Perform) -> str:
    try:
        result = reserve()
    except errors.EngineLost as error:
        undo(engine, job_id, error)
        raise
    try:
        perform(job_id)
    except Exception as cause:
        # The engine undoes its own failures, and then knows no such job; but not what went wrong around its work.
        if isinstance(cause, errors.SnapError):
            undo(engine, job_id, cause)
        else:
            give_up(engine, job_id, f"job {job_id}: {cause}")
        raise
    return result


def register(
    engine: Engine,
    glance: Glance,
    image_id: str,
    url: str,
    prepare: Callable[[], None],
    *,
    timeout_seconds: float,
    report: Report,
) -> None:
    """Give the clone to the image's record; returns once the image is active.

    :param prepare: as :func:`registration.register` takes it.
    :raises errors.InDoubt: the record may point at the clone, which is kept, and so is its job.
    :raises errors.SnapError: nothing is left of the clone but what ``undo_failures`` says.
    """
    report("register", 0, 0)
    send = functools.partial(registration.register, glance, image_id, url, prepare, timeout_seconds=timeout_seconds)
    try:
        try:
            send()
        except errors.NotRegistered as refusal:
            # What it says with another number is not about the data.
            if (refusal.status or 500) < 500 or not _make_flat(engine, image_id, refusal, report):
                raise
            send()
            _distrust(engine, image_id)
    except errors.InDoubt:
        _leave(engine, image_id)
        raise
    except errors.SnapError as error:
        error.step = error.step or "register"
        undo(engine, image_id, error)
        raise
    except Exception as error:
        _leave(engine, image_id)
        raise errors.InDoubt(f"registering failed unexpectedly, the data is kept: {error!r}") from error
    report("finish", 0, 0)
    try:
        engine.finish(image_id)
    except errors.SnapError as error:
        # The image is good; what is left is in the ledger.
        LOG.warning("Image %s is active, but its job stays in the ledger: %s", image_id, error.report())


def _make_flat(engine: Engine, image_id: str, refusal: errors.NotRegistered, report: Report) -> bool:
    """Whether an image that Glance refused was not flat, which may be why, and is now."""
    try:
        was_shared = engine.make_flat(image_id, report)
    except errors.SnapError as error:  # what is in the way of the image is what Glance said
        LOG.warning("Image %s cannot be flattened at once: %s", image_id, error.report())
        return False
    if was_shared:
        LOG.info("Image %s was not flat, which may be why Glance refused it; it is sent again: %s", image_id, refusal)
    return was_shared


def _distrust(engine: Engine, image_id: str) -> None:
    try:
        engine.distrust(image_id)
    except errors.SnapError as error:  # then the next image tells it again
        LOG.warning("That Glance cannot read what is not flat is not written down: %s", error.report())


def _leave(engine: Engine, image_id: str) -> None:
    try:
        engine.leave(image_id)
    except errors.SnapError as error:
        LOG.warning("Image %s may stay in doubt until nova-compute ends: %s", image_id, error.report())


def undo(engine: Engine, job_id: str, error: errors.SnapError) -> None:
    """Roll back what a job did before *error*; what cannot be undone is added to it."""
    try:
        engine.rollback(job_id)
    except errors.SnapError as failure:
        error.undo_failures += failure.undo_failures or [str(failure)]


def give_up(engine: Engine, job_id: str, why: str) -> None:
    """Roll back a job that nobody wants; what cannot be undone is logged: what led here is what counts."""
    error = errors.SnapError(why)
    undo(engine, job_id, error)
    if error.undo_failures:
        LOG.warning("Job %s is given up: %s", job_id, error.report())
