# SPDX-License-Identifier: Apache-2.0
"""Remove the disks of a server that is being deleted.

What nobody needs is removed with them: our snapshots, whoever's job they were, and those that stock Nova leaves behind.
A disk that images depend on goes to the trash, and from there with the last of them; one of an image that is being
flattened as well, with its snapshot as it is. What somebody else needs keeps the disk, and is told.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Callable

from nova_rbd_snap import errors
from nova_rbd_snap.ceph.interface import SnapInfo
from nova_rbd_snap.ledger.job import SNAP_PREFIX
from nova_rbd_snap.snapshot import steps
from nova_rbd_snap.snapshot.saga import Run
from nova_rbd_snap.specs import ImageSpec

#: What stock Nova calls a disk's snapshot (32 hex digits, LibvirtDriver.snapshot) and leaks on nearly every fault; and
#: the one of a resize (rbd_utils.RESIZE_SNAPSHOT_NAME), which Nova, too, removes with the disk.
STOCK_SNAP = re.compile(r"[0-9a-f]{32}")
_RESIZE_SNAP = "nova-resize"


#: Gets rid of a disk; returns what is left of it and why, as sentences. The snapshots that it has are trashed, for
#: images that depend on it, or are to be kept.
Discard = Callable[[ImageSpec, Sequence[SnapInfo]], Iterable[str]]


def remove_all(
    pool: str,
    server: str,
    run: Run,
    discard: Discard,
    *,
    at_work: Container[str] = (),
    kept: Container[str] = (),
) -> list[str]:
    """Remove every disk of the server; returns what is left of them and why, as sentences.

    :param server: uuid, which the names of its disks, and of no other's, begin with.
    :param at_work: ids of the jobs that will let go of their disks.
    :param kept: names of the snapshots that are to be kept, for flattens.
    :raises errors.Unreachable: the cluster does not answer; it can be tried again.
    :raises errors.StillAtWork: a job of ours needs a disk; it can be tried again.
    """
    left: list[str] = []
    for name in run.cluster.images(pool):
        if name.startswith(f"{server}_"):
            try:
                left += _remove(ImageSpec(pool, name), run, discard, at_work, kept)
            except errors.Missing:
                continue  # somebody else removed it
            except (errors.Unreachable, errors.StillAtWork):
                raise  # else nobody would ever remove what is left
            except errors.SnapError as error:
                left.append(f"{pool}/{name} stays: {error.report()}")
    return left


def _remove(
    disk: ImageSpec, run: Run, discard: Discard, at_work: Container[str], kept: Container[str]
) -> Iterator[str]:
    run.report(f"remove {disk.name}", 0, 0)
    snaps = [snap for snap in _snaps(disk, run) if snap.trashed or snap.name not in kept]
    holders = [text for snap in snaps for text in _free(disk, snap, run, at_work)]
    if holders:
        yield f"{disk} stays until these are removed: {', '.join(holders)}"
    else:
        yield from discard(disk, _snaps(disk, run))


def remove_now(run: Run, trash: Callable[[ImageSpec], object], disk: ImageSpec) -> Iterator[str]:
    """Remove a disk, as soon as nobody has it open; with images that depend on it librbd moves it to the trash.

    :param trash: has it removed from there, once it can be.
    """
    try:
        doing = f"remove {disk.name}"
        on_progress = functools.partial(run.report, doing)
        steps.when_free(run, doing, functools.partial(run.cluster.remove, on_progress=on_progress), disk)
    except errors.HasSnapshots:
        yield f"{disk} stays: somebody took a snapshot of it just now"
    except errors.Busy:
        # A watcher that outlives a dead client's 30 s: the name is freed at least.
        trash(disk)
        yield f"{disk} is in the trash of its pool, for somebody has it open; it is removed from there after that"


def _snaps(disk: ImageSpec, run: Run) -> list[SnapInfo]:
    try:
        return run.cluster.snaps(disk)
    except errors.Missing:
        return []  # half-made: it is removed all the same


def _free(disk: ImageSpec, snap: SnapInfo, run: Run, at_work: Container[str]) -> Iterator[str]:
    """Remove the snapshot if nobody needs it; else say who does."""
    try:
        children = run.cluster.children(disk, snap.id)
    except errors.Missing:
        return  # gone meanwhile
    if children and snap.name.removeprefix(SNAP_PREFIX) in at_work:
        raise errors.StillAtWork(f"{disk} cannot be removed yet, for job {children[0].name} does not let go of it")
    if children and snap.trashed:
        return  # it goes by itself with the last of them, and so does the disk
    if children and not _is_ours(snap.name):
        yield f"snapshot {snap.name} with its clones {', '.join(map(str, children))}"
    elif snap.trashed or _is_nobodys(snap.name):
        steps.remove_snap(disk.snap(snap.name), snap, run.cluster)
    else:
        yield f"snapshot {snap.name}"


def _is_ours(name: str) -> bool:
    return name.startswith(SNAP_PREFIX)


def _is_nobodys(name: str) -> bool:
    return name == _RESIZE_SNAP or _is_ours(name) or bool(STOCK_SNAP.fullmatch(name))
