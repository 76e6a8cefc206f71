# SPDX-License-Identifier: Apache-2.0
"""Who copies: this client, or the Ceph manager on its word."""

from __future__ import annotations

import contextlib
import time
from typing import Callable, Optional, Protocol

from nova_rbd_snap import errors
from nova_rbd_snap.ceph.interface import Cluster, FlattenTask
from nova_rbd_snap.copy.extents import OnProgress
from nova_rbd_snap.specs import ImageSpec
from nova_rbd_snap.workers.worker import Current

#: The means by the names that the options give them.
NAMES = WORKER, MANAGER = "worker", "manager"

#: Seconds between two looks at what the manager does, and how long it may take to stop.
_LOOK_SECONDS = 1.0
_STOP_SECONDS = 30.0


class Means(Protocol):
    """A way to flatten."""

    def begin(self, current: Current, image: ImageSpec, make_ready: Callable[[], None]) -> None:
        """Begin; *make_ready* is called first, unless somebody copies already, and would be disturbed."""

    def flatten(self, image: ImageSpec, on_progress: OnProgress) -> None:
        """As :meth:`Cluster.flatten`, once it was begun."""

    def see_ended(self, image: ImageSpec) -> None:
        """:raises errors.Busy: somebody may still copy, though :meth:`flatten` has ended."""


class ByWorker:
    """This client copies."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def begin(self, current: Current, image: ImageSpec, make_ready: Callable[[], None]) -> None:
        make_ready()

    def flatten(self, image: ImageSpec, on_progress: OnProgress) -> None:
        self._cluster.flatten(image, on_progress)

    def see_ended(self, image: ImageSpec) -> None:
        """Nobody does: it has ended, or its client was cut off."""


class ByManager:
    """The manager copies, one rbd image of the whole cluster after the other, and this client watches it.

    Its queue is everybody's: what this job did not put there is waited for, and never cancelled.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._ours: Optional[str] = None

    def begin(self, current: Current, image: ImageSpec, make_ready: Callable[[], None]) -> None:
        task = self._cluster.flatten_task(image)
        if task is None:
            make_ready()
            task = self._cluster.queue_flatten(image)
            current.change(task=task.id)
        self._ours = current.job.task

    def flatten(self, image: ImageSpec, on_progress: OnProgress) -> None:
        size_bytes = self._cluster.lookup(image).size_bytes
        while (task := self._cluster.flatten_task(image)) is not None:
            if task.failure:
                self._cancel(task)
                raise errors.CephError(f"the Ceph manager cannot flatten {image}: {task.failure}")
            if not on_progress(int(task.done * size_bytes), size_bytes):
                self._cancel(task)
                raise errors.Cancelled(f"the flatten of {image} was cancelled")
            time.sleep(_LOOK_SECONDS)
        with contextlib.suppress(errors.Missing):  # deleted meanwhile
            if self._cluster.lookup(image).parent is not None:
                raise errors.CephError(f"the Ceph manager gave the flatten of {image} up; its log says why")

    def _cancel(self, task: FlattenTask) -> None:
        if task.id == self._ours:
            with contextlib.suppress(errors.Missing):
                self._cluster.cancel_task(task.id)

    def see_ended(self, image: ImageSpec) -> None:
        deadline = time.monotonic() + _STOP_SECONDS
        while (task := self._cluster.flatten_task(image)) is not None:
            if task.id != self._ours or time.monotonic() >= deadline:
                raise errors.Busy(f"task {task.id} of the Ceph manager, which flattens {image}, does not end")
            time.sleep(_LOOK_SECONDS)


def of(name: str, cluster: Cluster) -> Means:
    """The means called *name*."""
    makers: dict[str, Callable[[Cluster], Means]] = {WORKER: ByWorker, MANAGER: ByManager}
    return makers[name](cluster)
