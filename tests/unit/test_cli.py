# SPDX-License-Identifier: Apache-2.0
"""The command line: what it prints, what it changes, and how it fails."""

from __future__ import annotations

import configparser
import importlib
import json
import logging
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import pytest

from nova_rbd_snap import errors
from nova_rbd_snap.cli import __main__ as cli
from nova_rbd_snap.cli import commands
from nova_rbd_snap.engine import wiring
from nova_rbd_snap.flatten import task
from nova_rbd_snap.ledger.job import AT_WORK, BACKGROUND, FLATTEN, INLINE, NEVER
from nova_rbd_snap.ledger.store import OBJECT, Ledger
from nova_rbd_snap.specs import ImageSpec
from tests.fakes.cluster import FakeCluster
from tests.fakes.engine import COPY, DEST, DISK, SERVER, clone, delete_image, freeze, image, in_thread, make_engine
from tests.fakes.sweep import (
    HOUR,
    LEAKED,
    NOW,
    STOCK,
    World,
    died_before_registration,
    flatten_failed,
    ours_without_a_record,
    removal_failed,
)
from tests.waiting import eventually

SECRET = "hunter2-is-a-secret"
CLOUD = "http://127.0.0.1:1/v3"
NOVA_CONF = f"""
[libvirt]
images_rbd_pool = vms
snapshots_directory = /nowhere/snapshots
[rbd_snap]
glance_pool = images
operation_timeout = 5
[placement]
auth_type = password
auth_url = {CLOUD}
[service_user]
auth_type = password
auth_url = {CLOUD}
username = nova
password = {SECRET}
project_name = service
user_domain_id = default
project_domain_id = default
"""


class Shell:
    """Runs commands in this process."""

    def __init__(self, world: World, conf: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.world, self.conf, self._capsys = world, conf, capsys
        self.out = self.err = ""

    def __call__(self, *words: str, conf: Optional[Path] = None) -> int:
        """Exit code of the command; what it printed is in ``out`` and ``err``."""
        self._capsys.readouterr()
        sys.argv = ["nova-rbd-snap", "--config-file", str(conf or self.conf), *words]
        try:
            code = cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        self.out, self.err = self._capsys.readouterr()
        assert "Traceback" not in self.out + self.err
        assert SECRET not in self.out + self.err
        return code

    def rows(self) -> list[dict[str, Any]]:
        """What ``-f json`` printed."""
        found: list[dict[str, Any]] = json.loads(self.out)
        return found


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Shell]:
    world, conf = World(), tmp_path / "nova.conf"
    conf.write_text(NOVA_CONF)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(wiring, "need_bindings", lambda: None)
    monkeypatch.setattr(wiring, "connect", lambda settings, objects_at_once=None: world.cluster.another())
    monkeypatch.setattr(wiring, "glance", lambda nova_conf, settings: world.glance)
    monkeypatch.setattr("time.time", lambda: NOW)
    monkeypatch.setattr(task, "_READERS_SECONDS", 0.0)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield Shell(world, conf, capsys)
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)
    root.setLevel(level)


# -- sweep -----------------------------------------------------------------------------------------------------------


def test_dry_run_prints_the_plan_that_the_sweep_executes(shell: Shell) -> None:
    before = shell.world.cluster.picture()
    leaked = flatten_failed(shell.world) | ours_without_a_record(shell.world)
    dirty = shell.world.cluster.picture()
    assert shell("sweep", "--dry-run", "-f", "json") == 0
    planned = shell.rows()
    assert {(row["What"], row["Action"]) for row in planned} == {(what, "remove") for what in leaked}
    assert shell.world.cluster.picture() == dirty
    assert shell("sweep", "-f", "json") == 0
    assert [row["What"] for row in shell.rows()] == [row["What"] for row in planned]
    assert {row["Action"] for row in shell.rows()} == {"removed"}
    assert shell.world.cluster.picture() == before
    assert shell("sweep", "-f", "json") == 0
    assert shell.rows() == []


def test_table(shell: Shell) -> None:
    died_before_registration(shell.world)
    assert shell("sweep") == 0
    assert "| Kind " in shell.out
    assert f"| {LEAKED} " in shell.out
    assert "| trashed " in shell.out


def test_age_is_the_operators_to_say(shell: Shell) -> None:
    """In hours and fractions of them."""
    shell.world.cluster.now = NOW - 0.1 * HOUR
    removal_failed(shell.world)
    for hours, action in ((None, "keep"), ("0.2", "keep"), ("0.05", "remove"), ("0", "remove")):
        assert shell("sweep", "--dry-run", "-f", "json", *(("--older-than", hours) if hours else ())) == 0
        assert [row["Action"] for row in shell.rows()] == [action]


