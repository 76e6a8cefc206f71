# SPDX-License-Identifier: Apache-2.0
"""The way 'clone', whoever takes it: the engine makes the clone, Glance takes it, and what fails is undone."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Optional, Protocol

from nova_rbd_snap import errors
from nova_rbd_snap.engine import Report
from nova_rbd_snap.openstack import registration
from nova_rbd_snap.openstack.glance import Glance

LOG = logging.getLogger(__name__)


class Engine(Protocol):
    """An engine: nova-compute's, in a process of its own, or one in this process."""

    def clone(self, image_id: str, disk: str, dest_pool: str, report: Report) -> str: ...
    def finish(self, image_id: str) -> None: ...
    def rollback(self, job_id: str) -> bool: ...


def make(engine: Engine, image_id: str, disk: str, dest_pool: str, report: Report) -> str:
    """Clone *disk* into *dest_pool* as *image_id*; returns the location, which :func:`register` is to be given next.

    :raises errors.SnapError: nothing is left of the attempt but what ``undo_failures`` says.
    """
    try:
        return engine.clone(image_id, disk, dest_pool, report)
    except errors.EngineLost as error:
        undo(engine, image_id, error)
        raise


def register(
    engine: Engine,
    glance: Glance,
    image_id: str,
    url: str,
    properties: Mapping[str, Optional[str]],
    *,
    timeout_seconds: float,
    report: Report,
) -> None:
    """Give the clone to the image's record; returns once the image is active.

    :raises errors.InDoubt: the record may point at the clone, which is kept, and so is its job.
    :raises errors.GlanceError: another of its kind: nothing is left of the clone but what ``undo_failures`` says.
    """
    report("register", 0, 0)
    try:
        registration.register(glance, image_id, url, properties, timeout_seconds=timeout_seconds)
    except errors.InDoubt:
        raise
    except errors.GlanceError as error:
        error.step = "register"
        undo(engine, image_id, error)
        raise
    except Exception as error:
        raise errors.InDoubt(f"registering failed unexpectedly, the data is kept: {error!r}") from error
    report("finish", 0, 0)
    try:
        engine.finish(image_id)
    except errors.SnapError as error:
        # The image is good; what is left is in the ledger.
        LOG.warning("Image %s is active, but its job stays in the ledger: %s", image_id, error.report())


def undo(engine: Engine, job_id: str, error: errors.SnapError) -> None:
    """Roll back what a job did before *error*; what cannot be undone is added to it."""
    try:
        engine.rollback(job_id)
    except errors.SnapError as failure:
        error.undo_failures += failure.undo_failures or [str(failure)]


def give_up(engine: Engine, image_id: str, why: str) -> None:
    """Roll back a clone that nobody wants; what cannot be undone is logged: what led here is what counts."""
    error = errors.SnapError(why)
    undo(engine, image_id, error)
    if error.undo_failures:
        LOG.warning("The clone for image %s is given up: %s", image_id, error.report())
