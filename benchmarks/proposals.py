# SPDX-License-Identifier: Apache-2.0
"""How long ago the monitors' last proposal was: the time a snapshot has to wait for the next depends on it."""

import time

import rbd

#: Ceph's paxos_propose_interval.
INTERVAL_SECONDS = 1.0


def await_moment(pool, share, interval=INTERVAL_SECONDS):
    """Return when that share of *interval* has gone by since a proposal; *pool* is an ioctx for an image of its own."""
    _await_proposal(pool)
    time.sleep(share * interval)


def _await_proposal(pool):
    name = "bench-proposal"
    rbd.RBD().create(pool, name, 1 << 20)
    try:
        with rbd.Image(pool, name) as image:
            image.create_snap("proposal")
            image.remove_snap("proposal")
    finally:
        rbd.RBD().remove(pool, name)
