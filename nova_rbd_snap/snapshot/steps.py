# SPDX-License-Identifier: Apache-2.0
"""The steps of a clone, of a copy in a store of Glance's, and of a freeze.

Order matters for speed: creating a snapshot waits for a proposal of the monitors, and so does removing one. Two are
the least that stand between the tenant and the image (``docs/design/clone.rst`` has the orders that were measured).
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Optional

import tenacity

from nova_rbd_snap import errors
from nova_rbd_snap.ceph.interface import Cluster, SnapInfo
from nova_rbd_snap.copy.extents import Sink
from nova_rbd_snap.copy.progress import Progress
from nova_rbd_snap.copy.transfer import transfer
from nova_rbd_snap.ledger.job import BACKGROUND_KINDS, CLONE, COPY, FREEZE, INLINE, Job
from nova_rbd_snap.snapshot.saga import RECORD, Run, Step
from nova_rbd_snap.specs import GLANCE_SNAP, ImageSpec, SnapSpec

LOG = logging.getLogger(__name__)

#: Name of the point after the last step: the image awaits its registration with Glance, or the frozen snapshot its
#: reader. What follows is not the saga's to decide.
READY = "ready"

#: A client that died keeps its watch, and so the rbd image, for 30 s (Ceph: osd_client_watch_timeout).
_DEAD_WATCH_SECONDS = 40

_when_free = tenacity.Retrying(
    retry=tenacity.retry_if_exception_type(errors.Busy) & tenacity.retry_if_not_exception_type(errors.HasSnapshots),
    wait=tenacity.wait_exponential(multiplier=0.2, max=2),
    stop=tenacity.stop_after_delay(_DEAD_WATCH_SECONDS),
    reraise=True,
)


def when_free(run: Run, doing: str, change: Callable[[ImageSpec], None], image: ImageSpec) -> None:
    """Make *change*, repeated while somebody has the rbd image open, for as long as that may be a dead client."""
    _when_free.copy(before_sleep=lambda state: run.report(doing, 0, 0))(change, image)


def image_of(job: Job) -> ImageSpec:
    """The rbd image that the job makes, or flattens."""
    if job.dest is None:
        raise errors.LedgerError(f"job {job.id} has no destination")
    return job.dest


@contextlib.contextmanager
def of_store(store: Optional[str]) -> Iterator[None]:
    """Within the block it is the cluster of that store of Glance's that does not answer, if one does not.

    :param store: None where it is the disk's own.
    """
    try:
        yield
    except errors.Unreachable as error:
        if store is None or isinstance(error, errors.StoreSilent):
            raise
        raise errors.StoreSilent(f"store {store!r} of Glance's: {error}") from error


class _InStore:
    """See :class:`nova_rbd_snap.copy.extents.Sink`."""

    def __init__(self, store: Optional[str], sink: Sink) -> None:
        self._store, self._sink = store, sink

    def write(self, offset: int, data: bytes) -> None:
        with of_store(self._store):
            self._sink.write(offset, data)


class Snap:
    """Freeze the disk: the instant the image will show."""

    name = "snap"

    def do(self, job: Job, run: Run) -> Mapping[str, Any]:
        snap_id = run.cluster.create_snap(job.snap)
        if run.too_late():
            raise errors.NotQuiesced(f"snapshot {job.snap} came after the guest's file systems had to be let go")
        return {"snap_id": snap_id}

    def undo(self, job: Job, run: Run) -> None:
        remove_frozen(job, run)


class Protect:
    """Make the frozen snapshot cloneable in format 1."""

    name = "protect"

    def do(self, job: Job, run: Run) -> Mapping[str, Any]:
        run.cluster.protect_snap(job.snap)
        return {}

    def undo(self, job: Job, run: Run) -> None:
        """Nothing: undoing :class:`Snap` removes the snapshot, protected or not."""


class Making:
    """A step that makes the future Glance image, under whose name there was none just before."""

    name: str

    def do(self, job: Job, run: Run) -> Mapping[str, Any]:
        dest = image_of(job)
        with of_store(job.store):
            if run.dest.exists(dest):
                raise errors.AlreadyThere(f"{dest} exists already and is left alone")
        return {"dest_id": self._make(job, run)}

    def _make(self, job: Job, run: Run) -> str:
        """Make it; returns its id."""
        raise NotImplementedError

    def undo(self, job: Job, run: Run) -> None:
        doing = f"undo {self.name}"

        def remove(dest: ImageSpec) -> None:
            if run.dest.exists(dest):
                if not self._is_ours(job, run):
                    raise errors.CephError(f"left {dest} alone: it is not the {self.name} of {job.snap}")
            elif dest.name not in run.dest.images(dest.pool):
                return
            # A name that is free but listed: somebody died while removing it, and librbd goes on from there.
            run.dest.remove(dest, functools.partial(run.report, doing))

        with contextlib.suppress(errors.Missing):
            when_free(run, doing, remove, image_of(job))

    @staticmethod
    def _is_ours(job: Job, run: Run) -> bool:
        """Whether the rbd image under the clone's name is what this job made, whole or half.

        The name was free just before. A half-made clone cannot be opened, or has neither parent nor
        snapshots (``docs/design/ceph.rst``); an id is known once ``clone`` returned.
        """
        dest = image_of(job)
        try:
            info = run.dest.lookup(dest)
        except errors.Missing:
            return True
        if job.dest_id is not None:
            return info.id == job.dest_id
        return is_unfinished(job, run) if info.parent is not None else not run.dest.snaps(dest)


class Clone(Making):
    """Make the future Glance image a copy-on-write child of the frozen snapshot."""

    name = "clone"

    def _make(self, job: Job, run: Run) -> str:
        # Flat before anybody reads it, or else to be flattened while somebody does.
        is_flat_soon = job.flatten == INLINE
        return run.dest.clone(job.snap, image_of(job), job.data_pool, object_map=is_flat_soon)


class Create(Making):
    """Make the future Glance image, blank, in a store of Glance's."""

    name = "create"

    def _make(self, job: Job, run: Run) -> str:
        with run.cluster.open_snap(job.snap) as source:
            size = source.size
        with of_store(job.store):
            return run.dest.create_blank(image_of(job), size, job.data_pool)


