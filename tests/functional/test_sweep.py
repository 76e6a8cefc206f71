# SPDX-License-Identifier: Apache-2.0
"""The command line on a real Ceph and a real Glance: what stock Nova, or a dead nova-compute, left goes, and no more.

In pools of its own, as a Ceph user with the rights that the README asks for: a sweep sees whole pools.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import pytest
import rbd

from nova_rbd_snap import conf, errors
from nova_rbd_snap.engine import unheard, wiring
from nova_rbd_snap.engine.service import Engine
from nova_rbd_snap.ledger.job import Owner
from nova_rbd_snap.ledger.store import OBJECT
from nova_rbd_snap.specs import ImageSpec
from tests.functional.world import CEPH_CONF, MIB, NOVA_CONF, World
from tests.waiting import eventually

SOURCE = Path(__file__).resolve().parents[2]
FEATURES = (
    rbd.RBD_FEATURE_LAYERING
    | rbd.RBD_FEATURE_EXCLUSIVE_LOCK
    | rbd.RBD_FEATURE_OBJECT_MAP
    | rbd.RBD_FEATURE_FAST_DIFF
    | rbd.RBD_FEATURE_DEEP_FLATTEN
)
LONG_AGO = 1e9


#: In a container without CAP_SYS_PTRACE, as the lab's are, root does not see what other users' processes have open, and
#: every copy is kept; so the command is shown the others only. And the time, lest it depend on how soon it begins.
SHOWN = """
import functools, pathlib, sys, types
from nova_rbd_snap.cli import __main__, commands
commands.LocalMachine = functools.partial(commands.LocalMachine, proc=pathlib.Path(sys.argv.pop(1)))
commands.time = types.SimpleNamespace(time=functools.partial(float, sys.argv.pop(1)))
sys.exit(__main__.main())
"""


def execute(*words: str, proc: Path = Path("/proc"), now: Optional[float] = None) -> subprocess.CompletedProcess[str]:
    """The command, from the source tree; *now* or as of *now*."""
    command = (sys.executable, "-W", "ignore", "-c", SHOWN, str(proc), str(now or time.time()), *words)
    return subprocess.run(command, cwd=SOURCE, capture_output=True, text=True, timeout=600, check=False)


def show_processes(shown: Path) -> None:
    """Make *shown* the part of /proc that can be seen whole."""
    shown.mkdir(exist_ok=True)
    (shown / "self").unlink(missing_ok=True)
    (shown / "self").symlink_to("/proc/self")
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            for descriptor in (process / "fd").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    descriptor.readlink()
            (shown / process.name).symlink_to(process)


class Operator:
    """Pools, a Ceph user, a snapshots directory and a nova.conf, and the command that is run with them."""

    def __init__(self, world: World, folder: Path, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        name = f"sweep-{uuid.uuid4().hex[:8]}"
        self.world, self.vms, self.images = world, f"{name}-vms", f"{name}-images"
        for pool in (self.vms, self.images):
            world.tell_monitor("osd pool create", pool=pool, pg_num=1)
            stack.callback(world.tell_monitor, "osd pool rm", pool=pool, pool2=pool, yes_i_really_really_mean_it=True)
            world.tell_monitor("osd pool application enable", pool=pool, app="rbd")
        self.ioctx = {pool: world.rados.open_ioctx(pool) for pool in (self.vms, self.images)}
        self.user, self.ceph_conf = name, folder / "ceph.conf"
        osd = f"profile rbd pool={self.vms}, profile rbd pool={self.images}"
        (made,) = world.tell_monitor(
            "auth get-or-create", entity=f"client.{name}", caps=["mon", "profile rbd", "mgr", osd, "osd", osd]
        )
        stack.callback(world.tell_monitor, "auth rm", entity=f"client.{name}")
        keyring = folder / "keyring"
        keyring.write_text(f"[client.{name}]\nkey = {made['key']}\n")
        self.ceph_conf.write_text(f"{Path(CEPH_CONF).read_text()}\n[client.{name}]\nkeyring = {keyring}\n")
        self.snapshots, self.proc, self.conf = folder / "snapshots", folder / "proc", folder / "nova-sweep.conf"
        self.snapshots.mkdir()
        self.configure()

    def configure(self, text: str = "") -> None:
        self.conf.write_text(
            f"[libvirt]\nimages_rbd_pool = {self.vms}\nimages_rbd_ceph_conf = {self.ceph_conf}\n"
            f"rbd_user = {self.user}\nsnapshots_directory = {self.snapshots}\n"
            f"[rbd_snap]\nglance_pool = {self.images}\n{text}"
        )

    def run(self, *words: str, now: Optional[float] = None) -> tuple[int, list[dict[str, Any]], str]:
        """Exit code, rows and complaints of the command, with nova-compute's credentials."""
        files = ("--config-file", NOVA_CONF, "--config-file", str(self.conf))
        show_processes(self.proc)
        done = execute(*files, *words, "-f", "json", proc=self.proc, now=now)
        assert "Traceback" not in done.stderr
        return done.returncode, json.loads(done.stdout or "[]"), done.stderr

    def engine(self, host: str) -> Engine:
        """An engine of another host's nova-compute."""
        nova_conf = conf.load(["--config-file", NOVA_CONF, "--config-file", str(self.conf)])
        settings = conf.Settings.read(nova_conf)
        owner = functools.partial(Owner, host, "its machine", "its life", cloud=conf.cloud(nova_conf))
        return wiring.engine(nova_conf, settings, owner)

    # -- what is in the cloud ------------------------------------------------------------------------------------

    def create(self, pool: str, name: str) -> ImageSpec:
        rbd.RBD().create(self.ioctx[pool], name, 8 * MIB, features=FEATURES)
        with rbd.Image(self.ioctx[pool], name) as image:
            image.write(os.urandom(4096), 0)
        return ImageSpec(pool, name)

    def disk(self) -> ImageSpec:
        return self.create(self.vms, f"{uuid.uuid4()}_disk")

    def snap(self, image: ImageSpec, name: str, *, protected: bool = True) -> str:
        with rbd.Image(self.ioctx[image.pool], image.name) as opened:
            opened.create_snap(name)
            if protected:
                opened.protect_snap(name)
        return f"{image}@{name}"

    def clone(self, image: ImageSpec, snap: str, dest: ImageSpec, clone_format: int = 1) -> ImageSpec:
        source, target = self.ioctx[image.pool], self.ioctx[dest.pool]
        rbd.RBD().clone(source, image.name, snap, target, dest.name, features=FEATURES, clone_format=clone_format)
        return dest

    def leaked_image(self) -> ImageSpec:
        return ImageSpec(self.images, str(uuid.uuid4()))

    def glance_image(self) -> ImageSpec:
        """One that Glance has a record of, made now."""
        image_id = self.world.new_record(f"{uuid.uuid4()}_disk")
        self._stack.callback(self.world.delete_image, image_id)
        return self.create(self.images, image_id)

    def copy(self, name: str, moment: float) -> Path:
        """What Nova's own full copy leaves on the local disk."""
        folder = self.snapshots / name
        folder.mkdir()
        path = folder / uuid.uuid4().hex
        path.write_bytes(b"disk")
        for each in (path, folder):
            os.utime(each, (moment, moment))
        return path

    def picture(self) -> dict[str, Any]:
        """All rbd images with their ids, data and snapshots; the ledger; the local disk."""
        found: dict[str, Any] = {"ledger": self.world.cluster.omap_items(self.vms, OBJECT)}
        found["files"] = sorted(str(path) for path in self.snapshots.rglob("*"))
        for pool, ioctx in self.ioctx.items():
            for name in rbd.RBD().list(ioctx):
                with rbd.Image(ioctx, name, read_only=True) as image:
                    snaps = [(snap["name"], snap["namespace"]) for snap in image.list_snaps()]
                    found[f"{pool}/{name}"] = (image.id(), snaps, image.read(0, 4096))
        return found

    def purge(self) -> None:
        """As a schedule does."""
        rbd.RBD().trash_purge(self.ioctx[self.images])

    def trash(self) -> set[str]:
        return {entry["name"] for entry in rbd.RBD().trash_list(self.ioctx[self.images])}


