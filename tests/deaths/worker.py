# SPDX-License-Identifier: Apache-2.0
"""What nova-compute is to the engine, without Nova: ``python3 -m tests.deaths.worker REQUEST`` keeps the real engine
running, takes one snapshot by the clone way, and lives on until its standard input ends.

REQUEST is JSON: ``config``, ``host`` and ``machine``, and for a snapshot ``image_id``, ``disk``, ``dest_pool`` and the
tenant's ``token``. A line on standard input asks for the snapshot. Each line on standard output is a JSON object:
``{"engine": pid}`` once there is one, ``{"step": name}`` as the snapshot goes on, and ``{"outcome", "error"}``.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
from typing import Any

from keystoneauth1 import loading, service_token, token_endpoint

from nova_rbd_snap import conf, errors
from nova_rbd_snap.engine.client import EngineClient
from nova_rbd_snap.openstack import clone, keystone, registration
from nova_rbd_snap.openstack.glance import Glance

#: As nova-compute's, see nova_rbd_snap/openstack/process.py.
PATIENCE_SECONDS = 100

LOG = logging.getLogger(__name__)

ACTIVE, FELL_BACK, FAILED = "active", "fell back", "failed"


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def tenants_glance(config: list[str], token: str) -> tuple[Glance, conf.Settings]:
    """Glance as nova-compute asks it for a tenant: with the request's token, and the service's own beside it."""
    nova_conf = conf.load(config)
    settings = conf.Settings.read(nova_conf)
    keystone.glance_as_service(nova_conf, settings)  # makes Nova's options known, too
    auth = service_token.ServiceTokenAuthWrapper(
        user_auth=token_endpoint.Token(nova_conf.glance.endpoint_override, token),
        service_auth=loading.load_auth_from_conf_options(nova_conf, "service_user"),
    )
    return Glance.connect(nova_conf, auth, settings.operation_timeout), settings


def snapshot(engine: EngineClient, glance: Glance, request: dict[str, Any], timeout_seconds: int) -> None:
    image_id = request["image_id"]

    def report(step: str, done: int, total: int) -> None:
        LOG.info("%s", step)
        say(step=step)

    def perform(job_id: str) -> None:
        report("reserved", 0, 0)
        engine.perform(job_id, None, report)

    url = clone.make(engine, image_id, request["disk"], request["dest_pool"], perform)
    prepare = registration.preparation(glance, image_id, registration.RAW, timeout_seconds=timeout_seconds)
    clone.register(engine, glance, image_id, url, prepare, timeout_seconds=timeout_seconds, report=report)


def main() -> None:
    request = json.loads(sys.argv[1])
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(process)d %(name)s %(message)s")
    engine = EngineClient(
        request["config"], host=request["host"], machine=request["machine"], patience_seconds=PATIENCE_SECONDS
    )
    threading.Thread(target=engine.keep_running, daemon=True).start()
    if "image_id" in request:
        glance, settings = tenants_glance(request["config"], request["token"])
        glance.record(request["image_id"])  # so that no token is waited for once it counts
        engine.check()
        say(engine=engine.pid)
        if sys.stdin.readline():
            try:
                snapshot(engine, glance, request, settings.operation_timeout)
            except errors.SnapError as error:
                say(outcome=FELL_BACK if error.may_fall_back else FAILED, error=error.report())
            else:
                say(outcome=ACTIVE, error="")
    sys.stdin.read()


if __name__ == "__main__":
    main()
