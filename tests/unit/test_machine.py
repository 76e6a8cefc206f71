# SPDX-License-Identifier: Apache-2.0
"""The local disk as it is: which of Nova's own copies go, and that nothing else does."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nova_rbd_snap import conf, errors
from nova_rbd_snap.cli.machine import LocalMachine
from nova_rbd_snap.janitor import leftovers
from nova_rbd_snap.janitor.findings import KEEP, REMOVE
from tests.fakes.sweep import FOLDER, HOUR, OLD, STOCK, World

digits = st.from_regex(r"[0-9a-f]{32}", fullmatch=True)

MOUNTS = "1 1 0:1 / / rw - overlay overlay rw\n"


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """Processes: ours, a shell, and whatever a test adds."""
    made = tmp_path / "proc"
    (made / "self/ns").mkdir(parents=True)
    (made / "self/mountinfo").write_text(MOUNTS)
    (made / "self/ns/pid").symlink_to("pid:[4026531836]")
    process(made, 10, ["/bin/sh", "-c", "cat nova-compute"], ["/dev/null", "socket:[123]"])
    return made


def process(proc: Path, pid: int, command: list[str], opened: list[str] = [], started: float = 0) -> None:  # noqa: B006
    folder = proc / str(pid)
    (folder / "fd").mkdir(parents=True)
    (folder / "cmdline").write_bytes(b"".join(word.encode() + b"\0" for word in command))
    ticks = int(started * os.sysconf("SC_CLK_TCK"))
    (folder / "stat").write_text(f"{pid} (a) b) c) S {' '.join(['1'] * 18)} {ticks} 1 1\n")
    for number, path in enumerate(opened):
        (folder / "fd" / str(number)).symlink_to(path)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "snapshots"
    made.mkdir()
    return made


def machine(directory: Optional[Path], proc: Path, user: int = 0) -> LocalMachine:
    return LocalMachine(str(directory) if directory else None, proc=proc, user=lambda: user, booted=lambda: OLD)


def copy_in(directory: Path, name: str = FOLDER, moment: float = OLD - HOUR) -> Path:
    folder = directory / name
    folder.mkdir()
    (folder / STOCK).write_text("disk")
    for path in (folder / STOCK, folder):
        os.utime(path, (moment, moment))
    return folder


def tree(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            yield str(path), os.readlink(path).encode()
        else:
            yield str(path), path.read_bytes() if path.is_file() else b""


def test_copy_on_a_real_disk(world: World, directory: Path, proc: Path) -> None:
    """The file and its folder go, and nothing beside them."""
    (directory / "keep").write_text("me")
    before = list(tree(directory))
    folder = copy_in(directory)
    process(proc, 11, ["/usr/bin/python3", "/usr/bin/nova-compute", "--config-file", "x"], started=HOUR)
    world.machine = machine(directory, proc)  # type: ignore[assignment]
    (outcome,) = world.sweep().values()
    assert (outcome.finding.what, outcome.done) == (str(folder / STOCK), True)
    assert list(tree(directory)) == before


@pytest.mark.parametrize("started", [-2 * HOUR, -HOUR])
def test_nova_is_older_than_the_copy(world: World, directory: Path, proc: Path, started: float) -> None:
    """Each of several counts; one that was installed anywhere, too."""
    copy_in(directory)
    process(proc, 11, ["/usr/bin/nova-compute"], started=2 * HOUR)
    process(proc, 12, ["/opt/nova/bin/python3", "-u", "/opt/nova/bin/nova-compute"], started=started)
    world.machine = machine(directory, proc)  # type: ignore[assignment]
    assert machine(directory, proc).nova_since() == pytest.approx(OLD + started)
    ((action, why),) = world.plan().values()
    assert (action, "may be of the nova-compute" in why) == (KEEP, True)


@pytest.mark.parametrize(
    "path", ["{folder}/{file}", "{folder}/{file} (deleted)", "{folder}", "/var/lib/nova/elsewhere/{name}/{file}"]
)
def test_a_process_has_it_open(world: World, directory: Path, proc: Path, path: str) -> None:
    """By whatever path it sees it."""
    folder = copy_in(directory)
    process(proc, 11, ["qemu-img"], [path.format(folder=folder, name=FOLDER, file=STOCK)])
    world.machine = machine(directory, proc)  # type: ignore[assignment]
    ((action, why),) = world.plan().values()
    assert (action, "has it open" in why) == (KEEP, True)


def test_a_real_process_has_it_open(directory: Path) -> None:
    """This one, as the kernel tells it."""
    folder = copy_in(directory)
    ours = LocalMachine(str(directory), user=lambda: 0)
    alone = LocalMachine(str(directory), user=lambda: 0)
    alone._processes = ours._processes = lambda: [Path(f"/proc/{os.getpid()}")]  # type: ignore[method-assign]
    assert not alone.is_open(FOLDER)
    with (folder / STOCK).open():
        assert ours.is_open(FOLDER)
    assert not ours.is_open(FOLDER)


@pytest.mark.parametrize("hide", ["user", "container"])
def test_who_does_not_see_every_process_removes_nothing(
    world: World, directory: Path, proc: Path, hide: str
) -> None:
    copy_in(directory)
    if hide == "container":
        (proc / "self/ns/pid").unlink()
        (proc / "self/ns/pid").symlink_to("pid:[4026532217]")
    world.machine = machine(directory, proc, user=0 if hide == "container" else 1000)  # type: ignore[assignment]
    ((action, why),) = world.plan().values()
    assert (action, "root" in why or "container" in why) == (KEEP, True)
    if hide == "container":
        process(proc, 11, ["nova-compute"], started=HOUR)
        assert [action for action, _ in world.plan().values()] == [REMOVE]


def test_disk_that_other_machines_write_to(world: World, directory: Path, proc: Path) -> None:
    """The mount that is nearest to the directory says what it is."""
    copy_in(directory)
    world.machine = machine(directory, proc)  # type: ignore[assignment]
    for kind, action in (("nfs4", KEEP), ("fuse.glusterfs", KEEP), ("ceph", KEEP), ("xfs", REMOVE)):
        near = f"2 1 0:2 / {str(directory.parent).replace(' ', chr(92) + '040')} rw shared:1 - {kind} x rw\n"
        (proc / "self/mountinfo").write_text(near + MOUNTS)
        assert [found for found, _ in world.plan().values()] == [action]


def test_no_directory(world: World, tmp_path: Path, proc: Path) -> None:
    """One that is not there holds nothing; one that is not known is told."""
    world.machine = machine(tmp_path / "none", proc)  # type: ignore[assignment]
    assert world.plan() == {}
    world.machine = machine(None, proc)  # type: ignore[assignment]
    ((action, why),) = world.plan().values()
    assert (action, "snapshots_directory" in why) == (KEEP, True)


def test_links_are_not_followed(world: World, directory: Path, proc: Path, tmp_path: Path) -> None:
    """Neither out of the directory, nor in a folder of it, nor when one takes a folder's place at the last moment."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / STOCK).write_text("data")
    os.utime(tmp_path / "precious" / STOCK, (OLD - HOUR, OLD - HOUR))
    os.utime(tmp_path / "precious", (OLD - HOUR, OLD - HOUR))
    (directory / "tmplink_dir").symlink_to(tmp_path / "precious")
    (directory / "tmplink_in1").mkdir()
    (directory / "tmplink_in1" / STOCK).symlink_to(tmp_path / "precious" / STOCK)
    copy_in(directory)
    world.machine = machine(directory, proc)  # type: ignore[assignment]
    scene = world.scene()
    plan = leftovers.plan(scene)
    assert [(finding.what, finding.action) for finding in plan.findings] == [(str(directory / FOLDER / STOCK), REMOVE)]
    (directory / FOLDER / STOCK).unlink()
    (directory / FOLDER).rmdir()
    (directory / FOLDER).symlink_to(tmp_path / "precious")
    (outcome,) = leftovers.execute(plan, scene)
    assert not outcome.done
    with pytest.raises(errors.SnapError):
        scene.machine.remove(FOLDER, (STOCK,))
    assert (tmp_path / "precious" / STOCK).read_text() == "data"


