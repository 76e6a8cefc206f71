# SPDX-License-Identifier: Apache-2.0
"""Images that are made to be read once, to see whether Glance can; see ``flatten/readers.py``."""

from __future__ import annotations

import contextlib
from typing import Callable

from nova_rbd_snap import errors
from nova_rbd_snap.openstack import registration
from nova_rbd_snap.openstack.glance import Glance

_NAME = "nova-rbd-snap: can Glance read a clone?"
#: Statuses that are about who asks, and tell nothing of the data.
_OF_THE_USER = (401, 403, 405, 409, 413, 501)


class ScratchImages:
    """See :class:`nova_rbd_snap.flatten.readers.ScratchImages`."""

    def __init__(self, connect: Callable[[], Glance], timeout_seconds: float) -> None:
        """
        :param connect: Glance as a user who may register locations.
        :param timeout_seconds: as :func:`registration.register` takes it.
        """
        self._connect, self._timeout_seconds = connect, timeout_seconds

    def read(self, image_id: str, url: str) -> bytes:
        glance = self._connect()
        glance.create(image_id, _NAME)
        timeout = self._timeout_seconds
        prepare = registration.preparation(glance, image_id, registration.RAW, timeout_seconds=timeout)
        try:
            registration.register(glance, image_id, url, prepare, timeout_seconds=timeout)
            return glance.data(image_id)
        except errors.NotRegistered as error:
            if error.status in _OF_THE_USER:
                raise
            raise errors.NotReadable(f"Glance cannot read the clone {url}: {error}") from error

    def delete(self, image_id: str) -> None:
        with contextlib.suppress(errors.RecordGone):
            self._connect().delete(image_id)
