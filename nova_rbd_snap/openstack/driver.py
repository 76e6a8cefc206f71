# SPDX-License-Identifier: Apache-2.0
"""Nova's seam ``LibvirtDriver``: climbs the ladder of ways until one yields an active image.

Each way either ends with the image active or has undone itself when it raises; the last one is Nova's own full copy.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Callable, Optional

from nova import exception
from nova.compute import power_state, task_states
from nova.virt.libvirt import driver as libvirt_driver
from nova.virt.libvirt import utils as libvirt_utils
from oslo_log import log as logging

from nova_rbd_snap import conf, errors
from nova_rbd_snap.ledger.job import BACKGROUND, NEVER, copy_id
from nova_rbd_snap.openstack import clone, imagebackend, images, policy, process, registration
from nova_rbd_snap.openstack.beside import Beside
from nova_rbd_snap.openstack.glance import Glance
from nova_rbd_snap.openstack.guest import Guest, thaw_all
from nova_rbd_snap.openstack.ondisks import OnDisks

CONF = process.CONF
LOG = logging.getLogger(__name__)

UpdateTaskState = Callable[..., None]

#: Seconds between two looks at whether a server that is being shelved is to be deleted.
_LOOK_SECONDS = 5.0

_REBUILDS = (task_states.REBUILDING, task_states.REBUILD_BLOCK_DEVICE_MAPPING, task_states.REBUILD_SPAWNING)


class LibvirtDriver(libvirt_driver.LibvirtDriver):
    """Nova's driver with snapshots of RBD disks made inside Ceph."""

    def __init__(self, virtapi: Any, read_only: bool = False) -> None:
        super().__init__(virtapi, read_only=read_only)
        self._on_disks = OnDisks()
        self._usable = self._read_configuration()
        if self._usable:
            self.image_backend.BACKEND["rbd"] = imagebackend.Rbd

    @staticmethod
    def _read_configuration() -> bool:
        try:
            conf.Settings.read(CONF)
        except conf.BadOption as error:
            LOG.error("nova-rbd-snap is off, snapshots are Nova's own: %s", error)
            conf.make_readable(CONF)
            return False
        for reason in conf.reasons_for_no_clone(CONF):
            LOG.warning("nova-rbd-snap will not clone: %s", reason)
        for reason in conf.reasons_for_inline(CONF):
            LOG.warning("nova-rbd-snap flattens at once: %s", reason)
        return True

    def init_host(self, host: str) -> None:
        """See Nova. What is wrong with the pools is told to the log, later if the cluster is slow to answer."""
        super().init_host(host)
        if self._usable and CONF.libvirt.images_type == "rbd":
            threading.Thread(target=self._look_after, name="nova-rbd-snap-engine", daemon=True).start()

    def _look_after(self) -> None:
        """What earlier snapshots left, also where no new ones shall be taken."""
        try:
            thaw_all(self)
        except Exception as error:  # the engine is started all the same
            LOG.error("Cannot look for guests that were left frozen: %s; restart nova-compute", error)
        process.await_identity()
        if CONF.rbd_snap.enabled:
            self._check()
        process.engine().keep_running()

    @staticmethod
    def _check() -> None:
        try:
            problems = process.engine().check()
        except errors.SnapError as error:
            problems = [f"cannot be checked now: {error.report()}"]
        for problem in problems:
            LOG.error("nova-rbd-snap: %s", problem)
        if not problems and not any(conf.reasons_for_no_clone(CONF)):
            ways = ", ".join(CONF.rbd_snap.ways)
            LOG.info("nova-rbd-snap is ready: ways %s, flatten %s", ways, CONF.rbd_snap.flatten)

    def snapshot(
        self, context: Any, instance: Any, image_id: str, update_task_state: UpdateTaskState
    ) -> None:
        """See Nova."""
        request = self._request(context, instance, image_id, update_task_state)
        if request is None:
            with self._running_again():
                super().snapshot(context, instance, image_id, update_task_state)
            return
        with request.announcing():
            try:
                self._climb(request)
            except Exception:
                if request.is_shelving:
                    request.drop_record()
                raise

    def _climb(self, request: _Request) -> None:
        """Try the ways in order; returns once one has made the image active."""
        image_id, instance = request.image_id, request.instance
        ways = {"clone": request.clone, "nova": lambda: self._full_copy(request)}
        *first, last = CONF.rbd_snap.ways
        try:
            for way in first:
                try:
                    ways[way]()
                except (exception.InstanceNotFound, exception.UnexpectedTaskStateError):
                    raise  # the server is going
                except Exception as cause:
                    error = errors.known(cause)
                    if not error.may_fall_back:
                        raise
                    LOG.warning(
                        "Snapshot to image %s: the way '%s' failed and the next is tried: %s",
                        image_id, way, error.report(), instance=instance,
                    )
                else:
                    return
            ways[last]()
        except errors.Cancelled as error:
            request.await_announced()
            # Nova knows why: where the server is being deleted, this raises what its manager expects then.
            request.update_task_state(
                task_state=task_states.IMAGE_UPLOADING, expected_state=task_states.IMAGE_UPLOADING
            )
            raise _for_nova(error, image_id, instance) from error
        except errors.SnapError as error:
            raise _for_nova(error, image_id, instance) from error

    def _request(
        self, context: Any, instance: Any, image_id: str, update_task_state: UpdateTaskState
    ) -> Optional[_Request]:
        """The request as ours to handle; None where it is Nova's own: we are off, or the disk is not in Ceph."""
        if not (self._usable and CONF.rbd_snap.enabled):
            return None
        try:
            guest = self._host.get_guest(instance)
        except exception.InstanceNotFound as error:
            raise exception.InstanceNotRunning(instance_id=instance.uuid) from error
        path, _ = libvirt_utils.find_disk(guest)
        if libvirt_utils.get_disk_type_from_path(path) != "rbd":
            return None
        try:
            disk = self.image_backend.by_libvirt_path(instance, path, image_type="rbd")
        except exception.InvalidDevicePath:
            return None
        metadata = self._create_snapshot_metadata(instance.image_meta, instance, "raw", None)
        return _Request(
            context,
            instance,
            guest,
            image_id,
            update_task_state,
            disk,
            metadata,
            Guest(self, context, instance, guest),
            self._on_disks,
            instance.task_state == task_states.SHELVING,
        )

    def _full_copy(self, request: _Request) -> None:
        """Nova's own full copy, from a frozen snapshot where one can be taken."""
        request.await_announced()
        job_id = copy_id(request.image_id)
        snap = request.freeze_disk(job_id)
        try:
            copy = imagebackend.FullCopy(request.image_id, snap)
            with self._running_again(), imagebackend.making_full_copy(copy):
                super().snapshot(request.context, request.instance, request.image_id, request.task_states_for_nova())
        finally:
            if snap is not None:
                request.release_disk(job_id)
        LOG.info("Snapshot to image %s: copied in full by Nova", request.image_id, instance=request.instance)

    def _needs_suspend_resume_for_snapshot(self, live_snapshot: bool, current_power_state: int) -> bool:
        """See Nova. A copy that reads a frozen snapshot lets the guest be."""
        copy = imagebackend.full_copy()
        if copy is not None and copy.snap is not None:
            return False
        return bool(super()._needs_suspend_resume_for_snapshot(live_snapshot, current_power_state))

    @contextlib.contextmanager
    def _running_again(self) -> Iterator[None]:
        """A guest that Nova suspends within the block for its copy runs again after it, whatever went wrong.

        Nova itself resumes it on some ways out, and leaves it suspended on the others. One whose server is being
        deleted stays off: its disks and ports go.
        """
        token = _suspension.set(None)
        all_went_well = is_going = False
        try:
            yield
            all_went_well = True
        except (exception.InstanceNotFound, exception.UnexpectedDeletingTaskStateError):
            is_going = True
            raise
        finally:
            suspension = _suspension.get()
            _suspension.reset(token)
            if suspension is not None and not is_going:
                try:
                    self._end(suspension)
                except Exception as error:
                    if all_went_well:
                        raise
                    LOG.error(
                        "The guest was suspended for its copy and is not as it was before: %s; remedy: 'openstack "
                        "server start', or 'stop' and 'start' where Nova takes it for running",
                        error, instance=suspension.instance,
                    )

    def _end(self, suspension: Suspension) -> None:
        """:raises Exception: the guest is not as it was before."""
        guest = self._host.get_guest(suspension.instance)
        if guest.get_power_state(self._host) == power_state.SHUTDOWN:
            super()._resume_guest_after_snapshot(
                suspension.context, suspension.live_snapshot, suspension.power_state, suspension.instance, guest
            )
        elif suspension.error is not None:
            raise suspension.error

    def _suspend_guest_for_snapshot(
        self, context: Any, live_snapshot: bool, current_power_state: int, instance: Any
    ) -> None:
        """See Nova."""
        if self._needs_suspend_resume_for_snapshot(live_snapshot, current_power_state):
            # Said first: a guest may be suspended although that seemed to fail.
            _suspension.set(Suspension(context, live_snapshot, current_power_state, instance))
        super()._suspend_guest_for_snapshot(context, live_snapshot, current_power_state, instance)

    def _resume_guest_after_snapshot(
        self, context: Any, live_snapshot: bool, original_power_state: int, instance: Any, guest: Any
    ) -> None:
        """See Nova. What goes wrong here is put off until the end, lest it hide what went wrong with the copy."""
        suspension = _suspension.get()
        try:
            super()._resume_guest_after_snapshot(context, live_snapshot, original_power_state, instance, guest)
        except Exception as error:
            if suspension is None:
                raise
            suspension.error = error
        else:
            _suspension.set(None)

    def _cleanup_rbd(self, instance: Any) -> None:
        """See Nova. A snapshot under way is stopped and undone first: the deletion wins.

        :raises exception.NovaException: the cluster does not answer; the server can be deleted again later.
        """
        if not self._usable or instance.task_state == task_states.RESIZE_REVERTING:
            super()._cleanup_rbd(instance)
            return
        with self._on_disks.given_up(instance.uuid):
            self._stop_snapshots(instance)
            self._remove_disks(instance)

    def _stop_snapshots(self, instance: Any) -> None:
        try:
            for job in self._on_disks.stop(instance.uuid, process.engine().cancel, CONF.rbd_snap.operation_timeout):
                LOG.info("Undid snapshot job %s: its server is being deleted", job, instance=instance)
        except errors.SnapError as error:
            LOG.warning("Cannot stop the server's snapshots: %s", error.report(), instance=instance)

    def _remove_disks(self, instance: Any) -> None:
        try:
            left = process.engine().remove_disks(instance.uuid)
        except errors.SnapError as error:
            if not error.may_fall_back:  # Nova's own removal would wait for ever
                raise exception.NovaException(f"cannot remove the server's disks: {error.report()}") from error
            LOG.warning("Nova removes the server's disks itself: %s", error.report(), instance=instance)
            super()._cleanup_rbd(instance)
            return
        if left and instance.task_state in _REBUILDS:  # what stays would be the rebuilt server's disk
            raise exception.NovaException(f"the server cannot be rebuilt: {'; '.join(left)}")
        for sentence in left:
            LOG.warning("The server goes, but %s", sentence, instance=instance)


