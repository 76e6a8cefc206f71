# SPDX-License-Identifier: Apache-2.0
"""What a sweep finds, what it removes, and what it keeps for which reason."""

from __future__ import annotations

import contextlib
import re
from typing import Any, Callable, Optional

import pytest

from nova_rbd_snap import errors
from nova_rbd_snap.janitor import leftovers
from nova_rbd_snap.janitor.findings import KEEP, REMOVE, TRASH, Folder
from nova_rbd_snap.ledger.store import OBJECT
from nova_rbd_snap.specs import GLANCE_SNAP, ImageSpec, SnapSpec
from tests.fakes.cluster import NAME_ONLY
from tests.fakes.engine import COPY, DEST, DISK, clone, freeze, image, make_engine
from tests.fakes.sweep import (
    BASE,
    FOLDER,
    HOUR,
    LEAKED,
    LEAKS,
    NOW,
    OLD,
    STOCK,
    YOUNG,
    World,
    died_before_registration,
    died_while_it_copied,
    flatten_failed,
    ours_without_a_record,
    removal_failed,
    snap_of,
)


@pytest.fixture
def world() -> World:
    return World()


@pytest.mark.parametrize("leak", LEAKS)
def test_leak(world: World, leak: Callable[[World], set[str]]) -> None:
    """Exactly what was leaked is planned, planning changes nothing, and the sweep leaves the cloud as it was before,
    but for what it says is in the trash; a second one has nothing to do."""
    before = world.picture()
    leaked = leak(world)
    dirty = world.picture()
    planned = world.plan()
    assert planned.keys() == leaked
    assert {action for action, _ in planned.values()} <= {REMOVE, TRASH}
    assert world.picture() == dirty
    assert world.plan() == planned
    outcomes = world.sweep()
    assert outcomes.keys() == leaked
    assert all(outcome.done for outcome in outcomes.values())
    trash = world.cluster.picture()["images"]["trash"]
    assert [str(LEAKED) for _ in trash] == [what for what, (action, _) in planned.items() if action == TRASH]
    assert all(image["snaps"] == [] for image in trash)
    cluster, folders = world.picture()
    cluster["images"]["trash"] = []
    assert (cluster, folders) == before
    assert world.plan() == {}


def test_what_went_to_the_trash_tells_how_it_comes_back(world: World) -> None:
    died_before_registration(world)
    _, why = world.plan()[str(LEAKED)]
    assert "rbd trash restore" in why
    assert f"protect {LEAKED}@snap" in why


def test_all_at_once(world: World) -> None:
    """On several disks of several servers, with others' in between."""
    servers = [f"{number:08x}-1111-4111-8111-111111111111" for number in range(4)]
    disks = [ImageSpec("vms", f"{server}_disk{suffix}") for server in servers for suffix in ("", ".rescue", ".local")]
    for disk in disks:
        world.cluster.create_disk(disk)
        world.cluster.create_snap(disk.snap("backup"))
    before = world.picture()
    for number, disk in enumerate(disks):
        snap = snap_of(world, disk=disk, name=f"{number:032x}")
        world.cluster.clone(snap, ImageSpec("images", image(100 + number)), None)
        snap_of(world, disk=disk, name=f"nova-rbd-snap-{image(200 + number)}")
    assert all(outcome.done for outcome in world.sweep().values())
    assert world.picture() == before


# -- what is kept, and why -------------------------------------------------------------------------------------------


def kept(world: World, what: object, reason: str, **changes: Any) -> None:
    """The plan names it, keeps it for that reason, and a sweep leaves the world alone."""
    before = world.picture()
    action, why = world.plan(**changes)[str(what)]
    assert action == KEEP
    assert re.search(reason, why), why
    outcomes = world.sweep(**changes)
    assert all(outcome.done for outcome in outcomes.values())
    assert world.picture() == before


