# SPDX-License-Identifier: Apache-2.0
"""What nobody looks after any more: found, told, and removed on an operator's word.

:func:`plan` only reads. :func:`execute` does what a plan says and nothing else, and judges each thing anew right before
it touches it, for the world goes on meanwhile. A name proves nothing: what bears a leftover's name goes only where the
ledger, Glance, its clones and its age agree. Doubt means keep, and the plan says why.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Optional

from nova_rbd_snap import errors
from nova_rbd_snap.janitor import copies, orphans, strays
from nova_rbd_snap.janitor.findings import KEEP, REMOVE, TRASH, Finding, Outcome, Scene, SweepPlan, Target
from nova_rbd_snap.ledger.job import Job

_BECOMES = {REMOVE: "removed", TRASH: "trashed"}


def plan(scene: Scene) -> SweepPlan:
    """Find what is left over; nothing is changed.

    :raises errors.SnapError: the cluster does not tell.
    """
    snapshots, unreadable = strays.snapshots(scene)
    names = strays.image_names(scene)
    # Read after what jobs make, so that nothing of a job that begins meanwhile is seen without its record.
    ledger = scene.ledger()
    images = list(strays.images(scene, names, ledger))
    doomed = {finding.what for finding in images if finding.action != KEEP}
    weighed = (snapshot.weigh(scene, ledger, doomed) for snapshot in snapshots)
    return SweepPlan(
        (
            *images,
            *(finding for finding in weighed if finding),
            *unreadable,
            *orphans.disks(scene, ledger),
            *copies.find(scene),
            *(_report(scene, job) for job in ledger.jobs),
            *(Finding("strange record", key, KEEP, f"never touched: {why}") for key, why in ledger.strange.items()),
        )
    )


def _report(scene: Scene, job: Job) -> Finding:
    """A job is its host's to end, or an operator's by name, never a sweep's."""
    why = f"{job.kind} of {job.disk} by {job.owner.host}, at step '{job.step}', {scene.age(job.created)}"
    return Finding("job", job.id, KEEP, "; ".join((why, *job.failures)))


def execute(plan: SweepPlan, scene: Scene) -> Iterator[Outcome]:
    """Do what *plan* says, one finding after the other, and tell what became of each."""
    silent: Optional[errors.SnapError] = None
    for finding in plan.findings:
        if finding.action == KEEP or finding.target is None:
            yield Outcome(finding, "kept", finding.why)
        elif silent is not None:
            why = f"not tried, for what must be asked does not answer: {silent.report()}"
            yield Outcome(finding, "kept", why, done=False)
        else:
            try:
                yield _execute(finding, finding.target, scene)
            except errors.SnapError as error:
                yield Outcome(finding, "kept", error.report(), done=False)
                if isinstance(error, (errors.Unreachable, errors.GlanceSilent)):
                    silent = error


def _execute(finding: Finding, target: Target, scene: Scene) -> Outcome:
    now = target.judge(scene)
    if now is None:
        return Outcome(finding, "gone", "no leftover any more")
    if (now.action, now.target) != (finding.action, target):
        return Outcome(finding, "kept", f"not as it was planned any more: {now.why}", done=False)
    target.remove(scene)
    return Outcome(finding, _BECOMES[finding.action], finding.why)
