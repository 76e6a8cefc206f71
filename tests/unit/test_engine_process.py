# SPDX-License-Identifier: Apache-2.0
"""The engine's real process and socket, from nova-compute's end; only its cluster is a fake."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable

import pytest

from nova_rbd_snap import errors
from nova_rbd_snap.engine import client as client_module
from nova_rbd_snap.engine import wire
from nova_rbd_snap.engine.client import EngineClient
from tests.fakes.engine import COPY, DEST, DISK, ENDLESS, SERVER, Reports, UntilFlattening, clone, freeze, image
from tests.waiting import eventually

REPO = Path(__file__).resolve().parent.parent.parent
BOUND_SECONDS = 60
FAKE_ENGINE = (sys.executable, "-m", "tests.fakes.engine_main")

Start = Callable[..., EngineClient]


@pytest.fixture(autouse=True)
def _in_the_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Child processes find the tests and the package; waiting is cut short."""
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    monkeypatch.setattr(client_module, "_BACK_OFF_SECONDS", (0.01, 0.02))


@pytest.fixture
def start() -> Iterator[Start]:
    """Makes clients of the fake engine, and ends what they started."""
    clients = []

    def make(*arguments: str, patience_seconds: float = BOUND_SECONDS, **more: Any) -> EngineClient:
        more = {"host": "compute-1", "machine": "machine-1", "command": FAKE_ENGINE, **more}
        clients.append(EngineClient(arguments, patience_seconds=patience_seconds, **more))
        return clients[-1]

    yield make
    for client in clients:
        if client.pid:
            os.kill(client.pid, signal.SIGKILL)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """Where an engine writes what its pools look like when it ends."""
    return tmp_path / "picture"


def pools(picture: Path) -> tuple[str, str]:
    """What an engine that ended left: its pools before and after."""
    eventually(picture.exists, "the engine ends", pause=0.01)
    found = json.loads(picture.read_text())
    return found["before"], found["after"]


# -- starting ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("rados") is not None, reason="this Python has Ceph's bindings")
def test_engine_without_bindings(start: Start, tmp_path: Path) -> None:
    """The real engine, where Ceph's bindings are missing, says which packages to install for which Python."""
    (tmp_path / "nova.conf").write_text("")
    client = start("--config-file", str(tmp_path / "nova.conf"), command=(sys.executable, "-m", "nova_rbd_snap.engine"))
    with pytest.raises(errors.EngineUnavailable, match="python3-rados and python3-rbd") as caught:
        client.check()
    assert sys.executable in str(caught.value)
    assert client.pid is None


@pytest.mark.parametrize("command", [("false",), ("true",), (sys.executable, "-m", "no_such_module")])
def test_engine_that_ends_at_once(start: Start, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]) -> None:
    """It is reported as not available, and not started over and over: until the pause is over the next call only says
    that it waits."""
    monkeypatch.setattr(client_module, "_BACK_OFF_SECONDS", (1000, 1000))
    client = start(command=command)
    with pytest.raises(errors.EngineUnavailable, match="cannot be started"):
        client.check()
    with pytest.raises(errors.EngineUnavailable, match="tried again in"):
        client.check()


def test_command_that_does_not_exist(start: Start) -> None:
    """An interpreter that is not there is an engine that cannot be started, nothing else."""
    with pytest.raises(errors.EngineUnavailable, match="no-such-python"):
        start(command=("no-such-python",)).check()