@pytest.mark.parametrize("hours", ["-1", "nan", "inf", "day", ""])
def test_age_that_is_none(shell: Shell, hours: str) -> None:
    removal_failed(shell.world)
    assert shell("sweep", f"--older-than={hours}") == 2
    assert "no number of hours" in shell.err
    assert shell.world.cluster.snaps(DISK)


def test_pools_of_glances(shell: Shell) -> None:
    """Those of the configuration and of the options, each once."""
    for pool in ("images", "elsewhere"):
        shell.world.cluster.create_disk(type(LEAKED)(pool, LEAKED.name))
    shell.world.cluster.create_disk(type(LEAKED)("elsewhere", "22222222-2222-4222-8222-000000000001"))

    def found(*words: str, conf: Optional[Path] = None) -> set[str]:
        assert shell("sweep", "--dry-run", "-f", "json", *words, conf=conf) == 0
        return {row["What"] for row in shell.rows()}

    assert found() == {f"images/{LEAKED.name}"}
    both = {f"images/{LEAKED.name}", f"elsewhere/{LEAKED.name}"}
    assert found("--glance-pool", "elsewhere", "--glance-pool", "images") == both
    without = shell.conf.with_name("without.conf")
    without.write_text(NOVA_CONF.replace("glance_pool", "#glance_pool"))
    assert found(conf=without) == {"Glance's pool"}
    assert found("--glance-pool", "elsewhere", conf=without) == {f"elsewhere/{LEAKED.name}"}
    assert shell("sweep", "--glance-pool", "typo") == 2
    assert "typo" in shell.err


def test_what_was_to_go_and_stays_is_the_exit_code(shell: Shell) -> None:
    flatten_failed(shell.world)
    ours_without_a_record(shell.world)
    shell.world.cluster.hold(LEAKED, float("inf"))
    assert shell("sweep", "-f", "json") == 1
    assert {row["What"]: row["Action"] for row in shell.rows()} == {
        str(LEAKED): "kept",
        str(DISK.snap(STOCK)): "kept",
        **{str(DISK.snap(f"nova-rbd-snap-{job}")): "removed" for job in (DEST.name, COPY)},
    }


def test_what_is_kept_by_plan_is_no_failure(shell: Shell) -> None:
    snap = removal_failed(shell.world)
    shell.world.cluster.clone(DISK.snap(STOCK), type(DISK)("elsewhere", "somebody's"), None)
    assert shell("sweep", "-f", "json") == 0
    assert {(row["What"], row["Action"]) for row in shell.rows()} == {(snap.pop(), "kept")}


def test_interrupted(shell: Shell) -> None:
    """What was done is told; what was not done is not done."""
    ours_without_a_record(shell.world)
    shell.world.cluster.fail_on("remove_snap_by_id", KeyboardInterrupt, nth=2)
    assert shell("sweep", "-f", "json") == 1
    assert [row["Action"] for row in shell.rows()] == ["removed"]
    assert "interrupted" in shell.err
    assert len(shell.world.cluster.snaps(DISK)) == 1


def test_mistake_of_ours_amid_a_sweep(shell: Shell) -> None:
    """What was done until then is told."""
    ours_without_a_record(shell.world)
    shell.world.cluster.fail_on("remove_snap_by_id", ZeroDivisionError, nth=2)
    assert shell("sweep", "-f", "json") == 1
    assert [row["Action"] for row in shell.rows()] == ["removed"]
    assert "ZeroDivisionError" in shell.err


