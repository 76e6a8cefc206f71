# SPDX-License-Identifier: Apache-2.0
"""One real cloud of the lab, seen from inside its container: to act as its users do, and to look at its whole state.

A test acts on :class:`Cloud` and compares what it sees there: pictures of the pools, bytes of disks and images,
nova-compute's log, what libvirt said of the guest. Everything made here is registered to be removed when it is made.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import threading
import uuid
from collections.abc import Iterator
from typing import Any, Optional

import keystoneauth1.exceptions
import libvirt
import openstack
import rados
import rbd

from tests.trash import trashed
from tests.waiting import eventually

MIB = 1 << 20
GIB = 1 << 30

#: What every server, image and Ceph user made here is called first.
PREFIX = "e2e-"
LEDGER = "nova_rbd_snap.ledger"
LOG = pathlib.Path("/var/log/lab/nova-compute.log")
NOVA_CONF = pathlib.Path("/etc/nova/lab.d/rbd_snap.conf")
GLANCE_CONF = pathlib.Path("/etc/glance/lab.d/e2e.conf")
KEYSTONE_CONF = pathlib.Path("/etc/keystone/keystone.conf.d/e2e.conf")
#: How long a token of :meth:`Cloud.short_tokens` lives.
SHORT_TOKEN_SECONDS = 10
#: What a test may have run as the engine; see ``breakpoints.py``.
_ENGINE_THAT_HOLDS = b"/src/tests/e2e/breakpoints.py"
#: An rbd image's id is as long at least; before it there may be a pool's.
_ID_LENGTH = 10
#: Where Nova's own full copy keeps its file.
SNAPSHOTS = pathlib.Path("/var/lib/nova/snapshots")
#: Of the proxy that tests put between nova-compute and Glance.
PROXY_PORT = 9393

Options = dict[str, dict[str, Any]]

#: The lines that switch us on, and what every test of ours would wait for without.
SWITCHED_ON: Options = {
    "DEFAULT": {
        "compute_driver": "rbd_snap.LibvirtDriver",
        # The guests halt at once and do not hear ACPI.
        "shutdown_timeout": 0,
        # Nova's own copy may run beside others.
        "max_concurrent_snapshots": 5,
    },
    "rbd_snap": {"reclaim_interval": 3},
}

#: What puts the proxy of ``glance_proxy.py`` between nova-compute and Glance.
THROUGH_PROXY: Options = {"glance": {"endpoint_override": f"http://127.0.0.1:{PROXY_PORT}"}}

#: A quick Glance: it neither reads what it was given a location of, nor writes the zeros of an upload.
QUICK_GLANCE: Options = {
    "DEFAULT": {"do_secure_hash": "false"},
    "ceph": {"rbd_thin_provisioning": "true"},
    "ec": {"rbd_thin_provisioning": "true"},
}


def merged(*options: Options) -> Options:
    """One set of options; a later value of the same name wins."""
    result: Options = {}
    for part in options:
        for group, values in part.items():
            result.setdefault(group, {}).update(values)
    return result


def run(*command: str) -> str:
    """What a command prints."""
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


class Log:
    """What nova-compute, and with it the engine, wrote since this was made."""

    def __init__(self) -> None:
        self._start = LOG.stat().st_size

    def lines(self, pattern: str = "") -> list[str]:
        with LOG.open("rb") as file:
            file.seek(self._start)
            text = file.read().decode(errors="replace")
        return [line for line in text.splitlines() if re.search(pattern, line)]

    def has(self, pattern: str, seconds: float = 60) -> str:
        """The first line that matches, waited for."""
        found = eventually(lambda: self.lines(pattern), f"a line {pattern!r} in nova-compute's log", seconds)
        return str(found[0])

    def ours(self) -> list[str]:
        """The warnings and errors of this project."""
        return self.lines(r" (WARNING|ERROR) nova_rbd_snap")


class Guests:
    """Libvirt's account of what happened to the guests."""

    _INTERRUPTED = (libvirt.VIR_DOMAIN_EVENT_SUSPENDED, libvirt.VIR_DOMAIN_EVENT_STOPPED)

    def __init__(self) -> None:
        self._events: list[tuple[str, int]] = []
        libvirt.virEventRegisterDefaultImpl()
        threading.Thread(target=self._loop, daemon=True).start()
        self._open: Any = None

    @property
    def connection(self) -> Any:
        """To libvirtd, made anew where that was restarted."""
        if self._open is None or not self._open.isAlive():
            self._open = libvirt.openReadOnly("qemu:///system")
            self._open.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._on_event, None)
        return self._open

    @staticmethod
    def _loop() -> None:
        while True:
            libvirt.virEventRunDefaultImpl()

    def _on_event(self, _connection: Any, domain: Any, event: int, _detail: int, _opaque: Any) -> None:
        self._events.append((domain.UUIDString(), event))

    def interruptions(self, server_id: str) -> int:
        """How often the guest was suspended or stopped so far."""
        assert self.connection
        return sum(guest == server_id and event in self._INTERRUPTED for guest, event in list(self._events))

    def state(self, server_id: str) -> int:
        return int(self.connection.lookupByUUIDString(server_id).state()[0])


