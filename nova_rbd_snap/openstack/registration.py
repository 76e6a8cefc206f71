# SPDX-License-Identifier: Apache-2.0
"""Make a Glance record point at our rbd image, and know for sure whether it does.

An answer that was lost, refused or late proves nothing: what counts is the record, read again. Data is given up
only when the record was seen not to point at it and no request of ours can still change that.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import logging
import time
from collections.abc import Mapping
from typing import Callable, Optional

from nova_rbd_snap import errors
from nova_rbd_snap.openstack.glance import Glance, Record, repeat

LOG = logging.getLogger(__name__)

#: Statuses of POST locations that mean "not this way": no service token (403), or a Glance without it.
_NOT_OFFERED = (403, 405, 501)

#: The formats of bytes as they are on the disk, as properties of a record.
RAW: Mapping[str, Optional[str]] = {"disk_format": "raw", "container_format": "bare"}

#: Seconds a record must be seen to be gone, or to have other data, before ours is given up.
_GONE_SECONDS = 1.0
#: Seconds a record must be seen to wait although Glance took, or may have taken, the location; no longer than it may
#: stay as it is at all.
_TASK_SECONDS = 10.0
#: A task of Glance's that is seen at work may take so many times as long as an answer: others may be before it.
_TASK_FACTOR = 10


class State(enum.Enum):
    """What a record says of a location."""

    HELD = "the image is active with our data"
    COMING = "a task of Glance is at work on it"
    WAITING = "the record waits for data"
    GONE = "the record is deleted"
    FOREIGN = "the record has other data"
    UPLOAD = "other data is on its way to the record"


def judge(record: Record, url: str) -> Optional[State]:
    """What *record* says of the location *url*; None where it says too little.

    Where Glance hides locations, active data counts as ours: only the one who asked for the snapshot knows the record,
    and asked us.
    """
    if record.status in ("deleted", "pending_delete"):
        return State.GONE
    if record.status in ("active", "deactivated"):
        if record.urls is None or url in record.urls:
            return State.HELD
        if not record.urls:
            return State.COMING  # an active image without any location makes no sense: Glance is at work
        return State.FOREIGN if record.urls_complete else None
    if record.importing or (record.status == "queued" and url in (record.urls or ())):
        return State.COMING
    waits = {"queued": State.WAITING, "saving": State.UPLOAD, "uploading": State.UPLOAD}
    return waits.get(record.status, State.FOREIGN)


def preparation(
    glance: Glance,
    image_id: str,
    properties: Mapping[str, Optional[str]],
    *,
    timeout_seconds: float,
    sleep: Callable[[float], None] = time.sleep,
) -> Callable[[], None]:
    """What gives the record its *properties*, among them the formats, without which no location is taken."""
    return functools.partial(
        repeat, glance.set_properties, image_id, properties, timeout_seconds=timeout_seconds, sleep=sleep
    )


def register(
    glance: Glance,
    image_id: str,
    url: str,
    prepare: Callable[[], None],
    *,
    timeout_seconds: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Set the location *url*, and return when the image is active.

    :param prepare: a :func:`preparation`, or what waits for one that was begun earlier.
    :param timeout_seconds: how long the record may stay as it is, or Glance without an answer.
    :raises errors.NotRegistered: Glance refused; the record still waits for data.
    :raises errors.InDoubt: it cannot be known whether the record points at *url*; keep the data.
    :raises errors.GlanceError: another of its kind; the record does not point at *url*, and will not.
    """
    watch = functools.partial(
        observe, glance, image_id, url, timeout_seconds=timeout_seconds, clock=clock, sleep=sleep
    )
    try:
        prepare()
    except (errors.RecordGone, errors.NotRegistered) as error:
        raise _failure(watch(waiting_seconds=0), error, image_id) or error from None
    refusal = _send(glance, image_id, url)
    if refusal is None or (refusal.status or 0) >= 500:
        waiting_seconds = min(_TASK_SECONDS, timeout_seconds)
    else:
        waiting_seconds = timeout_seconds if isinstance(refusal, errors.GlanceSilent) else 0
    state = watch(waiting_seconds=waiting_seconds)
    if state is not State.HELD:
        raise _failure(state, refusal, image_id) or errors.InDoubt(
            f"image {image_id}: no certain answer from Glance long after location {url} was sent; the data is kept"
        )


def _failure(
    state: Optional[State], refusal: Optional[errors.GlanceError], image_id: str
) -> Optional[errors.GlanceError]:
    """What *refusal* comes to, now that the record was read; None where nothing is certain."""
    if state is State.GONE:
        return errors.RecordGone(f"image {image_id} was deleted meanwhile")
    if state in (State.FOREIGN, State.UPLOAD):
        return errors.NotQueued(f"image {image_id}: {state.value}")
    if state is not State.WAITING or isinstance(refusal, errors.GlanceSilent):
        return None
    if isinstance(refusal, errors.RecordGone):  # said something that refuses, for the record is there
        return errors.NotRegistered(f"{refusal}; yet the record is there, and waits for data")
    return refusal or errors.NotRegistered(f"image {image_id}: Glance's task gave the location up")


