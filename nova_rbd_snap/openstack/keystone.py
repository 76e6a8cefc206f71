# SPDX-License-Identifier: Apache-2.0
"""Glance and Nova with the service's own credentials, where no user's token is at hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from keystoneauth1 import adapter, loading
from keystoneauth1 import exceptions as ksa
from oslo_config import cfg

from nova_rbd_snap import errors
from nova_rbd_snap.conf import Settings
from nova_rbd_snap.openstack.glance import Glance
from nova_rbd_snap.openstack.servers import Servers

#: A user without this role does not see other projects' images: to it, "not found" proves nothing.
_SEES_ALL = "admin"


def _register(conf: Any, section: str) -> None:
    loading.register_auth_conf_options(conf, section)
    loading.register_session_conf_options(conf, section)
    _register_glance(conf)


def _register_glance(conf: Any) -> None:
    loading.register_session_conf_options(conf, "glance")
    loading.register_adapter_conf_options(conf, "glance")
    conf.register_opt(cfg.ListOpt("api_servers"), group="glance")


def glance_as_service(conf: Any, settings: Settings) -> Glance:
    """Glance as the user of section [rbd_snap] auth_section.

    :raises errors.NotAuthorized: the section has no usable credentials, or they do not see every image.
    """
    auth, _ = _service(conf, settings)
    return Glance.connect(conf, auth, settings.operation_timeout)


def glance_with_access(conf: Any, access: Mapping[str, Any], settings: Settings) -> Glance:
    """Glance as the user whose *access* came with a request."""
    _register_glance(conf)
    return Glance.with_access(conf, access, settings.operation_timeout)


def nova_as_service(conf: Any, settings: Settings) -> Servers:
    """Nova's API as the same user, in Glance's region. :raises errors.NotAuthorized: the same."""
    auth, session = _service(conf, settings)
    region, interfaces = conf.glance.region_name, conf.glance.valid_interfaces
    return Servers(
        adapter.Adapter(session, auth=auth, service_type="compute", interface=interfaces, region_name=region)
    )


def _service(conf: Any, settings: Settings) -> tuple[Any, Any]:
    """How the service's user authenticates, and a session for it."""
    section = settings.auth_section
    _register(conf, section)
    # Nova's own defaults.
    conf.set_default("service_type", "image", group="glance")
    conf.set_default("valid_interfaces", ["internal", "public"], group="glance")
    try:
        auth = loading.load_auth_from_conf_options(conf, section)
        if auth is None:
            raise errors.NotAuthorized(f"section [{section}] has no auth_type; see [rbd_snap] auth_section")
        session = loading.load_session_from_conf_options(conf, section, timeout=settings.operation_timeout)
        roles = auth.get_access(session).role_names
    except ksa.ClientException as error:
        # Its message alone: as text it has the id of the request, too, and so looks new each time.
        raise errors.NotAuthorized(f"section [{section}]: {error.message}") from error
    if _SEES_ALL not in roles:
        raise errors.NotAuthorized(
            f"the user of section [{section}] lacks the role '{_SEES_ALL}', and so cannot tell a deleted image from "
            "one it may not see"
        )
    return auth, session