def test_young_things_are_kept(world: World) -> None:
    """They may be somebody's work under way; how young is the operator's to say."""
    world.cluster.now = YOUNG
    snap = snap_of(world)
    world.cluster.create_disk(LEAKED)
    world.machine.content[FOLDER] = Folder((STOCK,), (), YOUNG)
    for what in (snap, LEAKED, f"/snapshots/{FOLDER}/{STOCK}"):
        kept(world, what, "1.0 h old, so")
    assert {action for action, _ in world.plan(older_than_seconds=0.99 * HOUR).values()} == {REMOVE, TRASH}
    assert {action for action, _ in world.plan(older_than_seconds=1.01 * HOUR).values()} == {KEEP}


@pytest.mark.parametrize("pool", ["vms", "images", "elsewhere"])
@pytest.mark.parametrize("name", [STOCK, f"nova-rbd-snap-{DEST.name}"])
def test_snapshot_in_use_is_kept(world: World, pool: str, name: str) -> None:
    """And its clones are named; also those in the trash."""
    snap, child = snap_of(world, name=name), ImageSpec(pool, "somebody's")
    world.cluster.clone(snap, child, None)
    kept(world, snap, re.escape(f"in use by {child}"))
    world.cluster.trash(child, 0)
    kept(world, snap, re.escape(f"in use by {child}"))


def test_snapshot_with_one_child_more_than_goes(world: World) -> None:
    flatten_failed(world)
    other = ImageSpec("images", "somebody's")
    world.cluster.clone(DISK.snap(STOCK), other, None)
    outcomes = world.sweep()
    assert outcomes[str(LEAKED)].done
    assert outcomes[str(DISK.snap(STOCK))].finding.action == KEEP
    assert world.cluster.lookup(other).parent == DISK.snap(STOCK)


def test_image_in_use_is_kept(world: World) -> None:
    died_before_registration(world)
    child = ImageSpec("elsewhere", "somebody's")
    world.cluster.clone(LEAKED.snap(GLANCE_SNAP), child, None)
    kept(world, LEAKED, re.escape(f"in use by {child}"))


@pytest.mark.parametrize("protected", [False, True])
def test_image_with_an_operators_snapshot_is_kept(world: World, protected: bool) -> None:
    died_before_registration(world)
    snap_of(world, disk=LEAKED, name="before-upgrade", protected=protected)
    kept(world, LEAKED, "before-upgrade")


def test_mirrored_image_is_kept(world: World) -> None:
    """Of another site's Glance, which this one knows nothing of."""
    world.cluster.create_disk(LEAKED, mirrored=True)
    kept(world, LEAKED, "mirrored")


@pytest.mark.parametrize(
    "parent",
    [
        ImageSpec("images", image(1)).snap(GLANCE_SNAP),
        ImageSpec("elsewhere", DISK.name).snap(STOCK),
        ImageSpec("vms", f"{DISK.name}-backup").snap(STOCK),
        ImageSpec("vms", DISK.name).snap("before-upgrade"),
        ImageSpec("images", DISK.name).snap(STOCK),
    ],
    ids=str,
)
def test_clone_of_something_else_is_kept(world: World, parent: SnapSpec) -> None:
    """Only a clone of what Nova, or we, freeze a disk as is an unfinished snapshot."""
    if not world.cluster.exists(parent.image):
        world.cluster.create_disk(parent.image)
    world.cluster.clone(snap_of(world), ImageSpec("elsewhere", "sibling"), None)
    world.cluster.unprotect_snap(DISK.snap(STOCK))
    world.cluster.remove_snap(DISK.snap(STOCK))
    if parent.image != BASE:
        world.cluster.create_snap(parent)
    world.cluster.clone(parent, LEAKED, None)
    kept(world, LEAKED, re.escape(f"a clone of {parent}"))
    if parent.image != BASE:
        world.cluster.remove_snap(parent)  # trashed it has another name
        kept(world, LEAKED, "a clone of")


def test_clone_with_a_snapshot_is_kept(world: World) -> None:
    """Neither Nova nor we seal what is not flat."""
    flatten_failed(world)
    world.seal(LEAKED)
    kept(world, LEAKED, "a clone of")


