# SPDX-License-Identifier: Apache-2.0
"""Records and the object that holds them."""

from __future__ import annotations

import dataclasses
import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nova_rbd_snap import errors
from nova_rbd_snap.ledger.job import CLONE, FREEZE, VERSION, Job, Owner
from nova_rbd_snap.ledger.store import OBJECT, Ledger
from nova_rbd_snap.specs import ImageSpec
from tests.fakes.cluster import FakeCluster

JOB = Job(
    id="image-1",
    kind=CLONE,
    owner=Owner("compute-1", "machine-1", "incarnation-1", "192.0.2.1:0/1"),
    created=12.5,
    disk=ImageSpec("vms", "disk"),
    clone_format=2,
    step="snap",
    dest=ImageSpec("images", "image-1"),
)


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster("vms", "images")


@pytest.fixture
def ledger(cluster: FakeCluster) -> Ledger:
    return Ledger(cluster, "vms")


owners = st.builds(Owner, host=st.text(), machine=st.text(), incarnation=st.text(), client=st.text())
specs = st.builds(ImageSpec, pool=st.text(), name=st.text())
jobs = st.builds(
    Job,
    id=st.text(),
    kind=st.sampled_from([CLONE, FREEZE]),
    owner=owners,
    created=st.floats(allow_nan=False, allow_infinity=False),
    disk=specs,
    clone_format=st.sampled_from([1, 2]),
    step=st.text(),
    dest=st.none() | specs,
    data_pool=st.none() | st.text(),
    snap_id=st.none() | st.integers(),
    dest_id=st.none() | st.text(),
    failures=st.lists(st.text()).map(tuple),
    generation=st.integers(min_value=0),
)


@given(jobs)
def test_record_round_trip(job: Job) -> None:
    """What is written is read back as the same job."""
    assert Job.decode(job.encode()) == job


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "7",
        "null",
        "not json",
        json.dumps({**json.loads(JOB.encode()), "version": VERSION + 1}),
        json.dumps({**json.loads(JOB.encode()), "surprise": 1}),
        json.dumps({key: value for key, value in json.loads(JOB.encode()).items() if key != "owner"}),
        json.dumps({**json.loads(JOB.encode()), "disk": "vms/disk"}),
    ],
)
def test_strange_records_are_kept_and_in_nobodys_way(
    cluster: FakeCluster, ledger: Ledger, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What this release cannot read stays byte for byte, is named in the log, and hides no other job."""
    cluster.omap_replace("vms", OBJECT, "strange", None, text)
    ledger.reserve(JOB)
    with caplog.at_level(logging.WARNING):
        assert ledger.jobs() == [JOB]
    with pytest.raises(errors.NoRecord):
        ledger.load("strange")
    ledger.forget(JOB)
    # An empty value counts as absent in Ceph's comparison, so it is no record at all.
    assert cluster.omap_items("vms", OBJECT) == {"strange": text}
    assert "strange" in caplog.text


def test_life_of_a_record(cluster: FakeCluster, ledger: Ledger) -> None:
    """Reserved, advanced and forgotten; each state is another text and the last leaves no key."""
    job = ledger.reserve(JOB)
    later = ledger.advance(job, step="clone", snap_id=7)
    assert ledger.load(job.id) == later == dataclasses.replace(JOB, step="clone", snap_id=7, generation=1)
    ledger.forget(later)
    assert cluster.omap_items("vms", OBJECT) == {}


def test_second_job_of_an_image_is_refused(ledger: Ledger) -> None:
    """One image, one job: the first stands."""
    ledger.reserve(JOB)
    with pytest.raises(errors.LedgerConflict, match="image-1"):
        ledger.reserve(dataclasses.replace(JOB, created=13.0))
    assert ledger.jobs() == [JOB]


@pytest.mark.parametrize("write", [lambda ledger: ledger.advance(JOB, step="late"), lambda ledger: ledger.forget(JOB)])
def test_late_writer_loses(ledger: Ledger, write: object) -> None:
    """Whoever writes from a state that is no longer the record's changes nothing."""
    now = ledger.advance(ledger.reserve(JOB), step="clone")
    with pytest.raises(errors.LedgerConflict):
        write(ledger)
    assert ledger.jobs() == [now]


@pytest.mark.parametrize("applied", [False, True])
def test_reserve_without_an_answer_leaves_no_record(cluster: FakeCluster, ledger: Ledger, applied: bool) -> None:
    """Whether the write happened or only its answer was lost, a reserve that fails leaves nothing behind."""
    cluster.fail_on("omap_replace", errors.Unreachable, applied=applied)
    with pytest.raises(errors.Unreachable) as caught:
        ledger.reserve(JOB)
    assert cluster.omap_items("vms", OBJECT) == {}
    assert caught.value.undo_failures == []


def test_reserve_that_cannot_be_taken_back_says_so(cluster: FakeCluster, ledger: Ledger) -> None:
    """Where even taking it back fails the record stays, and the error says that something may be left."""
    cluster.fail_on("omap_replace", errors.Unreachable, applied=True)
    cluster.fail_on("omap_replace", errors.Unreachable, nth=2)
    with pytest.raises(errors.Unreachable) as caught:
        ledger.reserve(JOB)
    assert ledger.jobs() == [JOB]
    assert len(caught.value.undo_failures) == 1


def test_reserve_without_an_answer_spares_an_older_record(cluster: FakeCluster, ledger: Ledger) -> None:
    """Taking back removes exactly what was written, never the record that was there before."""
    older = ledger.advance(ledger.reserve(JOB), step="ready")
    cluster.fail_on("omap_replace", errors.Unreachable)
    with pytest.raises(errors.Unreachable):
        ledger.reserve(dataclasses.replace(JOB, created=13.0))
    assert ledger.jobs() == [older]


def test_jobs_come_oldest_first(ledger: Ledger) -> None:
    """Whatever their keys."""
    for name, created in (("b", 2.0), ("a", 3.0), ("c", 1.0)):
        ledger.reserve(dataclasses.replace(JOB, id=name, created=created))
    assert [job.id for job in ledger.jobs()] == ["c", "b", "a"]
