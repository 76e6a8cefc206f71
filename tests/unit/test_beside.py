# SPDX-License-Identifier: Apache-2.0
"""Work beside other work: when it is over, and what becomes of its error."""

from __future__ import annotations

import threading

import pytest

from nova_rbd_snap import errors
from nova_rbd_snap.openstack.beside import Beside


def test_goes_on_within_the_block_and_is_over_after_it() -> None:
    may_end, ended = threading.Event(), threading.Event()

    def work() -> None:
        assert may_end.wait(10)
        ended.set()

    with Beside("test", work):
        assert not ended.is_set()
        may_end.set()
    assert ended.is_set()


def test_its_error_is_raised_where_it_is_waited_for() -> None:
    def fail() -> None:
        raise errors.RecordGone("gone")

    with Beside("test", fail) as beside:
        for _ in range(2):
            with pytest.raises(errors.RecordGone):
                beside.wait()


def test_first_error_counts() -> None:
    def fail() -> None:
        raise errors.RecordGone("gone")

    with pytest.raises(errors.Refused), Beside("test", fail):
        raise errors.Refused("of the block")