def stock_name() -> str:
    """As LibvirtDriver.snapshot makes it."""
    return uuid.uuid4().hex


@pytest.fixture
def operator(world: World, tmp_path: Path) -> Iterator[Operator]:
    with contextlib.ExitStack() as stack:
        made = Operator(world, tmp_path, stack)
        known = made.glance_image()
        stack.callback(world.delete_image, known.name)
        yield made
        for ioctx in made.ioctx.values():
            ioctx.close()


def leave_everything(operator: Operator) -> tuple[set[str], set[str]]:
    """What each failing step of stock's snapshot leaves, and its death: what is to be removed, and what trashed."""
    removed, trashed = set(), set()
    # protect fails; the removal fails
    removed.add(operator.snap(operator.disk(), stock_name(), protected=False))
    removed.add(operator.snap(operator.disk(), stock_name()))
    # flatten fails, in both formats of clones
    for clone_format in (1, 2):
        disk, name = operator.disk(), stock_name()
        removed.add(operator.snap(disk, name))
        removed.add(str(operator.clone(disk, name, operator.leaked_image(), clone_format)))
    # flatten fails, and the snapshot is removed all the same: it waits in librbd's trash for its clone
    disk, name = operator.disk(), stock_name()
    removed.add(operator.snap(disk, name, protected=False))
    removed.add(str(operator.clone(disk, name, operator.leaked_image(), 2)))
    operator.world.cluster.remove_snap(disk.snap(name))
    # the removal fails after the flatten
    disk, name = operator.disk(), stock_name()
    removed.add(operator.snap(disk, name))
    flat = operator.clone(disk, name, operator.leaked_image())
    operator.world.cluster.flatten(flat, lambda done, total: True)
    trashed.add(str(flat))
    # the seal fails; death before the registration
    trashed.add(str(operator.create(operator.images, operator.leaked_image().name)))
    sealed = operator.create(operator.images, operator.leaked_image().name)
    operator.snap(sealed, "snap")
    trashed.add(str(sealed))
    # death in Nova's own full copy
    removed.add(str(operator.copy("tmpab12_xyz", LONG_AGO)))
    # our snapshot, of a job that nobody knows
    removed.add(operator.snap(operator.disk(), f"nova-rbd-snap-{uuid.uuid4()}", protected=False))
    return removed, trashed


