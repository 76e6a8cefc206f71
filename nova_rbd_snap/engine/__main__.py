# SPDX-License-Identifier: Apache-2.0
"""``python -m nova_rbd_snap.engine --fd N [--config-file F] [--config-dir D]``, as nova-compute starts it."""

from __future__ import annotations

import argparse
import functools
import logging
import signal
import socket
import sys
import threading
from types import FrameType
from typing import Any, Optional

from nova_rbd_snap import conf, errors
from nova_rbd_snap.ceph.interface import Cluster
from nova_rbd_snap.engine import wire
from nova_rbd_snap.engine.server import LogToParent, Server
from nova_rbd_snap.engine.service import Engine
from nova_rbd_snap.ledger.job import Owner


def _connect(settings: conf.Settings) -> Cluster:
    from nova_rbd_snap.ceph.librbd import LibrbdCluster

    return LibrbdCluster(
        conf=settings.ceph_conf,
        user=settings.ceph_user,
        timeout_seconds=settings.operation_timeout,
        clone_format=settings.clone_format,
    )


def _need_bindings() -> None:
    try:
        import rados
        import rbd
    except ImportError as error:
        raise errors.EngineUnavailable(
            f"{sys.executable} cannot import Ceph's Python bindings ({error}); install the distribution's packages "
            "python3-rados and python3-rbd for it"
        ) from error
    del rados, rbd


def _build(server: Server, config: list[str]) -> Engine:
    hello = server.greet()
    _need_bindings()
    nova_conf = conf.load(config)
    settings = conf.Settings.read(nova_conf)

    def glance() -> Any:
        from nova_rbd_snap.openstack import keystone

        return keystone.glance_as_service(nova_conf, settings)

    from nova_rbd_snap.openstack import registration

    return Engine(
        settings,
        functools.partial(Owner, hello["host"], hello["machine"], hello["incarnation"]),
        held=hello["held"],
        connect=lambda: _connect(settings),
        images=registration.Images(glance, settings.operation_timeout),
    )


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
    threading.Thread(target=engine.keep_reclaiming, name="reclaim", daemon=True).start()
    server.serve(engine)


if __name__ == "__main__":
    main()
