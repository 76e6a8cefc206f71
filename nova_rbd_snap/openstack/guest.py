# SPDX-License-Identifier: Apache-2.0
"""What a snapshot has to do with the guest: it must answer, and may be held still for the one moment that counts.

Every call into libvirt is bounded here, for libvirt itself waits for QEMU and its agent as long as they take.
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
import threading
import time
import weakref
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from typing import Any, Callable, Optional

from nova import exception
from nova.compute import power_state
from nova.virt.libvirt import driver as libvirt_driver
from nova.virt.libvirt import utils as libvirt_utils
from oslo_log import log as logging

from nova_rbd_snap import errors
from nova_rbd_snap.engine import Report
from nova_rbd_snap.snapshot.steps import Snap

LOG = logging.getLogger(__name__)

#: How long QEMU's monitor may take to answer. A QEMU that does not for 30 s loses its disk to a ``snap create``.
_ANSWER_SECONDS = 10
#: How long the file systems are held still at most; Windows (VSS) lets go by itself after 10 s, and says nothing.
_STILL_SECONDS = 9.0
#: Of these, how long the guest's agent may take to freeze them.
_FREEZE_SECONDS = 5
#: So much before that a snapshot must be back to count.
_MARGIN_SECONDS = 1.0
#: Who says no at once has not frozen anything.
_AT_ONCE_SECONDS = 1.0
#: After how long a guest that does not let go is told to the log.
_THAW_SECONDS = 60
#: Between two attempts to thaw it: so many seconds, then twice as many, up to the last.
_PAUSES_SECONDS = (1, 60)
#: In a server's directory while its file systems may be frozen.
_MARK = "nova-rbd-snap.frozen"
#: libvirt's own: an agent's answer is waited for however long it takes (VIR_DOMAIN_AGENT_RESPONSE_TIMEOUT_BLOCK).
_AGENT_BLOCKS = -2

#: There is a QEMU, be the guest itself asleep or crashed.
_ON = (power_state.RUNNING, power_state.PAUSED, power_state.SUSPENDED, power_state.CRASHED)

#: QEMU processes that have not answered yet: one question is enough.
_silent: set[str] = set()

#: By server, the last attempt to let its guest go, for as long as somebody is at it.
_thaws: weakref.WeakValueDictionary[str, Call] = weakref.WeakValueDictionary()


class Call:
    """A call in a thread of its own, which may outlive anybody's patience for it."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self.error: Optional[Exception] = None
        # Not the thread's own join: under eventlet on Python 3.13 that raises when time is up.
        self._over = threading.Event()
        threading.Thread(target=self._run, name="nova-rbd-snap-guest", daemon=True).start()

    def _run(self) -> None:
        try:
            self._call()
        except Exception as error:  # raised to whoever still waits
            self.error = error
        finally:
            self._over.set()

    def ended(self, seconds: Optional[float]) -> bool:
        """Whether it has come to an end after so many seconds at most; None waits for it."""
        return self._over.wait(seconds)


