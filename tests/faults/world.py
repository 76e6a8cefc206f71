# SPDX-License-Identifier: Apache-2.0
"""Where a cell's request is made: what worlds of fakes and of real servers have in common."""

from __future__ import annotations

import abc
import contextlib
import itertools
from typing import Any, Callable, NoReturn, Optional

from nova_rbd_snap import errors
from nova_rbd_snap.engine.service import Engine
from nova_rbd_snap.flatten.means import ByWorker
from nova_rbd_snap.flatten.queue import queue_image, shared
from nova_rbd_snap.flatten.task import Flattening
from nova_rbd_snap.janitor import parents
from nova_rbd_snap.ledger.job import INLINE, Owner
from nova_rbd_snap.ledger.store import Ledger
from nova_rbd_snap.openstack.registration import Images
from nova_rbd_snap.specs import ImageSpec
from nova_rbd_snap.workers.worker import Worker
from tests.faults.guest import FakeGuest
from tests.faults.matrix import Cell
from tests.faults.request import NovaCompute, Request
from tests.faults.sabotage import Killed, Mischief, Saboteur
from tests.waiting import eventually


class World(abc.ABC):
    """A cluster, Glance, and a nova-compute that is asked for a snapshot of a server's disk.

    Each kind of cause is a method that returns the mischief to be done.

    :ivar deletes_records: whether Nova's manager can delete the record of a request that failed.
    :ivar suspensions: how often a guest was suspended for a copy, or would have been.
    :ivar guest: who runs on the disk, if anybody does.
    :ivar vms, images: Nova's pool, and Glance's.
    :ivar image_id: of the image that is asked for.
    :ivar cloud: whose jobs the engine's are.
    """

    vms = images = image_id = cloud = ""
    deletes_records = True
    suspensions = 0
    guest: Optional[FakeGuest] = None

    def __init__(self, disk: str, policy: str) -> None:
        """
        :param policy: of flattening.
        """
        self.policy = policy
        self.saboteur = Saboteur(disk)
        self.compute = NovaCompute(self.engine, self.connect, self.saboteur, "life-1")
        #: What ends what others did, by :meth:`heal`.
        self._ends: list[Callable[[], None]] = []
        #: A request to Glance that was lost.
        self._late: Optional[Callable[[], Any]] = None

    # -- as a world is -------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def connect(self) -> Any:
        """A new connection to the cluster, as nova-compute's Ceph user."""

    @abc.abstractmethod
    def engine(self, **options: Any) -> Engine:
        """An engine, given ``life``, ``held`` and ``connect``."""

    @abc.abstractmethod
    def request(self) -> Request:
        """The request."""

    @abc.abstractmethod
    def delete_record(self) -> None:
        """As Nova's manager does after a failure."""

    @abc.abstractmethod
    def surroundings(self) -> dict[str, Any]:
        """All that there is but the image, by name."""

    @abc.abstractmethod
    def status(self) -> Optional[str]:
        """Of the image record; None where there is none."""

    @abc.abstractmethod
    def has_data(self) -> bool:
        """Whether there is an rbd image of the image's name."""

    @abc.abstractmethod
    def assert_whole(self) -> None:
        """The image's data are the disk's at the instant of the snapshot, in the form Glance wants."""

    @abc.abstractmethod
    def was_active(self) -> bool:
        """Whether the image was that when its record was deleted."""

    @abc.abstractmethod
    def bystander(self) -> Any:
        """A connection to the cluster that nothing happens to."""

    @abc.abstractmethod
    def asked_as_service(self) -> Images:
        """Glance."""

    def drain(self) -> None:
        """Have an image that is active and not flat flattened, so that it can be seen to be what it shall; and what is
        left for nobody of one that was active removed, as is done once an hour."""
        was_deleted = self.status() is None and self.was_active()
        if self.policy == INLINE or not (self.status() == "active" or was_deleted):
            return
        client, images = self.bystander(), self.asked_as_service()
        owner = Owner("compute-9", "machine-9", "life-9", client.address(), self.cloud)
        ledger = Ledger(client, self.vms)
        found = shared(client, ImageSpec(self.images, self.image_id))
        if found is not None:
            with contextlib.suppress(errors.LedgerConflict):
                queue_image(found, ledger, owner, 0.0)
        # Long after, so that nobody reads the image from before it was flat.
        moments = itertools.count(10**10, 10**6)
        flattening = Flattening(client, images, ByWorker(client), lambda: float(next(moments)))
        more = {"limit": 4, "lease_seconds": 60.0, "clock": lambda: float(next(moments))}
        worker = Worker(client, self.vms, owner, [flattening], **more)

        def is_done() -> bool:
            worker.work(lambda: False)
            return all(job.id != self.image_id for job in ledger.read().jobs)

        eventually(is_done, "the image is flat, and nobody reads it from before")
        if was_deleted:
            list(parents.clear(client, self.vms, [self.images], images, float(10**10)))

    # -- what happens in it --------------------------------------------------------------------------------------------

    def prepare(self, cell: Cell) -> None:
        """Let the cell's cause happen at its place."""
        make = getattr(self, cell.cause.kind)
        self.saboteur.plan(cell.place, make() if cell.cause.what is None else make(cell.cause.what))
        self.saboteur.outlasts_the_way = cell.cause.lasts

    def heal(self) -> None:
        """All that hinders is over; what somebody else made is seen to be as they made it, and removed."""
        self.saboteur.stop()
        while self._ends:
            self._ends.pop()()

    def arrive(self) -> None:
        """What Glance was asked for, and seemed lost, takes effect."""
        if self._late:
            self._late()

    def reclaim(self) -> None:
        """Earlier work is looked after: by the engine that there is, or, after a death, by what there is then."""
        if self.compute.is_alive:
            self.compute.engine().reclaim()
            return
        self.compute.end_of_the_socket()
        NovaCompute(self.engine, self.connect, self.saboteur, "life-2").engine().reclaim()

    def _begins(self, happen: Callable[[], Any], end: Callable[[], Any] = lambda: None) -> Mischief:
        """Something happens before a call; *end* ends it, also where it only half began."""

        def mischief(do: Callable[[], Any]) -> Any:
            self._ends.append(end)
            happen()
            return do()

        return mischief

    # -- mischief that is the same everywhere --------------------------------------------------------------------------

    @staticmethod
    def raises(error: type[Exception]) -> Mischief:
        def mischief(do: Callable[[], Any]) -> NoReturn:
            raise error("injected")

        return mischief

    @staticmethod
    def loses_the_answer(error: type[Exception]) -> Mischief:
        def mischief(do: Callable[[], Any]) -> NoReturn:
            do()
            raise error("injected: the answer is lost")

        return mischief

    def engine_killed(self, when: str) -> Mischief:
        return self._killed(self.compute.kill_engine, when)

    def both_killed(self, when: str) -> Mischief:
        return self._killed(self.compute.kill_both, when)

    def compute_killed(self, when: str) -> Mischief:
        return self._killed(self.compute.kill, when)

    @staticmethod
    def _killed(kill: Callable[[], None], when: str) -> Mischief:
        def mischief(do: Callable[[], Any]) -> Any:
            if when == "after":
                do()
            kill()
            if when == "meanwhile":
                return do()
            raise Killed

        return mischief

    def answers(self, status: int) -> Mischief:
        self.saboteur.for_step = True
        return self.answers_once(status)

    @abc.abstractmethod
    def answers_once(self, status: int) -> Mischief:
        """Glance refuses."""

    def is_silent(self, how: str) -> Mischief:
        self.saboteur.for_step = True
        return self.is_silent_once(how)

    def is_silent_once(self, how: str) -> Mischief:
        def mischief(do: Callable[[], Any]) -> Any:
            self._late = do
            return self._silently(do, how, asked=False)

        return mischief

    def loses_the_reply(self, how: str) -> Mischief:
        return lambda do: self._silently(do, how, asked=True)

    @abc.abstractmethod
    def _silently(self, do: Callable[[], Any], how: str, *, asked: bool) -> Any:
        """Make a request of Glance, or only seem to, and get no answer."""

    def record_deleted(self) -> Mischief:
        return self._begins(self.delete_record)
