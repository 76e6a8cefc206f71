# SPDX-License-Identifier: Apache-2.0
"""Nova's seam ``nova.virt.libvirt.imagebackend.Rbd``: direct snapshots through the engine.

Used by our driver, which registers the image itself; also good alone, under Nova's own driver: then it keeps Nova's
contract, in which the caller registers the location and calls ``cleanup_direct_snapshot`` when that fails.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Optional

import nova.conf
from nova import exception
from nova.virt import images as nova_images
from nova.virt.libvirt import imagebackend

from nova_rbd_snap import errors
from nova_rbd_snap.engine import unheard
from nova_rbd_snap.ledger.job import INLINE
from nova_rbd_snap.openstack import clone, images, process, registration
from nova_rbd_snap.openstack.glance import Glance

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class FullCopy:
    """A full copy by Nova that our driver asked for.

    :ivar snap: the frozen snapshot to read; None where none could be taken.
    """

    image_id: str
    snap: Optional[str]


_full_copy: contextvars.ContextVar[Optional[FullCopy]] = contextvars.ContextVar("full_copy", default=None)


def full_copy() -> Optional[FullCopy]:
    """The full copy that the running request is about, if it is about one."""
    return _full_copy.get()


@contextlib.contextmanager
def making_full_copy(copy: FullCopy) -> Iterator[None]:
    """Within the block, and only for this request, Nova makes the full copy *copy*."""
    token = _full_copy.set(copy)
    try:
        yield
    finally:
        _full_copy.reset(token)


class Rbd(imagebackend.Rbd):
    """A server's disk in Ceph."""

    _frozen: Optional[str] = None
    _handed_over: Optional[tuple[Glance, str, str]] = None

    def clone_to_glance(
        self,
        glance: Glance,
        image_id: str,
        base_image_id: Optional[str],
        perform: clone.Perform,
        flatten: Optional[str] = None,
    ) -> str:
        """Clone the disk into Glance's pool as *image_id*; returns the location to register.

        :param flatten: as the engine's ``reserve_clone`` takes it.
        :raises errors.SnapError: as :func:`nova_rbd_snap.openstack.clone.make`.
        """
        engine = process.engine()
        pool = images.destination_pool(glance, engine.describe(self.rbd_name), base_image_id)
        return clone.make(engine, image_id, self.rbd_name, pool, perform, flatten=flatten)

    def direct_snapshot(
        self, context: Any, snapshot_name: str, image_format: str, image_id: str, base_image_id: Optional[str]
    ) -> str:
        """See Nova.

        :raises exception.ImageUnacceptable: all was undone; Nova shall make its full copy.
        :raises exception.NovaException: all was undone, and a full copy would fail or hang as well.
        """
        copy = full_copy()
        if copy is not None and copy.image_id == image_id:
            self._frozen = copy.snap
            raise NotImplementedError  # the one refusal that Nova does not log as a failure
        if not CONF.rbd_snap.enabled:
            return str(super().direct_snapshot(context, snapshot_name, image_format, image_id, base_image_id))
        if image_format != "raw":
            raise exception.ImageUnacceptable(
                image_id=image_id, reason=f"a clone holds raw bytes; [libvirt] snapshot_image_format is {image_format}"
            )
        engine = process.engine()
        try:
            glance = images.glance_for(context)
            url = self.clone_to_glance(
                glance,
                image_id,
                base_image_id,
                lambda job_id: engine.perform(job_id, None, unheard),
                INLINE,  # Nova's own driver could not remove a disk that images depend on
            )
            # Nova registers it, and never says so: from now on Glance's record is what counts.
            engine.leave(image_id)
        except Exception as cause:
            error = errors.known(cause)
            if error.may_fall_back:
                raise exception.ImageUnacceptable(image_id=image_id, reason=error.report()) from cause
            raise exception.NovaException(f"snapshot to image {image_id}: {error.report()}") from cause
        self._handed_over = (glance, image_id, url)
        return url

    def cleanup_direct_snapshot(
        self, location: Optional[dict[str, str]], also_destroy_volume: bool = False, ignore_errors: bool = False
    ) -> None:
        """See Nova; but data that the Glance record points at, or may point at, is kept."""
        if not location or self._handed_over is None or self._handed_over[2] != location["url"]:
            super().cleanup_direct_snapshot(location, also_destroy_volume, ignore_errors)
            return
        glance, image_id, url = self._handed_over
        # Nova's own request may still be on its way: a record that waits is watched for a while.
        timeout = CONF.rbd_snap.operation_timeout
        state = registration.observe(glance, image_id, url, timeout_seconds=timeout, waiting_seconds=timeout)
        unused = (
            registration.State.WAITING, registration.State.GONE,
            registration.State.FOREIGN, registration.State.UPLOAD,
        )  # fmt: skip
        if state in unused:
            clone.give_up(process.engine(), image_id, "Glance does not use it")
        else:
            LOG.warning("Kept %s: image %s uses it, or may use it; see 'nova-rbd-snap job list'", url, image_id)

    def snapshot_extract(self, target: str, out_format: str) -> None:
        """See Nova; reads the frozen snapshot where there is one, so that the guest may go on writing."""
        if self._frozen is None:
            super().snapshot_extract(target, out_format)
            return
        disk = f"rbd:{self.driver.pool}/{self.rbd_name}"
        source = f"{disk}@{self._frozen}{self.path[len(disk):]}"
        nova_images.convert_image(source, target, "raw", out_format)