def test_without_credentials(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """The images are kept with that reason, the rest is swept; nothing secret is printed, however talkative."""
    monkeypatch.undo()
    world = shell.world
    monkeypatch.setattr(wiring, "need_bindings", lambda: None)
    monkeypatch.setattr(wiring, "connect", lambda settings, objects_at_once=None: world.cluster.another())
    died_before_registration(world)
    ours_without_a_record(world)
    bad = shell.conf.with_name("bad.conf")
    for text in ("", "[service_user]\nauth_type = nonsense\n", "[service_user]\ntimeout = soon\n"):
        bad.write_text(NOVA_CONF + text)
        assert shell("--debug", "-vv", "sweep", "--dry-run", "-f", "json", conf=bad) == 0
        (row,) = (row for row in shell.rows() if row["Kind"] == "image")
        assert (row["What"], row["Action"]) == ("images", "keep")
    assert shell("sweep", "-f", "json") == 0
    assert [row["Action"] for row in shell.rows()] == ["kept", "removed", "removed"]
    assert world.cluster.exists(LEAKED)


# -- job list --------------------------------------------------------------------------------------------------------


def test_jobs_are_listed(shell: Shell) -> None:
    """With whose they are, where they are, and what could not be undone; strange ones, too."""
    cluster = shell.world.cluster
    engine = make_engine(cluster)
    clone(engine)
    freeze(engine)
    cluster.omap_replace("vms", OBJECT, "key", None, '{"version": 2}')
    before = cluster.picture()
    assert shell("job", "list", "-f", "json") == 0
    rows = {row["ID"]: row for row in shell.rows()}
    assert rows.keys() == {DEST.name, COPY, "key"}
    client = Ledger(cluster, "vms").load(COPY).owner.client
    assert rows[COPY] == {
        "ID": COPY,
        "Kind": "freeze",
        "Step": "ready",
        "Percent": 0,
        "Disk": str(DISK),
        "Host": "compute-1",
        "Cloud": "",
        "Client": client,
        "Hours": round(NOW / HOUR, 1),
        "Left": "",
    }
    assert rows["key"]["Kind"] == "strange record"
    assert "version 2" in rows["key"]["Left"]
    assert cluster.picture() == before


def test_no_ledger(shell: Shell) -> None:
    assert shell("job", "list", "-f", "json") == 0
    assert shell.rows() == []


@pytest.mark.parametrize("command", [("job", "list"), ("sweep", "--dry-run")])
@pytest.mark.parametrize("formatter", ["table", "json", "value", "csv"])
def test_names_do_not_reach_the_terminal_raw(shell: Shell, command: tuple[str, ...], formatter: str) -> None:
    """A key of the ledger may hold anything."""
    shell.world.cluster.omap_replace("vms", OBJECT, "\x1b]0;owned\x07\nsecond line\u202e", None, "\x9b2J")
    assert shell(*command, "-f", formatter) == 0
    assert "owned" in shell.out
    assert all(char.isprintable() or char == "\n" for char in shell.out.replace("\r\n", "\n"))
    assert "\nsecond" not in shell.out


# -- job reclaim -----------------------------------------------------------------------------------------------------


class Glances:
    """Glance as the engine asks it: one answer for every image."""

    def __init__(self, uses: Optional[bool]) -> None:
        self.uses = lambda image_id, url: uses
        self.settle = lambda image_id, url, server: uses


def left_by_another_host(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, uses: Optional[bool], cloud: str = CLOUD
) -> FakeCluster:
    """A clone that awaits its registration and a frozen disk; returns the connection of the engine that made them."""
    monkeypatch.setattr("nova_rbd_snap.openstack.registration.Images", lambda *more: Glances(uses))
    dead = shell.world.cluster.another()
    engine = make_engine(shell.world.cluster, host="dead", cloud=cloud, connect=lambda: dead)
    clone(engine)
    freeze(engine)
    return dead


def test_named_jobs_are_ended(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others are not; exactly the client that worked on them is cut off."""
    cluster = shell.world.cluster
    before = cluster.picture()
    dead = left_by_another_host(shell, monkeypatch, uses=False)
    assert shell("job", "reclaim", DEST.name, "-f", "json") == 0
    assert shell.rows() == [{"ID": DEST.name, "Action": "ended", "Why": ""}]
    assert [job.id for job in Ledger(cluster, "vms").read().jobs] == [COPY]
    assert cluster.fenced == {dead.address()}
    assert shell("job", "reclaim", COPY, COPY) == 0
    assert cluster.picture() == before


def test_jobs_that_stay(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is told why, the others are ended all the same, and the exit code says that not all went."""
    left_by_another_host(shell, monkeypatch, uses=None)
    shell.world.cluster.omap_replace("vms", OBJECT, "strange", None, "{}")
    assert shell("job", "reclaim", DEST.name, "typo", "strange", COPY, "-f", "json") == 1
    actions = {row["ID"]: row["Action"] for row in shell.rows()}
    assert actions == {DEST.name: "kept", "typo": "none", "strange": "none", COPY: "kept"}
    # Given back: its own nova-compute may know more one day.
    assert Ledger(shell.world.cluster, "vms").load(DEST.name).owner.host == "dead"
    assert all(row["Why"] for row in shell.rows())


def test_jobs_of_another_cloud_are_not_ended(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """This one's Glance says truly that it knows no such image; unless they are said to be this one's, after all."""
    before = shell.world.cluster.picture()
    left_by_another_host(shell, monkeypatch, uses=False, cloud="http://elsewhere/v3 West")
    left = shell.world.cluster.picture()
    assert shell("job", "reclaim", DEST.name, COPY, "-f", "json") == 1
    assert {row["Action"] for row in shell.rows()} == {"kept"}
    assert "http://elsewhere/v3 West" in shell.rows()[0]["Why"]
    assert shell.world.cluster.picture() == left
    assert shell.world.cluster.fenced == set()
    assert shell("job", "reclaim", "--cloud", "http://elsewhere/v3 West", DEST.name, COPY) == 0
    assert shell.world.cluster.picture() == before


def test_operator_who_loses_patience_gives_the_job_back(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was done until then is told."""
    left_by_another_host(shell, monkeypatch, uses=False)
    shell.world.cluster.fail_on("unprotect_snap", KeyboardInterrupt)
    assert shell("job", "reclaim", COPY, DEST.name, "-f", "json") == 1
    assert [(row["ID"], row["Action"]) for row in shell.rows()] == [(COPY, "ended")]
    assert Ledger(shell.world.cluster, "vms").load(DEST.name).owner.host == "dead"


def test_no_job_is_named(shell: Shell) -> None:
    assert shell("job", "reclaim") == 2


# -- how it fails ----------------------------------------------------------------------------------------------------

EACH = pytest.mark.parametrize("command", [("sweep",), ("job", "list"), ("job", "reclaim", DEST.name)], ids=" ".join)


@EACH
@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[rbd_snap]\noperation_timeout = soon\n", "[rbd_snap] operation_timeout"),
        ("no section\n", "cannot be read"),
        (None, "Failed to find"),
    ],
)
def test_bad_configuration(shell: Shell, command: tuple[str, ...], text: Optional[str], complaint: str) -> None:
    conf = shell.conf.with_name("bad.conf")
    if text:
        conf.write_text(text)
    assert shell(*command, conf=conf) == 2
    assert complaint in shell.err
    assert shell.out == ""


@EACH
def test_no_configuration(shell: Shell, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]) -> None:
    """It would look for Ceph's defaults, which are not Nova's."""
    monkeypatch.setattr("oslo_config.cfg.find_config_files", lambda *more, **most: [])
    monkeypatch.setattr("oslo_config.cfg.find_config_dirs", lambda *more, **most: [])
    monkeypatch.setattr(sys, "argv", ["nova-rbd-snap", *command])
    assert cli.main() == 2


@EACH
def test_no_cluster(shell: Shell, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]) -> None:
    """Cause and remedy."""

    def silent(settings: object) -> None:
        raise errors.Unreachable("connect to Ceph: timed out")

    monkeypatch.setattr(wiring, "connect", silent)
    assert shell(*command) == 2
    assert "timed out" in shell.err
    assert "remedy" in shell.err


@EACH
def test_no_bindings(shell: Shell, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]) -> None:
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "rados", None)
    assert shell(*command) == 2
    assert "python3-rados" in shell.err


def test_no_cliff(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "cliff" or name == "nova_rbd_snap.cli.app"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert shell("sweep") == 2
    assert "install cliff" in shell.err


@EACH
def test_mistake_of_ours(shell: Shell, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]) -> None:
    """Is told in one line, too, unless a traceback is asked for."""

    def broken(settings: object) -> None:
        raise ZeroDivisionError("oops\x1b[2J")

    monkeypatch.setattr(wiring, "connect", broken)
    assert shell(*command) == 2
    assert "ZeroDivisionError: oops" in shell.err
    assert "\x1b" not in shell.err


@pytest.mark.parametrize("command", [("sweep",), ("job", "reclaim", DEST.name)])
def test_unknown_column_is_refused_before_anything_is_done(shell: Shell, command: tuple[str, ...]) -> None:
    ours_without_a_record(shell.world)
    clone(make_engine(shell.world.cluster), image_id="22222222-2222-4222-8222-000000000003")
    before = shell.world.cluster.picture()
    assert shell(*command, "-c", "Colour") == 2
    assert "Colour" in shell.err
    assert shell.world.cluster.picture() == before
    assert shell("sweep", "--dry-run", "-c", "what", "-c", "Action", "-f", "value") == 0
    assert len(shell.out.splitlines()) == 3


@pytest.mark.parametrize("words", [("--help",), ("sweep", "--help"), ("help", "job", "reclaim")])
def test_help(shell: Shell, words: tuple[str, ...]) -> None:
    assert shell(*words) == 0
    assert "usage" in shell.out


@pytest.mark.parametrize("words", [(), ("-v",), ("swep",), ("job",), ("job", "reclaim")])
def test_no_command(shell: Shell, words: tuple[str, ...]) -> None:
    """No prompt opens either."""
    assert shell(*words) == 2


def test_script_is_installed() -> None:
    """The entry point names what is there."""
    parsed = configparser.ConfigParser()
    parsed.read(Path(__file__).parents[2] / "setup.cfg")
    name, _, target = parsed["entry_points"]["console_scripts"].strip().partition(" = ")
    module, _, function = target.partition(":")
    assert name == "nova-rbd-snap"
    assert callable(getattr(importlib.import_module(module), function))


def test_each_command_says_what_it_is_for() -> None:
    for name, command in commands.COMMANDS.items():
        assert command.__doc__
        assert name == "worker" or command.columns


# -- images that are not flat -----------------------------------------------------------------------------------------


def make_image(shell: Shell, policy: str = NEVER, image_id: str = DEST.name) -> ImageSpec:
    engine = make_engine(shell.world.cluster, flatten=policy, cloud=CLOUD)
    clone(engine, image_id=image_id)
    engine.finish(image_id)
    return ImageSpec(DEST.pool, image_id)


def states(shell: Shell) -> dict[str, str]:
    assert shell("image", "list", "-f", "json") == 0
    return {row["ID"]: row["State"] for row in shell.rows()}


def test_image_list(shell: Shell) -> None:
    """What depends on a server's disk, how deep, and what becomes of it; flat images are not listed."""
    never, background = make_image(shell), make_image(shell, BACKGROUND, image(2))
    make_image(shell, INLINE, image(3))
    assert shell("image", "list", "-f", "json") == 0
    rows = {row["ID"]: row for row in shell.rows()}
    assert rows.keys() == {never.name, background.name}
    assert (rows[never.name]["Disk"], rows[never.name]["Depth"], rows[never.name]["State"]) == (str(DISK), 2, "shared")
    assert rows[background.name]["State"] == "queued"
    ledger = Ledger(shell.world.cluster, DISK.pool)
    ledger.advance(ledger.load(background.name), step=AT_WORK, percent=40)
    assert states(shell)[background.name] == "40 % flat"
    # The disk of a server that was deleted is still told.
    make_engine(shell.world.cluster).remove_disks(SERVER)
    assert shell("image", "list", "-f", "json") == 0
    assert {row["Disk"] for row in shell.rows()} == {str(DISK)}


@pytest.mark.parametrize("words", [["--all"], [DEST.name]])
def test_image_flatten(shell: Shell, words: list[str]) -> None:
    """What is named is queued, once; workers of the cloud take it."""
    make_image(shell)
    make_image(shell, image_id=image(2))
    assert shell("image", "flatten", *words, "-f", "json") == 0
    queued = {DEST.name, image(2)} if words == ["--all"] else {DEST.name}
    assert {row["ID"] for row in shell.rows()} == queued
    assert {name for name, state in states(shell).items() if state == "queued"} == queued
    assert shell("image", "flatten", *words, "-f", "json") == 0
    assert {row["Action"] for row in shell.rows()} == {"none"}
    working = make_engine(shell.world.cluster, cloud=CLOUD)
    flattening = in_thread(working.upkeep.keep_working, FLATTEN)
    eventually(lambda: not Ledger(shell.world.cluster, DISK.pool).read().jobs, "all is flat", pause=0.01)
    working.stop(30)
    flattening.result(30)
    assert states(shell).keys() == {DEST.name, image(2)} - queued


def test_image_that_cannot_be_flattened(shell: Shell) -> None:
    """It is told, and the exit code says so."""
    make_image(shell, INLINE)
    assert shell("image", "flatten", DEST.name, "-f", "json") == 1
    assert shell.rows()[0]["Action"] == "none"
    assert shell("image", "flatten") == 2


def test_which_pool_is_glances(shell: Shell, tmp_path: Path) -> None:
    """It must be told: images are looked for where they are."""
    make_image(shell)
    conf = tmp_path / "other.conf"
    conf.write_text(NOVA_CONF.replace("glance_pool = images", ""))
    assert shell("image", "list", conf=conf) == 2
    assert "--glance-pool" in shell.err
    assert shell("image", "list", "--glance-pool", "images", "-f", "json", conf=conf) == 0
    assert [row["ID"] for row in shell.rows()] == [DEST.name]


def test_trash(shell: Shell) -> None:
    """A disk in the trash is listed with the images that need it, and purged once none does."""
    cluster, dest = shell.world.cluster, make_image(shell)
    make_engine(cluster).remove_disks(SERVER)
    assert shell("trash", "purge", "-f", "json") == 0
    assert shell.rows() == []
    assert shell("trash", "list", "-f", "json") == 0
    (row,) = shell.rows()
    assert (row["Name"], row["Needed by"], row["Kept until"]) == (DISK.name, str(dest), "no image needs it")
    delete_image(cluster, dest)
    assert shell("trash", "purge", "-f", "json") == 0
    assert [(DISK.name in row["What"], row["Action"]) for row in shell.rows()] == [(True, "removed")]
    assert cluster.trashed(DISK.pool) == []


IMAGES = "profile rbd pool=images"
GLANCE = f"ceph auth caps client.glance mon 'profile rbd' osd '{IMAGES}{{more}}' mgr '{IMAGES}'"


@pytest.mark.parametrize(("policy", "more"), [(INLINE, ""), (BACKGROUND, ", profile rbd-read-only pool=vms")])
def test_caps(shell: Shell, tmp_path: Path, policy: str, more: str) -> None:
    """What each user needs, and no more; who reads images reads Nova's pool only where they are not flat at once."""
    conf = tmp_path / "other.conf"
    conf.write_text(NOVA_CONF.replace("[libvirt]", "[libvirt]\nrbd_user = nova"))
    assert shell("caps", "--policy", policy, "--reader", "cinder:volumes", "-f", "json", conf=conf) == 0
    told = {row["User"]: row["Command"] for row in shell.rows()}
    assert told.keys() == {"nova", "glance", "cinder"}
    assert told["glance"] == GLANCE.format(more=more)
    assert "osd 'profile rbd pool=vms, profile rbd pool=images'" in told["nova"]
    assert f"osd 'profile rbd pool=volumes, profile rbd-read-only pool=images{more}'" in told["cinder"]


def test_caps_of_the_administrator(shell: Shell) -> None:
    """They are never taken away: without rbd_user nova-compute is client.admin."""
    assert shell("caps", "-f", "json") == 0
    assert {row["User"] for row in shell.rows()} == {"glance"}


def test_caps_in_another_cluster(shell: Shell, tmp_path: Path) -> None:
    """There, of the user that copies are made as."""
    conf = tmp_path / "other.conf"
    options = "glance_ceph_conf = /far.conf\nglance_rbd_user = nova-far\nglance_pool = far-images\n"
    conf.write_text(NOVA_CONF.replace("glance_pool = images\n", options))
    assert shell("caps", "-f", "json", conf=conf) == 0
    (row,) = shell.rows()
    needed = "profile rbd pool=far-images"
    command = f"ceph --conf /far.conf auth caps client.nova-far mon 'profile rbd' osd '{needed}' mgr '{needed}'"
    assert (row["User"], row["Command"]) == ("nova-far", command)


@pytest.mark.parametrize("words", [["--reader", "cinder"], ["--reader", ":volumes"], ["--policy", "later"]])
def test_caps_that_make_no_sense(shell: Shell, words: list[str]) -> None:
    assert shell("caps", *words) == 2


def test_worker(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """It flattens what is queued, until it is told to end."""
    make_image(shell, BACKGROUND)
    handlers: dict[int, Any] = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    watching = threading.Thread(target=_end_when_flat, args=[shell.world.cluster, handlers])
    watching.start()
    assert shell("worker") == 0
    watching.join(30)
    assert states(shell) == {}


def test_worker_without_a_configuration(shell: Shell, tmp_path: Path) -> None:
    """As any command."""
    conf = tmp_path / "other.conf"
    conf.write_text(NOVA_CONF.replace("operation_timeout = 5", "operation_timeout = soon"))
    assert shell("worker", conf=conf) == 2
    assert "operation_timeout" in shell.err


def _end_when_flat(cluster: FakeCluster, handlers: dict[int, Any]) -> None:
    eventually(lambda: not Ledger(cluster, DISK.pool).read().jobs, "the image is flat", pause=0.01)
    handlers[signal.SIGTERM]()
