# SPDX-License-Identifier: Apache-2.0
"""Copies by the engine: into a store of Glance's, and uploads."""

from __future__ import annotations

from typing import Any, Optional

import pytest

from nova_rbd_snap import errors
from nova_rbd_snap.engine import unheard
from nova_rbd_snap.engine.service import Engine
from nova_rbd_snap.ledger.store import OBJECT
from nova_rbd_snap.specs import GLANCE_SNAP, ImageSpec, Location
from tests.fakes.cluster import FakeCluster
from tests.fakes.engine import (
    COPY,
    DEST,
    DISK,
    FAR,
    FROZEN,
    FakeImages,
    FakeUploads,
    Reports,
    far_cluster,
    freeze,
    in_thread,
    make_engine,
    populated,
)

IMAGE = DEST.name
THERE = ImageSpec(FAR.pool, IMAGE)


def copy(engine: Engine, report: Optional[Any] = None) -> str:
    url = engine.reserve_copy(IMAGE, DISK.name, FAR.name)
    engine.perform(IMAGE, None, report or unheard)
    return url


def records(cluster: FakeCluster) -> dict[str, str]:
    found: dict[str, str] = cluster.picture()[DISK.pool]["omap"].get(OBJECT, {})
    return found


# -- into a store --------------------------------------------------------------------------------------------------


def test_copy_holds_the_disk_at_the_instant_of_the_snapshot() -> None:
    """The image has the disk's bytes as of the snapshot, and is sealed as a clone is; nothing is left here."""
    here, far = populated(), far_cluster()
    before = here.picture()
    engine = make_engine(here, far=far)
    here.do_on("create_snap", lambda snap: here.write(DISK, 0, b"too late"), applied=True)
    url = copy(engine)
    engine.finish(IMAGE)

    assert Location.parse(url) == Location(far.fsid(), THERE.snap(GLANCE_SNAP))
    assert far.content(THERE.snap(GLANCE_SNAP)) == FROZEN
    assert far.lookup(THERE).size_bytes == here.lookup(DISK).size_bytes
    assert [(snap.name, snap.protected) for snap in far.snaps(THERE)] == [(GLANCE_SNAP, True)]
    here.write(DISK, 0, FROZEN[0])
    assert here.picture() == before


def test_only_what_is_allocated_is_read_and_written() -> None:
    here, far = populated(), far_cluster()
    copy(make_engine(here, far=far))
    assert here.calls.count("read_data") == far.calls.count("write_data") == len(FROZEN)


def test_rollback_of_a_ready_copy() -> None:
    here, far = populated(), far_cluster()
    before = here.picture(), far.picture()
    engine = make_engine(here, far=far)
    copy(engine)
    assert engine.rollback(IMAGE)
    assert (here.picture(), far.picture()) == before


@pytest.mark.parametrize("call", ["create_blank", "write_data", "create_snap", "protect_snap"])
@pytest.mark.parametrize("error", [errors.NoSpace, errors.NoPermission, errors.CephError])
@pytest.mark.parametrize("applied", [True, False])
def test_copy_that_fails_there(call: str, error: type[errors.CephError], applied: bool) -> None:
    """Nothing is left on either side, and the next way may be tried."""
    here, far = populated(), far_cluster()
    before = here.picture(), far.picture()
    engine = make_engine(here, far=far)
    far.fail_on(call, error, applied=applied)
    with pytest.raises(error) as failed:
        copy(engine)
    assert failed.value.may_fall_back
    assert failed.value.undo_failures == []
    assert (here.picture(), far.picture()) == before


def test_store_that_does_not_answer_for_a_while() -> None:
    """It goes on where it was."""
    here, far = populated(), far_cluster()
    for nth in (1, 3):
        far.fail_on("write_data", errors.Unreachable, nth)
    copy(make_engine(here, far=far))
    assert far.content(THERE.snap(GLANCE_SNAP)) == FROZEN
    assert far.calls.count("write_data") == len(FROZEN) + 2


@pytest.mark.parametrize("call", ["create_blank", "write_data", "create_snap"])
def test_store_that_goes_silent(call: str) -> None:
    """The server's own cluster is well, so another way is tried; what is left there goes once it answers."""
    here, far = populated(), far_cluster()
    before = far.picture()
    engine = make_engine(here, far=far)
    silent: list[str] = []

    def fall_silent(*args: object) -> None:
        silent.append(call)
        raise errors.Unreachable("no answer")

    for nth in range(1, 30):
        far.do_on(call, fall_silent, nth)
    far.do_on("remove", fall_silent)
    with pytest.raises(errors.StoreSilent) as failed:
        copy(engine)
    assert failed.value.may_fall_back
    assert failed.value.undo_failures or call == "create_blank"
    far.heal()
    engine.reclaim()
    assert (records(here), far.picture()[FAR.pool]["images"]) == ({}, before[FAR.pool]["images"])
    assert here.snaps(DISK) == []


def test_own_cluster_that_does_not_answer() -> None:
    """Then no other way would come to its end either."""
    here, far = populated(), far_cluster()
    for nth in range(1, 30):
        here.fail_on("read_data", errors.Unreachable, nth)
    with pytest.raises(errors.Unreachable) as failed:
        copy(make_engine(here, far=far))
    assert not failed.value.may_fall_back


def test_store_that_cannot_be_connected_to() -> None:
    """Nothing is changed."""
    here, far = populated(), far_cluster()
    before = here.picture()
    engine = make_engine(here, far=far)

    def connect() -> FakeCluster:
        raise errors.Unreachable("no monitor answered")

    far.another = connect  # type: ignore[method-assign,assignment]
    with pytest.raises(errors.StoreSilent, match="store 'far'"):
        copy(engine)
    assert here.picture() == before


