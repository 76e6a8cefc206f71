# SPDX-License-Identifier: Apache-2.0
"""Nova's seam ``LibvirtDriver``: climbs the ladder of ways until one yields an active image.

Each way either ends with the image active or has undone itself when it raises; the last one is Nova's own full copy.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Optional

from nova import exception
from nova.compute import power_state, task_states
from nova.virt.libvirt import driver as libvirt_driver
from nova.virt.libvirt import utils as libvirt_utils
from oslo_log import log as logging

from nova_rbd_snap import conf, errors
from nova_rbd_snap.ledger.job import copy_id
from nova_rbd_snap.openstack import imagebackend, process
from nova_rbd_snap.openstack.guest import Guest, thaw_all
from nova_rbd_snap.openstack.ondisks import OnDisks
from nova_rbd_snap.openstack.requests import OfDiskInCeph, OfDiskInFile, Request, UpdateTaskState

CONF = process.CONF
LOG = logging.getLogger(__name__)

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
        if no_copy := conf.reason_for_no_copy(CONF):
            LOG.warning("nova-rbd-snap will not copy: %s", no_copy)
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

    def _climb(self, request: Request) -> None:
        """Try the ways in order; returns once one has made the image active."""
        image_id, instance = request.image_id, request.instance
        ways = {"clone": request.clone, "copy": request.copy, "nova": lambda: self._nova(request)}
        *first, last = [way for way in CONF.rbd_snap.ways if way in request.ways]
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
                    LOG.log(
                        logging.INFO if isinstance(error, errors.RuledOut) else logging.WARNING,
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
    ) -> Optional[Request]:
        """The request as ours to handle; None where it is Nova's own: we are off, or have no way for such a disk."""
        if not (self._usable and CONF.rbd_snap.enabled):
            return None
        try:
            guest = self._host.get_guest(instance)
        except exception.InstanceNotFound as error:
            raise exception.InstanceNotRunning(instance_id=instance.uuid) from error
        path, disk_format = libvirt_utils.find_disk(guest)
        place = libvirt_utils.get_disk_type_from_path(path)
        common = {
            "context": context,
            "instance": instance,
            "guest": guest,
            "image_id": image_id,
            "update_task_state": update_task_state,
            "metadata": self._create_snapshot_metadata(instance.image_meta, instance, "raw", None),
            "on_disks": self._on_disks,
            "is_shelving": instance.task_state == task_states.SHELVING,
        }
        if place == "rbd":
            try:
                disk = self.image_backend.by_libvirt_path(instance, path, image_type="rbd")
            except exception.InvalidDevicePath:
                return None
            return OfDiskInCeph(disk=disk, still=Guest(self, context, instance, guest), **common)
        is_off = guest.get_power_state(self._host) == power_state.SHUTDOWN
        if is_off and place in (None, "lvm") and disk_format in (conf.RAW, conf.QCOW2) and "copy" in CONF.rbd_snap.ways:
            return OfDiskInFile(path=path, disk_format=disk_format, **common)
        return None

    def _nova(self, request: Request) -> None:
        """The way 'nova': Nova's own full copy."""
        request.await_announced()
        if isinstance(request, OfDiskInCeph):
            self._full_copy(request)
        else:
            super().snapshot(request.context, request.instance, request.image_id, request.task_states_for_nova())
        LOG.info("Snapshot to image %s: copied in full by Nova", request.image_id, instance=request.instance)

    def _full_copy(self, request: OfDiskInCeph) -> None:
        """From a frozen snapshot where one can be taken."""
        job_id = copy_id(request.image_id)
        snap = request.freeze_disk(job_id)
        try:
            copy = imagebackend.FullCopy(request.image_id, snap)
            with self._running_again(), imagebackend.making_full_copy(copy):
                super().snapshot(request.context, request.instance, request.image_id, request.task_states_for_nova())
        finally:
            if snap is not None:
                request.release_disk(job_id)

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


def _for_nova(error: errors.SnapError, image_id: str, instance: Any) -> Any:
    """The exception by which Nova's manager does the right thing with the image record.

    The reason is logged here, for from 33 on Nova logs nothing of what a snapshot raises.
    """
    if isinstance(error, errors.RecordGone):
        return exception.ImageNotFound(image_id=image_id)
    LOG.error("Snapshot to image %s failed: %s", image_id, error.report(), instance=instance)
    return exception.NovaException(f"snapshot to image {image_id} failed: {error.report()}")
