# SPDX-License-Identifier: Apache-2.0
"""The tree of errors."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from nova_rbd_snap import errors


def tree(cls: type[errors.SnapError], depth: int = 0) -> Iterator[tuple[int, type[errors.SnapError]]]:
    yield depth, cls
    for child in cls.__subclasses__():
        yield from tree(child, depth + 1)


ALL = [cls for _, cls in tree(errors.SnapError)]


def test_drawing_is_the_tree() -> None:
    """The docstring of the module draws exactly the classes there are, in their order and depth."""
    drawn = re.findall(r"^ {4}((?:[│├└─]|  )[│├└─ ]*)?([A-Z]\w+)", errors.__doc__ or "", re.MULTILINE)
    assert [(len(lines) // 4, name) for lines, name in drawn] == [
        (depth, cls.__name__) for depth, cls in tree(errors.SnapError)
    ]


@pytest.mark.parametrize("cls", ALL)
def test_wire_round_trip(cls: type[errors.SnapError]) -> None:
    """Every error arrives at the other end of the socket as what it was, with all it carries."""
    error = cls("what happened")
    error.step = "clone"
    error.undo_failures = ["snap: busy"]
    arrived = errors.from_wire(json.loads(json.dumps(error.to_wire())))
    assert type(arrived) is cls
    assert (str(arrived), arrived.report(), arrived.__dict__) == (str(error), error.report(), error.__dict__)


def test_unknown_class_arrives_as_the_base() -> None:
    """A class that this end does not know becomes the base class with the same message."""
    arrived = errors.from_wire({**errors.Busy("in use").to_wire(), "type": "FromTheFuture"})
    assert type(arrived) is errors.SnapError
    assert str(arrived) == "in use"


def test_report_says_step_cause_remedy_and_what_is_left() -> None:
    """One line tells an operator all of it."""
    error = errors.NoSpace("pool is full")
    error.step, error.undo_failures = "flatten", ["clone: busy", "snap: busy"]
    assert error.report() == (
        "step 'flatten': pool is full; remedy: add space to the pool or raise its quota; "
        "could not be undone and is kept in the ledger: clone: busy; snap: busy"
    )


def test_known_wraps_what_is_not_ours() -> None:
    """A bug becomes an error of ours that still names it; ours pass unchanged."""
    ours = errors.Busy("x")
    assert errors.known(ours) is ours
    assert str(errors.known(KeyError("k"))) == "unexpected KeyError: 'k'"


@pytest.mark.parametrize("cls", [errors.Unreachable, errors.Blocklisted])
def test_silent_cluster_gets_no_full_copy(cls: type[errors.SnapError]) -> None:
    """Nova's own copy has no time-outs: it is not tried where the cluster does not answer."""
    assert not cls.may_fall_back
