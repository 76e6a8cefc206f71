# SPDX-License-Identifier: Apache-2.0
"""A real Ceph and a real Glance, as their administrators see them and as a snapshot request does."""

from __future__ import annotations

import configparser
import contextlib
import functools
import json
import os
import random
import uuid
import weakref
from typing import Any, Callable, Optional

import rados
import rbd
from keystoneauth1 import loading, service_token
from keystoneauth1.identity import v3

from nova_rbd_snap import conf, errors
from nova_rbd_snap.ceph.librbd import LibrbdCluster
from nova_rbd_snap.engine import unheard
from nova_rbd_snap.engine.service import Engine
from nova_rbd_snap.ledger.job import INLINE, Owner
from nova_rbd_snap.ledger.store import OBJECT
from nova_rbd_snap.openstack import clone, keystone, registration
from nova_rbd_snap.openstack.glance import Glance
from tests.fakes.glance_proxy import GlanceProxy
from tests.waiting import eventually

NOVA_CONF = "/etc/nova/nova.conf"
CEPH_CONF = "/etc/ceph/ceph.conf"
MIB = 1 << 20
DISK_BYTES = 64 * MIB
TIMEOUT_SECONDS = 20
#: Of a Glance that will not answer.
HURRIED_SECONDS = 3
#: What Ceph has where nobody says otherwise. An OSD takes none for less than the one before.
USUAL_RATIOS = {"nearfull": 0.85, "backfillfull": 0.9, "full": 0.95}
PROXY_PORT = 9394


def delete(glance: Glance, image_id: str) -> None:
    """Delete the image; Glance refuses that while it still reads the image to hash it."""

    def deleted() -> bool:
        try:
            glance.delete(image_id)
        except errors.RecordGone:
            return True
        except errors.NotRegistered:
            return False
        return True

    eventually(deleted, f"image {image_id} can be deleted", pause=0.1)


