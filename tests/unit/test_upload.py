# SPDX-License-Identifier: Apache-2.0
"""Uploads: what becomes of the record, whatever Glance, the way to it, or the disk does."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Callable, Optional

import pytest

from nova_rbd_snap import errors
from nova_rbd_snap.openstack.glance import Glance, Record
from nova_rbd_snap.openstack.upload import Body, upload
from tests.fakes.glance import FakeImageService, Fault
from tests.unit.test_registration import IMAGE, Time, glance

Chunks = Generator[bytes, None, None]
CHUNKS = [b"one", b"two", b"three"]
DATA = b"".join(CHUNKS)


class Data:
    """Where the fake keeps what it is sent."""

    def __init__(self) -> None:
        self.images: dict[str, Any] = {}

    def holds(self, url: str) -> bool:
        return url in self.images

    def write(self, image_id: str, data: Any) -> str:
        self.images[image_id] = data
        return image_id

    def remove(self, url: str) -> None:
        del self.images[url]


@pytest.fixture
def service() -> FakeImageService:
    service = FakeImageService(store=Data())
    service.add(IMAGE)
    return service


def whole() -> Chunks:
    yield from CHUNKS


def body(chunks: Callable[[], Chunks] = whole) -> Body:
    return Body(len(DATA), chunks(), "sha512")


def send(service: FakeImageService, make: Callable[[], Body] = body, **more: Any) -> None:
    """Upload, in no time."""
    upload(glance(service), IMAGE, make, **{"attempts": 3, **Time().options(), **more})


def status(service: FakeImageService) -> Optional[str]:
    return service.records[IMAGE]["status"] if IMAGE in service.records else None


def stored(service: FakeImageService) -> Any:
    assert isinstance(service.store, Data)
    return service.store.images.get(IMAGE)


def test_upload(service: FakeImageService) -> None:
    send(service)
    assert (status(service), stored(service)) == ("active", DATA)


@pytest.mark.parametrize("cuts", [[1], [3, 11], [6, 1]])
def test_broken_off_and_begun_again(service: FakeImageService, cuts: list[int]) -> None:
    """From its start, as often as it may be."""
    service.cuts = list(cuts)
    send(service)
    assert (status(service), stored(service)) == ("active", DATA)


def test_broken_off_each_time(service: FakeImageService) -> None:
    """The record waits for what comes next."""
    service.cuts = [1, 2, 3]
    with pytest.raises(errors.NotRegistered, match="broken off each time"):
        send(service)
    assert status(service) == "queued"


def test_what_is_broken_off_is_closed(service: FakeImageService) -> None:
    """Before it is begun again: it holds memory that the next one needs."""
    held: list[int] = []

    def chunks() -> Chunks:
        assert held == [], "nobody else has any"
        held.append(1)
        try:
            yield from CHUNKS
        finally:
            held.clear()

    service.cuts = [1, 5]
    send(service, lambda: body(chunks))
    assert status(service) == "active"


@pytest.mark.parametrize("code", [None, 408, 504])
def test_answer_that_is_lost(service: FakeImageService, code: Optional[int]) -> None:
    """The record tells that all is there."""
    service.faults = [Fault("put", code, applied=True)]
    send(service, attempts=1)
    assert (status(service), stored(service)) == ("active", DATA)


@pytest.mark.parametrize("code", [400, 403, 409, 413, 415, 500, 503])
def test_refusal(service: FakeImageService, code: int) -> None:
    """It is not sent again, and the record waits for what comes next."""
    service.faults = [Fault("put", code)]
    asked: list[str] = []
    service.on_request = asked.append
    with pytest.raises(errors.NotRegistered) as refused:
        send(service)
    assert (refused.value.status, asked.count("put"), status(service)) == (code, 1, "queued")


def test_token_that_is_not_accepted(service: FakeImageService) -> None:
    service.faults = [Fault("put", 401)]
    with pytest.raises(errors.NotAuthorized):
        send(service)


def test_disk_that_cannot_be_read(service: FakeImageService) -> None:
    """What is wrong with it is told, and the record waits."""

    def chunks() -> Chunks:
        yield b"one"
        raise errors.Cancelled("the server is being deleted")

    with pytest.raises(errors.Cancelled, match="is being deleted"):
        send(service, lambda: body(chunks))
    assert status(service) == "queued"


def test_record_that_was_deleted(service: FakeImageService) -> None:
    service.records.clear()
    with pytest.raises(errors.RecordGone):
        send(service)


def test_record_that_has_data(service: FakeImageService) -> None:
    service.records[IMAGE]["status"] = "active"
    with pytest.raises(errors.NotQueued):
        send(service)


def test_earlier_upload_that_nobody_told_of(service: FakeImageService) -> None:
    """The engine died just then: its image is seen to be good, and is not sent again."""
    send(service)
    asked: list[str] = []
    service.on_request = asked.append
    send(service)
    assert "put" not in asked
    assert status(service) == "active"
    with pytest.raises(errors.NotQueued):
        send(service, lambda: Body(len(DATA), (part for part in [DATA[::-1]]), "sha512"))
    assert status(service) == "active"


def test_record_that_an_earlier_upload_leaves(service: FakeImageService) -> None:
    """It is waited for."""
    service.records[IMAGE]["status"] = "saving"
    looks: list[None] = []

    def waiting() -> None:
        looks.append(None)
        if len(looks) == 3:
            service.records[IMAGE]["status"] = "queued"

    send(service, waiting=waiting)
    assert status(service) == "active"


def test_record_that_stays_as_it_is(service: FakeImageService) -> None:
    """It is waited for, but not for ever."""
    service.records[IMAGE]["status"] = "saving"
    with pytest.raises(errors.NotQueued, match="saving"):
        send(service)


def test_damaged_on_its_way(service: FakeImageService) -> None:
    """No such image stays."""
    service.damages = True
    with pytest.raises(errors.Damaged, match="what was sent is"):
        send(service)
    assert (status(service), stored(service)) == (None, None)


def test_damaged_and_not_to_be_deleted(service: FakeImageService) -> None:
    service.damages, service.faults = True, [Fault("delete", 403)]
    with pytest.raises(errors.Damaged) as damaged:
        send(service)
    assert "delete it" in damaged.value.undo_failures[0]


def test_another_hash(service: FakeImageService) -> None:
    """Of what Glance hashes otherwise the size is compared."""
    service.algorithm = "sha256"
    send(service)
    service.records.clear()
    service.add(IMAGE)
    service.damages = True
    with pytest.raises(errors.Damaged):
        send(service)


def test_who_reads_the_record(service: FakeImageService) -> None:
    """Another may, where the token that all was sent with is not accepted any more."""
    service.on_request = lambda kind: service.faults.append(Fault("get", 401)) if kind == "put" else None
    as_service: Glance = glance(service)

    def read(image_id: str) -> Record:
        service.faults.clear()
        return as_service.record(image_id)

    send(service, read=read)
    assert status(service) == "active"
