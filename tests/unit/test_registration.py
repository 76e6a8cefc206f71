# SPDX-License-Identifier: Apache-2.0
"""Registering a location: what is decided, whatever Glance answers, or does not."""

from __future__ import annotations

import itertools
from typing import Any, Callable, Optional

import pytest

from nova_rbd_snap import errors
from nova_rbd_snap.openstack.glance import Glance, Record
from nova_rbd_snap.openstack.registration import State, judge, preparation, register, settle
from tests.fakes.glance import Answer, FakeImageService, Fault

IMAGE = "05261e6b-9813-4bda-8a5d-74f443e44679"
SERVER = "11111111-1111-4111-8111-111111111111"
URL = f"rbd://fsid/images/{IMAGE}/snap"
PROPERTIES = {"disk_format": "raw", "container_format": "bare", "kernel_id": None}


class Time:
    """A clock that only moves when there is a pause."""

    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def options(self) -> dict[str, Any]:
        return {"timeout_seconds": 60, "clock": lambda: self.now, "sleep": self.sleep}


def glance(service: FakeImageService) -> Glance:
    return Glance(service, ["http://glance-a", "http://glance-b"])


def try_to_register(service: FakeImageService, timeout_seconds: int = 60) -> None:
    """Register, in no time."""
    asked, time = glance(service), Time()
    prepare = preparation(asked, IMAGE, PROPERTIES, timeout_seconds=timeout_seconds, sleep=time.sleep)
    register(asked, IMAGE, URL, prepare, **{**time.options(), "timeout_seconds": timeout_seconds})


def urls(service: FakeImageService) -> list[str]:
    """The locations of the record."""
    return [location["url"] for location in service.records[IMAGE]["locations"]]


@pytest.fixture
def service() -> FakeImageService:
    """A current Glance with a record that waits for data."""
    service = FakeImageService()
    service.add(IMAGE)
    return service


@pytest.mark.parametrize("shows", [True, False])
@pytest.mark.parametrize(
    ("posts", "patches", "polls"), [(True, True, 0), (True, False, 5), (False, True, 0)], ids=["both", "post", "patch"]
)
def test_either_interface(service: FakeImageService, posts: bool, patches: bool, polls: int, shows: bool) -> None:
    """Whichever interface Glance offers, and whether or not it shows locations, the image ends active and is ours."""
    service.offers_post, service.offers_patch = posts, patches
    service.polls_until_active, service.shows_locations = polls, shows
    try_to_register(service)
    record = service.records[IMAGE]
    assert (record["status"], urls(service)) == ("active", [URL])
    assert PROPERTIES.items() <= record.items()


@pytest.mark.parametrize("status", [403, 405, 501])
def test_refused_post_is_patched(service: FakeImageService, status: int) -> None:
    """Where POST is refused for who we are or is not there, PATCH does it."""
    service.faults.append(Fault("post", status))
    try_to_register(service)
    assert urls(service) == [URL]


@pytest.mark.parametrize("timeout_seconds", [5, 60])
def test_refusal_is_believed_however_short_the_patience(service: FakeImageService, timeout_seconds: int) -> None:
    """A 5xx after which the record goes on waiting is a refusal, and no matter of doubt."""
    service.faults.append(Fault("post", 500))
    with pytest.raises(errors.NotRegistered):
        try_to_register(service, timeout_seconds)


def test_not_found_by_somebody_else(service: FakeImageService) -> None:
    """Something before Glance that says "not found" to everything does not make the image a deleted one."""
    service.faults += [Fault("get", 404), Fault("schemas", 404)]
    with pytest.raises(errors.InDoubt):
        try_to_register(service)
    assert service.records[IMAGE]["asked"] == URL


