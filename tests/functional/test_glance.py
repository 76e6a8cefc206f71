# SPDX-License-Identifier: Apache-2.0
"""What a real Glance answers to ``openstack/glance.py``, and the fake that stands for it in the fault matrix, too."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from typing import Any, Protocol

import pytest
import rbd

from nova_rbd_snap import errors
from nova_rbd_snap.openstack.glance import Glance
from nova_rbd_snap.openstack.registration import RAW
from nova_rbd_snap.specs import ImageSpec, Location
from tests.fakes.glance import FakeImageService
from tests.functional.world import MIB, World, delete
from tests.waiting import eventually


class Service(Protocol):
    """An image service, and a store with data in it.

    :ivar glance: as a tenant whom it believes to be Nova.
    """

    glance: Glance

    def waiting(self) -> str:
        """The id of a record that waits for data."""

    def data(self) -> str:
        """The location of data that is there."""

    def no_data(self) -> str:
        """A location with nothing at it."""

    def holds(self, url: str) -> bool:
        """Whether the data is there."""


class FakeService:
    """See :class:`Service`; it is the store, too."""

    def __init__(self) -> None:
        self._service = FakeImageService(store=self)
        self._there: set[str] = set()
        self.glance = Glance(self._service, ["http://glance"])

    def waiting(self) -> str:
        image_id = str(uuid.uuid4())
        self._service.add(image_id, **RAW)
        return image_id

    def data(self) -> str:
        url = self.no_data()
        self._there.add(url)
        return url

    def no_data(self) -> str:
        return f"rbd://fsid/images/{uuid.uuid4()}/snap"

    def holds(self, url: str) -> bool:
        return url in self._there

    def write(self, image_id: str, data: Any) -> str:
        return self.data()

    def remove(self, url: str) -> None:
        self._there.remove(url)


class RealService:
    """See :class:`Service`."""

    def __init__(self, world: World, stack: contextlib.ExitStack) -> None:
        self._world, self._stack = world, stack
        self.glance = world.tenant

    def waiting(self) -> str:
        image_id = self._world.new_record(f"{uuid.uuid4()}_disk")
        self._stack.callback(self._world.delete_image, image_id)
        self.glance.set_properties(image_id, RAW)
        return image_id

    def data(self) -> str:
        name = str(uuid.uuid4())
        ioctx = self._world.ioctx[self._world.images]
        self._stack.callback(self._world.remove_whole, self._world.images, name)
        rbd.RBD().create(ioctx, name, 8 * MIB)
        with rbd.Image(ioctx, name) as image:
            image.create_snap("snap")
            image.protect_snap("snap")
        return self._url(name)

    def no_data(self) -> str:
        return self._url(str(uuid.uuid4()))

    def _url(self, name: str) -> str:
        return Location(self._world.cluster.fsid(), ImageSpec(self._world.images, name).snap("snap")).url

    def holds(self, url: str) -> bool:
        return self._world.cluster.exists(ImageSpec(self._world.images, url.split("/")[-2]))


@pytest.fixture(params=["fake", "real"])
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    if request.param == "fake":
        yield FakeService()
        return
    with contextlib.ExitStack() as stack:
        yield RealService(request.getfixturevalue("world"), stack)


def active(service: Service, url: str) -> str:
    """An image that is active with the data at *url*."""
    image_id = service.waiting()
    service.glance.patch_location(image_id, url)
    return image_id


def refusal(call: Any, *arguments: Any) -> int:
    """The status that a call is refused with."""
    with pytest.raises(errors.NotRegistered) as caught:
        call(*arguments)
    assert caught.value.status is not None
    return caught.value.status


def test_glance_is_known_by_its_schema(service: Service) -> None:
    assert service.glance.answers()


def test_stores_are_for_administrators(service: Service) -> None:
    assert service.glance.pool_of_store("rbd") is None


def test_record_that_waits(service: Service) -> None:
    record = service.glance.record(service.waiting())
    assert (record.status, record.urls, record.urls_complete, record.importing) == ("queued", (), True, False)


def test_no_record(service: Service) -> None:
    nobody, url = str(uuid.uuid4()), service.data()
    for call, arguments in (
        (service.glance.record, ()),
        (service.glance.set_properties, (RAW,)),
        (service.glance.post_location, (url,)),
        (service.glance.patch_location, (url,)),
        (service.glance.delete, ()),
    ):
        with pytest.raises(errors.RecordGone):
            call(nobody, *arguments)


def test_location_that_is_posted(service: Service) -> None:
    """A task gives it to the image, which takes no second one so."""
    image_id, url = service.waiting(), service.data()
    service.glance.post_location(image_id, url)
    eventually(lambda: service.glance.record(image_id).status == "active", "the image is active")
    assert set(service.glance.record(image_id).urls or ()) == {url}
    assert refusal(service.glance.post_location, image_id, url) == 409


def test_location_that_is_posted_without_data(service: Service) -> None:
    """The task fails, and the record waits again."""
    image_id = service.waiting()
    service.glance.post_location(image_id, service.no_data())
    eventually(lambda: not service.glance.record(image_id).importing, "the task has ended")
    record = service.glance.record(image_id)
    assert (record.status, record.urls) == ("queued", ())


def test_location_that_is_patched(service: Service) -> None:
    """The image is active at once."""
    url = service.data()
    record = service.glance.record(active(service, url))
    assert (record.status, set(record.urls or ()), record.importing) == ("active", {url}, False)


def test_location_that_is_patched_without_data(service: Service) -> None:
    image_id = service.waiting()
    assert refusal(service.glance.patch_location, image_id, service.no_data()) == 400
    record = service.glance.record(image_id)
    assert (record.status, record.urls) == ("queued", ())


def test_properties(service: Service) -> None:
    """May be set twice, and before and after the data is there; the formats only before."""
    image_id = active(service, service.data())
    for _ in range(2):
        service.glance.set_properties(image_id, {"hw_video_model": "virtio"})
    assert refusal(service.glance.set_properties, image_id, {"disk_format": "qcow2"}) == 403


def test_deletion(service: Service) -> None:
    """Of a record that waits, and of an image with its data."""
    url = service.data()
    for image_id in (service.waiting(), active(service, url)):
        delete(service.glance, image_id)
        with pytest.raises(errors.RecordGone):
            service.glance.record(image_id)
    eventually(lambda: not service.holds(url), "the data is gone")
