# SPDX-License-Identifier: Apache-2.0
"""Records and the object that holds them."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nova_rbd_snap import errors
from nova_rbd_snap.ledger.job import CLONE, FREEZE, VERSION, Job, Owner, copy_id
from nova_rbd_snap.ledger.store import OBJECT, Ledger
from nova_rbd_snap.specs import ImageSpec
from tests.fakes.cluster import FakeCluster

JOB = Job(
    id="22222222-2222-4222-8222-222222222222",
    kind=CLONE,
    owner=Owner("compute-1", "machine-1", "incarnation-1", "192.0.2.1:0/1"),
    created=12.5,
    disk=ImageSpec("vms", "11111111-1111-4111-8111-111111111111_disk"),
    clone_format=2,
    step="snap",
    dest=ImageSpec("images", "22222222-2222-4222-8222-222222222222"),
)


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster("vms", "images")


@pytest.fixture
def ledger(cluster: FakeCluster) -> Ledger:
    return Ledger(cluster, "vms")


clients = st.builds(
    "{}:0/{}".format, st.ip_addresses(v=4), st.integers(min_value=1, max_value=2**32 - 1)
)
owners = st.builds(Owner, host=st.text(), machine=st.text(), incarnation=st.text(), client=clients)
disks = st.builds(
    ImageSpec, pool=st.text(), name=st.builds("{}_disk{}".format, st.uuids(), st.sampled_from(["", ".config", ".eph0"]))
)


@st.composite
def _jobs(draw: st.DrawFn) -> Job:
    image_id = str(draw(st.uuids()))
    kind = draw(st.sampled_from([CLONE, FREEZE]))
    return Job(
        id=image_id if kind == CLONE else copy_id(image_id),
        kind=kind,
        owner=draw(owners),
        created=draw(st.floats(allow_nan=False, allow_infinity=False)),
        disk=draw(disks),
        clone_format=draw(st.sampled_from([1, 2])),
        step=draw(st.text()),
        dest=ImageSpec(draw(st.text()), image_id) if kind == CLONE else None,
        data_pool=draw(st.none() | st.text()),
        snap_id=draw(st.none() | st.integers()),
        dest_id=draw(st.none() | st.text()),
        orphaned=draw(st.booleans()),
        failures=tuple(draw(st.lists(st.text()))),
        generation=draw(st.integers(min_value=0)),
    )


jobs = _jobs()


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
def test_strange_records_are_kept_and_in_nobodys_way(cluster: FakeCluster, ledger: Ledger, text: str) -> None:
    """What this release cannot read stays byte for byte, is told, and hides no other job."""
    cluster.omap_replace("vms", OBJECT, "strange", None, text)
    ledger.reserve(JOB)
    assert ledger.read().jobs == [JOB]
    assert list(ledger.read().strange) == ["strange"]
    with pytest.raises(errors.NoRecord):
        ledger.load("strange")
    ledger.forget(JOB)
    # An empty value counts as absent in Ceph's comparison, so it is no record at all.
    assert cluster.omap_items("vms", OBJECT) == {"strange": text}


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
    with pytest.raises(errors.LedgerConflict, match=JOB.id):
        ledger.reserve(dataclasses.replace(JOB, created=13.0))
    assert ledger.read().jobs == [JOB]


@pytest.mark.parametrize("write", [lambda ledger: ledger.advance(JOB, step="late"), lambda ledger: ledger.forget(JOB)])
def test_late_writer_loses(ledger: Ledger, write: object) -> None:
    """Whoever writes from a state that is no longer the record's changes nothing."""
    now = ledger.advance(ledger.reserve(JOB), step="clone")
    with pytest.raises(errors.LedgerConflict):
        write(ledger)
    assert ledger.read().jobs == [now]


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
    assert ledger.read().jobs == [JOB]
    assert len(caught.value.undo_failures) == 1


def test_reserve_without_an_answer_spares_an_older_record(cluster: FakeCluster, ledger: Ledger) -> None:
    """Taking back removes exactly what was written, never the record that was there before."""
    older = ledger.advance(ledger.reserve(JOB), step="ready")
    cluster.fail_on("omap_replace", errors.Unreachable)
    with pytest.raises(errors.Unreachable):
        ledger.reserve(dataclasses.replace(JOB, created=13.0))
    assert ledger.read().jobs == [older]


