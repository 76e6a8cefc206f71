# SPDX-License-Identifier: Apache-2.0
"""nova-compute's end of the socket: starts the engine when first needed, again with back-off, and ends a stuck one.

Plain threads, locks and sockets, so that it works the same under eventlet, which makes them green, and without.
eventlet is never imported.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import queue
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Optional

from nova_rbd_snap import errors
from nova_rbd_snap.engine import Report, wire

LOG = logging.getLogger(__name__)

#: Seconds for a new engine to load its libraries and answer.
_START_SECONDS = 60
#: Seconds between two starts: 1, 2, 4 … up to the last.
_BACK_OFF_SECONDS = (1, 8)
#: The most seconds between two starts that nobody waits for, where one after the other fails.
_RETRY_SECONDS = 60
#: How many engines are told what only nova-compute knows, where one after the other ends over it.
_ATTEMPTS = 3
#: An engine that lived this long ended for a new reason; back-off starts over.
_LONG_LIFE_SECONDS = 120


class _Process:
    """One engine process and the calls under way in it."""

    def __init__(self, command: Sequence[str], hello: dict[str, Any]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [*command, "--fd", str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                )
            except OSError as error:
                ours.close()
                raise errors.EngineUnavailable(f"the engine cannot be started: {error}") from error
        self.pid = self._process.pid
        self.started = time.monotonic()
        self._socket = ours
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._waiting: dict[int, queue.Queue[Optional[dict[str, Any]]]] = {}
        self.alive = True
        self._greet(hello)
        self._reader = threading.Thread(target=self._read, name="nova-rbd-snap", daemon=True)
        self._reader.start()

    def _greet(self, hello: dict[str, Any]) -> None:
        answer: Optional[dict[str, Any]] = None
        self._socket.settimeout(_START_SECONDS)
        try:
            wire.send(self._socket, hello)
            answer = wire.receive(self._socket)
        except (OSError, ValueError) as error:
            answer = {"error": f"no answer from the engine: {error}"}
        self._socket.settimeout(None)
        if answer is None or "error" in answer or answer["version"] != wire.VERSION:
            self.end()
            self._socket.close()
            self._process.wait()
            reason = (answer or {}).get("error", "it ended, or speaks another version")
            raise errors.EngineUnavailable(f"the engine cannot be started: {reason}")

    def _read(self) -> None:
        while True:
            try:
                message = wire.receive(self._socket)
            except (OSError, ValueError) as error:
                LOG.warning("The engine's socket failed: %s", error)
                message = None
            if message is None:
                break
            if "log" in message:
                level, name, text = message["log"]
                logging.getLogger(name).log(level, "%s", text)
            elif waiting := self._waiting.get(message["id"]):
                waiting.put(message)
        self._reap()

    def _reap(self) -> None:
        with self._lock:
            self.alive = False
            for waiting in self._waiting.values():
                waiting.put(None)
        self._socket.close()
        code = self._process.wait()
        LOG.info("The engine (process %d) ended with code %d", self.pid, code)

    def wait(self) -> None:
        """Return when the process has ended."""
        self._reader.join()

    def end(self) -> None:
        """End the process now; what it was doing is in the ledger."""
        self.alive = False  # at once: the next call needs another process, not the rest of this one
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def call(self, name: str, arguments: dict[str, Any], patience: float, report: Optional[Report]) -> Any:
        """Make one call.

        :param patience: seconds without a sign of progress after which the process is ended.
        :raises errors.EngineStuck: that happened.
        :raises errors.EngineLost: the process ended meanwhile.
        :raises errors.SnapError: what the call raised.
        """
        answers: queue.Queue[Optional[dict[str, Any]]] = queue.Queue()
        number = next(self._numbers)
        with self._lock:
            if not self.alive:
                raise errors.EngineLost(f"the engine ended before '{name}'")
            self._waiting[number] = answers
            try:
                wire.send(self._socket, {"id": number, "call": name, "arguments": arguments})
            except OSError as error:
                self.alive = False  # whether or not its end has been read yet
                raise errors.EngineLost(f"the engine ended before '{name}': {error}") from error
        try:
            return self._await(answers, name, patience, report)
        finally:
            with self._lock:
                del self._waiting[number]

    def _await(
        self, answers: queue.Queue[Optional[dict[str, Any]]], name: str, patience: float, report: Optional[Report]
    ) -> Any:
        step = name
        while True:
            try:
                message = answers.get(timeout=patience)
            except queue.Empty:
                self.end()
                raise errors.EngineStuck(
                    f"the engine made no progress in '{step}' for {patience:.0f} s and was ended"
                ) from None
            if message is None:
                raise errors.EngineLost(f"the engine ended during '{step}'")
            if "report" in message:
                step = message["report"][0]
                if report:
                    report(*message["report"])
            elif "error" in message:
                raise errors.from_wire(message["error"])
            else:
                return message["result"]


class EngineClient:
    """The engine as nova-compute sees it: the calls of :class:`nova_rbd_snap.engine.service.Engine`, each blocking."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        host: str,
        machine: str,
        patience_seconds: float,
        command: Sequence[str] = (sys.executable, "-m", "nova_rbd_snap.engine"),
    ) -> None:
        """
        :param arguments: ``--config-file`` and ``--config-dir`` as nova-compute got them.
        :param patience_seconds: how long a call may show no progress before the engine is ended.
        :param command: what to run; ``--fd`` and the socket's number are added after *arguments*.
        """
        self._command = (*command, *arguments)
        self._hello = {"version": wire.VERSION, "host": host, "machine": machine, "incarnation": str(uuid.uuid4())}
        # What an engine must not end by itself: we have asked for it, and still have the say about it.
        self._held: set[str] = set()
        self._patience = patience_seconds
        self._starting = threading.Lock()
        self._process: Optional[_Process] = None
        self._owner_pid = os.getpid()
        self._retry_at = 0.0
        self._delay: float = _BACK_OFF_SECONDS[0]

    def check(self) -> list[str]:
        return list(self._call("check"))

    def describe(self, disk: str) -> dict[str, Any]:
        return dict(self._call("describe", disk=disk))

    def reserve_clone(self, image_id: str, disk: str, dest_pool: str, flatten: Optional[str] = None) -> str:
        with self._reserving(image_id):
            return str(
                self._call("reserve_clone", image_id=image_id, disk=disk, dest_pool=dest_pool, flatten=flatten)
            )

    def reserve_copy(self, image_id: str, disk: str, store: str) -> str:
        with self._reserving(image_id):
            return str(self._call("reserve_copy", image_id=image_id, disk=disk, store=store))

    def reserve_freeze(self, job_id: str, disk: str) -> str:
        with self._reserving(job_id):
            return str(self._call("reserve_freeze", job_id=job_id, disk=disk))

    def perform(self, job_id: str, snap_before: Optional[float], report: Report) -> None:
        with self._holding(job_id):
            self._call("perform", report, job_id=job_id, snap_before=snap_before)

    def upload(self, job_id: str, disk: str, target: Mapping[str, Any], report: Report) -> dict[str, Any]:
        return dict(self._call("upload", report, job_id=job_id, disk=disk, target=target))

    def upload_file(
        self, server: str, path: str, disk_format: str, target: Mapping[str, Any], report: Report
    ) -> dict[str, Any]:
        return dict(
            self._call("upload_file", report, server=server, path=path, disk_format=disk_format, target=target)
        )

    def distrust(self, image_id: str) -> None:
        self._call("distrust", image_id=image_id)

    def make_flat(self, image_id: str, report: Report) -> bool:
        with self._holding(image_id):
            return bool(self._call("make_flat", report, image_id=image_id))

    def finish(self, image_id: str) -> None:
        self._leave(image_id)
        self._call("finish", image_id=image_id)

    def rollback(self, job_id: str) -> bool:
        self._leave(job_id)
        return bool(self._insist("rollback", job_id=job_id))

    def leave(self, job_id: str) -> None:
        self._leave(job_id)
        self._call("leave", job_id=job_id)

    def cancel(self, server: str) -> list[str]:
        return list(self._insist("cancel", server=server))

    def remove_disks(self, server: str) -> list[str]:
        return list(self._insist("remove_disks", server=server))

    @contextlib.contextmanager
    def _reserving(self, job_id: str) -> Iterator[None]:
        if job_id in self._held:
            raise errors.LedgerConflict(f"job {job_id} is under way already")
        self._held.add(job_id)
        with self._holding(job_id):
            yield

    @contextlib.contextmanager
    def _holding(self, job_id: str) -> Iterator[None]:
        """A call after which we still have the say about the job, unless the engine refused it."""
        try:
            yield
        except errors.EngineLost:
            raise  # what it did is to be rolled back
        except errors.SnapError:
            self._held.discard(job_id)
            raise

    def _leave(self, job_id: str) -> None:
        """Note that the job is the engines' after the call that follows, however that ends.

        Noted before it: an engine that is started once this one has died over it shall not wait for us.
        """
        self._held.discard(job_id)

    def keep_running(self) -> None:
        """See that there is an engine, for the rest of this process's life: it has work that nobody calls for."""
        pause: float = _BACK_OFF_SECONDS[0]
        while True:
            try:
                self._running().wait()
                pause = _BACK_OFF_SECONDS[0]
            except Exception as error:  # whatever it is: nobody else would start one
                LOG.warning("%s", errors.known(error))
                time.sleep(pause)
                pause = min(2 * pause, _RETRY_SECONDS)

    @property
    def pid(self) -> Optional[int]:
        """Process id of the running engine."""
        process = self._process
        return process.pid if process and process.alive else None

    def _call(self, name: str, report: Optional[Report] = None, **arguments: Any) -> Any:
        return self._running().call(name, arguments, self._patience, report)

    def _insist(self, name: str, **arguments: Any) -> Any:
        """A call that may be made twice, to one engine after the other until one lives to answer it."""
        for _ in range(_ATTEMPTS - 1):
            try:
                return self._call(name, **arguments)
            except errors.EngineStuck:
                raise
            except errors.EngineError as error:
                LOG.warning("'%s' is called again: %s", name, error)
        return self._call(name, **arguments)

    def _running(self) -> _Process:
        with self._starting:
            if self._owner_pid != os.getpid():
                # Nova forked after it made this client: the parent's engine is not ours to use.
                self._process, self._owner_pid = None, os.getpid()
            if self._process is None or not self._process.alive:
                self._process = self._start()
            return self._process

    def _start(self) -> _Process:
        if self._process is not None and time.monotonic() - self._process.started > _LONG_LIFE_SECONDS:
            self._delay = _BACK_OFF_SECONDS[0]
        wait = self._retry_at - time.monotonic()
        if wait > 0 and self._process is None:
            raise errors.EngineUnavailable(f"the engine could not be started; it is tried again in {wait:.0f} s")
        if wait > 0:
            # It did start, and ended: what it left needs an engine that undoes it, so wait rather than fail.
            time.sleep(wait)
        self._retry_at = time.monotonic() + self._delay
        self._delay = min(2 * self._delay, _BACK_OFF_SECONDS[1])
        process = _Process(self._command, {**self._hello, "held": sorted(self._held)})
        LOG.info("Started the engine (process %d)", process.pid)
        return process