@pytest.mark.parametrize("call", ["has_pool", "exists", "usual_data_pool"])
def test_store_that_is_silent_from_the_start(call: str) -> None:
    """Nothing is changed."""
    here, far = populated(), far_cluster()
    before = here.picture()
    far.fail_on(call, errors.Unreachable)
    with pytest.raises(errors.StoreSilent):
        copy(make_engine(here, far=far))
    assert here.picture() == before


def test_store_that_is_not_configured() -> None:
    with pytest.raises(errors.Refused, match="glance_stores"):
        copy(make_engine(populated()))


def test_store_without_its_pool() -> None:
    far = FakeCluster("another")
    with pytest.raises(errors.Refused, match="has no pool"):
        copy(make_engine(populated(), far=far))


def test_what_somebody_else_has_there() -> None:
    """It is left alone."""
    here, far = populated(), far_cluster()
    far.create_disk(THERE)
    before = here.picture(), far.picture()
    with pytest.raises(errors.AlreadyThere):
        copy(make_engine(here, far=far))
    assert (here.picture(), far.picture()) == before


def test_what_somebody_else_makes_there_meanwhile() -> None:
    here, far = populated(), far_cluster()
    engine = make_engine(here, far=far)
    here.do_on("create_snap", lambda snap: far.create_disk(THERE), applied=True)
    with pytest.raises(errors.AlreadyThere):
        copy(engine)
    assert far.exists(THERE)
    assert records(here) == {}


@pytest.mark.parametrize("word", [None, False])
@pytest.mark.parametrize("step", ["create", "copy", "seal"])
def test_copy_that_an_engine_leaves(step: str, word: Optional[bool]) -> None:
    """The next one removes it. Whatever Glance says, once it is known to be ours: it was never sent to Glance."""
    here, far = populated(), far_cluster()
    first = make_engine(here, far=far, life="first")
    held = Reports(hold_at=step)
    left = in_thread(copy, first, held)
    assert held.reached.wait(30)
    second = make_engine(here, far=far, life="second", images=FakeImages(settles_as=word))
    if step == "create":
        far.create_blank(THERE, 1 << 22, None)  # it had got that far
    second.reclaim()
    held.go_on.set()
    with pytest.raises(errors.SnapError):
        left.result(30)
    is_gone = step != "create" or word is False
    assert (far.images(FAR.pool), here.snaps(DISK)) == ([], []) if is_gone else far.exists(THERE)
    # A record that waits for data is Glance's to tell about.
    assert bool(records(here)) == (word is None)


def test_progress_is_told() -> None:
    here, far = populated(), far_cluster()
    told: list[tuple[str, int, int]] = []
    copy(make_engine(here, far=far), lambda step, done, total: told.append((step, done, total)))
    total = sum(map(len, FROZEN.values()))
    assert ("copy", total, total) in told


# -- uploads -------------------------------------------------------------------------------------------------------


def upload(engine: Engine, disk_format: Optional[str] = None, report: Any = unheard) -> dict[str, Any]:
    freeze(engine)
    target = {"image_id": IMAGE, "access": {}, "properties": {"a": "b"}, "disk_format": disk_format}
    return engine.upload(COPY, DISK.name, target, report)


@pytest.mark.parametrize(
    ("store", "wanted", "expected"),
    [
        ("file", None, "qcow2"),
        ("rbd", None, "raw"),
        (None, None, "qcow2"),
        ("unknown", None, "qcow2"),
        ("rbd", "qcow2", "qcow2"),
        ("file", "raw", "raw"),
    ],
)
def test_format_of_an_upload(store: Optional[str], wanted: Optional[str], expected: str) -> None:
    """The one that is asked for, else what suits Glance's store."""
    here, uploads = populated(), FakeUploads(store)
    before = here.picture()
    engine = make_engine(here, uploads=uploads)
    done = upload(engine, wanted)
    target, data = uploads.sent[IMAGE]
    assert done == {"format": expected, "allocated": sum(map(len, FROZEN.values())), "sent": len(data)}
    assert target.disk_format == expected
    assert data.startswith(b"QFI\xfb" if expected == "qcow2" else FROZEN[0])
    assert engine.rollback(COPY)
    assert here.picture() == before


def test_upload_that_fails() -> None:
    """The snapshot stays until it is rolled back, for the upload may be begun again."""
    here = populated()
    before = here.picture()
    engine = make_engine(here, uploads=FakeUploads(failure=errors.NotRegistered("refused")))
    with pytest.raises(errors.NotRegistered):
        upload(engine)
    assert [snap.name for snap in here.snaps(DISK)] == [DISK.snap(f"nova-rbd-snap-{COPY}").name]
    assert engine.rollback(COPY)
    assert here.picture() == before


@pytest.mark.parametrize("end", ["cancel", "stop"])
def test_upload_that_is_cancelled(end: str) -> None:
    here = populated()
    before = here.picture()
    engine = make_engine(here, uploads=FakeUploads())
    held = Reports(hold_at="upload")
    sending = in_thread(upload, engine, "raw", held)
    assert held.reached.wait(30)
    ending = in_thread(engine.cancel, DISK.name[:36]) if end == "cancel" else in_thread(engine.stop)
    while not any(work.cancelled.is_set() for work in engine._busy.values()):
        pass
    held.go_on.set()
    with pytest.raises(errors.Cancelled):
        sending.result(30)
    ending.result(30)
    engine.rollback(COPY)
    assert here.picture() == before


def test_engine_that_uploads_nothing() -> None:
    with pytest.raises(errors.Refused):
        upload(make_engine(populated()))