def test_two_versions_part(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine of another protocol version refuses, and says that nova-compute wants a restart."""
    monkeypatch.setattr(wire, "VERSION", wire.VERSION + 1)
    with pytest.raises(errors.EngineUnavailable, match="restart nova-compute"):
        start().check()


# -- calls -------------------------------------------------------------------------------------------------------------


def test_calls_and_errors_cross_the_socket(start: Start) -> None:
    """Results arrive as the engine gave them, errors as what they were, all from one process."""
    client = start()
    assert client.describe(DISK.name)["parent_pool"] == "images"
    pid = client.pid
    assert client.check() == []
    assert clone(client).endswith(f"/{DEST.name}/snap")
    with pytest.raises(errors.Missing, match="no-such-disk"):
        clone(client, image_id=image(1), disk="no-such-disk")
    with pytest.raises(errors.LedgerConflict, match=DEST.name):
        clone(client)
    client.finish(DEST.name)
    assert freeze(client) == f"nova-rbd-snap-{COPY}"
    assert client.cancel(SERVER) == [COPY]
    assert client.rollback(COPY) is False
    with pytest.raises(errors.NoRecord):
        client.finish(DEST.name)
    assert client.pid == pid


def test_concurrent_calls_keep_apart(start: Start) -> None:
    """Many at once in one engine: each gets its own answer and all of its own progress."""
    client = start()

    def one(number: int) -> tuple[str, list[str]]:
        report = Reports()
        url = clone(client, report, image_id=image(number))
        client.finish(image(number))
        return url, list(dict.fromkeys(report.steps))

    with ThreadPoolExecutor(20) as pool:
        outcomes = list(pool.map(one, range(20)))
    assert [url.split("/")[-2] for url, _ in outcomes] == [image(number) for number in range(20)]
    assert {tuple(steps) for _, steps in outcomes} == {("snap", "clone", "flatten", "seal")}


def test_engines_log_is_nova_computes(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    """What the engine logs stands in nova-compute's log, under the engine's own names."""
    client = start("--denied", "remove", "--stuck", "none")
    with caplog.at_level(logging.INFO):
        clone(client)
        with pytest.raises(errors.SnapError, match="could not be undone") as caught:
            client.rollback(DEST.name)
        eventually(lambda: "nova_rbd_snap.snapshot.saga" in {record.name for record in caplog.records}, "it is logged")
    assert caught.value.undo_failures
    assert "could not undo clone" in caplog.text


def test_slow_call_that_moves_is_let_be(start: Start) -> None:
    """Progress starts patience anew: a flatten may take longer than that as long as it moves."""
    client = start("--slow-seconds", "6", patience_seconds=4)
    assert clone(client)


# -- an engine that ends -----------------------------------------------------------------------------------------------


def test_stuck_engine_is_ended(start: Start) -> None:
    """No progress: the process is ended, every call in it fails, the one that waited says in which step; the next call
    has a new process."""
    client = start("--stuck", "flatten", patience_seconds=5)
    with pytest.raises(errors.EngineStuck, match="'flatten'"):
        clone(client)
    assert client.pid is None
    assert client.check() == []


def test_killed_engine(start: Start) -> None:
    """kill -9: all calls in it fail at once, each naming its step; the next call has a new process."""
    client = start()
    client.check()
    pid = client.pid
    reports = [UntilFlattening() for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        calls = [
            pool.submit(clone, client, report, image(number), ENDLESS) for number, report in enumerate(reports)
        ]
        for report in reports:
            assert report.reached.wait(BOUND_SECONDS)
        os.kill(pid, signal.SIGKILL)
        for call in calls:
            with pytest.raises(errors.EngineLost, match="'flatten'"):
                call.result(BOUND_SECONDS)
    assert client.check() == []
    assert client.pid not in (None, pid)


def test_engine_is_kept_running(start: Start) -> None:
    """One that ended is started again though nobody calls: it has work of its own."""
    client = start()
    threading.Thread(target=client.keep_running, daemon=True).start()
    eventually(lambda: client.pid, "an engine runs", pause=0.01)
    pid = client.pid
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: client.pid not in (None, pid), "another engine runs", pause=0.01)
    client._start = sys.exit  # else it would start one after the other until all tests are over


def test_next_engine_leaves_alone_what_we_have_the_say_about(start: Start, tmp_path: Path) -> None:
    """It is told what we hold, and of nothing else does it hear that it is ours to end."""
    client = start()
    client.reserve_clone(DEST.name, DISK.name, DEST.pool)
    hello = tmp_path / "hello"
    client._command = (sys.executable, "-c", _RECORDS_HELLO, str(hello))
    pid = client.pid
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: client.pid != pid, "the engine is gone", pause=0.01)
    with pytest.raises(errors.EngineUnavailable):
        client.check()
    assert json.loads(hello.read_text())["held"] == [DEST.name]


#: An engine that writes down what it is told first, and ends.
_RECORDS_HELLO = """
import json, pathlib, socket, sys
from nova_rbd_snap.engine import wire

end = socket.socket(fileno=int(sys.argv[-1]))
hello = wire.receive(end)
pathlib.Path(sys.argv[1]).write_text(json.dumps(hello))
"""


def test_socket_is_nobody_elses(start: Start) -> None:
    """No other child of ours gets an end of it, and it has no name by which anybody could reach it."""
    client = start()
    client.check()
    ours = client._process._socket
    assert ours.getsockname() == ours.getpeername() == ""
    listed = subprocess.run(["ls", "-l", "/proc/self/fd"], capture_output=True, text=True, check=True).stdout
    assert f"socket:[{os.fstat(ours.fileno()).st_ino}]" not in listed
    assert not os.get_inheritable(ours.fileno())


def test_sigterm_undoes_and_ends(start: Start, picture: Path) -> None:
    """Told to end, the engine cancels what runs, tells its caller, leaves nothing, and ends."""
    client, report = start("--picture", str(picture)), UntilFlattening()
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(clone, client, report, disk=ENDLESS)
        assert report.reached.wait(BOUND_SECONDS)
        os.kill(client.pid, signal.SIGTERM)
        with pytest.raises(errors.Cancelled):
            call.result(BOUND_SECONDS)
    before, after = pools(picture)
    assert after == before
    eventually(lambda: client.pid is None, "the engine is gone", pause=0.01)


def takes_no_more_work(client: EngineClient) -> bool:
    with pytest.raises((errors.Missing, errors.Cancelled)) as caught:
        freeze(client, disk="11111111-1111-4111-8111-111111111112_disk")
    return isinstance(caught.value, errors.Cancelled)


def test_sigterm_waits_for_what_is_ready(start: Start, picture: Path) -> None:
    """What awaits registration may still be finished by nova-compute; then the process ends."""
    client = start("--picture", str(picture), "--registered", "no")
    clone(client)
    os.kill(client.pid, signal.SIGTERM)
    eventually(lambda: takes_no_more_work(client), "the engine takes no work", pause=0.01)
    client.finish(DEST.name)
    before, after = pools(picture)
    assert DEST.name in after
    assert DEST.name not in before
    assert "nova-rbd-snap-" not in after


def test_sigterm_leaves_to_nova_compute_what_it_does_not_take(start: Start, picture: Path) -> None:
    """What nova-compute is not done with does not keep the engine, nor does it decide about that itself: Glance may be
    about to hold it. The next call starts another engine."""
    client = start("--picture", str(picture), "--registered", "no", "--take-seconds", "0.1")
    clone(client)
    pid = client.pid
    os.kill(pid, signal.SIGTERM)
    _, after = pools(picture)
    assert DEST.name in after
    assert "nova_rbd_snap.ledger" in after
    eventually(lambda: client.pid != pid, "the engine is gone", pause=0.01)
    assert client.check() == []


# -- a nova-compute that ends ------------------------------------------------------------------------------------------

_NOVA_COMPUTE = """
import sys
from nova_rbd_snap.engine.client import EngineClient

disk, *arguments = sys.argv[1:]
command = (sys.executable, "-m", "tests.fakes.engine_main")
client = EngineClient(arguments, host="compute-1", machine="machine-1", patience_seconds=60, command=command)

def report(step, done, total):
    if step == "flatten" and total:
        print("flattening", flush=True)

image_id = "22222222-2222-4222-8222-222222222222"
client.reserve_clone(image_id, disk, "images")
client.perform(image_id, None, report)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGTERM, None], ids=["kill -9", "terminated", "exit"])
@pytest.mark.parametrize(
    ("disk", "registered", "left"),
    [
        (ENDLESS, "yes", "nothing"),
        (DISK.name, "no", "nothing"),
        (DISK.name, "yes", "image"),
        (DISK.name, "unknown", "image and record"),
    ],
)
def test_nova_compute_dies(death: signal.Signals, disk: str, registered: str, left: str, picture: Path) -> None:
    """However nova-compute goes, its engine undoes what was under way and settles what was ready, and then ends.

    Who ran nova-compute reads no more what is left of it has to say.
    """
    nova_compute = subprocess.Popen(
        [sys.executable, "-c", _NOVA_COMPUTE, disk, "--picture", str(picture), "--registered", registered],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPO,
    )
    with nova_compute:
        wanted = "flattening" if disk == ENDLESS else "ready"
        assert any(line.strip() == wanted for line in nova_compute.stdout)
        nova_compute.stderr.close()
        if death is None and disk != ENDLESS:
            nova_compute.stdin.close()
        else:
            nova_compute.send_signal(death or signal.SIGKILL)
        before, after = pools(picture)
    assert (DEST.name in after, "nova_rbd_snap.ledger" in after) == (left != "nothing", left == "image and record")
    if left == "nothing":
        assert after == before


