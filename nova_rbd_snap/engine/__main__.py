# SPDX-License-Identifier: Apache-2.0
"""``python -m nova_rbd_snap.engine --fd N [--config-file F] [--config-dir D]``, as nova-compute starts it."""

from __future__ import annotations

import argparse
import functools
import logging
import signal
import socket
import threading
from types import FrameType
from typing import Optional

from nova_rbd_snap import conf, errors
from nova_rbd_snap.engine import wire, wiring
from nova_rbd_snap.engine.server import LogToParent, Server
from nova_rbd_snap.engine.service import Engine
from nova_rbd_snap.ledger.job import Owner


def _build(server: Server, config: list[str]) -> Engine:
    hello = server.greet()
    wiring.need_bindings()
    nova_conf = conf.load(config)
    settings = conf.Settings.read(nova_conf)
    owner = functools.partial(
        Owner, hello["host"], hello["machine"], hello["incarnation"], cloud=conf.cloud(nova_conf)
    )
    return wiring.engine(nova_conf, settings, owner, hello["held"])


def main() -> None:
    """Serve one nova-compute until it ends."""
    parser = argparse.ArgumentParser(prog="nova_rbd_snap.engine", description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="the socket, as an inherited file descriptor")
    known, config = parser.parse_known_args()

    sock = socket.socket(fileno=known.fd)
    sock.setblocking(True)  # under eventlet it was created non-blocking
    server = Server(sock)
    try:
        engine = _build(server, config)
    except (errors.EngineUnavailable, conf.BadOption) as error:
        server.send({"error": str(error)})
        return
    except Exception as error:  # a configuration file that cannot be read, another version …
        server.send({"error": f"{type(error).__name__}: {error}"})
        return

    logging.basicConfig(level=logging.INFO, handlers=[LogToParent(server)], format="%(message)s")

    def on_sigterm(signum: int, frame: Optional[FrameType]) -> None:
        # In a thread: the handler itself runs between two steps of the main thread and must not wait.
        threading.Thread(target=server.terminate, args=[engine], name="terminate", daemon=True).start()

    signal.signal(signal.SIGTERM, on_sigterm)
    # Ctrl-C reaches the whole process group; nova-compute ends, and the end of the socket ends this one in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server.send({"version": wire.VERSION})
    engine.start()
    server.serve(engine)


if __name__ == "__main__":
    main()