class Fill:
    """Copy what is allocated of the frozen disk to the image."""

    name = "copy"

    def do(self, job: Job, run: Run) -> Mapping[str, Any]:
        progress = Progress(f"Copying {job.snap} to {image_of(job)} in store {job.store!r}", run.note)

        def on_progress(done: int, total: int) -> bool:
            run.report(self.name, done, total)
            progress.moved(done, total)
            return not run.cancelled()

        def listing(done: int, total: int) -> bool:
            return on_progress(0, total)

        with contextlib.ExitStack() as opened:
            source = opened.enter_context(run.cluster.open_snap(job.snap))
            with of_store(job.store):
                sink = opened.enter_context(run.dest.open_blank(image_of(job)))
            transfer(source, _InStore(job.store, sink), source.extents(listing), on_progress, run.limits)
        return {}

    def undo(self, job: Job, run: Run) -> None:
        """Nothing: undoing :class:`Create` removes the image."""


class Flatten:
    """Copy what the clone still shares with the disk, and cut the link."""

    name = "flatten"

    def do(self, job: Job, run: Run) -> Mapping[str, Any]:
        def on_progress(done: int, total: int) -> bool:
            run.report(self.name, done, total)
            return not run.cancelled()

        dest = image_of(job)
        info = run.cluster.flatten(dest, on_progress)
        # "No parent" alone proves nothing of a half-made clone; of this very id the link was seen.
        if info.id != job.dest_id or info.parent is not None or not info.deep_flatten:
            raise errors.CephError(f"{dest} is not the flattened clone of {job.snap}: {info}")
        return {}

    def undo(self, job: Job, run: Run) -> None:
        """Nothing: undoing :class:`Clone` removes the copy."""


class Seal:
    """Give the clone the protected snapshot that Glance's location names, and take the frozen one off the disk.

    Side by side, for both wait for a proposal of the monitors, and it is the same one. The frozen snapshot of a clone
    that is not flat stays: its readers need it, and some of them a while longer (``docs/design/flatten.rst``).
    """

    name = "seal"

    def do(self, job: Job, run: Run) -> Mapping[str, Any]:
        if job.flatten == INLINE:
            self._seal_and_release(job, run)
        else:
            self._seal(job, run)
        return {}

    @staticmethod
    def _seal(job: Job, run: Run) -> None:
        snap = image_of(job).snap(GLANCE_SNAP)
        with of_store(job.store):
            run.dest.create_snap(snap)
            run.dest.protect_snap(snap)

    def _seal_and_release(self, job: Job, run: Run) -> None:
        with ThreadPoolExecutor(max_workers=1) as beside:
            removed = beside.submit(_release, job, run)
            self._seal(job, run)
        try:
            removed.result()
        except errors.HolderSilent as error:  # it goes when the job does, and the image is good without
            LOG.warning("Job %s: the snapshot of the disk is removed later: %s", job.id, error)

    def undo(self, job: Job, run: Run) -> None:
        dest = image_of(job)
        try:
            if run.dest.lookup(dest).id != job.dest_id:
                return  # not ours; undoing what made it reports that
            snaps = run.dest.snaps(dest)
        except errors.Missing:
            return
        for snap in snaps:
            if snap.name == GLANCE_SNAP:
                remove_snap(dest.snap(GLANCE_SNAP), snap, run.dest)


