# SPDX-License-Identifier: Apache-2.0
"""A cloud of the lab from inside its container, as the benchmark and the demo need it.

Times are taken where they cost nothing: the start from nova-compute's log, the rest from the services' databases,
read every few milliseconds. Asking the APIs that often would take a core away from what is measured.
"""

import configparser
import contextlib
import datetime
import os
import pathlib
import re
import shutil
import subprocess
import time
from dataclasses import dataclass

import openstack
import pymysql
import rados
import rbd
from keystoneauth1 import adapter, loading, service_token, session
from keystoneauth1 import exceptions as ksa_exceptions

MIB = 1 << 20
GIB = 1 << 30

LEDGER = "nova_rbd_snap.ledger"
#: Guests begin with a boot sector that halts them; data is written behind it.
DATA_OFFSET_BYTES = 16 * MIB

_NOVA_CONF = pathlib.Path("/etc/nova/lab.d/rbd_snap.conf")
_GLANCE_CONF = pathlib.Path("/etc/glance/lab.d/benchmark.conf")
_LOG = pathlib.Path("/var/log/lab/nova-compute.log")
_PAUSE_SECONDS = 0.005
#: The OSDs' files on the host grow with all that was ever written, and never shrink; the host must not fill up.
_ROOM_BYTES = 12 * GIB


class NotAsAsked(Exception):
    """What was measured is not what should have been."""