@dataclass
class Suspension:
    """That Nova suspended a guest for its copy, and what it takes to resume it.

    :ivar power_state: the guest's, before.
    :ivar error: why it could not be resumed when Nova tried.
    """

    context: Any
    live_snapshot: bool
    power_state: int
    instance: Any
    error: Optional[Exception] = None


#: The suspension that Nova made for the copy of the running request, and has not ended.
_suspension: contextvars.ContextVar[Optional[Suspension]] = contextvars.ContextVar("suspension", default=None)


@dataclass
class _Request:
    """One snapshot request on a disk in Ceph.

    :ivar metadata: as Nova makes it for the image record.
    :ivar still: what the snapshot needs of *guest*.
    :ivar is_shelving: of a server, not for its own sake.
    :ivar steps: each step's name, and when it began.
    """

    context: Any
    instance: Any
    guest: Any
    image_id: str
    update_task_state: UpdateTaskState
    disk: imagebackend.Rbd
    metadata: dict[str, Any]
    still: Guest
    on_disks: OnDisks
    is_shelving: bool
    steps: list[tuple[str, float]] = field(default_factory=list)
    _announcing: Optional[Beside] = None

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

    def clone(self) -> None:
        """The way 'clone': returns when the image is active."""
        for reason in conf.reasons_for_no_clone(CONF):
            raise errors.Refused(reason)
        if _has_encrypted_disk(self.guest.get_xml_desc()):
            raise errors.Refused("the server's disk is encrypted")
        started = time.monotonic()
        timeout = {"timeout_seconds": CONF.rbd_snap.operation_timeout}
        glance = images.glance_for(self.context)
        prepare = registration.preparation(glance, self.image_id, images.properties(self.metadata), **timeout)
        with Beside("nova-rbd-snap-properties", prepare) as prepared:
            url = self._make(glance)
            clone.register(
                process.engine(), glance, self.image_id, url, prepared.wait, report=self._note, **timeout
            )
        LOG.info(
            "Snapshot to image %s: cloned in %.1f s (%s) as %s",
            self.image_id, time.monotonic() - started, self._durations(), url, instance=self.instance,
        )

    def _make(self, glance: Glance) -> str:
        """Make the clone; returns its location."""
        with self.on_disks.work(self.instance.uuid), self._giving_way():
            url = self.disk.clone_to_glance(
                glance, self.image_id, self.instance.image_ref, self._perform, self._policy()
            )
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
        """By the engine or, where that dies over it, by the next."""
        freeze = functools.partial(clone.freeze, process.engine(), job_id, self.disk.rbd_name, self._perform)
        try:
            return freeze()
        except (errors.EngineLost, errors.LedgerConflict) as error:
            if not error.may_fall_back:
                raise
            LOG.warning(
                "Snapshot to image %s: the engine was lost, and the next one freezes the disk: %s",
                self.image_id, error.report(), instance=self.instance,
            )
            return freeze()

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

    def task_states_for_nova(self) -> UpdateTaskState:
        """The callback for Nova's own snapshot: its first two transitions were made already."""
        made = iter((task_states.IMAGE_PENDING_UPLOAD, task_states.IMAGE_UPLOADING))

        def update(task_state: str, **expected: Any) -> None:
            if next(made, None) != task_state:
                self.update_task_state(task_state=task_state, **expected)

        return update

    def _note(self, step: str, done: int, total: int) -> None:
        if not self.steps or self.steps[-1][0] != step:
            self.steps.append((step, time.monotonic()))

    def _durations(self) -> str:
        ends = [start for _, start in self.steps[1:]] + [time.monotonic()]
        return ", ".join(f"{step} {end - start:.1f}" for (step, start), end in zip(self.steps, ends))


def _has_encrypted_disk(domain_xml: str) -> bool:
    """Whether the root disk, the first of the domain, is encrypted by libvirt."""
    disk = ET.fromstring(domain_xml).find("./devices/disk")
    return disk is not None and disk.find(".//encryption") is not None


def _for_nova(error: errors.SnapError, image_id: str, instance: Any) -> Any:
    """The exception by which Nova's manager does the right thing with the image record.

    The reason is logged here, for from 33 on Nova logs nothing of what a snapshot raises.
    """
    if isinstance(error, errors.RecordGone):
        return exception.ImageNotFound(image_id=image_id)
    LOG.error("Snapshot to image %s failed: %s", image_id, error.report(), instance=instance)
    return exception.NovaException(f"snapshot to image {image_id} failed: {error.report()}")