class Guest:
    """The guest of one snapshot request, through Nova's own driver."""

    def __init__(self, driver: Any, context: Any, instance: Any, guest: Any) -> None:
        self._driver = driver
        self._context = context
        self._instance = instance
        self._guest = guest

    def perform(self, engine: Any, job_id: str, report: Report) -> None:
        """Let *engine* do a job whose first step takes the snapshot, once QEMU has answered and the guest is still.

        :raises errors.GuestSilent: QEMU does not answer.
        :raises errors.NotQuiesced: the image requires that the guest be still, and it was not.
        """
        if not self._is_on():
            engine.perform(job_id, None, report)
            return
        self.ask()
        required = self._driver._requires_quiesce(self._instance.image_meta)
        with self._still(required) as stillness:
            if stillness is None:
                engine.perform(job_id, None, report)
            else:
                snap_before = stillness.deadline - _MARGIN_SECONDS if required else None
                engine.perform(job_id, snap_before, functools.partial(stillness.report, report))

    def must_be_still(self) -> bool:
        """Whether the image forbids a snapshot of the guest while it is on and not quiesced."""
        return self._is_on() and bool(self._driver._requires_quiesce(self._instance.image_meta))

    def _is_on(self) -> bool:
        """Asked anew, for libvirtd may have been restarted since the request began."""
        host = self._driver._host
        return host.get_guest(self._instance).get_power_state(host) in _ON

    def ask(self) -> None:
        """One question to the monitor of a guest that is on. :raises errors.GuestSilent: there is no answer."""
        uuid = self._instance.uuid
        if not self._is_on():
            return
        if uuid in _silent:
            raise errors.GuestSilent("QEMU has not answered an earlier question yet")
        _silent.add(uuid)

        def ask() -> None:
            try:
                # Not through the driver, which keeps libvirt's errors to itself.
                self._guest.get_block_device(_root_device(self._guest.get_xml_desc())).blockStats()
            finally:
                _silent.discard(uuid)

        call = Call(ask)
        if not call.ended(_ANSWER_SECONDS):
            raise errors.GuestSilent(f"QEMU does not answer its monitor within {_ANSWER_SECONDS} s")
        if call.error is not None and self._is_on():
            raise errors.GuestSilent(f"QEMU cannot be asked: {call.error}") from call.error

    @contextlib.contextmanager
    def _still(self, required: bool) -> Iterator[Optional[Stillness]]:
        """Within the block the guest's file systems are held still, None where they are not; afterwards never."""
        try:
            self._driver._can_quiesce(self._instance, self._instance.image_meta)
        except exception.NovaException as error:
            if required:
                raise errors.NotQuiesced(str(error)) from error
            LOG.debug("The guest is not quiesced: %s", error, instance=self._instance)
            yield None
            return
        stillness = Stillness(self._driver, self._context, self._instance, self._guest, self._is_on)
        try:
            failure = stillness.begin()
            if failure and required:
                raise errors.NotQuiesced(failure)
            if failure:
                LOG.info("The snapshot will be crash-consistent only: %s", failure, instance=self._instance)
            yield stillness
            if not failure and stillness.was_cut_short:
                LOG.warning(
                    "The snapshot is crash-consistent only: it took longer than the %.0f s a guest may be held still",
                    _STILL_SECONDS, instance=self._instance,
                )
        finally:
            stillness.end()


class Stillness:
    """A guest whose file systems are held still: from :meth:`begin` to :meth:`end`, and never for too long."""

    def __init__(
        self, driver: Any, context: Any, instance: Any, guest: Any, is_on: Callable[[], bool]
    ) -> None:
        self._driver = driver
        self._instance = instance
        self._arguments = (context, instance, instance.image_meta)
        self._guest = guest
        self._is_on = is_on
        self._lock = threading.Lock()
        #: When the guest is let go at the latest, by the monotonic clock.
        self.deadline = time.monotonic() + _STILL_SECONDS
        #: The freeze was refused before it got to the guest.
        self._was_refused = False
        self._freezing: Optional[Call] = None
        self._ending: Optional[Call] = None
        self._timer = threading.Timer(_STILL_SECONDS, self._cut_short)
        self._timer.daemon = True
        #: Let go because time was up.
        self.was_cut_short = False

    def begin(self) -> str:
        """Freeze; returns why that failed, or nothing."""
        earlier = _thaws.get(self._instance.uuid)
        if earlier is not None and not earlier.ended(_AT_ONCE_SECONDS):
            return "the guest is not let go of yet after an earlier snapshot, and would be amid this one"
        began = time.monotonic()
        self._freezing = Call(self._freeze)
        self._timer.start()
        if not self._freezing.ended(_FREEZE_SECONDS):
            return f"the guest agent did not freeze the file systems within {_FREEZE_SECONDS} s"
        if self._freezing.error is None:
            return ""
        at_once = time.monotonic() - began < _AT_ONCE_SECONDS
        self._was_refused = at_once and not _is_of_the_connection(self._freezing.error)
        return f"the guest's file systems cannot be frozen: {self._freezing.error}"

    def _freeze(self) -> None:
        _mark(self._instance).touch()
        _bound_agent(self._guest, _FREEZE_SECONDS)
        self._driver.quiesce(*self._arguments)

    def report(self, report: Report, step: str, done: int, total: int) -> None:
        """Lets the guest go as soon as the snapshot is there."""
        if step != Snap.name:
            self.end()
        report(step, done, total)

    def _cut_short(self) -> None:
        with self._lock:
            self.was_cut_short = self._ending is None
        self.end()

    def end(self) -> None:
        """Thaw, once and whatever became of the freeze: it may have happened although nobody heard of it."""
        with self._lock:
            if self._ending is not None:
                return
            self._ending = Call(self._thaw)
            if self._freezing is not None:
                _thaws[self._instance.uuid] = self._ending
        self._timer.cancel()

    def _thaw(self) -> None:
        if self._freezing is None:
            return
        is_over = self._freezing.ended(0)
        self._let_go()
        if not is_over:  # it may come after its thaw, and must not have the last word
            self._freezing.ended(None)
            self._let_go()
        _bound_agent(self._guest, _AGENT_BLOCKS)
        _mark(self._instance).unlink(missing_ok=True)

    def _let_go(self) -> None:
        def thaw() -> None:
            try:
                self._driver.unquiesce(*self._arguments)
            except exception.NovaException:
                if not self._was_refused and self._is_on():
                    raise

        _insist_on(thaw, self._instance)


