# SPDX-License-Identifier: Apache-2.0
"""The command that prints which capabilities the Ceph users need."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator

from nova_rbd_snap.cli.app import Cell, Command, add_glance_pool, glance_pools
from nova_rbd_snap.conf import BadOption, Store
from nova_rbd_snap.ledger.job import INLINE, POLICIES


def osd_caps(writes: Iterable[str], reads: Iterable[str] = ()) -> str:
    """Those of a user that writes to, and only reads, rbd images in these pools."""
    profiles = [f"profile rbd pool={pool}" for pool in writes]
    return ", ".join(profiles + [f"profile rbd-read-only pool={pool}" for pool in reads])


def mgr_caps(pools: Iterable[str]) -> str:
    """Those of a user who may have the manager work on rbd images in these pools."""
    return ", ".join(f"profile rbd pool={pool}" for pool in pools)


def auth_caps(user: str, writes: list[str], reads: list[str], ceph: str = "ceph") -> str:
    """The command that gives a Ceph user the least that it needs, and takes all else away.

    :param ceph: how the cluster's administrator calls ``ceph``.
    """
    return f"{ceph} auth caps client.{user} mon 'profile rbd' osd '{osd_caps(writes, reads)}' mgr '{mgr_caps(writes)}'"


def _reader(text: str) -> tuple[str, str]:
    user, _, pool = text.partition(":")
    if not user or not pool:
        raise argparse.ArgumentTypeError(f"{text!r} is no USER:POOL")
    return user, pool


class Caps(Command):
    """Print the commands that give the Ceph users what a policy needs; they take all else away, so add that first.

    With 'background' and 'never' Glance, and every other user that reads images, can read every server's disk.
    """

    columns = ("User", "Command")

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("--policy", choices=POLICIES, help="of flattening; default: the configured one")
        parser.add_argument("--glance-user", default="glance", metavar="USER", help="default: glance")
        parser.add_argument(
            "--reader",
            action="append",
            default=[],
            type=_reader,
            metavar="USER:POOL",
            help="another user that clones images into a pool of its own, as Cinder's does; can be repeated",
        )
        add_glance_pool(parser)
        return parser

    def rows(self, parsed_args: argparse.Namespace) -> Iterator[tuple[Cell, ...]]:
        _, settings = self.configuration()
        glance = glance_pools(settings, parsed_args)
        if not glance and settings.stores:
            yield from _of_stores(settings.stores)
            return
        if not glance:
            raise BadOption("which pool is Glance's? Set [rbd_snap] glance_pool, or name it with --glance-pool")
        images = [*glance, *filter(None, [settings.glance_data_pool])]
        shared = [] if (parsed_args.policy or settings.flatten) == INLINE else [settings.pool]
        if settings.ceph_user:  # else librados takes client.admin, which may do all, and must stay so
            yield settings.ceph_user, auth_caps(settings.ceph_user, [settings.pool, *images], [])
        yield parsed_args.glance_user, auth_caps(parsed_args.glance_user, images, shared)
        for user, pool in parsed_args.reader:
            yield user, auth_caps(user, [pool], [*images, *shared])
        yield from _of_stores(settings.stores)


def _of_stores(stores: Iterable[Store]) -> Iterator[tuple[Cell, ...]]:
    """Of the users that copies are made as, in their own clusters."""
    for store in stores:
        if store.ceph_user:
            pools = [store.pool, *filter(None, [store.data_pool])]
            yield store.ceph_user, auth_caps(store.ceph_user, pools, [], f"ceph --conf {store.ceph_conf}")
