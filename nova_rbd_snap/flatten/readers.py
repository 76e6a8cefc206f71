# SPDX-License-Identifier: Apache-2.0
"""Whether Glance can read an image that is not flat: found out with one that nobody needs.

An image that only Glance's record calls active proves nothing. So a scratch disk is made in Nova's pool and a clone of
it in Glance's, and Glance is asked for the bytes, which only the disk has. While the answer is no, and until somebody
has looked, images in that pool are flattened before they are registered: the job says so, to every engine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import uuid
from typing import Any, Callable, Protocol

from nova_rbd_snap import errors
from nova_rbd_snap.ceph.interface import Cluster
from nova_rbd_snap.janitor.jobs import location
from nova_rbd_snap.ledger.job import BACKGROUND, INLINE, PROBE, QUEUED, Job, Owner, probe_disk, probe_id
from nova_rbd_snap.ledger.store import Ledger
from nova_rbd_snap.snapshot import saga, steps
from nova_rbd_snap.specs import ImageSpec
from nova_rbd_snap.workers.worker import Current

#: How long it is believed that Glance cannot read an image, where it cannot be asked.
_BELIEVED_SECONDS = 3600.0
_STEPS = steps.CLONE_STEPS[2, False]


def _of_clone(job: Job) -> Job:
    """As the steps of a snapshot take it: what the probe says of others it does not say of its own clone."""
    return dataclasses.replace(job, flatten=BACKGROUND)


class ScratchImages(Protocol):
    """Glance, asked with the service's own credentials. Both raise ``GlanceError``."""

    def read(self, image_id: str, url: str) -> bytes:
        """Make an image of the location, and read all of it. :raises errors.NotReadable: it cannot be read."""

    def delete(self, image_id: str) -> None:
        """Delete the image, if there is such a one, and what is at its location."""


def _names(pool: str, glance_pool: str) -> dict[str, Any]:
    """Of the scratch disk, and of its clone: others each time, for Glance takes no id twice."""
    name = str(uuid.uuid4())
    return {"disk": ImageSpec(pool, probe_disk(name)), "dest": ImageSpec(glance_pool, name)}


def queue(ledger: Ledger, pool: str, glance_pool: str, owner: Owner, now: float) -> Job:
    """Have it found out.

    :param now: seconds since the epoch.
    :raises errors.LedgerConflict: somebody has, already.
    """
    return ledger.reserve(
        Job(
            id=probe_id(glance_pool),
            kind=PROBE,
            owner=owner,
            created=now,
            clone_format=2,
            step=QUEUED,
            flatten=BACKGROUND,
            **_names(pool, glance_pool),
        )
    )


def distrust(ledger: Ledger, pool: str, glance_pool: str, owner: Owner, now: float) -> None:
    """As :func:`queue`; until then it is taken for certain that Glance cannot, for it just refused an image."""
    with contextlib.suppress(errors.LedgerConflict):
        queue(ledger, pool, glance_pool, owner, now)
    with contextlib.suppress(errors.LedgerConflict, errors.NoRecord):  # somebody finds out right now
        ledger.advance(ledger.load(probe_id(glance_pool)), flatten=INLINE)


def are_trusted(ledger: Ledger, glance_pool: str) -> bool:
    """Whether Glance may be given images in that pool that are not flat."""
    try:
        return ledger.load(probe_id(glance_pool)).flatten != INLINE
    except errors.NoRecord:
        return True


class Probe:
    """See :class:`nova_rbd_snap.workers.worker.Task`, and the module."""

    kind = PROBE
    fails_as = "Whether Glance can read images that are not flat is not known: the check"

    def __init__(self, cluster: Cluster, glance: ScratchImages, clock: Callable[[], float]) -> None:
        """
        :param clock: seconds since the epoch.
        """
        self._cluster, self._glance, self._clock = cluster, glance, clock

    def do(self, current: Current, stopped: Callable[[], bool]) -> None:
        """Return if Glance can read. :raises errors.NotReadable: it cannot."""
        if current.is_repeated:
            job = current.job
            self._clear(job)
            current.change(snap_id=None, dest_id=None, **_names(job.disk.pool, steps.image_of(job).pool))
        try:
            self._find_out(current)
        except Exception as cause:
            error = errors.known(cause)
            try:
                self._clear(current.job)
            except errors.SnapError as failure:  # the next attempt begins with it
                error.undo_failures.append(str(failure))
            if isinstance(error, errors.NotReadable):
                current.change(flatten=INLINE)
            if not isinstance(error, errors.NotAuthorized) or self._clock() < current.job.created + _BELIEVED_SECONDS:
                raise error from cause.__cause__ if error is cause else cause
        else:
            self._clear(current.job)

    def _find_out(self, current: Current) -> None:
        data, run = uuid.uuid4().bytes * 32, saga.Run(self._cluster)
        self._cluster.create(current.job.disk, data)
        for step in _STEPS:
            current.change(**step.do(_of_clone(current.job), run))
        job = current.job
        if self._glance.read(job.image_id, location(job, run)) != data:
            raise errors.NotReadable(f"Glance reads other bytes than are in {steps.image_of(job)}")

    def _clear(self, job: Job) -> None:
        """Remove all that the job names, as far as it is there."""
        with contextlib.suppress(errors.GlanceError):  # what Glance cannot, or must not, delete goes by our hand
            self._glance.delete(job.image_id)
        failures = saga.undo(_of_clone(job), _STEPS, saga.Run(self._cluster))
        if failures:
            raise errors.CephError("; ".join(f"{step}: {text}" for step, text in failures.items()))
        with contextlib.suppress(errors.Missing):
            self._cluster.remove(job.disk)