class Ceph:
    """The cluster as its administrator sees it."""

    def __init__(self) -> None:
        self.rados = rados.Rados(
            rados_id="admin", conffile="/etc/ceph/ceph.conf", conf={"rados_osd_op_timeout": "120"}
        )
        self.rados.connect()
        self.fsid = self.rados.get_fsid()

    @contextlib.contextmanager
    def pool(self, name: str) -> Iterator[Any]:
        ioctx = self.rados.open_ioctx(name)
        try:
            yield ioctx
        finally:
            ioctx.close()

    @contextlib.contextmanager
    def image(self, pool: str, name: str, snap: Optional[str] = None) -> Iterator[Any]:
        with self.pool(pool) as ioctx, rbd.Image(ioctx, name, snapshot=snap, read_only=snap is not None) as opened:
            yield opened

    def ledger(self, pool: str) -> dict[str, str]:
        """The ledger's records as they stand."""
        with self.pool(pool) as ioctx, rados.ReadOpCtx() as operation:
            pairs, _ = ioctx.get_omap_vals(operation, "", "", 1000)
            try:
                ioctx.operate_read_op(operation, LEDGER)
            except rados.ObjectNotFound:
                return {}
            return {key: value.decode() for key, value in pairs}

    def picture(self, *pools: str) -> dict[str, Any]:
        """All that is in *pools*: rbd images with snapshots and parents, the trash, the ledger, and stray objects."""
        return {pool: self._pool_picture(pool) for pool in pools}

    def _pool_picture(self, pool: str) -> dict[str, Any]:
        with self.pool(pool) as ioctx:
            return {
                "rbd images": {name: self.about(pool, name) for name in rbd.RBD().list(ioctx)},
                "trash": sorted(entry.name for entry in trashed(ioctx)),
                "ledger": self.ledger(pool),
                "ids": sorted({found for obj in ioctx.list_objects() if (found := self._whose(obj.key))}),
            }

    @staticmethod
    def _whose(name: str) -> str:
        """The id of the rbd image, and of the snapshot if it is a snapshot's, that the object *name* belongs to."""
        kind, *parts = name.split(".")
        if kind == "rbd_object_map":
            return ".".join(parts)
        if kind in ("rbd_data", "rbd_header", "journal"):
            return next((part for part in parts if len(part) >= _ID_LENGTH), "")
        return ""

    def about(self, pool: str, name: str) -> Any:
        """One rbd image: id, snapshots with the trashed ones, and parent."""
        try:
            with self.image(pool, name) as opened:
                return {
                    "id": opened.id(),
                    "snapshots": [(s["name"], s["namespace"]) for s in opened.list_snaps()],
                    "parent": self.parent(opened),
                }
        except rbd.ImageNotFound:
            return "cannot be opened"

    @staticmethod
    def parent(opened: Any) -> Optional[str]:
        try:
            return "/".join(opened.parent_info()[:2])
        except rbd.ImageNotFound:
            return None

    def digest(self, pool: str, name: str, snap: Optional[str] = None) -> str:
        """Of size and content; what was never written counts as the zeros it reads as."""
        chunk = 4 * MIB
        with self.image(pool, name, snap) as opened:
            size, touched = opened.size(), set()

            def note(offset: int, length: int, _exists: bool) -> None:
                touched.update(range(offset // chunk, (offset + length - 1) // chunk + 1))

            opened.diff_iterate(0, size, None, note, include_parent=True, whole_object=True)
            digest = hashlib.sha256(str(size).encode())
            for index in sorted(touched):
                data = opened.read(index * chunk, min(chunk, size - index * chunk))
                if data.strip(b"\0"):
                    digest.update(b"%d:" % index + data)
            return digest.hexdigest()

    def undo_by_hand(self, pool: str, job_id: str) -> None:
        """What an operator does with a job that stays in the ledger: remove what its record names, then the record."""
        job = json.loads(self.ledger(pool)[job_id])
        if job.get("dest"):
            with self.pool(job["dest"]["pool"]) as ioctx:
                eventually(lambda: self._removed(ioctx, job_id), "the clone can be removed", 60)
        with contextlib.suppress(rbd.ImageNotFound), self.image(pool, job["disk"]["name"]) as disk:
            self._remove_snaps(disk)
        with self.pool(pool) as ioctx, rados.WriteOpCtx() as operation:
            ioctx.remove_omap_keys(operation, (job_id,))
            ioctx.operate_write_op(operation, LEDGER)

    def let_a_day_pass(self, pool: str) -> None:
        """For the jobs in the ledger that wait for whoever may still read an image from before it was flat."""
        with self.pool(pool) as ioctx:
            for key, text in self.ledger(pool).items():
                job = json.loads(text)
                if "flat_at" in job:
                    job.update(flat_at=job["flat_at"] - 25 * 3600, not_before=0.0)
                    with rados.WriteOpCtx() as operation:
                        ioctx.set_omap(operation, (key,), (json.dumps(job, sort_keys=True),))
                        ioctx.operate_write_op(operation, LEDGER)

    @staticmethod
    def _remove_snaps(opened: Any) -> None:
        for snap in opened.list_snaps():
            if opened.is_protected_snap(snap["name"]):
                opened.unprotect_snap(snap["name"])
            opened.remove_snap_by_id(snap["id"])

    def _removed(self, ioctx: Any, name: str) -> bool:
        with contextlib.suppress(rbd.ImageNotFound):
            try:
                with rbd.Image(ioctx, name) as opened:
                    self._remove_snaps(opened)
                rbd.RBD().remove(ioctx, name)
            except rbd.ImageBusy:
                return False
        return True

    def stop_mirroring(self, pool: str, name: str) -> None:
        with self.pool(pool) as ioctx:
            with rbd.Image(ioctx, name) as opened:
                opened.mirror_image_disable(True)
            rbd.RBD().mirror_mode_set(ioctx, rbd.RBD_MIRROR_MODE_DISABLED)

    def set_caps(self, user: str, **caps: str) -> None:
        run("ceph", "auth", "caps", f"client.{user}", *(part for pair in caps.items() for part in pair))

    def caps(self, user: str) -> dict[str, str]:
        text = run("ceph", "auth", "get", f"client.{user}")
        return dict(re.findall(r'caps (\w+) = "(.*)"', text))


class Cloud:
    """See the module."""

    def __init__(self) -> None:
        self.release = os.environ["CLOUD"]
        self.vms, self.images, self.images_ec = f"vms-{self.release}", f"images-{self.release}", "images-ec"
        self.demo, self.admin = openstack.connect(cloud="demo"), openstack.connect(cloud="admin")
        self.ceph, self.guests = Ceph(), Guests()
        self.clean_up = contextlib.ExitStack()
        self._standing: Any = None

    # -- configuration ----------------------------------------------------------------------------------------------

    def configure(self, *options: Options) -> Log:
        """Make nova-compute run with *options* besides the switch; it is restarted only when that changes them.

        :returns: its log since before it was restarted.
        """
        log = Log()
        if self.write_configuration(*options):
            self.restart_nova_compute()
        return log

    def write_configuration(self, *options: Options) -> bool:
        """What :meth:`configure` has nova-compute read when it starts; whether that is something else than before."""
        return self._write(NOVA_CONF, merged(SWITCHED_ON, *options))

    def restart_nova_compute(self) -> None:
        log = Log()
        run("supervisorctl", "restart", "nova-compute")
        self.nova_compute_is_back(log)

    def nova_compute_is_back(self, log: Log) -> None:
        """Wait until a nova-compute that started since *log* does what it is asked to.

        Sooner, it takes a server that is about to be built for one whose building was interrupted.
        """
        log.has("Looking for unclaimed instances")
        eventually(self.nova_compute_answers, "nova-compute answers")

    def nova_compute_answers(self) -> bool:
        """Whether nova-compute answers a question that nobody else can."""
        uptime = f"/os-hypervisors/{self._hypervisor}/uptime"
        return bool(self.admin.compute.get(uptime, microversion="2.53").ok)

    def nova_compute_takes_servers(self) -> bool:
        """Whether the scheduler may choose it: Nova disables a nova-compute that has lost libvirt."""
        (service,) = self.admin.compute.services(binary="nova-compute")
        return bool(service.status == "enabled")

    @functools.cached_property
    def _hypervisor(self) -> str:
        (host,) = self.admin.compute.get("/os-hypervisors", microversion="2.53").json()["hypervisors"]
        return str(host["id"])

    def configure_glance(self, *options: Options) -> None:
        if self._write(GLANCE_CONF, merged(QUICK_GLANCE, *options)):
            self.restart_glance()

    def restart_glance(self) -> None:
        """What its Ceph user may do is settled when it connects, too."""
        run("supervisorctl", "restart", "glance-api")
        self.wait_for_glance()

    def wait_for_glance(self) -> None:
        def answers() -> bool:
            with contextlib.suppress(OSError, openstack.exceptions.SDKException):
                return next(iter(self.admin.image.images(limit=1)), None) is not None
            return False

        eventually(answers, "Glance answers")

    @contextlib.contextmanager
    def short_tokens(self) -> Iterator[None]:
        """Tokens that are issued within the block live for :data:`SHORT_TOKEN_SECONDS`."""
        KEYSTONE_CONF.parent.mkdir(exist_ok=True)
        self._write(KEYSTONE_CONF, {"token": {"expiration": SHORT_TOKEN_SECONDS}})
        self._restart_keystone()
        ours = self.demo
        self.demo = openstack.connect(cloud="demo")
        try:
            yield
        finally:
            self.demo = ours
            KEYSTONE_CONF.unlink()
            self._restart_keystone()

    def _restart_keystone(self) -> None:
        run("supervisorctl", "restart", "keystone")

        def answers() -> bool:
            with contextlib.suppress(openstack.exceptions.SDKException, keystoneauth1.exceptions.ClientException):
                return bool(openstack.connect(cloud="demo").authorize())
            return False

        eventually(answers, "Keystone answers")

    @staticmethod
    def _write(path: pathlib.Path, options: Options) -> bool:
        lines = []
        for group, values in options.items():
            lines += [f"[{group}]", *(f"{name} = {value}" for name, value in values.items())]
        text = "".join(line + "\n" for line in lines)
        if path.exists() and path.read_text() == text:
            return False
        path.write_text(text)
        return True

    # -- what there is ----------------------------------------------------------------------------------------------

    def picture(self) -> dict[str, Any]:
        """All of the cloud's pools; the data pool of the erasure-coded one has objects only."""
        return self.ceph.picture(self.vms, self.images, self.images_ec)

    def unchanged(self, before: dict[str, Any], seconds: float = 30) -> None:
        """The pools look as in the picture *before*, at the latest after a while."""
        try:
            eventually(lambda: self.picture() == before, "the pools look as before", seconds, pause=0.3)
        except AssertionError:
            assert self.picture() == before

    @staticmethod
    def command(*words: str) -> list[dict[str, Any]]:
        """What ``nova-rbd-snap`` prints, read from its JSON."""
        conf = ("--config-file", "/etc/nova/nova.conf", "--config-dir", str(NOVA_CONF.parent))
        text = run("env", "PYTHONPATH=/src", "python3", "-m", "nova_rbd_snap.cli", *conf, *words, "-f", "json")
        return list(json.loads(text))

    def forget_jobs(self) -> None:
        """Undo by hand what a failed test left, that it may not fail those after it."""
        for job_id in self.ceph.ledger(self.vms):
            self.ceph.undo_by_hand(self.vms, job_id)

    def server(self, server: Any) -> Any:
        return self.admin.compute.get_server(server.id)

    def image(self, image_id: str) -> Any:
        """The image record, None where there is none."""
        try:
            image = self.admin.image.get_image(image_id)
        except openstack.exceptions.NotFoundException:
            return None
        return None if image.status == "deleted" else image

    def record(self, image_id: str) -> dict[str, Any]:
        """The image record as Glance sends it."""
        return dict(self.admin.image.get(f"/images/{image_id}").json())

    def image_called(self, name: str) -> Any:
        return next((image for image in self.admin.image.images() if image.name == name), None)

    def disk_digest(self, server: Any) -> str:
        return self.ceph.digest(self.vms, f"{server.id}_disk")

    def image_digest(self, image_id: str, pool: Optional[str] = None) -> str:
        return self.ceph.digest(pool or self.images, image_id, "snap")

    @staticmethod
    def local_copies() -> list[pathlib.Path]:
        """What Nova's own full copy keeps on the local disk."""
        return list(SNAPSHOTS.iterdir())

    @functools.cached_property
    def _flavors(self) -> dict[str, str]:
        return {flavor.name: flavor.id for flavor in self.admin.compute.flavors()}

    # -- processes --------------------------------------------------------------------------------------------------

    @property
    def nova_compute(self) -> int:
        return int(run("supervisorctl", "pid", "nova-compute"))

    def engines(self) -> list[int]:
        """The process ids of all engines, whoever's children they are."""
        found = []
        for entry in pathlib.Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if b"nova_rbd_snap.engine" in words or _ENGINE_THAT_HOLDS in words:
                    found.append(int(entry.name))
        return found

    def kill_engine(self, number: int = signal.SIGKILL) -> int:
        (engine,) = self.engines()
        os.kill(engine, number)
        return engine

    @staticmethod
    def rados_clients(pid: int) -> int:
        """How many librados clients live in a process: each holds one connection to the monitor."""
        sockets = set()
        for entry in pathlib.Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if found := re.match(r"socket:\[(\d+)\]", os.readlink(entry)):
                    sockets.add(found[1])
        count = 0
        for line in pathlib.Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            remote_port = int(fields[2].rsplit(":")[1], 16)
            count += remote_port in (3300, 6789) and fields[3] == "01" and fields[9] in sockets
        return count

    @contextlib.contextmanager
    def stand_in_driver(self, name: str, text: str) -> Iterator[Options]:
        """Meanwhile Nova has a driver *name* of that *text*; what switches it on."""
        package = self.nova_folder("nova.virt") / name
        package.mkdir()
        try:
            (package / "__init__.py").write_text(text)
            yield {"DEFAULT": {"compute_driver": f"{name}.LibvirtDriver"}}
            self.configure()
        finally:
            shutil.rmtree(package)

    def nova_folder(self, package: str) -> pathlib.Path:
        """Where *package* of the Nova lies that nova-compute runs."""
        python = pathlib.Path(f"/proc/{self.nova_compute}/cmdline").read_text().split("\0")[0]
        return pathlib.Path(run(python, "-c", f"import {package}; print({package}.__path__[0])").strip())

    # -- servers and images -----------------------------------------------------------------------------------------

    def boot(self, image: str = "base", name: str = "", data: bool = True) -> Any:
        """An active server without network, with known *data* on its disk."""
        image_id = image if len(image) == 36 else self.image_called(image).id
        server = self.demo.compute.create_server(
            name=name or PREFIX + uuid.uuid4().hex[:8], image_id=image_id, flavor_id=self._flavors["tiny"],
            networks="none",
        )
        self.clean_up.callback(self.delete_server, server)
        server = self.wait_for_status(server, "ACTIVE")
        if data:
            self.write(server, 8)
        return server

    def boot_flat(self) -> Any:
        """As :meth:`boot`; the disk's link to its base image is cut."""
        server = self.boot()
        with self.ceph.image(self.vms, f"{server.id}_disk") as disk:
            disk.flatten()
        return server

    def write(self, server: Any, pieces: int, *, size: int = MIB, step: int = MIB) -> None:
        """Write pieces of known data to the server's disk, each *step* after the last; not to its boot sector."""
        with self.ceph.image(self.vms, f"{server.id}_disk") as disk:
            block = random.Random(server.id).randbytes(size)
            for index in range(pieces):
                disk.write(index.to_bytes(8, "big") + block[8:], MIB + index * step)

    def standing_server(self) -> Any:
        """The server of all tests that leave theirs as it was; its disk has a little data in nearly every object."""
        found = self._standing and self.admin.compute.find_server(self._standing.id, all_projects=True)
        if found and found.status == "ACTIVE" and not found.task_state:
            return self._standing
        self._standing = self.boot(data=False)
        self.write(self._standing, 250, size=64 * 1024, step=4 * MIB)
        return self._standing

    def wait_for_status(self, server: Any, status: str, seconds: float = 90) -> Any:
        def reached() -> Any:
            now = self.server(server)
            assert now.status in (status, server.status) or now.status != "ERROR", now.fault
            return now if now.status == status and now.task_state is None else None

        return eventually(reached, f"server {server.id} {status}", seconds)

    def delete_server(self, server: Any) -> None:
        """Delete the server and wait until it and its disk are gone."""
        with contextlib.suppress(openstack.exceptions.NotFoundException):
            self.admin.compute.delete_server(server.id, force=False)
        eventually(lambda: self.is_gone(server), f"server {server.id} is gone", 90)

    def is_gone(self, server: Any) -> bool:
        try:
            self.server(server)
        except openstack.exceptions.NotFoundException:
            return True
        return False

    @contextlib.contextmanager
    def image_elsewhere(self, name: str) -> Iterator[None]:
        """Meanwhile the image *name* has a location in another cluster; Glance itself would not take such a one."""
        image_id, elsewhere = self.image_called(name).id, str(uuid.uuid4())

        def replace(old: str, new: str) -> None:
            change = f"value = REPLACE(value, '{old}', '{new}')"
            run("mariadb", "glance", "-e", f"UPDATE image_locations SET {change} WHERE image_id = '{image_id}'")

        replace(self.ceph.fsid, elsewhere)
        try:
            yield
        finally:
            replace(elsewhere, self.ceph.fsid)

    def delete_image(self, image_id: str) -> None:
        """Delete the image; Glance refuses that while it still reads the image to hash it."""

        def deleted() -> bool:
            try:
                self.admin.image.delete_image(image_id, ignore_missing=True)
            except openstack.exceptions.HttpException as error:
                # Glance 33 answers 500 at the moment when it has done with hashing.
                if error.status_code not in (409, 500):
                    raise
                return False
            return True

        eventually(deleted, f"image {image_id} can be deleted", pause=0.5)

    def request(self, server: Any, name: str = "") -> str:
        """Ask for a snapshot as the tenant; returns the image's id at once."""
        image = self.demo.compute.create_server_image(server, name or PREFIX + uuid.uuid4().hex[:8])
        self.clean_up.callback(self.delete_image, image.id)
        return str(image.id)

    def settled(self, server: Any, seconds: float = 120) -> Any:
        """The server once no task is under way on it."""

        def free() -> Any:
            now = self.server(server)
            return now if now.task_state is None else None

        return eventually(free, f"no task on server {server.id}", seconds)

    def snapshot(self, server: Any, name: str = "", seconds: float = 120) -> Any:
        """The image that a snapshot of the server ended in, active; the server is as before."""
        image_id = self.request(server, name)
        assert self.settled(server, seconds).status == server.status
        image = self.image(image_id)
        assert image is not None, f"image {image_id} is gone"
        assert image.status == "active"
        return image

    def failed_snapshot(self, server: Any, image_id: str, seconds: float = 120) -> None:
        """The request ended in a clean failure: no task, the server in its state, and no image record."""
        assert self.settled(server, seconds).status == server.status
        eventually(lambda: self.image(image_id) is None, f"image {image_id} is deleted", 20)

    def resize(self, server: Any, flavor: str) -> None:
        """Up to where it is to be confirmed or reverted."""
        self.admin.compute.resize_server(server, self._flavors[flavor])
        self.wait_for_status(server, "VERIFY_RESIZE")

    def backup(self, server: Any) -> Any:
        name = PREFIX + uuid.uuid4().hex[:8]
        self.demo.compute.backup_server(server, name, "daily", 1)
        return self._image_of(server, name)

    def shelve(self, server: Any) -> Any:
        self.demo.compute.shelve_server(server)
        image = self._image_of(server, f"{server.name}-shelved")
        self.wait_for_status(server, "SHELVED_OFFLOADED")
        return image

    def unshelve(self, server: Any) -> None:
        self.demo.compute.unshelve_server(server)
        self.wait_for_status(server, "ACTIVE")

    def _image_of(self, server: Any, name: str) -> Any:
        image = eventually(lambda: self.image_called(name), f"image {name}")
        self.clean_up.callback(self.delete_image, image.id)
        self.settled(server)
        image = self.image(image.id)
        assert image is not None
        assert image.status == "active"
        return image

    def paused(self, server: Any) -> Any:
        self.demo.compute.pause_server(server)
        return self.wait_for_status(server, "PAUSED")

    def stopped(self, server: Any) -> Any:
        self.demo.compute.stop_server(server)
        return self.wait_for_status(server, "SHUTOFF")

