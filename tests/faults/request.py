# SPDX-License-Identifier: Apache-2.0
"""A snapshot request as nova-compute makes it, without Nova: what ``openstack/driver.py`` does, the manager around it,
and an engine that is a process in all but name.

The engine's client, the ways, and the registration are the real ones.
"""

from __future__ import annotations

import contextlib
import json
import threading
from typing import Any, Callable, Optional

from nova_rbd_snap import errors
from nova_rbd_snap.engine import Report, server, unheard
from nova_rbd_snap.engine.client import EngineClient
from nova_rbd_snap.engine.service import Engine
from nova_rbd_snap.ledger.job import copy_id
from nova_rbd_snap.openstack import clone, registration
from nova_rbd_snap.openstack.glance import Glance
from tests.faults.sabotage import Connection, Killed, Saboteur

#: The steps that calls of the engine belong to, but for ``perform``, which reports its own.
_STEP_OF = {"describe": "connect", "reserve_clone": "reserve", "reserve_copy": "reserve", "finish": "forget"}

#: Given ``of_store``, which is True for a connection to the cluster of a store of Glance's.
Connect = Callable[..., Any]


class EngineProcess:
    """An engine in this process that can be killed, with the interface of the client's ``_Process``."""

    def __init__(self, make: Callable[[Connect], Engine], connect: Connect, saboteur: Saboteur) -> None:
        """
        :param make: the engine, given how it connects to the cluster.
        """
        self._saboteur = saboteur
        self._connect = connect
        self.alive = True
        #: Its connections so far.
        self.connections: list[Connection] = []
        self.engine = make(self.connection)

    def connection(self, *, of_store: bool = False) -> Connection:
        if not self.alive:
            raise Killed
        self.connections.append(Connection(self._connect, self, self._saboteur, of_store=of_store))
        return self.connections[-1]

    def call(self, name: str, arguments: dict[str, Any], patience: float, report: Optional[Report]) -> Any:
        """As ``_Process.call``: an error crosses as plain data, and the process's end is ``EngineLost``."""
        if not self.alive:
            raise errors.EngineLost(f"the engine ended before '{name}'")
        self._saboteur.enter(_STEP_OF.get(name, name))
        is_freeze = str(arguments.get("job_id")).endswith("-copy")

        def noted(step: str, done: int, total: int) -> None:
            self._saboteur.enter(f"full copy {step}" if is_freeze else step)
            if report:
                report(step, done, total)

        if server._CALLS[name]:
            arguments = {**arguments, "report": noted}
        try:
            result = getattr(self.engine, name)(**arguments)
        except Killed:
            self.alive = False
            raise errors.EngineLost(f"the engine ended during '{name}'") from None
        except Exception as error:
            raise errors.from_wire(json.loads(json.dumps(errors.known(error).to_wire()))) from None
        if not self.alive:
            raise errors.EngineLost(f"the engine ended during '{name}'")
        return result


class NovaCompute(EngineClient):
    """One life of nova-compute, as far as its engines go: they are of this process."""

    def __init__(self, make: Callable[..., Engine], connect: Connect, saboteur: Saboteur, life: str) -> None:
        """
        :param make: an engine, given ``life``, ``held`` and ``connect``.
        """
        super().__init__([], host="", machine="", patience_seconds=0)
        self._make, self._connect, self._saboteur, self._life = make, connect, saboteur, life
        self.is_alive = True
        self._stopping: Optional[threading.Thread] = None

    def _start(self) -> Any:
        held = sorted(self._held)
        return EngineProcess(
            lambda connect: self._make(life=self._life, held=held, connect=connect), self._connect, self._saboteur
        )

    def _call(self, name: str, report: Optional[Report] = None, **arguments: Any) -> Any:
        try:
            return super()._call(name, report, **arguments) if self.is_alive else None
        finally:
            if not self.is_alive:
                raise Killed

    def engine(self) -> Engine:
        """The engine, a new one if the last was killed."""
        return self._running().engine

    def connections(self) -> list[Connection]:
        """The engine's, to the cluster."""
        return list(self._running().connections)

    def kill_engine(self) -> None:
        """As ``kill -9``."""
        self._running().alive = False

    def kill_both(self) -> None:
        """As ``kill -9`` of both."""
        self.kill_engine()
        self.is_alive = False

    def kill(self) -> None:
        """As ``kill -9`` of nova-compute alone: its engine sees the end of the socket."""
        self.is_alive = False
        self.engine().orphan()
        self._stopping = threading.Thread(target=self.engine().stop, daemon=True)
        self._stopping.start()

    def end_of_the_socket(self) -> None:
        """What an engine that outlived nova-compute does, as ``Server.serve``."""
        if self._stopping is not None:
            self._stopping.join(60)
            assert not self._stopping.is_alive(), "the engine does not stop"
            self.engine().settle()