def test_half_made_clone_without_a_head_is_kept(world: World) -> None:
    """Nothing tells how old it is."""
    world.cluster.make_half_clone(NAME_ONLY, BASE.snap(GLANCE_SNAP), LEAKED)
    kept(world, LEAKED, "cannot be read")


def test_what_may_not_be_read_is_kept(world: World) -> None:
    """And what may be is swept all the same."""
    removal_failed(world)
    stranger = ImageSpec("vms", f"{image(9)}_disk")
    world.cluster.create_disk(stranger)
    snap = snap_of(world, disk=stranger)
    world.cluster.create_disk(LEAKED)

    def deny(spec: ImageSpec, *more: object) -> None:
        if spec in (stranger, LEAKED):
            raise errors.NoPermission(f"no rights in the parent of {spec}")

    for call in ("snaps", "lookup"):
        for nth in range(1, 40):
            world.cluster.do_on(call, deny, nth=nth)
    outcomes = world.sweep()
    kept_ones = {what for what, outcome in outcomes.items() if outcome.finding.action == KEEP}
    assert kept_ones == {str(stranger), str(LEAKED)}
    assert all("no rights" in outcomes[str(spec)].why for spec in (stranger, LEAKED))
    world.cluster.heal()
    assert [found.name for found in world.cluster.snaps(stranger)] == [snap.name]
    assert world.cluster.snaps(DISK) == []


# -- Glance ----------------------------------------------------------------------------------------------------------


def test_image_that_glance_knows_is_no_finding(world: World) -> None:
    died_before_registration(world)
    world.glance.known.add(LEAKED.name)
    assert world.plan() == {}


@pytest.mark.parametrize(
    "error", [errors.NotAuthorized("no credentials"), errors.GlanceSilent("timed out"), errors.NotRegistered("500")]
)
def test_without_glances_word(world: World, error: errors.GlanceError) -> None:
    """Not one of its images is touched, nor a snapshot that one of them needs; all else goes."""
    flatten_failed(world)
    died_while_it_copied(world)
    world.glance.error = error
    outcomes = world.sweep()
    assert str(error) in outcomes["images"].why
    assert outcomes[str(DISK.snap(STOCK))].finding.action == KEEP
    assert world.cluster.exists(LEAKED)
    assert world.machine.content == {}


def test_not_found_counts_from_glance_alone(world: World) -> None:
    """A proxy before it says so of everything."""
    died_before_registration(world)
    world.glance.is_glance = False
    kept(world, "images", "it is not Glance that says")


def test_another_glances_pool(world: World) -> None:
    """A Glance that knows none of the images of a pool is not the one to ask about them."""
    died_before_registration(world)
    world.glance.known.clear()
    kept(world, "images", "another Glance's pool")


def test_no_pool_of_glances_is_known(world: World) -> None:
    died_before_registration(world)
    kept(world, "Glance's pool", "glance_pool", glance_pools=[])


def test_several_pools_of_glances(world: World) -> None:
    """Each is looked at, also the one that Nova's disks are in, where only Glance's names count."""
    for pool in ("images", "elsewhere", "vms"):
        world.cluster.create_disk(ImageSpec(pool, LEAKED.name))
        world.cluster.create_disk(ImageSpec(pool, BASE.name))
    planned = world.plan(glance_pools=["images", "elsewhere", "vms"])
    assert planned.keys() == {f"{pool}/{LEAKED.name}" for pool in ("images", "elsewhere", "vms")}


# -- the ledger ------------------------------------------------------------------------------------------------------

STEPS = ("snap", "clone", "flatten", "seal")


class Killed(BaseException):
    """The engine's process ends."""


def start(world: World, until: Optional[str], image_id: str = DEST.name) -> None:
    """A job that is under way, and gets no further; its image record is gone already."""

    def report(step: str, done: int, total: int) -> None:
        if step == until:
            raise Killed

    engine = make_engine(world.cluster)
    with contextlib.suppress(Killed):
        clone(engine, report, image_id=image_id)