names = st.one_of(
    st.sampled_from([FOLDER, "tmp0000zzzz", "tmp", "tmpAAAAAAAA", "notes", STOCK, "tmp0000zzz"]),
    st.from_regex(r"tmp[0-9a-z_]{7,9}", fullmatch=True),
)
entries = st.one_of(digits, digits.map(lambda name: f"{name}.delta"), st.sampled_from(["notes", "disk.info", "link"]))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(names, st.dictionaries(entries, st.sampled_from(["file", "folder", "link"]), max_size=3)))
def test_innocent_files_survive(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, dict[str, str]]
) -> None:
    """Only a folder named as Nova's, with nothing but files named as Nova's, goes."""
    root = tmp_path_factory.mktemp("disk")
    directory, proc = root / "snapshots", root / "proc"
    (proc / "self/ns").mkdir(parents=True)
    (proc / "self/mountinfo").write_text(MOUNTS)
    (proc / "self/ns/pid").symlink_to("pid:[4026531836]")
    directory.mkdir()
    doomed = set()
    for name, files in content.items():
        (directory / name).mkdir()
        for file, kind in files.items():
            path = directory / name / file
            if kind == "file":
                path.write_text(file)
                os.utime(path, (0, 0))
            elif kind == "folder":
                path.mkdir()
            else:
                path.symlink_to(root)
        os.utime(directory / name, (0, 0))
        innocent = {file for file, kind in files.items() if kind != "file" or len(file) != 32}
        if re.fullmatch(r"tmp[0-9a-z_]{8}", name) and files and not innocent:
            doomed.add(name)
    before = list(tree(directory))
    world = World()
    world.machine = machine(directory, proc)  # type: ignore[assignment]
    world.sweep()
    paths = tuple(str(directory / name) for name in doomed)
    assert list(tree(directory)) == [
        (path, data) for path, data in before if not any(path == gone or path.startswith(f"{gone}/") for gone in paths)
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("[DEFAULT]\nstate_path = /var/lib/nova\n", "/var/lib/nova/instances/snapshots"),
        ("[DEFAULT]\ninstances_path = /srv\n", "/srv/snapshots"),
        ("[libvirt]\nsnapshots_directory = /srv/s\n", "/srv/s"),
        ("[libvirt]\nsnapshots_directory = $state_path/s\n", None),
        ("[DEFAULT]\nstate_path = /x\n[libvirt]\nsnapshots_directory = $state_path/s\n", "/x/s"),
    ],
)
def test_where_nova_copies_to(tmp_path: Path, text: str, expected: Optional[str]) -> None:
    """As Nova's own options say, or unknown where only Nova's package would tell."""
    path = tmp_path / "nova.conf"
    path.write_text(text)
    options = conf.load(["--config-file", str(path)])
    assert conf.Settings.read(options).snapshots_directory == expected
