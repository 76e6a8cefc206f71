# SPDX-License-Identifier: Apache-2.0
"""One snapshot request, and the ways of ours to serve it: by the place of the server's disk."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Callable, ClassVar, Optional, TypeVar

from nova import exception
from nova.compute import task_states
from oslo_log import log as logging

from nova_rbd_snap import conf, errors
from nova_rbd_snap.engine.copying import Target
from nova_rbd_snap.ledger.job import BACKGROUND, NEVER, copy_id
from nova_rbd_snap.openstack import clone, imagebackend, images, policy, process, registration
from nova_rbd_snap.openstack.beside import Beside
from nova_rbd_snap.openstack.glance import Glance
from nova_rbd_snap.openstack.guest import Guest
from nova_rbd_snap.openstack.ondisks import OnDisks

CONF = process.CONF
LOG = logging.getLogger(__name__)

T = TypeVar("T")
UpdateTaskState = Callable[..., None]

#: Seconds between two looks at whether a server that is being shelved is to be deleted.
_LOOK_SECONDS = 5.0

#: The steps that take as long as there is data, and the least percent of them that is worth to be shown.
_LONG_STEPS = ("copy", "upload")
_SHOWN_PERCENT = 5


@dataclass
class Request:
    """What all have in common, wherever the disk is.

    :cvar ways: those that there are for such a disk.
    :ivar guest: libvirt's.
    :ivar metadata: as Nova makes it for the image record.
    :ivar is_shelving: of a server, not for its own sake.
    :ivar steps: each step's name, and when it began.
    :ivar shown_percent: what the server's progress was last set to.
    """

    ways: ClassVar[Collection[str]]

    context: Any
    instance: Any
    guest: Any
    image_id: str
    update_task_state: UpdateTaskState
    metadata: dict[str, Any]
    on_disks: OnDisks
    is_shelving: bool
    steps: list[tuple[str, float]] = field(default_factory=list, init=False)
    shown_percent: int = field(default=0, init=False)
    _announcing: Optional[Beside] = field(default=None, init=False)

    def clone(self) -> None:
        """The way 'clone': returns when the image is active."""
        raise NotImplementedError

    def copy(self) -> None:
        """The way 'copy': returns when the image is active."""
        raise NotImplementedError

    @contextlib.contextmanager
    def announcing(self) -> Iterator[None]:
        """Within the block the task states' two transitions are made beside the work: each asks the conductor.

        None is made after it, when Nova's manager has the say again.
        """
        self._announcing = Beside("nova-rbd-snap-states", self._announce)
        with self._announcing:
            yield

    def _announce(self) -> None:
        self.update_task_state(task_state=task_states.IMAGE_PENDING_UPLOAD)
        self.update_task_state(task_state=task_states.IMAGE_UPLOADING, expected_state=task_states.IMAGE_PENDING_UPLOAD)

    def await_announced(self) -> None:
        """Return when the transitions are made. :raises Exception: Nova's, as a rule because the server is going."""
        if self._announcing is not None:
            self._announcing.wait()

    def task_states_for_nova(self) -> UpdateTaskState:
        """The callback for Nova's own snapshot: its first two transitions were made already."""
        made = iter((task_states.IMAGE_PENDING_UPLOAD, task_states.IMAGE_UPLOADING))

        def update(task_state: str, **expected: Any) -> None:
            if next(made, None) != task_state:
                self.update_task_state(task_state=task_state, **expected)

        return update

    def drop_record(self) -> None:
        """Delete the image record that waits for data that will not come: of a shelve that fails Nova does not."""
        try:
            glance = images.glance_for(self.context)
            if glance.record(self.image_id).status == "queued":
                glance.delete(self.image_id)
        except errors.RecordGone:
            return
        except errors.GlanceError as error:
            LOG.warning("Image %s stays, and waits for data: %s", self.image_id, error.report(), instance=self.instance)

    def _begin(self) -> None:
        """Another way begins: of those before it nothing counts any more."""
        self.steps.clear()
        self.shown_percent = 0

    def _refuse_encrypted(self) -> None:
        if _has_encrypted_disk(self.guest.get_xml_desc()):
            raise errors.Refused("the server's disk is encrypted")

    def _upload(self, wanted: Optional[str], send: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Have the disk sent to Glance.

        :param wanted: the format, where one is.
        :param send: is given an ``engine.copying.Target`` as plain data, and returns what the engine's ``upload`` does.
        """
        started, glance = time.monotonic(), images.glance_for(self.context)
        target = Target(self.image_id, glance.access(), images.properties(self.metadata), wanted)
        done = self._by_the_next("uploads the disk", lambda: send(dataclasses.asdict(target)))
        LOG.info(
            "Snapshot to image %s: uploaded in %.1f s (%s), %d bytes as %s for %d allocated ones",
            self.image_id, time.monotonic() - started, self._durations(), done["sent"], done["format"],
            done["allocated"], instance=self.instance,
        )

    def _by_the_next(self, doing: str, work: Callable[[], T]) -> T:
        """Have it done by the engine or, where that dies over it, by the next."""
        try:
            return work()
        except (errors.EngineLost, errors.LedgerConflict) as error:
            if not error.may_fall_back:
                raise
            LOG.warning(
                "Snapshot to image %s: the engine was lost, and the next one %s: %s",
                self.image_id, doing, error.report(), instance=self.instance,
            )
            return work()

    @contextlib.contextmanager
    def _giving_way(self) -> Iterator[None]:
        """Within the block a deletion of the server cancels the work, also where Nova lets it wait for that.

        Nova shelves and deletes a server under the same lock: the deletion shows in the task state alone.
        """
        if not self.is_shelving:
            yield
            return
        over = threading.Event()
        watching = threading.Thread(target=self._watch, args=[over], name="nova-rbd-snap-shelve", daemon=True)
        watching.start()
        try:
            yield
        finally:
            over.set()
            watching.join()

    def _watch(self, over: threading.Event) -> None:
        with contextlib.suppress(Exception):  # raised where it can be acted upon
            self.await_announced()
        while not over.wait(_LOOK_SECONDS):
            try:
                self.update_task_state(
                    task_state=task_states.IMAGE_UPLOADING, expected_state=task_states.IMAGE_UPLOADING
                )
            except exception.UnexpectedDeletingTaskStateError:
                self._cancel()  # again at the next look, if the work comes to the engine only after this
            except Exception as error:  # the conductor may answer the next time
                LOG.debug("Cannot look whether the server is being deleted: %s", error, instance=self.instance)

    def _cancel(self) -> None:
        try:
            process.engine().cancel(self.instance.uuid)
        except errors.SnapError as error:
            LOG.warning("Cannot stop the server's snapshots: %s", error.report(), instance=self.instance)

    def _note(self, step: str, done: int, total: int) -> None:
        if step in _LONG_STEPS and total:
            self._show(100 * done // total)
        if not self.steps or self.steps[-1][0] != step:
            self.steps.append((step, time.monotonic()))

    def _show(self, percent: int) -> None:
        """Show the server's owner how far it is."""
        if percent < self.shown_percent + _SHOWN_PERCENT:
            return
        self.shown_percent = percent
        try:
            self.instance.progress = percent
            self.instance.save()
        except Exception as error:  # it is for show
            LOG.debug("Cannot show the progress of the snapshot: %s", error, instance=self.instance)

    def _durations(self) -> str:
        ends = [start for _, start in self.steps[1:]] + [time.monotonic()]
        return ", ".join(f"{step} {end - start:.1f}" for (step, start), end in zip(self.steps, ends))


@dataclass
class OfDiskInCeph(Request):
    """See :class:`Request`.

    :ivar still: what the snapshot needs of *guest*.
    """

    ways: ClassVar[Collection[str]] = conf.WAYS

    disk: imagebackend.Rbd
    still: Guest

    def clone(self) -> None:
        """The way 'clone': returns when the image is active."""
        for reason in conf.reasons_for_no_clone(CONF):
            raise errors.RuledOut(reason)
        self._refuse_encrypted()

        def make(glance: Glance) -> str:
            return self.disk.clone_to_glance(
                glance, self.image_id, self.instance.image_ref, self._perform, self._policy()
            )

        self._make_and_register("cloned", make)

    def copy(self) -> None:
        """The way 'copy': into an rbd store of Glance's, or through its API; returns when the image is active."""
        if reason := conf.reason_for_no_copy(CONF):
            raise errors.RuledOut(reason)
        self._refuse_encrypted()
        self.await_announced()
        # What is in an rbd store is raw.
        is_raw = CONF.libvirt.snapshot_image_format in (None, conf.RAW)
        for store in process.stores() if is_raw else ():
            try:
                self._make_and_register(f"copied into store {store!r}", functools.partial(self._copy_into, store))
            except errors.SnapError as error:
                if not error.may_fall_back:
                    raise
                LOG.warning(
                    "Snapshot to image %s: it cannot be copied into store '%s': %s",
                    self.image_id, store, error.report(), instance=self.instance,
                )
            else:
                return
        self._freeze_and_upload()

    def _copy_into(self, store: str, glance: Glance) -> str:
        del glance
        return clone.copy(process.engine(), self.image_id, self.disk.rbd_name, store, self._perform)

    def _freeze_and_upload(self) -> None:
        engine, job_id, disk = process.engine(), copy_id(self.image_id), self.disk.rbd_name
        self._begin()
        wanted = images.upload_format(engine.describe(disk))
        with self.on_disks.work(self.instance.uuid), self._giving_way():
            self.still.ask()
            self._freeze(job_id)
            try:
                self._upload(wanted, lambda target: engine.upload(job_id, disk, target, self._note))
            finally:
                self.release_disk(job_id)

    def _make_and_register(self, done: str, make: Callable[[Glance], str]) -> None:
        """Make the rbd image that is to be the Glance image, which returns its location, and register that.

        :param done: what was done then, for the log.
        """
        self._begin()
        started = time.monotonic()
        timeout = {"timeout_seconds": CONF.rbd_snap.operation_timeout}
        glance = images.glance_for(self.context)
        prepare = registration.preparation(glance, self.image_id, images.properties(self.metadata), **timeout)
        with Beside("nova-rbd-snap-properties", prepare) as prepared:
            url = self._make(lambda: make(glance))
            clone.register(
                process.engine(), glance, self.image_id, url, prepared.wait, report=self._note, **timeout
            )
        LOG.info(
            "Snapshot to image %s: %s in %.1f s (%s) as %s",
            self.image_id, done, time.monotonic() - started, self._durations(), url, instance=self.instance,
        )

    def _make(self, make: Callable[[], str]) -> str:
        """Make the rbd image; returns its location."""
        with self.on_disks.work(self.instance.uuid), self._giving_way():
            url = make()
        try:
            self.await_announced()
        except Exception:
            clone.give_up(process.engine(), self.image_id, "the server takes no image now")
            raise
        return url

    def _policy(self) -> Optional[str]:
        """What is to be instead of the configured policy.

        Nova deletes the image of a shelved server once, when that is unshelved, and heeds no answer: nobody may have it
        open for writing then, as who flattens it has. Unshelving flattens what it makes of the image.
        """
        policy_of_all = policy.override(self.instance) or CONF.rbd_snap.flatten
        return NEVER if policy_of_all == BACKGROUND and self.is_shelving else policy_of_all

    def freeze_disk(self, job_id: str) -> Optional[str]:
        """Take the snapshot that a full copy reads; None where none can be had and the guest must be suspended.

        :raises errors.SnapError: the cluster does not answer; a copy would not end.
        """
        try:
            with self.on_disks.work(self.instance.uuid):
                self.still.ask()  # a copy without a snapshot would ask QEMU for more, and wait for ever
                return self._freeze(job_id)
        except errors.SnapError as error:
            if not error.may_fall_back:
                raise
            if self.still.must_be_still():
                raise errors.NotQuiesced(f"a copy of a suspended guest is none that was quiesced: {error}") from error
            LOG.warning(
                "Snapshot to image %s: the guest is suspended for Nova's copy, for its disk cannot be frozen: %s",
                self.image_id, error.report(), instance=self.instance,
            )
            return None

    def _freeze(self, job_id: str) -> str:
        freeze = functools.partial(clone.freeze, process.engine(), job_id, self.disk.rbd_name, self._perform)
        return self._by_the_next("freezes the disk", freeze)

    def _perform(self, job_id: str) -> None:
        self.still.perform(process.engine(), job_id, self._note)

    def release_disk(self, job_id: str) -> None:
        """Remove the frozen snapshot. What fails is logged and stays in the ledger: the copy's own outcome counts."""
        try:
            process.engine().rollback(job_id)
        except errors.SnapError as error:
            LOG.warning(
                "Cannot remove the frozen snapshot of %s: %s",
                self.disk.rbd_name, error.report(), instance=self.instance,
            )


@dataclass
class OfDiskInFile(Request):
    """See :class:`Request`; the disk of a server that is off, in a file or on a volume of this host.

    :ivar path: of the file, or the block device.
    :ivar disk_format: of its content: ``qcow2`` or ``raw``.
    """

    ways: ClassVar[Collection[str]] = ("copy", "nova")

    path: str
    disk_format: str

    def copy(self) -> None:
        if reason := conf.reason_for_no_copy(CONF):
            raise errors.RuledOut(reason)
        self._refuse_encrypted()
        self.await_announced()
        with self._giving_way():
            self._upload(
                CONF.libvirt.snapshot_image_format or CONF.rbd_snap.copy_format,
                lambda target: process.engine().upload_file(
                    self.instance.uuid, self.path, self.disk_format, target, self._note
                ),
            )


def _has_encrypted_disk(domain_xml: str) -> bool:
    """Whether the root disk, the first of the domain, is encrypted by libvirt."""
    disk = ET.fromstring(domain_xml).find("./devices/disk")
    return disk is not None and disk.find(".//encryption") is not None
