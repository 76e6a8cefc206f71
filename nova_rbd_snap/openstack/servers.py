# SPDX-License-Identifier: Apache-2.0
"""Nova's API, as far as it tells whether there is a server."""

from __future__ import annotations

from typing import Any

from keystoneauth1 import exceptions as ksa

from nova_rbd_snap import errors


class Servers:
    """See :class:`nova_rbd_snap.janitor.findings.Nova`."""

    def __init__(self, adapter: Any) -> None:
        """
        :param adapter: a keystoneauth adapter for the compute service, of a user who sees every project's servers.
        """
        self._adapter = adapter

    def knows(self, server: str) -> bool:
        try:
            answer = self._adapter.request(f"/servers/{server}", "GET", raise_exc=False)
        except ksa.ClientException as error:
            raise errors.NovaSilent(f"Nova cannot be asked for server {server}: {error}") from error
        if answer.status_code == 200:
            return True
        # A proxy says "not found", too.
        if answer.status_code == 404 and "itemNotFound" in answer.text:
            return False
        raise errors.NovaSilent(f"Nova answered {answer.status_code} when it was asked for server {server}")
