# SPDX-License-Identifier: Apache-2.0
"""Instants of death, chosen by a seed, and what follows each: the restart, or a machine that never comes back."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import dataclass, field
from typing import Any, Optional

from nova_rbd_snap import errors
from tests.deaths import worker
from tests.deaths.scene import Scene
from tests.faults import recording
from tests.functional.world import CEPH_CONF, NOVA_CONF, TIMEOUT_SECONDS, World
from tests.waiting import eventually

REPO = pathlib.Path(__file__).parents[2]

ENGINE, NOVA_COMPUTE, BOTH = "the engine", "nova-compute", "both"

#: A second death comes within so many seconds of the first: while the first one's work is undone.
_SECOND_SECONDS = 3.0
_SECOND_SHARE = 0.3
#: An engine that is killed as it starts is started again after a minute.
_CLEAN_SECONDS = 150

#: Of the workers and their engines, over nova-compute's own configuration.
_CONFIG = """\
[libvirt]
images_rbd_ceph_conf = {ceph_conf}
[glance]
endpoint_override = http://127.0.0.1:9292
[rbd_snap]
operation_timeout = {timeout_seconds}
reclaim_interval = 1
"""
#: Flattens one object at a time, so that there are instants in the middle of it.
_CEPH_CONF = """
[client]
rbd concurrent management ops = 1
"""


#: What a snapshot does, one after the other, as the worker tells; and how many seconds each takes when nothing happens.
STEPS = ("asked", "reserved", "snap", "clone", "flatten", "seal", "register", "finish")
Seconds = dict[str, float]


@dataclass(frozen=True)
class Instant:
    """When who dies, and what then.

    :ivar step: in which the first death comes. Each is as likely as another, however short it is.
    :ivar moment: of the first death, as a part of the time that the step takes.
    :ivar second: seconds from then to the death of an engine, whichever is at work then; None for no second death.
    :ivar returns: whether there is a restart.
    :ivar guest: whether somebody writes to the disk.
    """

    number: int
    victim: str
    step: str
    moment: float
    second: Optional[float]
    returns: bool
    guest: bool

    @classmethod
    def choose(cls, seed: str, number: int) -> Instant:
        chance = random.Random(f"{seed} {number}")
        returns = number % 10 != 9
        victim = chance.choice((ENGINE, NOVA_COMPUTE, BOTH)) if returns else BOTH
        step, moment = chance.choice(STEPS), chance.uniform(0, 1.1)
        second = chance.uniform(0, _SECOND_SECONDS) if returns and chance.random() < _SECOND_SHARE else None
        return cls(number, victim, step, moment, second, returns, guest=number % 3 == 0)

    def __str__(self) -> str:
        text = f"{self.victim} killed in '{self.step}' after {self.moment:.2f} of it"
        if self.second is not None:
            text += f", an engine {self.second:.2f} s later"
        if not self.returns:
            text += ", for good"
        return text + (", a guest writing" if self.guest else "")


@dataclass
class Outcome:
    """What became of one instant.

    :ivar job_step: the job's when the first death came.
    :ivar wrong: what is not as promised.
    :ivar left: what of that is a leftover.
    :ivar request_seconds: from then until the request was over; None where that died with its nova-compute.
    :ivar clean_seconds: from then until nothing was left.
    """

    instant: Optional[Instant]
    job_step: str = ""
    status: Optional[str] = None
    wrong: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    request_seconds: Optional[float] = None
    clean_seconds: float = 0.0
    stall_seconds: float = 0.0


class Place:
    """Where the instants are played: the cloud, and the folder with configuration and logs."""

    def __init__(self, world: World, folder: pathlib.Path) -> None:
        self.world = world
        self.folder = folder
        self.token = world.tenant._adapter.get_token()
        ceph_conf = folder / "ceph.conf"
        ceph_conf.write_text(pathlib.Path(CEPH_CONF).read_text() + _CEPH_CONF)
        config = folder / "nova.conf.d"
        config.mkdir()
        text = _CONFIG.format(ceph_conf=ceph_conf, timeout_seconds=TIMEOUT_SECONDS)
        (config / "deaths.conf").write_text(text)
        self.config = ["--config-file", NOVA_CONF, "--config-dir", str(config)]

    def is_fenced(self, client: str) -> bool:
        """Whether the client with this address is blocklisted."""
        return client in self.world.tell_monitor("osd dump")["blocklist"]


class NovaCompute:
    """One life of ``worker.py`` on one machine, and of the engines it starts."""

    def __init__(self, place: Place, machine: str, log: Any, request: Optional[dict[str, str]] = None) -> None:
        identity = {"config": place.config, "host": f"deaths-{machine}", "machine": machine}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.deaths.worker", json.dumps({**identity, **(request or {})})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=REPO,
        )
        #: What it said, and when.
        self._said: list[tuple[float, dict[str, Any]]] = []
        self._engines: set[int] = set()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self._process.stdout:
            self._said.append((time.monotonic(), json.loads(line)))

    def _first(self, key: str, value: Any = None) -> Optional[tuple[float, dict[str, Any]]]:
        """The first message with *key*, and *value* if one is given, and when it came."""
        return next(((when, said) for when, said in self._said if key in said and value in (None, said[key])), None)

    def is_up(self) -> None:
        """Return once there is an engine."""
        _, said = eventually(lambda: self._first("engine"), "the worker is up", pause=0.05)
        self._engines.add(said["engine"])

    def ask(self) -> None:
        """Ask for the snapshot."""
        self._said.append((time.monotonic(), {"step": STEPS[0]}))
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def has_come_to(self, step: str) -> bool:
        return self._first("step", step) is not None

    def come_to(self, step: str) -> None:
        """Return when the snapshot has come to *step*, or is over."""
        eventually(lambda: self.has_come_to(step) or self._first("outcome"), f"it comes to {step}", pause=0.002)

    def outcome(self) -> dict[str, Any]:
        """The snapshot's, waited for."""
        _, said = eventually(lambda: self._first("outcome"), "the snapshot's outcome", _CLEAN_SECONDS, pause=0.02)
        return dict(said)

    def seconds(self) -> Seconds:
        """How long each step took, of a snapshot that is over."""
        found = [self._first("step", step) for step in STEPS] + [self._first("outcome")]
        times = [message[0] for message in found if message is not None]
        return {step: end - start for step, start, end in zip(STEPS, times, times[1:])}

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    @property
    def engines(self) -> set[int]:
        """The engines that are running: those seen so far, and any started since."""
        if self._process.poll() is None:  # else the number may be somebody else's by now
            for path in pathlib.Path(f"/proc/{self._process.pid}/task").glob("*/children"):
                with contextlib.suppress(OSError):
                    self._engines.update(int(pid) for pid in path.read_text().split())
        return {pid for pid in self._engines if is_running(pid)}

    def end(self) -> None:
        """End in order, and the engines with it."""
        engines = self.engines
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(30)
            eventually(lambda: not any(map(is_running, engines)), "the engines end with their nova-compute", 30)
        finally:
            self.kill()
            for pid in engines:
                kill(pid)


