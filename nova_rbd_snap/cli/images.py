# SPDX-License-Identifier: Apache-2.0
"""The commands about images that are not flat, and about what they keep in the trash."""

from __future__ import annotations

import argparse
import signal
import threading
import time
from collections.abc import Iterator
from typing import Optional

from nova_rbd_snap import conf, errors
from nova_rbd_snap.ceph.interface import Cluster
from nova_rbd_snap.cli.app import Cell, Command, Silent, add_glance_pool, glance_pools, owner
from nova_rbd_snap.engine import wiring
from nova_rbd_snap.flatten.queue import Shared, queue_image, shared_images
from nova_rbd_snap.janitor import parents
from nova_rbd_snap.ledger.job import AT_WORK, BACKGROUND_KINDS, FLATTEN, Job
from nova_rbd_snap.ledger.store import Ledger


class _OfImages(Command):
    """About the images in Glance's pools."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        add_glance_pool(parser)
        return parser

    def _images(self, parsed_args: argparse.Namespace, cluster: Cluster, settings: conf.Settings) -> Iterator[Shared]:
        pools = glance_pools(settings, parsed_args)
        if not pools:
            raise conf.BadOption("which pool is Glance's? Set [rbd_snap] glance_pool, or name it with --glance-pool")
        return shared_images(cluster, settings.pool, pools)


class ImageList(_OfImages):
    """List the images that are not flat: they share data with a server's disk, and keep it from going for good."""

    columns = ("ID", "Pool", "Disk", "Depth", "State", "Why")

    def rows(self, parsed_args: argparse.Namespace) -> Iterator[tuple[Cell, ...]]:
        _, settings = self.configuration()
        wiring.need_bindings()
        cluster = wiring.connect(settings)
        jobs = {job.id: job for job in Ledger(cluster, settings.pool).read().jobs}
        for found in self._images(parsed_args, cluster, settings):
            state = _state(jobs.get(found.image.name))
            yield found.image.name, found.image.pool, str(found.disk), found.depth, *state


def _state(job: Optional[Job]) -> tuple[str, str]:
    if job is None:
        return "shared", ""
    if job.kind != FLATTEN:
        return f"at step {job.step}", "its snapshot is under way, see 'job list'"
    if job.step == AT_WORK:
        return f"{job.percent} % flat", f"on {job.owner.host}"
    waits = job.not_before > time.time()
    again = [time.strftime("tried again at %F %T", time.localtime(job.not_before))] if waits else []
    return "queued", "; ".join([*job.failures, *again])


class ImageFlatten(_OfImages):
    """Have images flattened in the background by the cloud's workers; 'image list' tells how far they are."""

    columns = ("ID", "Action", "Why")

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        which = parser.add_mutually_exclusive_group(required=True)
        which.add_argument("--all", action="store_true", help="every image that is not flat")
        which.add_argument("ids", nargs="*", default=[], metavar="ID", help="as 'image list' prints it")
        return parser

    def rows(self, parsed_args: argparse.Namespace) -> Iterator[tuple[str, ...]]:
        nova_conf, settings = self.configuration()
        wiring.need_bindings()
        cluster = wiring.connect(settings)
        ledger, us = Ledger(cluster, settings.pool), owner("worker", conf.cloud(nova_conf))(cluster.address())
        wanted = dict.fromkeys(parsed_args.ids)
        for found in self._images(parsed_args, cluster, settings):
            name = found.image.name
            if not parsed_args.all and name not in wanted:
                continue
            wanted.pop(name, None)
            try:
                queue_image(found, ledger, us, time.time())
            except errors.LedgerConflict:
                yield name, "none", "it has a job already"
            else:
                yield name, "queued", ""
        for name in wanted:
            self.stays()
            yield name, "none", "there is no such image in Glance's pools that is not flat"


class TrashList(Command):
    """List what is in the trash of Nova's pool, and the images that keep it there."""

    columns = ("ID", "Name", "Kept until", "Needed by")

    def rows(self, parsed_args: argparse.Namespace) -> Iterator[tuple[Cell, ...]]:
        _, settings = self.configuration()
        wiring.need_bindings()
        cluster = wiring.connect(settings)
        for found in cluster.trashed(settings.pool):
            try:
                children = cluster.children_of_trashed(settings.pool, found.id)
            except errors.Missing:
                continue  # gone meanwhile
            until = "no image needs it" if found.is_parent else time.strftime("%F %T", time.localtime(found.kept_until))
            yield found.id, found.name, until, ", ".join(map(str, children))


class TrashPurge(Command):
    """Remove for good what waited in Nova's pool for images that are gone; the engines do so once an hour."""

    columns = ("What", "Action", "Why")

    def rows(self, parsed_args: argparse.Namespace) -> Iterator[tuple[str, ...]]:
        nova_conf, settings = self.configuration()
        wiring.need_bindings()
        pools = [settings.glance_pool] if settings.glance_pool else []
        images, cluster = wiring.images(nova_conf, settings), wiring.connect(settings)
        for cleared in parents.clear(cluster, settings.pool, pools, images, time.time()):
            if cleared.kept:
                self.stays()
            yield cleared.what, "kept" if cleared.kept else "removed", cleared.kept


class Worker(Silent):
    """Flatten images, and purge disks of deleted servers, until SIGTERM or Ctrl-C. The engines do so, too."""

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        nova_conf, settings = self.configuration()
        wiring.need_bindings()
        engine = wiring.engine(nova_conf, settings, owner("worker", conf.cloud(nova_conf)))

        def end(*_: object) -> None:
            # In a thread: the handler itself runs between two steps of the main thread and must not wait.
            threading.Thread(target=engine.stop, name="stop", daemon=True).start()

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, end)
        engine.upkeep.keep_working(*BACKGROUND_KINDS)