def is_unfinished(job: Job, run: Run) -> bool:
    """Whether the rbd image under the clone's name is a child of the job's own snapshot, and no image yet.

    No other can be such a child; but what is registered before it is flat is one, too. A copy is told by its id.
    """
    dest = image_of(job)
    if job.kind == COPY:
        with contextlib.suppress(errors.Missing):
            return job.step != READY and run.dest.lookup(dest).id == job.dest_id
        return False
    if job.flatten != INLINE and job.step == READY:
        return False
    try:
        if run.cluster.lookup(dest).parent == job.snap:
            return True
        # In the trash, where an undo that could not remove the clone left it, the snapshot has another name.
        return any(dest in run.cluster.children(job.disk, snap.id) for snap in frozen(job, run) if snap.trashed)
    except errors.Missing:
        return False


def _release(job: Job, run: Run) -> None:
    """Remove the snapshot of the disk that this saga took; it is not looked for first, for the seal waits meanwhile.

    :raises errors.HolderSilent: the guest may be frozen, and would lose its disk.
    """
    with run.cluster.keep_open(job.disk):
        with contextlib.suppress(errors.Missing):  # gone meanwhile
            run.cluster.ask_holder(job.disk)
            if job.clone_format == 1:
                run.cluster.unprotect_snap(job.snap)
            run.cluster.remove_snap(job.snap)
        _see_gone(job, run)


def remove_frozen(job: Job, run: Run) -> None:
    """Remove the snapshot of the disk, as far as there is one, and it waits for no clone.

    :raises errors.HolderSilent: the guest may be frozen, and would lose its disk.
    """
    found = frozen(job, run)
    if not found:
        return
    run.cluster.ask_holder(job.disk)
    for snap in found:
        # In the trash it waits for its clone, where that is not flat yet.
        with contextlib.suppress(errors.Busy) if snap.trashed and job.flatten != INLINE else contextlib.nullcontext():
            remove_snap(job.snap, snap, run.cluster)
    _see_gone(job, run)


def _see_gone(job: Job, run: Run) -> None:
    """"Not found" from a removal proves nothing."""
    if any(job.flatten == INLINE or not snap.trashed for snap in frozen(job, run)):
        raise errors.CephError(f"{job.snap} was removed, but is still there")


def frozen(job: Job, run: Run) -> list[SnapInfo]:
    """The job's snapshot of the disk, as far as there is one; none is left of a disk that was deleted."""
    if not run.cluster.exists(job.disk):
        return []
    snaps = run.cluster.snaps(job.disk)
    return [snap for snap in snaps if snap.name == job.snap.name and job.snap_id in (snap.id, None)]


def remove_snap(spec: SnapSpec, snap: SnapInfo, cluster: Cluster) -> None:
    """Remove the snapshot *snap*, called *spec*, trashed or not, protected or not."""
    try:
        if snap.protected:
            cluster.unprotect_snap(spec)
        cluster.remove_snap_by_id(spec.image, snap.id)
    except errors.Missing:
        return  # gone meanwhile


#: Those of a clone, by format, and whether it is flattened before it is an image.
CLONE_STEPS: dict[tuple[int, bool], Sequence[Step]] = {
    (2, True): (Snap(), Clone(), Flatten(), Seal()),
    (1, True): (Snap(), Protect(), Clone(), Flatten(), Seal()),
    (2, False): (Snap(), Clone(), Seal()),
}


#: Those of a copy in a store of Glance's.
COPY_STEPS: Sequence[Step] = (Snap(), Create(), Fill(), Seal())


def sequence(job: Job) -> Sequence[Step]:
    """The steps of *job*, in order; :data:`READY` follows the last."""
    if job.kind == FREEZE:
        return (Snap(),)
    if job.kind == COPY:
        return COPY_STEPS
    return CLONE_STEPS[job.clone_format, job.flatten == INLINE]


def lets_go(job: Job) -> bool:
    """Whether the job needs the disk no more, and nothing of it is there but what goes by itself."""
    return job.step == RECORD or job.kind in BACKGROUND_KINDS or (job.kind in (CLONE, COPY) and job.step == READY)


def started(job: Job) -> Sequence[Step]:
    """The steps of *job* that may have happened, judged by its record.

    :raises errors.LedgerError: the record names no step of such a job.
    """
    steps = sequence(job)
    names = [step.name for step in steps]
    if job.step not in (*names, READY, RECORD):
        raise errors.LedgerError(f"job {job.id} is at {job.step!r}, which is no step of a {job.kind}")
    if job.step in names:
        return steps[: names.index(job.step) + 1]
    return steps if job.step == READY else ()