# -- what travels ------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_messages_arrive_whole(pair: tuple[socket.socket, socket.socket]) -> None:
    """Large ones and many in a row, in order, and None once the other end is gone."""
    ours, theirs = pair
    messages = [{"n": number, "text": "é" * number} for number in (0, 1, 100_000, 2)]

    def send() -> None:
        for message in messages:
            wire.send(ours, message)
        ours.close()

    threading.Thread(target=send, daemon=True).start()
    assert [wire.receive(theirs) for _ in messages] == messages
    assert wire.receive(theirs) is None


@pytest.mark.parametrize("data", [b"HTTP/1.1 200 OK\r\n\r\n", b"\0\0\0\4nope", b"\0\0\0\2\xff\xff"])
def test_garbage_is_told(pair: tuple[socket.socket, socket.socket], data: bytes) -> None:
    """What is no message is a ValueError, not a wait for ever."""
    ours, theirs = pair
    ours.sendall(data)
    with pytest.raises(ValueError, match=r".+"):
        wire.receive(theirs)


@pytest.mark.parametrize("data", [b"", b"\0\0", b"\0\0\0\4{}"])
def test_end_amid_a_message(pair: tuple[socket.socket, socket.socket], data: bytes) -> None:
    """An end that goes amid a message is an end that is gone."""
    ours, theirs = pair
    ours.sendall(data)
    ours.close()
    assert wire.receive(theirs) is None