def leave_alone(operator: Operator) -> dict[str, str]:
    """Things that are no leftovers; returns those that a sweep names all the same, and why it keeps them."""
    # a live image with a server's disk made of it, and one that nobody uses
    base = operator.glance_image()
    operator.snap(base, "snap")
    disk = operator.clone(base, "snap", ImageSpec(operator.vms, f"{uuid.uuid4()}_disk"))
    # an operator's snapshots, of disks and elsewhere
    operator.snap(disk, "before-upgrade")
    operator.snap(operator.disk(), "nova-resize", protected=False)
    operator.snap(operator.create(operator.vms, "golden"), stock_name())
    operator.create(operator.images, "not-a-uuid")
    operator.copy("backups", LONG_AGO)
    (operator.snapshots / "notes").write_text("mine")
    kept = {}
    # a leak that an operator made something of
    disk, name = operator.disk(), stock_name()
    snap = operator.snap(disk, name)
    operator.clone(disk, name, ImageSpec(operator.images, "rescued"))
    kept[snap] = f"in use by {operator.images}/rescued"
    unknown = operator.create(operator.images, operator.leaked_image().name)
    operator.snap(unknown, "snap")
    operator.clone(unknown, "snap", ImageSpec(operator.vms, f"{uuid.uuid4()}_disk"))
    kept[str(unknown)] = "in use by"
    beside = operator.copy("tmpbeside__", LONG_AGO)
    (beside.parent / "notes").write_text("mine")
    kept[f"{beside}, notes"] = "with notes beside it"
    return kept


def still_young(operator: Operator) -> dict[str, str]:
    """As :func:`leave_alone`: what somebody may be at work on."""
    young = [operator.snap(operator.disk(), stock_name()), str(operator.create(operator.images, str(uuid.uuid4())))]
    return {**dict.fromkeys(young, "at work on it"), str(operator.copy("tmpyoung_12", time.time())): "at work on it"}


