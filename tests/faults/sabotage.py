# SPDX-License-Identifier: Apache-2.0
"""Let something go wrong at one place of a request, whether the servers are fakes or real.

A :class:`Saboteur` sits on all that a request calls: the engine's connections to the cluster, the adapter to Glance,
and the guest. It knows which step is under way, keeps a trace, and does a cell's mischief at the cell's place.
"""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any, Callable, Optional

from nova_rbd_snap.specs import ImageSpec, SnapSpec
from tests.fakes.glance import kind_of
from tests.faults.matrix import GLANCE, Place


class Killed(BaseException):
    """A process ends: nothing of it runs any more, not even an ``except Exception``."""


#: What happens instead of a call, which it is given, to make or not.
Mischief = Callable[[Callable[[], Any]], Any]


class Saboteur:
    """Does one mischief at one place, once, or to the rest of the step as well, or for good."""

    def __init__(self, disk: str) -> None:
        """
        :param disk: name of the server's disk: what is done to it during the seal is the step ``release``.
        """
        self._disk = disk
        self._place: Optional[Place] = None
        self._mischief: Optional[Mischief] = None
        self._lock = threading.Lock()
        self._steps: Counter[str] = Counter()
        self._calls: Counter[tuple[str, str]] = Counter()
        self._step = ""
        #: The calls so far.
        self.trace: list[Place] = []
        self.struck = False
        #: The rest of its step meets the mischief as well.
        self.for_step = False
        #: It does not end with the clone way.
        self.outlasts_the_way = False

    def plan(self, place: Place, mischief: Mischief) -> None:
        """Do *mischief* at *place*."""
        self._place, self._mischief = place, mischief

    def stop(self) -> None:
        """No mischief any more."""
        self._mischief = None

    def end_of_the_way(self) -> None:
        """The clone way has ended."""
        if not self.outlasts_the_way:
            self.stop()

    def enter(self, step: str) -> None:
        """What is called from now on belongs to *step*."""
        self._step = step

    def around(
        self, call: str, do: Callable[[], Any], step: Optional[str] = None, *, of_store: bool = False
    ) -> Any:
        """Make the call, or do the mischief, where it is due.

        :param step: the call's, where that is not the one that was entered.
        :param of_store: as :class:`tests.faults.matrix.Place` has it.
        """
        with self._lock:
            step = step or self._step
            self._steps[step] += 1
            self._calls[step, call] += 1
            place = Place(step, call, self._calls[step, call], first=self._steps[step] == 1, of_store=of_store)
            self.trace.append(place)
            mischief = self._mischief if self._is_due(place) else None
            self.struck = self.struck or mischief is not None
        return mischief(do) if mischief else do()

    def _is_due(self, place: Place) -> bool:
        if place == self._place:
            return True
        return self.struck and self.for_step and self._place is not None and place.step == self._place.step

    def on_cluster(
        self, call: str, do: Callable[[], Any], arguments: Sequence[Any], *, of_store: bool = False
    ) -> Any:
        """:meth:`around`, for a call to the cluster."""
        beside = self._step == "seal" and any(image.name == self._disk for image in images_in(arguments))
        return self.around(call, do, "release" if beside else None, of_store=of_store)


def images_in(arguments: Sequence[Any]) -> list[ImageSpec]:
    """The rbd images that a call to the cluster is about."""
    images = (argument.image if isinstance(argument, SnapSpec) else argument for argument in arguments)
    return [image for image in images if isinstance(image, ImageSpec)]


class Connection:
    """A connection of the engine *process* to the cluster: useless once that is dead."""

    def __init__(
        self, connect: Callable[[], Any], process: Any, saboteur: Saboteur, *, of_store: bool = False
    ) -> None:
        self._connect, self._process, self._saboteur, self._of_store = connect, process, saboteur, of_store
        self._cluster = saboteur.around("connect", connect, "connect", of_store=of_store)

    def connect_anew(self) -> None:
        """The sessions with the servers end, and others begin."""
        self._cluster = self._connect()

    def keep_open(self, image: Any) -> Any:
        """Not a call: it is the first that needs it which opens the rbd image."""
        return self._cluster.keep_open(image)

    def __getattr__(self, name: str) -> Any:
        return functools.partial(self._call, name)

    def _call(self, name: str, *arguments: Any, **more: Any) -> Any:
        if not self._process.alive:
            raise Killed
        def do() -> Any:  # over the connection that there is by then
            return getattr(self._cluster, name)(*arguments, **more)

        return self._saboteur.on_cluster(name, do, arguments, of_store=self._of_store)


#: The step that makes a request of Glance.
_STEP_OF = {call: step.name for step in GLANCE.values() for call in step.calls}


class Adapter:
    """What ``openstack/glance.py`` calls, on its way to *adapter*."""

    def __init__(self, adapter: Any, saboteur: Saboteur) -> None:
        self.__dict__.update(_adapter=adapter, _saboteur=saboteur)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._adapter, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._adapter, name, value)

    def request(self, path: str, method: str, **arguments: Any) -> Any:
        kind = kind_of(path, method, arguments.get("json"))
        do = functools.partial(self._adapter.request, path, method, **arguments)
        return self._saboteur.around(kind, do, _STEP_OF.get(kind, kind))