@pytest.mark.parametrize(
    ("shown", "state"),
    [
        ({"locations": [{"url": "rbd://other"}]}, State.FOREIGN),
        ({"direct_url": "rbd://other"}, None),
        ({"direct_url": URL}, State.HELD),
        ({"locations": [{"url": "rbd://other"}], "direct_url": URL}, State.HELD),
    ],
)
def test_one_location_of_several(shown: dict[str, Any], state: Optional[State]) -> None:
    """The direct URL is one of the image's locations: that it is another's says nothing of ours."""
    assert judge(Record.from_json({"status": "active", **shown}), URL) is state


@pytest.mark.parametrize("way", ["post", "patch"])
@pytest.mark.parametrize("status", [None, 400, 409, 500, 502, 503, 504])
def test_lost_answer_is_looked_up(service: FakeImageService, way: str, status: Optional[int]) -> None:
    """A request that took effect counts, whatever came back."""
    service.offers_post = way == "post"
    service.faults.append(Fault(way, status, applied=True))
    try_to_register(service)
    assert urls(service) == [URL]


@pytest.mark.parametrize("way", ["post", "patch"])
@pytest.mark.parametrize("status", [400, 409, 413, 500, 503])
def test_refusal_leaves_the_record_for_a_copy(service: FakeImageService, way: str, status: int) -> None:
    """Refused, and the record still waits: the data may be given up and another way tried."""
    service.offers_post = way == "post"
    service.faults.append(Fault(way, status))
    with pytest.raises(errors.NotRegistered) as caught:
        try_to_register(service)
    assert caught.value.may_fall_back
    assert str(status) in str(caught.value)
    assert service.records[IMAGE]["status"] == "queued"


@pytest.mark.parametrize("status", [None, 502, 504])
def test_silence_is_doubt(service: FakeImageService, status: Optional[int]) -> None:
    """No answer, and the record still waits: the request may be on its way, so the data must be kept."""
    service.faults.append(Fault("post", status))
    with pytest.raises(errors.InDoubt) as caught:
        try_to_register(service)
    assert not caught.value.may_fall_back


def test_request_that_arrives_late(service: FakeImageService) -> None:
    """A request that seemed lost and takes effect while we look again ends in success."""
    service.faults.append(Fault("post", None))
    looks = itertools.count()

    def arrive(kind: str) -> None:
        if kind == "get" and next(looks) == 5:
            service.records[IMAGE].update(status="active", locations=[{"url": URL}])

    service.on_request = arrive
    try_to_register(service)


@pytest.mark.parametrize("lie", [lambda data: {**data, "status": "queued", "locations": []}, lambda data: None])
def test_reader_that_lags_behind(service: FakeImageService, lie: Callable[[Any], Any]) -> None:
    """What took effect counts, though another server of Glance's shows the record of before, or none, for a while."""
    real, reads = service._get, itertools.count()

    def get(image_id: str, record: dict[str, Any], body: Any) -> Answer:
        answer = real(image_id, record, body)
        if next(reads) > 8:
            return answer
        data = lie(answer.data)
        return Answer(200, data)

    service._get = get  # type: ignore[method-assign]
    try_to_register(service)
    assert urls(service) == [URL]


def test_one_not_found_is_not_a_deletion(service: FakeImageService) -> None:
    """A single 404, from whatever stands before Glance, gives nothing up."""
    reads = itertools.count()

    def once(kind: str) -> None:
        service.faults[:] = [Fault("get", 404)] if kind == "get" and next(reads) == 0 else []

    service.on_request = once
    try_to_register(service)


def test_first_server_down(service: FakeImageService) -> None:
    """Where one server of Glance's does not answer, the next is asked."""
    tries = itertools.count()

    def down(kind: str) -> None:
        service.faults[:] = [Fault("properties", None)] if next(tries) == 0 else []

    service.on_request = down
    first = service.endpoint_override
    try_to_register(service)
    assert service.endpoint_override != first


def test_task_that_gives_up(service: FakeImageService) -> None:
    """Glance took the request, and its task failed: the record waits again, and another way may be tried."""
    service.task_fails = True
    with pytest.raises(errors.NotRegistered, match="gave the location"):
        try_to_register(service)


