# SPDX-License-Identifier: Apache-2.0
"""One disk, and one image record that waits for its snapshot: what is made of them, and what is left."""

from __future__ import annotations

import contextlib
import json
import random
import uuid
from typing import Any, Optional

import rados
import rbd

from nova_rbd_snap import errors
from nova_rbd_snap.ledger.store import OBJECT
from nova_rbd_snap.specs import GLANCE_SNAP, ImageSpec
from tests.deaths.guest import BLOCK_BYTES, PLACES, Guest, block
from tests.functional.world import CEPH_CONF, MIB, World

DISK_BYTES = 32 * MIB
#: Small, so that the flatten has many of them to copy and takes its time.
OBJECT_ORDER = 18
OBJECT_BYTES = 1 << OBJECT_ORDER
_DATA_BYTES = 4096


class Scene:
    """Removed with *stack*."""

    def __init__(self, world: World, stack: contextlib.ExitStack, *, guest: bool) -> None:
        self._world = world
        self._stack = stack
        self.disk = f"{uuid.uuid4()}_disk"
        self._first = self._make_disk()
        self.image_id = world.new_record(self.disk)
        stack.callback(self._remove_image)
        #: Internal ids that the image's data bore, as far as they were seen.
        self._ids: set[str] = set()
        self.guest: Optional[Guest] = None
        if guest:
            user = world.conf.libvirt.rbd_user
            self.guest = stack.enter_context(Guest(CEPH_CONF, user, world.vms, self.disk, OBJECT_BYTES))
        #: Of the guest's, when the snapshot was asked for.
        self.written_before = 0

    def _make_disk(self) -> bytes:
        ioctx = self._world.ioctx[self._world.vms]
        content = bytearray(DISK_BYTES)
        rbd.RBD().create(ioctx, self.disk, DISK_BYTES, order=OBJECT_ORDER)
        self._stack.callback(self._remove_disk)
        with rbd.Image(ioctx, self.disk) as disk:
            for offset in range(0, DISK_BYTES, OBJECT_BYTES):
                data = random.randbytes(_DATA_BYTES)
                content[offset : offset + _DATA_BYTES] = data
                disk.write(data, offset)
        return bytes(content)

    def _remove_disk(self) -> None:
        # A failed test's snapshots and clones stay where they are, to be looked at.
        with contextlib.suppress(rbd.Error):
            rbd.RBD().remove(self._world.ioctx[self._world.vms], self.disk)

    def _remove_image(self) -> None:
        with contextlib.suppress(AssertionError):
            self._world.delete_image(self.image_id)

    # -- what is there -------------------------------------------------------------------------------------------

    def job(self) -> Optional[str]:
        """The job's record, as text."""
        return self._world.cluster.omap_items(self._world.vms, OBJECT).get(self.image_id)

    def status(self) -> Optional[str]:
        """The image record's, None for one that is deleted."""
        try:
            return self._world.status(self.image_id)
        except errors.RecordGone:
            return None

    def left(self, *, may_wait: bool) -> list[str]:
        """What is there that a finished, or an undone, snapshot does not leave, as sentences.

        :param may_wait: the image's record may wait for data: somebody is alive to give it some, or nobody began.
        """
        job, status = self._look(), self.status()
        found = [] if job is None else [f"the job is in the ledger: {job}"]
        found += [f"the disk has {what}" for what in self._on_disk()]
        for pool, ioctx in self._world.ioctx.items():
            names = {entry["name"] for entry in rbd.RBD().trash_list(ioctx)}
            found += [f"the trash of {pool} has {name}" for name in names & {self.image_id, self.disk}]
        if status == "active":
            found += [f"the image {flaw}" for flaw in self._flaws()]
        else:
            if status is not None and (status != "queued" or not may_wait):
                found.append(f"the record is {status}")
            found += self._strays()
        return found

    def _look(self) -> Optional[str]:
        """The job's record; on the way it is seen what id the image's data bears."""
        job = self.job()
        if job is not None and json.loads(job).get("dest_id"):
            self._ids.add(json.loads(job)["dest_id"])
        with contextlib.suppress(rados.ObjectNotFound):
            # Made first and removed last; the id after its length.
            self._ids.add(self._images.read(f"rbd_id.{self.image_id}")[4:].decode())
        return job

    @property
    def _images(self) -> Any:
        return self._world.ioctx[self._world.images]

    def _on_disk(self) -> list[str]:
        ioctx = self._world.ioctx[self._world.vms]
        with rbd.Image(ioctx, self.disk, read_only=True) as disk:
            found = [f"snapshot {snap['name']}" for snap in disk.list_snaps()]
            header = f"rbd_header.{disk.id()}"
        with rados.ReadOpCtx() as operation:
            pairs, _ = ioctx.get_omap_vals(operation, "", "snap_children_", 100)
            ioctx.operate_read_op(operation, header)
            return found + [f"a link to a clone, {key}" for key, _ in pairs]

    def _flaws(self) -> list[str]:
        """What an active image has, or lacks, that it should not."""
        found = []
        with rbd.Image(self._images, self.image_id, read_only=True) as image:
            snaps = [snap["name"] for snap in image.list_snaps()]
            if snaps != [GLANCE_SNAP] or not image.is_protected_snap(GLANCE_SNAP):
                found.append(f"is not sealed: {snaps}")
        for snap in (None, *snaps):
            with (
                rbd.Image(self._images, self.image_id, snapshot=snap, read_only=True) as image,
                contextlib.suppress(rbd.ImageNotFound),
            ):
                found.append(f"has parent {image.parent_info()} at {snap or 'its head'}")
        return found

    def _strays(self) -> list[str]:
        """What there is of the image's data."""
        found = []
        if self.image_id in rbd.RBD().list(self._images):
            found.append(f"{self.image_id} is listed in {self._world.images}")
        if self._world.cluster.exists(ImageSpec(self._world.images, self.image_id)):
            found.append(f"{self.image_id} exists in {self._world.images}")
        if not found:
            names = [entry.key for entry in self._images.list_objects()]
            found += [f"object {name}" for name in names if any(part in self._ids for part in name.split("."))]
        return found

    # -- bytes ---------------------------------------------------------------------------------------------------

    def asked(self) -> None:
        """The snapshot is about to be asked for: it holds what was written before."""
        self.written_before = self.guest.written if self.guest else 0

    def wrong_bytes(self) -> list[str]:
        """What disk and active image hold that they should not, as sentences. The guest, if any, has stopped."""
        written, found = self.guest.written if self.guest else 0, []
        if self._world.content(self._world.vms, self.disk) != self._content(written):
            found.append("the disk's content is not what was written")
        if self.status() == "active":
            image = self._world.content(self._world.images, self.image_id, GLANCE_SNAP)
            frozen = self._last_write_in(image)
            if not self.written_before <= frozen <= written or image != self._content(frozen):
                found.append(
                    f"the image's content is not the disk's at one instant of the snapshot: it has write {frozen}, "
                    f"{self.written_before} were before and {written} in all"
                )
        return found

    def _content(self, written: int) -> bytes:
        """The disk's content after so many writes of the guest."""
        content = bytearray(self._first)
        if self.guest:
            for number in range(max(1, written - PLACES + 1), written + 1):
                place = self.guest.place(number)
                content[place : place + BLOCK_BYTES] = block(number)
        return bytes(content)

    def _last_write_in(self, content: bytes) -> int:
        if self.guest is None:
            return 0
        places = (self.guest.place(number) for number in range(PLACES))
        return max(int.from_bytes(content[place : place + 8], "little") for place in places)