def _insist_on(thaw: Callable[[], None], server: Any) -> None:
    """*thaw* the guest until that is done: whoever froze it is the only one to do so, and an agent that still flushes
    its disk for the freeze answers nothing else meanwhile."""
    began, is_told = time.monotonic(), False
    pause, longest = _PAUSES_SECONDS
    while True:
        try:
            thaw()
        except exception.InstanceNotFound:
            break
        except Exception as error:  # whatever it is may pass
            if not is_told and time.monotonic() - began >= _THAW_SECONDS:
                is_told = True
                LOG.error(
                    "The guest of server %s may be frozen, and cannot be thawed, which is tried again: %s; remedy: see "
                    "that qemu-guest-agent runs in it, or reboot the server",
                    server.uuid, error,
                )
            time.sleep(pause)
            pause = min(2 * pause, longest)
        else:
            break


def thaw_all(driver: Any) -> None:
    """Let go the guests that an earlier life of this nova-compute froze, and died. One that is off is so no more."""
    for guest in driver._host.list_guests(only_running=False):
        if not _mark(guest).exists():
            continue
        try:
            is_on = guest.get_power_state(driver._host) in _ON
        except exception.InstanceNotFound:
            continue  # its directory goes, too
        if is_on:
            LOG.warning("nova-compute died while the guest of server %s was frozen: it is let go", guest.uuid)
            _thaws[guest.uuid] = Call(functools.partial(_let_go_of, driver._host, guest))
        else:
            _mark(guest).unlink(missing_ok=True)


def _let_go_of(host: Any, server: Any) -> None:
    def thaw() -> None:
        guest = host.get_guest(server)  # anew, for libvirtd may have been restarted meanwhile
        try:
            guest.thaw_filesystems()
        except libvirt_driver.libvirt.libvirtError:
            if guest.get_power_state(host) in _ON:
                raise
        _bound_agent(guest, _AGENT_BLOCKS)

    _insist_on(thaw, server)
    _mark(server).unlink(missing_ok=True)


def _bound_agent(guest: Any, seconds: int) -> None:
    """Let libvirt give the agent up after so many seconds, lest no thaw ever gets past a freeze without answer."""
    with contextlib.suppress(Exception):  # libvirt before 5.10 cannot
        guest._domain.agentSetResponseTimeout(seconds)


def _mark(server: Any) -> pathlib.Path:
    """What tells a later life of nova-compute that the server's guest may be frozen."""
    return pathlib.Path(libvirt_utils.get_instance_path(server), _MARK)


def _is_of_the_connection(error: BaseException) -> bool:
    """Whether it was libvirtd that could not be asked, so that what it did is unknown."""
    causes = (error, error.__cause__, error.__context__)
    domains = {cause.get_error_domain() for cause in causes if isinstance(cause, libvirt_driver.libvirt.libvirtError)}
    return bool(domains & {libvirt_driver.libvirt.VIR_FROM_REMOTE, libvirt_driver.libvirt.VIR_FROM_RPC})


def _root_device(domain_xml: str) -> str:
    """The guest's name of its first disk."""
    target = ET.fromstring(domain_xml).find("./devices/disk/target")
    if target is None:
        raise errors.GuestSilent("the domain has no disk")
    return str(target.get("dev"))