def test_sweep(operator: Operator) -> None:
    """The dry run tells and changes nothing; the sweep removes exactly what was told; a second one finds nothing."""
    kept = leave_alone(operator)
    before = operator.picture()
    removed, trashed = leave_everything(operator)
    names = set(operator.picture())
    # Ceph tells the second in which a thing was made.
    old = int(time.time()) + 1
    eventually(lambda: time.time() > old + 1, "the next second")
    kept.update(still_young(operator))
    an_hour_after = {"now": old + 3600.0}
    dirty = operator.picture()
    code, rows, complaints = operator.run("sweep", "--dry-run", "--older-than", "1", **an_hour_after)
    assert (code, complaints) == (0, "")
    assert operator.picture() == dirty
    planned = {row["What"]: row["Action"] for row in rows}
    assert planned == {
        **dict.fromkeys(kept, "keep"),
        **dict.fromkeys(removed, "remove"),
        **dict.fromkeys(trashed, "trash"),
    }
    for row in rows:
        assert re.search(re.escape(kept.get(row["What"], "")), row["Why"]), row

    code, done, complaints = operator.run("sweep", "--older-than", "1", **an_hour_after)
    assert (code, complaints) == (0, "")
    past = {"keep": "kept", "remove": "removed", "trash": "trashed"}
    became = {row["What"]: row["Action"] for row in done}
    gone = {what for what, action in became.items() if action == "gone"}
    assert len(gone) == 1, "the snapshot that was trashed goes with its clone"
    expected = {what: past[action] for what, action in planned.items()}
    assert became == {**expected, **dict.fromkeys(gone, "gone")}
    assert {f"{operator.images}/{name}" for name in operator.trash()} == trashed
    after = operator.picture()
    young = {name: state for name, state in dirty.items() if name not in names}
    disks = {name for name in names - set(before) if name.startswith(operator.vms)}
    files = [path for path in dirty["files"] if "tmpab12_xyz" not in path]
    freed = {disk: (dirty[disk][0], [], dirty[disk][2]) for disk in disks}
    assert after == {**before, **freed, **young, "files": files}

    operator.purge()
    assert {f"{operator.images}/{name}" for name in operator.trash()} == trashed, "not before a week is over"
    code, rows, _ = operator.run("sweep", "--older-than", "1", **an_hour_after)
    assert (code, {row["What"]: row["Action"] for row in rows}) == (0, dict.fromkeys(kept, "kept"))
    assert operator.picture() == after


def test_what_was_trashed_comes_back(operator: Operator) -> None:
    """As the plan says: its data is whole, and with its snapshot made anew Glance could read it."""
    image = operator.create(operator.images, str(uuid.uuid4()))
    operator.snap(image, "snap")
    before = operator.picture()
    assert operator.run("sweep", "--older-than", "0")[0] == 0
    (entry,) = rbd.RBD().trash_list(operator.ioctx[operator.images])
    rbd.RBD().trash_restore(operator.ioctx[operator.images], entry["id"], image.name)
    operator.snap(image, "snap")
    assert operator.picture() == before


def test_copy_that_is_open(operator: Operator) -> None:
    """However old: some process reads it."""
    path = operator.copy("tmpab12_xyz", LONG_AGO)
    with path.open():
        code, (row,), _ = operator.run("sweep")
        assert (code, row["Action"], "has it open" in row["Why"]) == (0, "kept", True)
    assert path.exists()
    assert operator.run("sweep")[1][0]["Action"] == "removed"
    assert not path.parent.exists()


def test_copy_of_the_nova_that_runs(operator: Operator) -> None:
    """However old the operator says that leftovers are."""
    path = operator.copy("tmpab12_xyz", time.time())
    code, (row,), _ = operator.run("sweep", "--older-than", "0")
    assert (code, row["Action"], "of the nova-compute" in row["Why"]) == (0, "kept", True)
    assert path.exists()