def is_running(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


class Play:
    """One snapshot of one disk on one machine."""

    def __init__(self, place: Place, instant: Optional[Instant], stack: contextlib.ExitStack) -> None:
        """
        :param instant: None for a snapshot that nothing happens to.
        """
        self._place, self._stack = place, stack
        self._machine = str(uuid.uuid4())
        name = instant.number if instant is not None else "undisturbed"
        self._log_path = place.folder / f"{name}-{self._machine}.log"
        self._log = stack.enter_context(self._log_path.open("w"))
        self.scene = Scene(place.world, stack, guest=instant is not None and instant.guest)
        request = {
            "image_id": self.scene.image_id,
            "disk": self.scene.disk,
            "dest_pool": place.world.images,
            "token": place.token,
        }
        self._nova = self._start(request)
        self._lives = [self._nova]
        self._nova.is_up()
        self.outcome = Outcome(instant)
        self._may_wait = False

    def _start(self, request: Optional[dict[str, str]] = None) -> NovaCompute:
        nova = NovaCompute(self._place, self._machine, self._log, request)
        self._stack.callback(nova.end)
        return nova

    @property
    def log(self) -> str:
        return self._log_path.read_text()

    def live(self) -> Seconds:
        """Take the snapshot in peace."""
        began = time.monotonic()
        self.scene.asked()
        self._nova.ask()
        self._go_on(began)
        self._await_clean(began)
        self._compare()
        assert not self.outcome.wrong, "\n".join([*self.outcome.wrong, "", self.log])
        return self._nova.seconds()

    def die(self, undisturbed: Seconds) -> None:
        """Ask for the snapshot, let come what the instant says, and see that all ends well."""
        instant = self.outcome.instant
        self.scene.asked()
        self._nova.ask()
        self._nova.come_to(instant.step)
        time.sleep(instant.moment * undisturbed[instant.step])
        began = time.monotonic()
        self._strike(instant.victim)
        job = self.scene.job()
        self._note(job)
        if not instant.returns:
            self._abandoned(job)
        elif instant.victim != ENGINE:
            self._lives.append(self._start())
        if instant.second is not None:
            time.sleep(max(0.0, began + instant.second - time.monotonic()))
            self._strike_an_engine()
        if instant.victim == ENGINE:
            self._go_on(began)
        elif instant.returns:
            eventually(lambda: not self._nova.engines, "the engine ends after its nova-compute")
        self._await_clean(began)
        self._compare()

    def _strike(self, victim: str) -> None:
        (engine,) = self._nova.engines
        if victim != ENGINE:
            self._nova.kill()
        if victim != NOVA_COMPUTE:
            kill(engine)

    def _strike_an_engine(self) -> None:
        engines = sorted(pid for nova in self._lives for pid in nova.engines)
        if engines:
            kill(random.Random(self.outcome.instant.second).choice(engines))

    def _note(self, job: Optional[str]) -> None:
        if job is not None:
            self.outcome.job_step = json.loads(job)["step"]
        else:
            self.outcome.job_step = "forgotten" if self._nova.has_come_to("reserved") else "unreserved"
        # Who died before there was a job leaves a record that nobody knows of, as stock Nova does.
        self._may_wait = self.outcome.job_step == "unreserved"

    def _go_on(self, began: float) -> None:
        """nova-compute lives, and knows what to do when its engine ends: it falls back to a copy, if need be."""
        answer = self._nova.outcome()
        self.outcome.request_seconds = time.monotonic() - began
        status = self.scene.status()
        if answer["outcome"] not in (worker.ACTIVE, worker.FELL_BACK):
            self.outcome.wrong.append(f"the request failed: {answer['error']}")
        if (answer["outcome"] == worker.ACTIVE) != (status == "active"):
            self.outcome.wrong.append(f"the record is {status}, but the request {answer['outcome']}: {answer['error']}")
        self._may_wait = True

    def _abandoned(self, job: Optional[str]) -> None:
        """The machine does not come back: another leaves the job alone, until an operator names it."""
        another = self._place.world.engine(host="deaths-another")
        another.reclaim()
        if self.scene.job() != job:
            self.outcome.wrong.append(f"another host's engine touched the job: {job} became {self.scene.job()}")
        if job is not None and self._place.is_fenced(json.loads(job)["owner"]["client"]):
            self.outcome.wrong.append("another host's engine cut off the job's client")
        try:
            another.end(self.scene.image_id, "")
        except errors.NoRecord:
            if job is not None:
                self.outcome.wrong.append("an operator's word found no job")
        except errors.SnapError as error:
            self.outcome.wrong.append(f"an operator's word did not end the job: {error.report()}")

    def _await_clean(self, began: float) -> None:
        def is_clean() -> bool:
            self.outcome.left = self.scene.left(may_wait=self._may_wait)
            return not self.outcome.left

        try:
            eventually(is_clean, "nothing is left", _CLEAN_SECONDS)
        except AssertionError:
            self.outcome.wrong += self.outcome.left
        self.outcome.clean_seconds = time.monotonic() - began
        self.outcome.status = self.scene.status()

    def _compare(self) -> None:
        guest = self.scene.guest
        if guest is not None:
            guest.stop()
            self.outcome.stall_seconds = guest.longest_seconds
            if guest.error is not None:
                self.outcome.wrong.append(f"the guest cannot write: {guest.error!r}")
        self.outcome.wrong += self.scene.wrong_bytes()


def undisturbed(place: Place) -> Seconds:
    """Take a snapshot that nothing happens to."""
    with contextlib.ExitStack() as stack:
        return Play(place, None, stack).live()


def die(place: Place, seed: str, number: int, undisturbed: Seconds, outcomes: list[Outcome]) -> None:
    """Play an instant, and add what became of it to *outcomes*.

    :raises AssertionError: that is not as promised; with the processes' log.
    """
    instant = Instant.choose(seed, number)
    name = f"seed {seed}, instant {number}: {instant}"
    with recording.cell(name, real=True, kill=True) as cell, contextlib.ExitStack() as stack:
        play = Play(place, instant, stack)
        outcome = play.outcome
        outcomes.append(outcome)
        try:
            play.die(undisturbed)
        except Exception as error:
            outcome.wrong.append(f"{type(error).__name__}: {error}")
        cell.leftovers, cell.wait_seconds = len(outcome.left), outcome.request_seconds
        assert not outcome.wrong, "\n".join([f"{name}, at '{outcome.job_step}'", *outcome.wrong, "", play.log])
