# SPDX-License-Identifier: Apache-2.0
"""The command: where its configuration comes from, and how it fails.

Exit codes: 0 all is as it was asked for; 1 something that was to go stays; 2 it could not be looked at, or the command
makes no sense.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import socket
import uuid
from collections.abc import Iterable, Sequence
from typing import Any, Callable, Union

from cliff import app, command, commandmanager, lister

from nova_rbd_snap import conf, errors
from nova_rbd_snap.ledger.job import Owner

Cell = Union[str, float]


class App(app.App):
    """``nova-rbd-snap``."""

    NAME = "nova-rbd-snap"
    CONSOLE_MESSAGE_FORMAT = f"{NAME}: %(message)s"

    def __init__(self) -> None:
        from nova_rbd_snap.cli import commands

        # By name, not by entry point: they are there wherever the module is.
        manager = commandmanager.CommandManager("")
        for name, cls in commands.COMMANDS.items():
            manager.add_command(name, cls)
        about = "What nova-rbd-snap and stock Nova have left, listed and cleared away."
        super().__init__(about, _version(), manager, deferred_help=True)

    def build_option_parser(self, *args: Any, **kwargs: Any) -> argparse.ArgumentParser:
        parser = super().build_option_parser(*args, **kwargs)
        for option, what in (("--config-file", "file"), ("--config-dir", "directory of files")):
            parser.add_argument(
                option,
                action="append",
                default=[],
                metavar=option[-4:].strip("-").upper(),
                help=f"Configuration {what} of nova-compute; can be repeated. Default: those it reads by itself.",
            )
        return parser

    def interact(self) -> None:
        """There is no prompt to type commands at."""
        self.parser.error("which command? See 'nova-rbd-snap --help'")


def _version() -> str:
    try:
        return importlib.metadata.version("nova-rbd-snap")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def configuration(options: argparse.Namespace) -> tuple[Any, conf.Settings]:
    """nova.conf, whole and as settings.

    :param options: of the command line.
    :raises conf.BadOption: it cannot be used.
    """
    nova_conf = conf.load(conf.arguments(options))
    if not (nova_conf.config_file or nova_conf.config_dir):
        raise conf.BadOption("no configuration of nova-compute was found; name it with --config-file")
    return nova_conf, conf.Settings.read(nova_conf)


def owner(role: str, cloud: str) -> Callable[[str], Owner]:
    """Whose the jobs are that a command works on, given its client's address: no nova-compute's."""
    return functools.partial(Owner, f"{role}:{socket.gethostname()}", role, str(uuid.uuid4()), cloud=cloud)


def add_glance_pool(parser: argparse.ArgumentParser) -> None:
    """The option that :func:`glance_pools` reads."""
    parser.add_argument(
        "--glance-pool",
        action="append",
        default=[],
        metavar="POOL",
        help="a pool of Glance's besides [rbd_snap] glance_pool; can be repeated",
    )


def glance_pools(settings: conf.Settings, parsed_args: argparse.Namespace) -> list[str]:
    """Glance's pools, as configured and as named; each once."""
    return list(dict.fromkeys(pool for pool in (settings.glance_pool, *parsed_args.glance_pool) if pool))


class Silent(command.Command):
    """Something to do that fails in a sentence."""

    app_args: argparse.Namespace

    def run(self, parsed_args: argparse.Namespace) -> int:
        self._stays = False
        try:
            super().run(parsed_args)
        except (BrokenPipeError, KeyboardInterrupt):
            raise
        except Exception as error:
            if self.app_args.debug:
                raise
            self.app.LOG.error("%s", _printable(_sentence(error)))
            return 2
        return 1 if self._stays else 0

    def configuration(self) -> tuple[Any, conf.Settings]:
        """As :func:`configuration`."""
        return configuration(self.app_args)

    def stays(self) -> None:
        """Note that something that was to go stays."""
        self._stays = True


class Command(Silent, lister.Lister):
    """The same, answered by a table, or by what ``-f`` asks for.

    :cvar columns: of the table.
    """

    columns: Sequence[str] = ()

    def _check_columns(self, parsed_args: argparse.Namespace) -> None:
        """cliff would complain when all is done, instead of telling what was done."""
        known = {column.lower().replace(" ", "_") for column in self.columns}
        for column in parsed_args.columns:
            if column.lower().strip().replace(" ", "_") not in known:
                raise conf.BadOption(f"there is no column {column!r}, but {', '.join(self.columns)}")

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Sequence[str], list[tuple[Cell, ...]]]:
        self._check_columns(parsed_args)
        told = []
        try:
            for row in self.rows(parsed_args):
                told.append(tuple(map(_printable, row)))
        except KeyboardInterrupt:  # what was done is told all the same
            self.app.LOG.error("interrupted: nothing more is done")
            self.stays()
        except Exception as error:
            if not told or self.app_args.debug:
                raise
            self.app.LOG.error("nothing more is done: %s", _printable(_sentence(error)))
            self.stays()
        return self.columns, told

    def rows(self, parsed_args: argparse.Namespace) -> Iterable[tuple[Cell, ...]]:
        """Do it, and tell, in :attr:`columns`."""
        raise NotImplementedError


def _sentence(error: Exception) -> str:
    if isinstance(error, errors.SnapError):
        return error.report()
    return str(error) if isinstance(error, conf.BadOption) else f"{type(error).__name__}: {error}"


def _printable(cell: Cell) -> Cell:
    """Names in a pool or on a disk may hold anything, a terminal's control sequences included."""
    if not isinstance(cell, str):
        return cell
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in cell)