def test_jobs_come_oldest_first(ledger: Ledger) -> None:
    """Whatever their keys."""
    names = [f"{digit}" * 8 + "-2222-4222-8222-222222222222" for digit in "bac"]
    for name, created in zip(names, (2.0, 3.0, 1.0)):
        ledger.reserve(dataclasses.replace(JOB, id=name, dest=ImageSpec("images", name), created=created))
    assert [job.id[0] for job in ledger.read().jobs] == ["c", "b", "a"]


ANOTHER = "33333333-3333-4333-8333-333333333333"
HOSTILE = {
    "somebody else's image": {"dest": {"pool": "images", "name": ANOTHER}},
    "a server's disk for an image": {"id": f"{ANOTHER}_disk", "dest": {"pool": "vms", "name": f"{ANOTHER}_disk"}},
    "an image for a disk": {"disk": {"pool": "vms", "name": ANOTHER}},
    "a disk in another pool": {"disk": {"pool": "volumes", "name": f"{ANOTHER}_disk"}},
    "a snapshot of its own choice": {"disk": {"pool": "vms", "name": f"{ANOTHER}_disk@backup"}},
    "a freeze with a destination": {"kind": FREEZE, "id": copy_id(ANOTHER)},
    "a clone without one": {"dest": None},
    "a kind nobody knows": {"kind": "purge"},
    "a format nobody knows": {"clone_format": 3},
    "every client of a machine": {"owner": {**dataclasses.asdict(JOB.owner), "client": "192.0.2.1"}},
    "every client of a machine by nonce 0": {"owner": {**dataclasses.asdict(JOB.owner), "client": "192.0.2.1:0/0"}},
    "a snapshot without a number": {"snap_id": "1"},
    "a pool without a name": {"dest": {"pool": 7, "name": JOB.id}},
    "failures without words": {"failures": [1]},
    "a time that no clock shows": {"created": 10**400},
}


@pytest.mark.parametrize("changes", HOSTILE.values(), ids=HOSTILE)
def test_hostile_record(cluster: FakeCluster, ledger: Ledger, changes: dict[str, object]) -> None:
    """What names anything that no job of ours names is no job: nothing is ever removed on its word."""
    record = {**json.loads(JOB.encode()), **changes}
    cluster.omap_replace("vms", OBJECT, record["id"], None, json.dumps(record))
    assert ledger.read().jobs == []
    assert list(ledger.read().strange) == [record["id"]]


def test_record_without_an_end(cluster: FakeCluster, ledger: Ledger) -> None:
    """Is in nobody's way."""
    ledger.reserve(JOB)
    cluster.omap_replace("vms", OBJECT, ANOTHER, None, "[" * 100_000)
    assert ledger.load(JOB.id) == JOB
    assert list(ledger.read().strange) == [ANOTHER]
    with pytest.raises(errors.NoRecord, match="never touched"):
        ledger.load(ANOTHER)


def test_record_under_another_key(cluster: FakeCluster, ledger: Ledger) -> None:
    """A record that was copied is not the job."""
    cluster.omap_replace("vms", OBJECT, ANOTHER, None, JOB.encode())
    assert ledger.read().jobs == []


def test_record_of_another_release() -> None:
    """What stands in it is what is replaced, however this release would have written it."""
    cluster = FakeCluster("vms")
    ledger = Ledger(cluster, "vms")
    text = json.dumps({**json.loads(JOB.encode()), "orphaned": False, "percent": 0}, indent=1)
    cluster.omap_replace("vms", OBJECT, JOB.id, None, text)
    job = ledger.load(JOB.id)
    assert job == JOB
    job = ledger.advance(job, step="clone")
    job = ledger.advance(job, step="seal")
    assert ledger.read().jobs == [job]
    ledger.forget(job)
    assert ledger.read().jobs == []


def test_record_tells_what_is_not_as_usual() -> None:
    """So that a later release, which knows more, writes the same for what it knows nothing more of."""
    assert not {"orphaned", "failures", "text", "percent", "not_before"} & json.loads(JOB.encode()).keys()