def observe(
    glance: Glance,
    image_id: str,
    url: str,
    *,
    timeout_seconds: float,
    waiting_seconds: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Optional[State]:
    """Watch the record until it holds *url*, or until what it says otherwise has lasted; None if it never does.

    One reading proves little: another server of Glance's may lag behind, a proxy may answer for it, and a task may be
    between two of its changes.

    :param waiting_seconds: how long WAITING must last to be believed.
    """
    lasting = {State.WAITING: waiting_seconds}
    lasting |= dict.fromkeys((State.GONE, State.FOREIGN, State.UPLOAD), _GONE_SECONDS)
    began, pause = clock(), 0.05
    state, since = look(glance, image_id, url), began
    while state is not State.HELD:
        sleep(pause)
        pause = min(1.5 * pause, 1.0)
        seen, now = look(glance, image_id, url), clock()
        if seen is not state:
            state, since = seen, now
        elif state in lasting and now - since >= lasting[state]:
            return state
        elif now - since > timeout_seconds * (_TASK_FACTOR if state is State.COMING else 1):
            return None
        if now - began > _TASK_FACTOR * timeout_seconds:
            return None
    return state


def _send(glance: Glance, image_id: str, url: str) -> Optional[errors.GlanceError]:
    """Send the location the one way or the other; returns what Glance had against it, if it said so."""
    try:
        try:
            glance.post_location(image_id, url)
        except errors.RecordGone:
            # No such image, or no such path: a Glance before 2024.2.
            glance.patch_location(image_id, url)
        except errors.NotRegistered as error:
            if error.status not in _NOT_OFFERED:
                raise
            glance.patch_location(image_id, url)
    except errors.NotAuthorized:
        raise  # the token was not looked past: nothing was done, and re-reading would end the same
    except errors.GlanceError as error:
        return error
    return None


def look(glance: Glance, image_id: str, url: str) -> Optional[State]:
    """The record's state; None where Glance did not say."""
    try:
        return judge(glance.record(image_id), url)
    except errors.RecordGone:
        return State.GONE if glance.answers() else None
    except errors.GlanceError as error:
        LOG.debug("Cannot read image %s: %s", image_id, error)
        return None


def settle(
    glance: Glance,
    image_id: str,
    url: str,
    server: str,
    *,
    timeout_seconds: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Optional[bool]:
    """Whether the record points at *url* once whoever registered it is dead; None where that cannot be known yet.

    A record that still waits is deleted first: a request that is on its way somewhere can then no longer reach it. Only
    one of a snapshot of *server* is: anybody who may write to the pool may have written down that it is a job's. And an
    upload that is broken off ends in a record that waits again, or is left as it is by a Glance that died over it.

    :param glance: as a user who sees every project's images; to another, a record it may not see looks deleted.
    """
    watch = functools.partial(
        observe, glance, image_id, url, timeout_seconds=timeout_seconds, waiting_seconds=0, clock=clock, sleep=sleep
    )
    state, began = watch(), clock()
    while state is State.UPLOAD and clock() - began < timeout_seconds:
        sleep(_GONE_SECONDS)
        state = watch()
    if state in (State.WAITING, State.UPLOAD):
        with contextlib.suppress(errors.GlanceError):
            if glance.record(image_id).server == server:
                glance.delete(image_id)
        state = watch()
    return _verdict(state)


def uses(
    glance: Glance, image_id: str, url: str, *, sleep: Callable[[float], None] = time.sleep
) -> Optional[bool]:
    """Whether the record points at *url*; None where it may still come to, or that cannot be known."""
    state = look(glance, image_id, url)
    if state in (State.GONE, State.FOREIGN):
        sleep(_GONE_SECONDS)
        state = state if look(glance, image_id, url) is state else None
    return _verdict(state)


def _verdict(state: Optional[State]) -> Optional[bool]:
    """Whether a record in that state points at our location; None where it may still come to."""
    return {State.HELD: True, State.GONE: False, State.FOREIGN: False}.get(state) if state else None


class Images:
    """See :class:`nova_rbd_snap.janitor.jobs.Images`."""

    def __init__(self, connect: Callable[[], Glance], timeout_seconds: float) -> None:
        """
        :param connect: Glance as a user who sees every project's images.
        :param timeout_seconds: as :func:`settle` takes it.
        """
        self._connect = connect
        self._timeout_seconds = timeout_seconds

    def uses(self, image_id: str, url: str) -> Optional[bool]:
        return uses(self._connect(), image_id, url)

    def settle(self, image_id: str, url: str, server: str) -> Optional[bool]:
        return settle(self._connect(), image_id, url, server, timeout_seconds=self._timeout_seconds)
