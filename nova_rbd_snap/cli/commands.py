# SPDX-License-Identifier: Apache-2.0
"""What the command line can do."""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import time
from collections.abc import Iterator
from typing import Any, Callable

from nova_rbd_snap import conf, errors
from nova_rbd_snap.cli import caps, images
from nova_rbd_snap.cli.app import Cell, Command, add_glance_pool, glance_pools, owner
from nova_rbd_snap.cli.machine import LocalMachine
from nova_rbd_snap.engine import wiring
from nova_rbd_snap.janitor import leftovers
from nova_rbd_snap.janitor.findings import Scene
from nova_rbd_snap.ledger.store import Ledger


def _hours(text: str) -> float:
    with contextlib.suppress(ValueError):
        hours = float(text)
        if math.isfinite(hours) and hours >= 0:
            return hours
    raise argparse.ArgumentTypeError(f"{text!r} is no number of hours")


class Sweep(Command):
    """Remove what nobody looks after any more: what a dead nova-compute, or a failed snapshot of stock Nova's, left.

    Prints every finding with what becomes of it. What is in use, or in doubt, is kept, and so are the ledger's jobs.
    """

    columns = ("Kind", "What", "Action", "Why")

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("--dry-run", action="store_true", help="print the plan and change nothing")
        parser.add_argument(
            "--older-than",
            type=_hours,
            default=24.0,
            metavar="HOURS",
            help="what is younger is kept, for somebody may be at work on it; default 24, fractions allowed",
        )
        add_glance_pool(parser)
        return parser

    def rows(self, parsed_args: argparse.Namespace) -> Iterator[tuple[str, ...]]:
        scene = self._scene(parsed_args)
        plan = leftovers.plan(scene)
        if parsed_args.dry_run:
            yield from ((found.kind, found.what, found.action, found.why) for found in plan.findings)
            return
        for outcome in leftovers.execute(plan, scene):
            found = outcome.finding
            if not outcome.done:
                self.stays()
            yield found.kind, found.what, outcome.became, outcome.why

    def _scene(self, parsed_args: argparse.Namespace) -> Scene:
        nova_conf, settings = self.configuration()
        wiring.need_bindings()

        def asked(connect: Callable[[Any, Any], Any], silent: type[errors.SnapError]) -> Callable[[], Any]:
            @functools.cache
            def ask() -> Any:
                try:
                    return connect(nova_conf, settings)
                except errors.SnapError:
                    raise
                except Exception as error:  # an option of keystone's that cannot be read, a plugin that is not there …
                    raise silent(f"cannot be asked: {type(error).__name__}: {error}") from error

            return ask

        return Scene(
            cluster=wiring.connect(settings),
            pool=settings.pool,
            glance_pools=glance_pools(settings, parsed_args),
            glance=asked(wiring.glance, errors.GlanceSilent),
            nova=asked(wiring.nova, errors.NovaSilent),
            machine=LocalMachine(settings.snapshots_directory),
            now=time.time(),
            older_than_seconds=parsed_args.older_than * 3600,
        )


class JobList(Command):
    """List what the ledger holds: snapshots under way, and what is left of those that came to no end."""

    columns = ("ID", "Kind", "Step", "Percent", "Disk", "Host", "Cloud", "Client", "Hours", "Left")

    def rows(self, parsed_args: argparse.Namespace) -> Iterator[tuple[Cell, ...]]:
        _, settings = self.configuration()
        wiring.need_bindings()
        contents = Ledger(wiring.connect(settings), settings.pool).read()
        for job in contents.jobs:
            hours = round((time.time() - job.created) / 3600, 1)
            owner = job.owner
            whose = owner.host, owner.cloud, owner.client
            yield job.id, job.kind, job.step, job.percent, str(job.disk), *whose, hours, "; ".join(job.failures)
        for key, why in contents.strange.items():
            yield key, "strange record", "", "", "", "", "", "", "", f"never touched: {why}"


class JobReclaim(Command):
    """End jobs whose nova-compute will not come back: finish or undo them, as Glance's record says.

    Exactly the client that worked on a job is cut off from the cluster first, so name none that is still at work. A job
    that stays is given back to its nova-compute: name it again once its reason is gone. A flatten, or a purge, is put
    back in the queue, to be done at once.
    """

    columns = ("ID", "Action", "Why")

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("ids", nargs="+", metavar="ID", help="as 'job list' prints it")
        parser.add_argument(
            "--cloud",
            help="whose jobs these are, as 'job list' prints it; default: the one that the configuration tells, whose "
            "Glance is asked in any case",
        )
        return parser

    def rows(self, parsed_args: argparse.Namespace) -> Iterator[tuple[str, ...]]:
        nova_conf, settings = self.configuration()
        wiring.need_bindings()
        cloud = conf.cloud(nova_conf) if parsed_args.cloud is None else parsed_args.cloud
        engine = wiring.engine(nova_conf, settings, owner("operator", cloud))
        for job_id in dict.fromkeys(parsed_args.ids):
            try:
                became = engine.end(job_id, conf.cloud(nova_conf))
            except errors.SnapError as error:
                if isinstance(error, errors.Unreachable) and not isinstance(error, errors.StoreSilent):
                    raise  # so is the next one's
                self.stays()  # the next one may fare better
                yield job_id, "none" if isinstance(error, errors.NoRecord) else "kept", error.report()
            else:
                yield job_id, became, ""


COMMANDS: dict[str, Any] = {
    "sweep": Sweep,
    "job list": JobList,
    "job reclaim": JobReclaim,
    "image list": images.ImageList,
    "image flatten": images.ImageFlatten,
    "trash list": images.TrashList,
    "trash purge": images.TrashPurge,
    "worker": images.Worker,
    "caps": caps.Caps,
}