@pytest.mark.parametrize("until", [*STEPS, None])
def test_jobs_are_reported_and_left_alone(world: World, until: Optional[str]) -> None:
    """At whatever step, and however old."""
    start(world, until)
    kept(world, DEST.name, f"clone of {re.escape(str(DISK))} by compute-1, at step '{until or 'ready'}'", now=NOW * 2)
    assert world.plan().keys() == {DEST.name}


def test_frozen_disk_is_left_alone(world: World) -> None:
    freeze(make_engine(world.cluster))
    kept(world, COPY, "freeze of")
    assert world.plan().keys() == {COPY}


def test_strange_records_count(world: World) -> None:
    """What cannot be read is reported, and what it may be about is left alone."""
    start(world, None)
    snap_of(world, name=f"nova-rbd-snap-{image(3)}")
    (text,) = (world.cluster.omap_items("vms", OBJECT)[DEST.name],)
    world.cluster.omap_replace("vms", OBJECT, DEST.name, text, text.replace('"version": 1', '"version": 99'))
    for key in (image(3), "\x1b[2J", "check"):
        world.cluster.omap_replace("vms", OBJECT, key, None, "not JSON")
    before = world.picture()
    planned = world.plan()
    assert planned.keys() == {DEST.name, image(3), "\x1b[2J", "check"}
    assert "version 99" in planned[DEST.name][1]
    world.sweep()
    assert world.picture() == before


@pytest.mark.parametrize("call", ["images", "snaps", "children", "omap_items", "lookup"])
def test_cluster_does_not_tell(world: World, call: str) -> None:
    """Then nothing is planned at all, the ledger's word included."""
    removal_failed(world)
    died_before_registration(world)
    world.cluster.fail_on(call, errors.Unreachable)
    with pytest.raises(errors.Unreachable):
        world.plan()


@pytest.mark.parametrize("until", [*STEPS, None])
def test_a_job_begins_meanwhile(until: Optional[str]) -> None:
    """Before whichever call of the sweep: nothing of it is touched, whatever the age that the operator asked for."""

    def swept(nth: int) -> bool:
        world = World()
        removal_failed(world)
        seen: list[Any] = []

        def begin(*args: object) -> None:
            start(world, until)
            seen.append(world.picture())

        world.cluster.do_on("*", begin, nth=nth)
        scene = world.scene(older_than_seconds=0)
        plan = leftovers.plan(scene)
        assert {finding.what for finding in plan.findings if finding.action != KEEP} == {str(DISK.snap(STOCK))}
        list(leftovers.execute(plan, scene))
        if not seen:
            return False
        (before,), after = seen, world.picture()
        for cluster, _ in (before, after):
            disk = cluster["vms"]["images"][DISK.name]
            disk["snaps"] = [snap for snap in disk["snaps"] if snap[1] != STOCK]
        assert after == before, nth
        return True

    calls = 0
    while swept(calls + 1):
        calls += 1
    assert calls > 10


# -- the world goes on between plan and execution --------------------------------------------------------------------


def child_of_the_snapshot(world: World) -> None:
    world.cluster.clone(DISK.snap(STOCK), ImageSpec("elsewhere", "new"), None)


def snapshot_of_the_same_name(world: World) -> None:
    world.cluster.unprotect_snap(DISK.snap(STOCK))
    world.cluster.remove_snap(DISK.snap(STOCK))
    snap_of(world)


def record_of_our_snapshot(world: World) -> None:
    start(world, "clone")


def unreadable_record(world: World) -> None:
    world.cluster.omap_replace("vms", OBJECT, DEST.name, None, "not JSON")


def glance_record(world: World) -> None:
    world.glance.known.add(LEAKED.name)


def glance_falls_silent(world: World) -> None:
    world.glance.error = errors.GlanceSilent("timed out")


def child_of_the_image(world: World) -> None:
    world.cluster.clone(LEAKED.snap(GLANCE_SNAP), ImageSpec("elsewhere", "new"), None)


def snapshot_of_the_image(world: World) -> None:
    world.cluster.create_snap(LEAKED.snap("before-upgrade"))