def wait_for(condition, what, seconds=300, pause=0.2):
    """What *condition* returns once that is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise NotAsAsked(f"not within {seconds} s: {what}")
        time.sleep(pause)
    return found


def _read(path):
    parsed = configparser.ConfigParser(strict=False, interpolation=None)
    parsed.read(path)
    return parsed


@dataclass(frozen=True)
class Timing:
    """One snapshot.

    :ivar active: seconds from nova-compute's start to the active image.
    :ivar done: seconds until the server takes the next task: nothing is left to do.
    """

    image_id: str
    active: float
    done: float


class Cloud:
    """One cloud, as its tenant ``demo`` and as its operator."""

    def __init__(self):
        self.nova_conf = _read("/etc/nova/nova.conf")
        self.glance_conf = _read("/etc/glance/glance-api.conf")
        self.user = openstack.connect(cloud="demo")
        self.ceph = rados.Rados(
            rados_id="admin", conffile="/etc/ceph/ceph.conf", conf={"rbd_default_clone_format": "2"}
        )
        self.ceph.connect()
        self.vms_pool = self.nova_conf["libvirt"]["images_rbd_pool"]
        self.images_pool = self.glance_conf["ceph"]["rbd_store_pool"]
        self.vms = self.ceph.open_ioctx(self.vms_pool)
        self.images = self.ceph.open_ioctx(self.images_pool)
        self._database = pymysql.connect(unix_socket="/run/mysqld/mysqld.sock", user="root", autocommit=True)

    # -- nova-compute --------------------------------------------------------------------------------------------

    def restart_nova_compute(self, *, enabled, at_once=5, **options):
        """Restart it with our driver, and our way of snapshots on or off.

        :param at_once: how many snapshots; Nova's own default.
        :param options: of ``[rbd_snap]``.
        """
        nova = {"compute_driver": "rbd_snap.LibvirtDriver", "max_concurrent_snapshots": at_once}
        sections = {"DEFAULT": nova, "rbd_snap": {"enabled": enabled, **options}}
        parsed = configparser.ConfigParser()
        parsed.read_dict(sections)
        with _NOVA_CONF.open("w") as file:
            parsed.write(file)
        subprocess.run(["supervisorctl", "restart", "nova-compute"], check=True, stdout=subprocess.DEVNULL)
        reports = "select report_count from nova.services where topic = %s"
        before = self._value(reports, "compute")
        # The first report comes some seconds after all else of its start.
        wait_for(lambda: self._value(reports, "compute") != before, "nova-compute reports to be up", 90)

    @contextlib.contextmanager
    def without_hashes(self):
        """Within the block Glance does not read, and hash, the whole image once it is active."""
        _GLANCE_CONF.write_text("[DEFAULT]\ndo_secure_hash = false\n")
        self._restart_glance()
        try:
            yield
        finally:
            _GLANCE_CONF.unlink()
            self._restart_glance()

    def _restart_glance(self):
        subprocess.run(["supervisorctl", "restart", "glance-api"], check=True, stdout=subprocess.DEVNULL)

        def answers():
            with contextlib.suppress(ksa_exceptions.ClientException):
                return self.glance_as_nova().get("/v2/images").ok

        wait_for(answers, "Glance answers", 60)

    def nova_compute_pid(self):
        return self._pid("nova-compute")

    @staticmethod
    def _pid(service):
        found = subprocess.run(["supervisorctl", "pid", service], check=True, capture_output=True, text=True)
        return int(found.stdout)

    def version(self, service, package):
        """Of *package* in the Python that *service* runs in."""
        python = pathlib.Path(f"/proc/{self._pid(service)}/cmdline").read_text().split("\0")[0]
        code = f"import importlib.metadata; print(importlib.metadata.version('{package}'))"
        return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()

    def log_end(self):
        return _LOG.stat().st_size

    def log_since(self, position):
        with _LOG.open("rb") as file:
            file.seek(position)
            return file.read().decode(errors="replace")

    @staticmethod
    def check_room():
        """:raises NotAsAsked: the host's disk is about to be full, which would break Ceph and more."""
        free = shutil.disk_usage("/").free
        if free < _ROOM_BYTES:
            raise NotAsAsked(f"only {free / GIB:.0f} GiB free on the host; lab/lab down gives back what the OSDs hold")

    # -- servers and their disks ---------------------------------------------------------------------------------

    def boot(self, name, *, flavor="big", image="base"):
        """A running server of the tenant's."""
        image_id, flavor_id = self.user.image.find_image(image).id, self.user.compute.find_flavor(flavor).id
        server = self.user.compute.create_server(name=name, image_id=image_id, flavor_id=flavor_id, networks="none")
        return self.user.compute.wait_for_server(server, wait=300, interval=1).id

    def delete_server(self, server_id):
        """:returns: how many seconds it took."""
        began = time.time()
        self.user.compute.delete_server(server_id, ignore_missing=True)
        return self._moment("select vm_state from nova.instances where uuid = %s", server_id, "deleted") - began

    @staticmethod
    def disk(server_id):
        return f"{server_id}_disk"

    def write(self, server_id, blocks):
        """Write *blocks* one behind the other into the running server's disk."""
        with rbd.Image(self.vms, self.disk(server_id)) as disk:
            offset = DATA_OFFSET_BYTES
            for block in blocks:
                disk.write(block, offset)
                offset += len(block)
            disk.flush()

    # -- snapshots -----------------------------------------------------------------------------------------------

    def snapshot(self, server_id, name, *, on_active=None):
        """Ask Nova for a snapshot and wait until all is done.

        :param on_active: called once the image is active.
        :returns: its timing, and what nova-compute logged meanwhile.
        """
        logged = self.log_end()
        answer = self.user.compute.post(
            f"/servers/{server_id}/action", json={"createImage": {"name": name}}, microversion="2.45"
        )
        image_id = answer.json()["image_id"]
        active = self.wait_until_active(image_id)
        if on_active:
            on_active()
        done = self._moment("select task_state from nova.instances where uuid = %s", server_id, None)
        log = self.log_since(logged)
        began = self._began(log, server_id)
        return Timing(image_id, active - began, done - began), log

    def wait_until_active(self, image_id):
        """When the image became active."""
        return self._moment(
            "select status from glance.images where id = %s", image_id, "active", ("deleted", "killed")
        )

    def _moment(self, query, key, wanted, never=()):
        """When the value that *query* finds became *wanted*."""

        def arrived():
            value = self._value(query, key)
            if value in never:
                raise NotAsAsked(f"{key} is {value} instead of {wanted}")
            return value == wanted

        wait_for(arrived, f"{key} is {wanted}", 600, _PAUSE_SECONDS)
        return time.time()

    def _value(self, query, key):
        with self._database.cursor() as cursor:
            cursor.execute(query, (key,))
            (value,) = cursor.fetchone()
            return value

    @staticmethod
    def _began(log, server_id):
        found = re.search(rf"(\S+ \S+) \d+ INFO nova\.compute\.manager .*{server_id}\] instance snapshotting", log)
        if not found:
            raise NotAsAsked("nova-compute's log does not say when the snapshot began")
        return datetime.datetime.strptime(found[1], "%Y-%m-%d %H:%M:%S.%f").timestamp()

    def image(self, image_id):
        """The image as the API shows it."""
        return self.user.image.get(f"/images/{image_id}").json()

    def settled(self, image_id):
        """Wait until Glance has no work on the image any more, such as hashing its data; returns the image."""
        return wait_for(
            lambda: (image := self.image(image_id)) and not image.get("os_glance_import_task") and image,
            "Glance has done its task",
        )

    def delete_image(self, image_id):
        """Delete the image, once who has it open, as who flattens it has, lets it go."""

        def delete():
            try:
                self.user.image.delete_image(image_id)
            except openstack.exceptions.ConflictException:
                return False
            return True

        self.settled(image_id)
        wait_for(delete, "Glance deletes the image")

    def is_flat(self, image_id):
        with rbd.Image(self.images, image_id, read_only=True) as image:
            try:
                image.parent_info()
            except rbd.ImageNotFound:
                return True
            return False

    def is_locked(self, image_id):
        """Whether a client works on the image's data."""
        with rbd.Image(self.images, image_id, read_only=True) as image:
            return bool(image.list_lockers())

    # -- Ceph ----------------------------------------------------------------------------------------------------

    def picture(self):
        """Everything in both pools and the ledger, as lines."""
        found = set()
        for pool, ioctx in ((self.vms_pool, self.vms), (self.images_pool, self.images)):
            for name in rbd.RBD().list(ioctx):
                found.add(f"{pool}/{name}")
                with contextlib.suppress(rbd.ImageNotFound), rbd.Image(ioctx, name, read_only=True) as image:
                    found.update(f"{pool}/{name}@{self._snap_name(snap)}" for snap in image.list_snaps())
            found.update(f"trash of {pool}: {entry['name']}" for entry in rbd.RBD().trash_list(ioctx))
        return found | {f"ledger: {job}" for job in self._jobs()}

    @staticmethod
    def _snap_name(snap):
        return snap["trash"]["original_name"] + " (trashed)" if "trash" in snap else snap["name"]

    def _jobs(self):
        with rados.ReadOpCtx() as read:
            pairs, _ = self.vms.get_omap_vals(read, "", "", 1000)
            with contextlib.suppress(rados.ObjectNotFound):
                self.vms.operate_read_op(read, LEDGER)
                return [job for job, _ in pairs]
        return []

    def wait_until_trimmed(self):
        """Wait until the OSDs have removed what deleted snapshots held, which would slow down what is measured next."""
        wait_for(lambda: "snaptrim" not in self.ceph_command("pg stat"), "the OSDs have trimmed", pause=1)

    @staticmethod
    def ceph_command(command):
        """The text a command of the ``ceph`` tool prints."""
        return subprocess.run(["ceph", *command.split()], check=True, capture_output=True, text=True).stdout.strip()

    @contextlib.contextmanager
    def readers(self):
        """Within the block Glance may read Nova's pool, as images that are not flat need it."""
        user = f"client.{self.vms_pool.replace('vms', 'glance')}"
        text = self.ceph_command(f"auth get {user}")
        before = re.findall(r'caps (\w+) = "(.*)"', text)
        reads = f", profile rbd-read-only pool={self.vms_pool}"
        self._set_caps(user, [(name, value + (reads if name == "osd" else "")) for name, value in before])
        self._restart_glance()
        try:
            yield
        finally:
            self._set_caps(user, before)
            self._restart_glance()

    @staticmethod
    def _set_caps(user, caps):
        words = [word for pair in caps for word in pair]
        subprocess.run(["ceph", "auth", "caps", user, *words], check=True, capture_output=True)

    @contextlib.contextmanager
    def proposing_every(self, seconds):
        """Within the block the monitors take so long between two proposals at least."""
        self.ceph_command(f"config set mon paxos_propose_interval {seconds}")
        try:
            yield
        finally:
            self.ceph_command("config rm mon paxos_propose_interval")

    @contextlib.contextmanager
    def flavor(self, name, gigabytes):
        """Within the block there is a flavor with a disk of that size."""
        admin = openstack.connect(cloud="admin")
        flavor = admin.compute.create_flavor(name=name, ram=128, vcpus=1, disk=gigabytes)
        try:
            yield
        finally:
            admin.compute.delete_flavor(flavor)

    @staticmethod
    def purge():
        """Clear away what deleted images that were not flat have left."""
        command = ["python3", "-m", "nova_rbd_snap.cli", "--config-file", "/etc/nova/nova.conf", "trash", "purge"]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": "/src"})

    # -- Glance as Nova talks to it ------------------------------------------------------------------------------

    def glance_as_nova(self):
        """An adapter with the tenant's token and Nova's service token."""
        section = self.nova_conf["service_user"]
        plugin = loading.get_plugin_loader(section["auth_type"])
        names = {option.dest for option in plugin.get_options()}
        service = plugin.load_from_options(**{name: value for name, value in section.items() if name in names})
        auth = service_token.ServiceTokenAuthWrapper(user_auth=self.user.session.auth, service_auth=service)
        return adapter.Adapter(
            session.Session(), auth=auth, endpoint_override=self.nova_conf["glance"]["endpoint_override"]
        )