class World:
    """The cluster and Glance as their administrators see them, and what a snapshot request has at hand."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.vms, self.images = f"vms-{os.environ['CLOUD']}", f"images-{os.environ['CLOUD']}"
        self.conf = conf.load(["--config-file", NOVA_CONF])
        self._connections: weakref.WeakSet[LibrbdCluster] = weakref.WeakSet()
        stack.callback(self._disconnect)
        #: For what the bindings say at length.
        self.cluster = LibrbdCluster(conf=CEPH_CONF, user="admin", timeout_seconds=TIMEOUT_SECONDS, clone_format=2)
        self.rados = rados.Rados(rados_id="admin", conffile=CEPH_CONF)
        self.rados.connect()
        stack.callback(self.rados.shutdown)
        self.ioctx = {pool: self.rados.open_ioctx(pool) for pool in (self.vms, self.images)}
        self.service = keystone.glance_as_service(self.conf, self.settings())
        self.tenant = Glance.connect(self.conf, self._tenants_auth(trusted=True), TIMEOUT_SECONDS)
        #: The tenant behind a nova-compute that sends no service token.
        self.untrusted = Glance.connect(self.conf, self._tenants_auth(trusted=False), TIMEOUT_SECONDS)
        #: Goes between the tenant and Glance where a test says so.
        self.proxy = stack.enter_context(GlanceProxy(PROXY_PORT))

    def _tenants_auth(self, trusted: bool) -> Any:
        parsed = configparser.ConfigParser(strict=False, interpolation=None)
        parsed.read(NOVA_CONF)
        user = v3.Password(
            auth_url=parsed["service_user"]["auth_url"],
            username="demo",
            password="lab",
            project_name="demo",
            user_domain_id="default",
            project_domain_id="default",
        )
        if not trusted:
            return user
        return service_token.ServiceTokenAuthWrapper(
            user_auth=user, service_auth=loading.load_auth_from_conf_options(self.conf, "service_user")
        )

    # -- what a test works on ------------------------------------------------------------------------------------

    def settings(
        self, clone_format: int = 2, timeout_seconds: int = TIMEOUT_SECONDS, policy: str = INLINE
    ) -> conf.Settings:
        """nova-compute's."""
        self.conf.set_override("flatten", policy, group="rbd_snap")
        self.conf.set_override("clone_format", clone_format, group="rbd_snap")
        self.conf.set_override("operation_timeout", timeout_seconds, group="rbd_snap")
        return conf.Settings.read(self.conf)

    def connect(self, settings: conf.Settings) -> LibrbdCluster:
        """A connection as an engine's."""
        made = LibrbdCluster(
            conf=settings.ceph_conf,
            user=settings.ceph_user,
            timeout_seconds=settings.operation_timeout,
            clone_format=settings.clone_format,
        )
        self._connections.add(made)
        return made

    def _disconnect(self) -> None:
        """Of connections that are alive as Python ends the threads may be aborted, and the tests' process with them."""
        for connection in list(self._connections):
            connection._rados.shutdown()

    def engine(self, *, host: str = "functional", life: str = "life-1", clone_format: int = 2) -> Engine:
        """A new engine of *host*, as nova-compute's configuration makes it.

        :param life: of nova-compute.
        """
        settings = self.settings(clone_format)
        return self.engine_with(settings, host=host, life=life, connect=lambda: self.connect(settings))

    def engine_with(
        self, settings: conf.Settings, *, host: str, life: str, cloud: Optional[str] = None, **more: Any
    ) -> Engine:
        """An engine with such *settings*."""
        return Engine(settings, self.owner(host, life, cloud), images=self.asked_as_service(), **more)

    def asked_as_service(self) -> registration.Images:
        """Glance, as engines and workers ask it."""
        return registration.Images(lambda: self.service, TIMEOUT_SECONDS)

    def owner(self, host: str, life: str, cloud: Optional[str] = None) -> Callable[[str], Owner]:
        """Who owns the jobs of a client, given its address.

        :param cloud: the lab's nova-compute, where nothing is said, which may do the jobs, too.
        """
        return functools.partial(Owner, host, "machine", life, cloud=conf.cloud(self.conf) if cloud is None else cloud)

    def clone(self, engine: Engine, disk: str, image_id: str) -> str:
        """The clone, ready to be registered; returns its location."""
        return clone.make(
            engine,
            image_id,
            disk,
            self.images,
            lambda job_id: engine.perform(job_id, None, unheard),
        )

    def new_disk(self, size_bytes: int = DISK_BYTES) -> str:
        """A server's disk with random data."""
        name = f"{uuid.uuid4()}_disk"
        rbd.RBD().create(self.ioctx[self.vms], name, size_bytes)
        with rbd.Image(self.ioctx[self.vms], name) as disk:
            for offset in range(0, size_bytes, 4 * MIB):
                disk.write(random.randbytes(64 * 1024), offset)
        return name

    def new_record(self, disk: str) -> str:
        """An image record of the tenant's that waits for data, as Nova makes it for a snapshot of the disk's server."""
        record = {"name": "functional", "visibility": "private", "instance_uuid": disk.partition("_")[0]}
        answer = self.tenant._call("POST", "/v2/images", json=record)
        return str(answer.json()["id"])

    def tenant_through(self, endpoint: str) -> Glance:
        """The tenant, with Glance at *endpoint*, who soon loses patience."""
        configured = self.conf.glance.endpoint_override
        self.conf.set_override("endpoint_override", endpoint, group="glance")
        try:
            return Glance.connect(self.conf, self._tenants_auth(trusted=True), HURRIED_SECONDS)
        finally:
            self.conf.set_override("endpoint_override", configured, group="glance")

    def through_proxy(self) -> Glance:
        return self.tenant_through(f"http://127.0.0.1:{PROXY_PORT}")

    def register(self, engine: Engine, as_user: Glance, image_id: str, url: str) -> None:
        prepare = registration.preparation(as_user, image_id, registration.RAW, timeout_seconds=HURRIED_SECONDS)
        clone.register(engine, as_user, image_id, url, prepare, timeout_seconds=HURRIED_SECONDS, report=unheard)

    def delete_image(self, image_id: str) -> None:
        delete(self.service, image_id)

    def remove_whole(self, pool: str, name: str) -> None:
        """Remove an rbd image with its snapshots, whatever is left of it."""
        with contextlib.suppress(rbd.Error), rbd.Image(self.ioctx[pool], name) as image:
            for snap in list(image.list_snaps()):
                if snap["namespace"] == rbd.RBD_SNAP_NAMESPACE_TYPE_USER and image.is_protected_snap(snap["name"]):
                    image.unprotect_snap(snap["name"])
                image.remove_snap_by_id(snap["id"])
        with contextlib.suppress(rbd.Error):
            rbd.RBD().remove(self.ioctx[pool], name)

    def forget_jobs(self, *job_ids: str) -> None:
        """Remove what a failed test left in the ledger."""
        for key, text in self.cluster.omap_items(self.vms, OBJECT).items():
            if key in job_ids:
                self.cluster.omap_replace(self.vms, OBJECT, key, text, None)

    # -- what administrators do ----------------------------------------------------------------------------------

    def tell_monitor(self, prefix: str, **arguments: Any) -> Any:
        """A command's answer."""
        command = json.dumps({"prefix": prefix, "format": "json", **arguments})
        code, answer, text = self.rados.mon_command(command, b"")
        assert code == 0, f"{command}: {code} {text}"
        return json.loads(answer) if answer else None

    def caps(self, user: str) -> dict[str, str]:
        (found,) = self.tell_monitor("auth get", entity=user)
        return dict(found["caps"])

    def set_caps(self, user: str, caps: dict[str, str]) -> None:
        self.tell_monitor("auth caps", entity=user, caps=[text for pair in caps.items() for text in pair])

    def set_quota(self, pool: str, objects: int) -> None:
        """Let *pool* be full with so many objects, 0 for no limit; returns once it is, or is no more."""
        self.tell_monitor("osd pool set-quota", pool=pool, field="max_objects", val=str(objects))
        eventually(lambda: (pool in self._full_pools()) == bool(objects), f"pool {pool} notices its quota")

    def set_full(self, *, full: bool) -> None:
        """Let the OSDs be full with what is in them, or no more; returns once the pools are."""
        for name, usual in USUAL_RATIOS.items():
            self.tell_monitor(f"osd set-{name}-ratio", ratio=1e-6 if full else usual)
        pools = {self.vms, self.images}
        eventually(lambda: self._full_pools() & pools == (pools if full else set()), "the pools notice it")

    def _full_pools(self) -> set[str]:
        pools = self.tell_monitor("osd dump")["pools"]
        return {found["pool_name"] for found in pools if "full" in found["flags_names"].split(",")}

    # -- what became of it ---------------------------------------------------------------------------------------

    def status(self, image_id: str) -> str:
        return self.service.record(image_id).status

    def is_hashed(self, image_id: str) -> bool:
        return bool(self.service._call("GET", f"/v2/images/{image_id}").json()["os_hash_value"])

    def content(self, pool: str, name: str, snap: Any = None) -> bytes:
        with rbd.Image(self.ioctx[pool], name, snapshot=snap, read_only=True) as image:
            return bytes(image.read(0, image.size()))

    def jobs(self) -> set[str]:
        return set(self.cluster.omap_items(self.vms, OBJECT))

    def picture(self) -> dict[str, Any]:
        """All rbd images of both pools with their snapshots, and the jobs."""
        found: dict[str, Any] = {"jobs": self.jobs()}
        for pool, ioctx in self.ioctx.items():
            for name in rbd.RBD().list(ioctx):
                found[f"{pool}/{name}"] = "half-made"
                with contextlib.suppress(rbd.ImageNotFound), rbd.Image(ioctx, name, read_only=True) as image:
                    found[f"{pool}/{name}"] = [(snap["name"], snap["namespace"]) for snap in image.list_snaps()]
        return found