def test_processes_that_are_not_seen(operator: Operator) -> None:
    """Where some hide what they have open nobody's copy goes, and it is told what hides it."""
    path = operator.copy("tmpab12_xyz", LONG_AGO)
    files = ("--config-file", NOVA_CONF, "--config-file", str(operator.conf))
    done = execute(*files, "sweep", "-f", "json")
    (row,) = json.loads(done.stdout)
    assert (row["Action"], "Permission denied" in row["Why"]) == ("kept", True)
    assert path.exists()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[glance]\nendpoint_override = http://127.0.0.1:1\n", "Unable to establish connection"),
        ("[service_user]\npassword = wrong\n", "authentication"),
        ("auth_section = nowhere\n", "no auth_type"),
        ("[service_user]\nusername = demo\npassword = lab\nproject_name = demo\n", "lacks the role 'admin'"),
    ],
    ids=["silent", "wrong password", "no credentials", "no rights"],
)
def test_without_glances_word(operator: Operator, text: str, why: str) -> None:
    """Its images stay, with the reason, and so does the snapshot that one of them needs; the rest goes."""
    operator.configure(text)
    disk, name = operator.disk(), stock_name()
    operator.snap(disk, name)
    operator.clone(disk, name, operator.leaked_image())
    before = operator.picture()
    free = operator.snap(operator.disk(), stock_name())
    code, rows, complaints = operator.run("sweep", "--older-than", "0")
    found = {row["What"]: row for row in rows}
    assert (code, complaints) == (0, "")
    assert why in found[operator.images]["Why"]
    assert {what: row["Action"] for what, row in found.items()} == {
        operator.images: "kept",
        f"{disk}@{name}": "kept",
        free: "removed",
    }
    after = operator.picture()
    assert {name: state for name, state in after.items() if name in before} == before


def test_as_novas_own_user(world: World) -> None:
    """On the pools of the lab's cloud a dry run needs no more than nova-compute's configuration and rights."""
    before = world.picture()
    done = execute("sweep", "--dry-run", "--glance-pool", world.images)
    assert (done.returncode, done.stderr) == (0, "")
    assert world.picture() == before


# -- jobs ------------------------------------------------------------------------------------------------------------


def test_job_of_a_host_that_never_comes_back(operator: Operator, world: World) -> None:
    """Listed, kept by a sweep, and on the operator's word ended: its client is cut off, its clone and its waiting image
    record are gone, and what another host works on is not touched."""
    disk = operator.disk()
    image_id, other_id = world.new_record(disk.name), world.new_record(disk.name)
    before = operator.picture()
    dead, other = operator.engine("dead-host"), operator.engine("other-host")
    for engine, job_id in ((dead, image_id), (other, other_id)):
        engine.reserve_clone(job_id, disk.name, operator.images)
        engine.perform(job_id, None, unheard)
    code, rows, _ = operator.run("job", "list")
    jobs = {row["ID"]: row for row in rows}
    assert (code, jobs.keys()) == (0, {image_id, other_id})
    assert [jobs[image_id][column] for column in ("Kind", "Step", "Disk", "Host")] == [
        "clone",
        "ready",
        str(disk),
        "dead-host",
    ]
    dirty = operator.picture()
    code, rows, _ = operator.run("sweep", "--older-than", "0")
    assert (code, {row["What"]: row["Action"] for row in rows}) == (0, {image_id: "kept", other_id: "kept"})
    assert operator.picture() == dirty

    code, rows, complaints = operator.run("job", "reclaim", image_id)
    assert (code, rows) == (0, [{"ID": image_id, "Action": "ended", "Why": ""}]), complaints
    with pytest.raises(errors.RecordGone):
        world.status(image_id)
    _, listed, _ = world.rados.mon_command(json.dumps({"prefix": "osd blocklist ls"}), b"")
    fenced = {line.split()[0] for line in listed.decode().splitlines()}
    assert jobs[image_id]["Client"] in fenced
    assert jobs[other_id]["Client"] not in fenced
    other.rollback(other_id, unheard)
    after = operator.picture()
    assert after == before
    assert operator.run("job", "reclaim", image_id)[0] == 1
    world.delete_image(other_id)


def test_reclaim_without_the_right_to_fence(operator: Operator, world: World) -> None:
    """The missing right is named, and nothing is changed."""
    disk = operator.disk()
    image_id = world.new_record(disk.name)
    engine = operator.engine("dead-host")
    engine.reserve_clone(image_id, disk.name, operator.images)
    engine.perform(image_id, None, unheard)
    caps = world.caps(f"client.{operator.user}")
    world.set_caps(f"client.{operator.user}", {**caps, "mon": "allow r"})
    before = operator.picture()
    code, (row,), _ = operator.run("job", "reclaim", image_id)
    assert (code, row["Action"]) == (1, "kept")
    assert "mon 'profile rbd'" in row["Why"]
    assert operator.picture() == before
    assert world.status(image_id) == "queued"
    world.set_caps(f"client.{operator.user}", caps)
    assert operator.run("job", "reclaim", image_id)[0] == 0