class Request:
    """One snapshot request.

    :ivar failure: why the clone way failed, if it did.
    :ivar was_copied: a full copy was begun.
    """

    def __init__(
        self,
        compute: NovaCompute,
        glance: Glance,
        saboteur: Saboteur,
        *,
        image_id: str,
        disk: str,
        dest_pool: str,
        timeout_seconds: float,
        perform: clone.Perform,
        copy: Callable[[Optional[str]], None],
        delete_record: Callable[[], None],
        store: Optional[str] = None,
    ) -> None:
        """
        :param store: of Glance's, into which the disk is to be copied; None where it is to be cloned.
        :param perform: does a reserved job, with what is to be done about the guest around it.
        :param copy: Nova's own full copy, of the snapshot of that name, or of the suspended guest's disk.
        """
        self._compute, self._glance, self._saboteur = compute, glance, saboteur
        self._image_id, self._disk, self._dest_pool = image_id, disk, dest_pool
        self._timeout_seconds, self._store = timeout_seconds, store
        self._perform, self._copy, self._delete_record = perform, copy, delete_record
        self.failure: Optional[errors.SnapError] = None
        self.was_copied = False

    def run(self) -> Optional[errors.SnapError]:
        """What Nova's manager does: the record of a request that failed is deleted. Returns what it failed with."""
        try:
            self._climb()
        except errors.RecordGone as error:
            return error  # Nova's ImageNotFound: there is nothing to delete
        except Exception as error:
            self._delete_record()
            return errors.known(error)
        return None

    def _climb(self) -> None:
        """As ``driver.LibvirtDriver._climb`` does."""
        try:
            self._clone()
        except Exception as cause:
            self.failure = errors.known(cause)
            if not self.failure.may_fall_back:
                raise self.failure from cause
        else:
            return
        finally:
            self._saboteur.end_of_the_way()
        self._full_copy()

    def _clone(self) -> None:
        if self._store is None:
            self._compute.describe(self._disk)
            url = clone.make(self._compute, self._image_id, self._disk, self._dest_pool, self._perform)
        else:
            url = clone.copy(self._compute, self._image_id, self._disk, self._store, self._perform)
        timeout = {"timeout_seconds": self._timeout_seconds}
        prepare = registration.preparation(self._glance, self._image_id, registration.RAW, **timeout)
        clone.register(self._compute, self._glance, self._image_id, url, prepare, report=unheard, **timeout)

    def _full_copy(self) -> None:
        self.was_copied = True
        job_id = copy_id(self._image_id)
        snap: Optional[str] = None
        try:
            snap = clone.freeze(self._compute, job_id, self._disk, self._perform)
        except errors.SnapError as error:
            if not error.may_fall_back:
                raise
        try:
            self._copy(snap)
        finally:
            if snap is not None:
                self._thaw(job_id)

    def _thaw(self, job_id: str) -> None:
        with contextlib.suppress(errors.SnapError):  # what stays is in the ledger; the copy's own outcome counts
            self._compute.rollback(job_id)
