# SPDX-License-Identifier: Apache-2.0
"""Send an image's bytes to Glance, and know for sure what became of them.

As with a location, an answer that was lost proves nothing: what counts is the record, read again. It ends active with
exactly what was sent, waiting for data again, or deleted; never half.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import time
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Callable, Optional

from nova_rbd_snap import errors
from nova_rbd_snap.openstack.glance import Glance, Record, repeat

LOG = logging.getLogger(__name__)

#: What Glance itself hashes with, where nobody has told it otherwise.
USUAL_ALGORITHM = "sha512"
#: Statuses of a record whose data is on its way.
_UNDER_WAY = ("saving", "uploading", "importing")
#: Seconds a record must be seen to wait again before it is believed.
_QUEUED_SECONDS = 1.0
#: What Glance takes to end an upload whose every byte it has may be so many times what an answer takes.
_END_FACTOR = 10


class Body:
    """A request's body of known length, hashed on its way, beside the sending."""

    def __init__(self, length: int, chunks: Generator[bytes, None, None], algorithm: str) -> None:
        self._length, self._chunks = length, chunks
        self._hash = hashlib.new(algorithm)
        self._sent = self._hashed()

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[bytes]:
        return self._sent

    def _hashed(self) -> Generator[bytes, None, None]:
        with ThreadPoolExecutor(1, thread_name_prefix="hash") as pool:
            hashed: Optional[Future[None]] = None
            for chunk in self._chunks:
                if hashed is not None:
                    hashed.result()
                hashed = pool.submit(self._hash.update, chunk)
                yield chunk

    def close(self) -> None:
        """Nobody takes the rest: what it is read into is free for the next."""
        self._sent.close()
        self._chunks.close()

    @property
    def digest(self) -> tuple[str, str]:
        """The algorithm, and the hash of what was sent."""
        return self._hash.name, self._hash.hexdigest()


def upload(
    glance: Glance,
    image_id: str,
    body: Callable[[], Body],
    *,
    attempts: int,
    timeout_seconds: float,
    read: Optional[Callable[[str], Record]] = None,
    waiting: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Send what *body* makes; returns once the image is active with just that.

    :param body: makes one from its start, for each attempt.
    :param attempts: how often at most an upload that is broken off is begun.
    :param read: reads the record, where *glance* may be let in no more once all is sent.
    :param waiting: called now and again while nothing is sent, and Glance is waited for.
    :raises errors.NotRegistered: Glance refused; the record waits for data.
    :raises errors.NotQueued: the record is not what can be uploaded to, now.
    :raises errors.Damaged: what Glance has is not what was sent; the record is deleted.
    :raises errors.SnapError: what *body* raised; the record waits for data.
    """
    watch = functools.partial(
        _settled,
        read or glance.record,
        image_id,
        timeout_seconds=timeout_seconds,
        waiting=waiting,
        clock=clock,
        sleep=sleep,
    )
    record = watch(queued_seconds=0)  # an earlier engine's may not be at its end
    if record.status == "active" and _is_that(record, body()):
        return  # it was, and that engine died before it could say so
    failure: Optional[Exception] = None
    for _ in range(attempts):
        if record.status != "queued":
            raise errors.NotQueued(f"image {image_id} is {record.status!r}; before that: {failure or 'nothing'}")
        sent = body()
        failure = _send(glance, image_id, sent)
        record = watch(queued_seconds=_QUEUED_SECONDS)
        if record.status == "active":
            _compare(glance, image_id, record, sent)
            return
        if failure is None:
            failure = errors.NotRegistered(f"image {image_id}: Glance took an upload, and yet it is {record.status!r}")
        if not isinstance(failure, errors.GlanceSilent):
            break
        LOG.warning("The upload to image %s was broken off: %s", image_id, failure)
    if record.status == "queued" and isinstance(failure, errors.GlanceSilent):
        raise errors.NotRegistered(f"the upload to image {image_id} was broken off each time: {failure}")
    raise failure or AssertionError("no attempt was made")


def _send(glance: Glance, image_id: str, body: Body) -> Optional[Exception]:
    """Returns what went wrong, on either side."""
    try:
        glance.upload(image_id, body)
    except errors.NotAuthorized:
        raise  # Glance deletes the record itself where a token expires meanwhile
    except Exception as error:
        return error
    finally:
        body.close()
    return None


def _settled(
    read: Callable[[str], Record],
    image_id: str,
    *,
    timeout_seconds: float,
    queued_seconds: float,
    waiting: Callable[[], object],
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> Record:
    """The record once nothing is on its way to it any more, or after long.

    :param queued_seconds: how long it must be seen to wait for data to be believed.
    :raises errors.RecordGone: it is deleted.
    """
    began, queued_since, pause = clock(), None, 0.05
    while True:
        record = repeat(read, image_id, timeout_seconds=timeout_seconds, sleep=sleep)
        now = clock()
        if now - began > _END_FACTOR * timeout_seconds:
            return record
        if record.status == "queued":
            queued_since = now if queued_since is None else queued_since
            if now - queued_since >= queued_seconds:
                return record
        elif record.status not in _UNDER_WAY:
            return record
        else:
            queued_since = None
        waiting()
        sleep(pause)
        pause = min(1.5 * pause, 1.0)


def _is_that(record: Record, body: Body) -> bool:
    """Whether the record has what *body* makes, which nobody takes."""
    if record.size != len(body) or record.digest is None or record.digest[0] != body.digest[0]:
        return False
    for _ in body:
        continue
    return record.digest == body.digest


def _compare(glance: Glance, image_id: str, record: Record, sent: Body) -> None:
    """:raises errors.Damaged: what is stored is not what was sent."""
    algorithm, digest = sent.digest
    if record.digest is None or record.digest[0] != algorithm:
        LOG.warning("Image %s: Glance tells no %s hash, so only its size is compared", image_id, algorithm)
        stored, wanted = str(record.size), str(len(sent))
    else:
        stored, wanted = f"{record.size} bytes, {record.digest[1]}", f"{len(sent)} bytes, {digest}"
    if stored != wanted:
        damaged = errors.Damaged(f"image {image_id}: Glance stored {stored}, but what was sent is {wanted}")
        try:
            glance.delete(image_id)
        except errors.GlanceError as error:
            damaged.undo_failures.append(f"image {image_id} is active and damaged, delete it: {error}")
        raise damaged


def give_up(
    glance: Glance,
    image_id: str,
    *,
    timeout_seconds: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Delete a record that waits for data, or does once an upload that was broken off is at its end."""
    try:
        record = _settled(
            glance.record,
            image_id,
            timeout_seconds=timeout_seconds,
            queued_seconds=0,
            waiting=lambda: None,
            clock=clock,
            sleep=sleep,
        )
        if record.status != "active":
            glance.delete(image_id)
    except errors.RecordGone:
        return
    except errors.GlanceError as error:
        LOG.warning("Image %s stays, and waits for data; delete it: %s", image_id, error.report())