def test_task_that_never_ends(service: FakeImageService) -> None:
    """Glance took the request, and its task never ends: in doubt, within the bound."""
    service.polls_until_active = -1
    with pytest.raises(errors.InDoubt, match="no certain answer"):
        try_to_register(service)


@pytest.mark.parametrize("kind", ["properties", "post"])
def test_expired_token(service: FakeImageService, kind: str) -> None:
    """A token that is not accepted ends it at once: nothing was asked for, and an upload would not be accepted."""
    service.faults.append(Fault(kind, 401))
    with pytest.raises(errors.NotAuthorized):
        try_to_register(service)
    assert urls(service) == []


@pytest.mark.parametrize("kind", ["properties", "post", "get"])
def test_image_deleted_meanwhile(service: FakeImageService, kind: str) -> None:
    """The tenant deletes the image at any moment: nothing points at the data."""
    service.on_request = lambda now: service.records.pop(IMAGE, None) if now == kind else None
    with pytest.raises(errors.RecordGone):
        try_to_register(service)


def test_image_with_other_data(service: FakeImageService) -> None:
    """Somebody gave the image other data: it is left alone, and not copied over."""
    service.add(IMAGE, status="active", locations=[{"url": "rbd://fsid/images/other/snap"}])
    with pytest.raises(errors.NotQueued):
        try_to_register(service)


def test_silence_before_anything_was_asked_for(service: FakeImageService) -> None:
    """No answer to the properties is no doubt: the location was not sent."""
    service.faults.append(Fault("properties", None))
    with pytest.raises(errors.GlanceSilent):
        try_to_register(service)


@pytest.mark.parametrize(
    ("status", "locations", "importing", "state"),
    [
        ("queued", (), False, State.WAITING),
        ("queued", None, False, State.WAITING),
        ("queued", (), True, State.COMING),
        ("queued", (URL,), False, State.COMING),
        ("importing", (), True, State.COMING),
        ("active", (URL,), False, State.HELD),
        ("active", None, False, State.HELD),
        ("active", ("rbd://a/b/c/d",), False, State.FOREIGN),
        ("active", (), False, State.COMING),
        ("deactivated", (URL,), False, State.HELD),
        ("saving", (), False, State.UPLOAD),
        ("uploading", (), False, State.UPLOAD),
        ("killed", (), False, State.FOREIGN),
        ("deleted", (), False, State.GONE),
        ("pending_delete", (URL,), False, State.GONE),
    ],
)
def test_judge(status: str, locations: Optional[tuple[str, ...]], importing: bool, state: State) -> None:
    """What each kind of record says of our location."""
    assert judge(Record(status, locations, True, importing), URL) is state


@pytest.mark.parametrize(
    ("change", "known"),
    [
        (lambda s: s.add(IMAGE, status="active", locations=[{"url": URL}]), True),
        (lambda s: s.add(IMAGE, instance_uuid=SERVER), False),
        (lambda s: s.add(IMAGE), None),
        (lambda s: s.add(IMAGE, instance_uuid=IMAGE), None),
        (lambda s: s.add(IMAGE, status="saving"), None),
        (lambda s: s.add(IMAGE, status="saving", instance_uuid=SERVER), False),
        (lambda s: None, False),
        (lambda s: s.faults.append(Fault("get", 503)), None),
        (lambda s: s.add(IMAGE, instance_uuid=SERVER) and s.faults.append(Fault("delete", 403)), None),
        (lambda s: s.add(IMAGE, status="importing"), None),
    ],
    ids=[
        "active", "waiting", "not of a server", "of another server", "upload", "upload that stays", "gone", "silent",
        "waiting and not ours to delete", "a task at work",
    ],
)
def test_settle(change: Callable[[FakeImageService], None], known: Optional[bool]) -> None:
    """After nova-compute died: known is only what can no longer change; a waiting record is deleted to know it."""
    service = FakeImageService()
    change(service)
    assert settle(glance(service), IMAGE, URL, SERVER, **Time().options()) is known
    assert (service.records.get(IMAGE, {}).get("status") == "queued") <= (known is None)