def image_of_the_same_name(world: World) -> None:
    world.cluster.trash(LEAKED, 0)
    world.cluster.create_disk(LEAKED)
    world.seal(LEAKED)


def record_of_the_image(world: World) -> None:
    world.cluster.omap_replace("vms", OBJECT, LEAKED.name, None, "not JSON")


def flattened(world: World) -> None:
    world.cluster.flatten(LEAKED, lambda done, total: True)


def copy_is_opened(world: World) -> None:
    world.machine.opened.add(FOLDER)


def copy_grows(world: World) -> None:
    world.machine.content[FOLDER] = Folder((STOCK,), (), OLD + 1)


def file_beside_the_copy(world: World) -> None:
    world.machine.content[FOLDER] = Folder((STOCK,), ("more",), OLD)


def older_nova(world: World) -> None:
    world.machine.since = OLD - HOUR


@pytest.mark.parametrize(
    ("leak", "change"),
    [
        (removal_failed, child_of_the_snapshot),
        (removal_failed, snapshot_of_the_same_name),
        (ours_without_a_record, record_of_our_snapshot),
        (ours_without_a_record, unreadable_record),
        (died_before_registration, glance_record),
        (died_before_registration, glance_falls_silent),
        (died_before_registration, child_of_the_image),
        (died_before_registration, snapshot_of_the_image),
        (died_before_registration, image_of_the_same_name),
        (died_before_registration, record_of_the_image),
        (flatten_failed, glance_record),
        (flatten_failed, flattened),
        (died_while_it_copied, copy_is_opened),
        (died_while_it_copied, copy_grows),
        (died_while_it_copied, file_beside_the_copy),
        (died_while_it_copied, older_nova),
    ],
)
def test_changed_since_it_was_planned(
    world: World, leak: Callable[[World], set[str]], change: Callable[[World], None]
) -> None:
    """What is no longer as it was planned is kept, and that is told; so is what a kept one needs."""
    leak(world)
    scene = world.scene()
    plan = leftovers.plan(scene)
    victims = {finding.what for finding in plan.findings if finding.action != KEEP}
    if change is flattened:
        victims.remove(str(DISK.snap(STOCK)))  # that one may go now
    if change in (record_of_our_snapshot, unreadable_record):
        victims.remove(str(DISK.snap(f"nova-rbd-snap-{COPY}")))
    if change is record_of_our_snapshot:
        world.cluster.remove_snap(DISK.snap(f"nova-rbd-snap-{DEST.name}"))
    change(world)
    before = world.picture()
    outcomes = {outcome.finding.what: outcome for outcome in leftovers.execute(plan, scene)}
    after = world.picture()
    if change is flattened or change in (record_of_our_snapshot, unreadable_record):
        before, after = without_snap(before), without_snap(after)
    assert after == before
    for what in victims:
        assert not outcomes[what].done or outcomes[what].became == "gone", outcomes[what]


def without_snap(picture: Any) -> Any:
    """Without the one snapshot that may go in any case."""
    gone = (STOCK, f"nova-rbd-snap-{COPY}")
    disk = picture[0]["vms"]["images"][DISK.name]
    disk["snaps"] = [snap for snap in disk["snaps"] if snap[1] not in gone]
    return picture


def test_guest_that_is_silent_keeps_its_disk(world: World) -> None:
    """Its snapshot stays for now, with that reason."""
    ours_without_a_record(world)
    before = world.picture()
    world.cluster.freeze_holder(DISK)
    scene = world.scene()
    outcomes = list(leftovers.execute(leftovers.plan(scene), scene))
    assert {(outcome.became, outcome.done) for outcome in outcomes} == {("kept", False)}
    assert all("does not answer" in outcome.why for outcome in outcomes)
    assert world.picture() == before


@pytest.mark.parametrize("leak", LEAKS)
def test_somebody_else_was_faster(world: World, leak: Callable[[World], set[str]]) -> None:
    """What is gone by then is no failure, and two sweeps at once do no harm."""
    before = world.cluster.picture()["vms"]
    leak(world)
    scene = world.scene()
    plan = leftovers.plan(scene)
    world.sweep()
    outcomes = list(leftovers.execute(plan, scene))
    assert [(outcome.done, outcome.became) for outcome in outcomes] == [(True, "gone")] * len(plan.findings)
    assert world.cluster.picture()["vms"] == before


# -- what fails ------------------------------------------------------------------------------------------------------


def test_removal_that_fails_is_told_and_the_rest_goes_on(world: World) -> None:
    """A clone that somebody has open, with the snapshot it needs."""
    flatten_failed(world)
    ours_without_a_record(world)
    world.cluster.hold(LEAKED, float("inf"))
    outcomes = world.sweep()
    stayed = {what for what, outcome in outcomes.items() if not outcome.done}
    assert stayed == {str(LEAKED), str(DISK.snap(STOCK))}
    assert "open somewhere" in outcomes[str(LEAKED)].why
    assert "in use by" in outcomes[str(DISK.snap(STOCK))].why
    assert [snap.name for snap in world.cluster.snaps(DISK)] == [STOCK]


@pytest.mark.parametrize("error", [errors.Unreachable, errors.Blocklisted])
def test_cluster_falls_silent(world: World, error: type[Exception]) -> None:
    """No further removal is tried: each would wait its time out."""
    ours_without_a_record(world)
    removal_failed(world)
    died_while_it_copied(world)
    scene = world.scene()
    plan = leftovers.plan(scene)
    world.cluster.fail_on("remove_snap_by_id", error, nth=2)
    outcomes = list(leftovers.execute(plan, scene))
    assert [outcome.done for outcome in outcomes] == [True, False, False, False]
    assert all("not tried" in outcome.why for outcome in outcomes[2:])
    assert len(world.cluster.snaps(DISK)) == 2


def test_removal_that_seems_to_work(world: World) -> None:
    """librbd may say "not found" of what is there."""
    removal_failed(world)
    world.cluster.fail_on("remove_snap_by_id", errors.Missing)
    (outcome,) = world.sweep().values()
    assert (outcome.done, "still there" in outcome.why) == (False, True)


# -- the local disk --------------------------------------------------------------------------------------------------


def test_copy_of_a_nova_that_runs_is_kept(world: World) -> None:
    """Only what is older than every nova-compute of the machine can be none of its."""
    died_while_it_copied(world)
    path = f"/snapshots/{FOLDER}/{STOCK}"
    for since in (OLD - HOUR, OLD):
        world.machine.since = since
        kept(world, path, "may be of the nova-compute")
    world.machine.since = OLD + 1
    assert world.plan()[path][0] == REMOVE


def test_copy_that_is_open_is_kept(world: World) -> None:
    died_while_it_copied(world)
    world.machine.opened.add(FOLDER)
    kept(world, f"/snapshots/{FOLDER}/{STOCK}", "has it open")


@pytest.mark.parametrize("folder", [Folder((STOCK, "notes"), (), OLD), Folder((STOCK,), ("link",), OLD)])
def test_copy_with_something_beside_it_is_kept(world: World, folder: Folder) -> None:
    world.machine.content[FOLDER] = folder
    (what,) = world.plan()
    kept(world, what, "beside it")


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        (name, Folder((STOCK,), (), OLD))
        for name in ("tmp", "tmpab12", "tmpAB12_xyz", f"{FOLDER}z", f"{FOLDER}\n", "backup12345", STOCK)
    ]
    + [
        (FOLDER, Folder(files, others, OLD))
        for files, others in [((), ()), (("notes",), ()), ((), (STOCK,)), ((STOCK.upper(),), ()), ((f"{STOCK}\n",), ())]
    ],
)
def test_other_folders_are_no_findings(world: World, name: str, folder: Folder) -> None:
    world.machine.content[name] = folder
    assert world.plan() == {}


def test_processes_that_cannot_be_seen(world: World) -> None:
    died_while_it_copied(world)
    world.machine.error = errors.SnapError("only root sees")
    kept(world, f"/snapshots/{FOLDER}", "only root sees")
