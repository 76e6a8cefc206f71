# SPDX-License-Identifier: Apache-2.0
"""What the tests of ours look at: a server on Nova's fake libvirt, and a cluster and Glance held in memory.

Whatever stands for something real behaves like it: a suspended guest is off, a frozen one stays frozen until somebody
thaws it, the engine undoes its own failures. A test breaks one thing by putting another callable in its place.
"""

# ruff: noqa: PT009 - Nova's harness is unittest, and its environments have no pytest

import itertools
import pathlib
import threading
from unittest import mock

import fixtures
from lxml import etree
from nova import exception, objects
from nova.compute import utils as compute_utils
from nova.network import model as network_model
from nova.storage import rbd_utils
from nova.tests.fixtures import libvirt as fakelibvirt
from nova.tests.unit.virt.libvirt import test_driver
from nova.virt import fake
from nova.virt import images as nova_images
from nova.virt.libvirt import host
from nova.virt.libvirt import imagebackend as nova_imagebackend
from oslo_utils.fixture import uuidsentinel

from nova_rbd_snap import errors
from nova_rbd_snap.engine import copying
from nova_rbd_snap.ledger.job import SNAP_PREFIX
from nova_rbd_snap.ledger.store import Ledger
from nova_rbd_snap.openstack import driver, glance, images, process
from nova_rbd_snap.specs import ImageSpec
from tests.fakes.cluster import FakeCluster
from tests.fakes.engine import FakeUploads, make_engine
from tests.waiting import eventually

NOVA_POOL = "nova-pool"
GLANCE_POOL = "glance-pool"
FSID = FakeCluster().fsid()
#: What servers are made of.
BASE = ImageSpec(GLANCE_POOL, "base").snap("snap")

#: Longer than any test waits for what will happen; one that waits so long fails.
PATIENCE_SECONDS = 30

#: PCI devices of the server: one its flavor asks for, and a port that is a whole network card.
GPU = "0000:81:00.1"
PORT = "0000:82:00.0"


def failing(error):
    """What raises *error* whenever it is called."""
    return mock.Mock(side_effect=error)


def libvirt_error(text, code=fakelibvirt.VIR_ERR_INTERNAL_ERROR, source=fakelibvirt.VIR_FROM_QEMU):
    """:param source: the part of libvirt that says so, its error domain."""
    return fakelibvirt.make_libvirtError(fakelibvirt.libvirtError, text, error_code=code, error_domain=source)


def crossed(*groups):
    """Rows for ``ddt.named_data``: each combination of functions or words, called after these."""
    rows = itertools.product(*groups)
    return [(" ".join(getattr(item, "__name__", item) for item in row), *row) for row in rows]


class Silence:
    """What does not answer, until the test ends it, or is over.

    :ivar begun: set once somebody waits for an answer.
    """

    def __init__(self, case):
        self.begun = threading.Event()
        self._over = threading.Event()
        case.addCleanup(self.end)

    def __call__(self, *_):
        self.begun.set()
        self._over.wait(PATIENCE_SECONDS)

    def end(self):
        self._over.set()


class Clock:
    """Stands for the module ``time``: it passes while somebody sleeps, and only then."""

    def __init__(self):
        self.now = 0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class Beside:
    """A call that runs beside the test."""

    def __init__(self, call):
        self._call = call
        self._error = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        try:
            self._call()
        except Exception as error:
            self._error = error

    def end(self):
        """Wait for its end; raises what it raised."""
        self._thread.join(PATIENCE_SECONDS)
        assert not self._thread.is_alive(), "it does not end"
        if self._error:
            raise self._error


class Domain(test_driver.FakeVirtDomain):
    """A domain that has a state: a QEMU that is on or off, PCI devices, and an agent in the guest.

    :ivar state: libvirt's.
    :ivar devices: addresses of its PCI devices, as often as each is attached.
    :ivar encrypted: whether libvirt encrypts the disk.
    :ivar file: path of a qcow2 file that the disk is in, if it is in one.
    :ivar suspensions: how often its QEMU was ended to save the guest.
    :ivar frozen: whether the guest's file systems are held still; *freezes* and *thaws* count the changes.
    :ivar agent_patience: how long libvirt gives the agent to answer.
    """

    def __init__(self, uuid, devices=()):
        super().__init__(uuidstr=uuid)
        self.state = fakelibvirt.VIR_DOMAIN_RUNNING
        self.devices = list(devices)
        self.encrypted = False
        self.file = None
        self.suspensions = 0
        self.frozen = False
        self.freezes = self.thaws = 0
        self.agent_patience = -2  # libvirt's default: as long as it takes
        self._saved = None
        self._changed = threading.Condition()

    def picture(self):
        """What the tenant would notice."""
        return {"state": self.state, "devices": sorted(self.devices), "frozen": self.frozen}

    def until(self, condition):
        """Whether *condition* came true; asked anew at each change of the guest's stillness."""
        with self._changed:
            return self._changed.wait_for(condition, PATIENCE_SECONDS)

    def info(self):
        return [self.state, 0, 0, 1, 0]

    def XMLDesc(self, flags):
        encryption = "<encryption format='luks'/>" if self.encrypted else ""
        source = f"<source protocol='rbd' name='{NOVA_POOL}/{self.uuidstr}_disk'>{encryption}</source>"
        if self.file:
            source = f"<driver name='qemu' type='qcow2'/><source file='{self.file}'>{encryption}</source>"
        return f"""
            <domain type='kvm'><devices>
                <disk type='{"file" if self.file else "network"}' device='disk'>
                    {source}
                    <target dev='vda' bus='virtio'/>
                </disk>
                {"".join(map(_hostdev, self.devices))}
            </devices></domain>"""

    def managedSave(self, flags):
        self._saved, self.state = self.state, fakelibvirt.VIR_DOMAIN_SHUTOFF
        self.suspensions += 1

    def createWithFlags(self, flags):
        if self.state != fakelibvirt.VIR_DOMAIN_SHUTOFF:
            raise libvirt_error("domain is already running")
        paused = flags & fakelibvirt.VIR_DOMAIN_START_PAUSED
        self.state = fakelibvirt.VIR_DOMAIN_PAUSED if paused else self._saved

    def attachDeviceFlags(self, xml, flags):
        self.devices.append(_address(etree.fromstring(xml)))

    def detachDeviceFlags(self, xml, flags):
        self.devices.remove(_address(etree.fromstring(xml)))

    def blockStats(self, device):
        return [2, 10000242400, 234, 2343424234, 34]

    def agentSetResponseTimeout(self, seconds, flags=0):
        with self._changed:
            self.agent_patience = seconds
            self._changed.notify_all()

    def fsFreeze(self):
        with self._changed:
            self.frozen = True
            self.freezes += 1
            self._changed.notify_all()

    def fsThaw(self):
        with self._changed:
            self.frozen = False
            self.thaws += 1
            self._changed.notify_all()


def _hostdev(address):
    domain, bus, rest = address.split(":")
    slot, function = rest.split(".")
    source = f"<address domain='0x{domain}' bus='0x{bus}' slot='0x{slot}' function='0x{function}'/>"
    return f"<hostdev mode='subsystem' type='pci' managed='yes'><source>{source}</source></hostdev>"


def _address(hostdev):
    found = hostdev.find("source/address")
    domain, bus, slot, function = (int(found.get(part), 16) for part in ("domain", "bus", "slot", "function"))
    return f"{domain:04x}:{bus:02x}:{slot:02x}.{function:x}"


class ObservedEngine:
    """The engine as nova-compute sees it, on a cluster in memory.

    :ivar asked: every job that ever came here.
    :ivar meanwhile: what happens during a call or step of that name; what it raises is what the call meets.
    :ivar uploads: the uploads that were taken; *uploaded_files* those of disks in files.
    :ivar kept: set once nova-compute keeps it running.
    """

    def __init__(self):
        self.asked = []
        self.meanwhile = {}
        self.kept = threading.Event()
        self._cluster = FakeCluster(NOVA_POOL, GLANCE_POOL)
        self._cluster.create_disk(BASE.image)
        self._cluster.create_snap(BASE)
        self.uploads = FakeUploads()
        self.uploaded_files = []
        self._engine = make_engine(self._cluster, pool=NOVA_POOL, uploads=self.uploads)

    # -- the world, as tests make and see it

    def add_disk(self, name):
        """A server's disk as Nova makes it, of an image of Glance's."""
        self._cluster.clone(BASE, ImageSpec(NOVA_POOL, name), None)

    def add_flat_disk(self, name):
        self._cluster.create_disk(ImageSpec(NOVA_POOL, name))

    def remove_disk(self, name):
        self._cluster.remove(ImageSpec(NOVA_POOL, name))

    def take(self, disk):
        """An operator's snapshot of a disk."""
        self._cluster.create_snap(ImageSpec(NOVA_POOL, disk).snap("operators"))

    def give_up(self, disk):
        """The operator needs it no more."""
        self._cluster.remove_snap(ImageSpec(NOVA_POOL, disk).snap("operators"))

    @property
    def disks(self):
        """Names of the servers' disks."""
        return set(self._cluster.images(NOVA_POOL))

    @property
    def left(self):
        """What exists because of snapshot requests: rbd images in Glance's pool, snapshots of disks."""
        images = [name for name in self._cluster.images(GLANCE_POOL) if name != BASE.image.name]
        disks = [ImageSpec(NOVA_POOL, name) for name in self.disks]
        snaps = [disk.snap(snap.name) for disk in disks for snap in self._cluster.snaps(disk)]
        return images + [str(snap) for snap in snaps if snap.name.startswith(SNAP_PREFIX)]

    def is_flat(self, image_id):
        """Whether the image depends on nothing."""
        return self._cluster.lookup(ImageSpec(GLANCE_POOL, image_id)).parent is None

    @property
    def jobs(self):
        """What the ledger holds."""
        return {job.id for job in Ledger(self._cluster, NOVA_POOL).read().jobs}

    def await_cancel(self):
        """Return once work shall stop."""
        works = self._engine._busy
        eventually(lambda: any(work.cancelled.is_set() for work in list(works.values())), "it is cancelled", pause=0.01)

    def _reach(self, name):
        self.meanwhile.get(name, lambda: None)()

    # -- the calls

    def check(self):
        return self._engine.check()

    def keep_running(self):
        self.kept.set()

    def describe(self, disk):
        self._reach("describe")
        return self._engine.describe(disk)

    def reserve_clone(self, image_id, disk, dest_pool, flatten=None):
        self.asked.append(image_id)
        self._reach("reserve_clone")
        return self._engine.reserve_clone(image_id, disk, dest_pool, flatten)

    def distrust(self, image_id):
        self._reach("distrust")
        return self._engine.distrust(image_id)

    def make_flat(self, image_id, report):
        self._reach("make_flat")
        return self._engine.make_flat(image_id, report)

    def reserve_freeze(self, job_id, disk):
        self.asked.append(job_id)
        self._reach("reserve_freeze")
        return self._engine.reserve_freeze(job_id, disk)

    def perform(self, job_id, snap_before, report):
        def observed(step, done, total):
            report(step, done, total)
            if not total:  # it begins
                self._reach(step)

        self._engine.perform(job_id, snap_before, observed)

    def upload(self, job_id, disk, target, report):
        self._reach("upload")
        return self._engine.upload(job_id, disk, target, report)

    def upload_file(self, server, path, disk_format, target, report):
        self._reach("upload_file")
        self.uploaded_files.append((server, path, disk_format))
        self.uploads.send(copying.Target(**target), 0, lambda: (), lambda: None)
        return {"format": target["disk_format"], "allocated": 0, "sent": 0}

    def finish(self, image_id):
        self._engine.finish(image_id)

    def rollback(self, job_id):
        return self._engine.rollback(job_id)

    def leave(self, job_id):
        self._engine.leave(job_id)

    def cancel(self, server):
        self._reach("cancel")
        return self._engine.cancel(server)

    def remove_disks(self, server):
        self._reach("remove_disks")
        return self._engine.remove_disks(server)


class GlanceInMemory:
    """Our way into the images of Nova's own Glance fixture.

    :ivar error: what asking for the location meets; nothing changes then.
    :ivar reads: whether Glance can read an image of that id, which it must, to take its location.
    """

    def __init__(self, service):
        self._images = service.images
        self.error = None
        self.reads = lambda image_id: True

    def _image(self, image_id):
        if image_id not in self._images:
            raise errors.RecordGone(image_id)
        return self._images[image_id]

    def record(self, image_id):
        image = self._image(image_id)
        urls = tuple(filter(None, [image.get("location")]))
        return glance.Record("active" if urls else "queued", urls, urls_complete=True, importing=False)

    def answers(self):
        return True

    def delete(self, image_id):
        del self._images[image_id]

    def access(self):
        return {"endpoints": ["http://glance"], "headers": {"X-Auth-Token": "secret"}}

    def set_properties(self, image_id, properties):
        image = self._image(image_id)
        for name, value in properties.items():
            (image if name.endswith("_format") else image["properties"])[name] = value

    def post_location(self, image_id, url):
        if self.error:
            raise self.error
        if not self.reads(image_id):
            raise errors.NotRegistered("Glance cannot read it")
        self._image(image_id).update(location=url, status="active")

    patch_location = post_location


def use(case, engine, glance_):
    """For the test *case*, disks are in Ceph, as far as Nova can tell, and ours finds these two."""
    case.flags(images_type="rbd", images_rbd_pool=NOVA_POOL, group="libvirt")
    for patch in (
        mock.patch.object(rbd_utils, "rbd"),
        mock.patch.object(rbd_utils, "rados"),
        mock.patch.object(process, "engine", return_value=engine),
        mock.patch.object(images, "glance_for", return_value=glance_),
    ):
        patch.start()
        case.addCleanup(patch.stop)


class ServerCase(test_driver._BaseSnapshotTests):
    """Tests about a running server with its disk in Ceph, and an image that awaits its snapshot.

    :ivar copy: qemu-img, which reads a disk for Nova's full copy.
    """

    def setUp(self):
        super().setUp()
        self.engine, self.glance = ObservedEngine(), GlanceInMemory(self.image_service)
        use(self, self.engine, self.glance)
        # What the rung between them does is seen in behaviour_copy.py.
        self.flags(ways=["clone", "nova"], group="rbd_snap")
        self.domains = {}
        self._servers_files = pathlib.Path(self.useFixture(fixtures.TempDir()).path)
        self.flags(instances_path=str(self._servers_files))
        self.server = self.instance_ref
        self.domain = self.give_domain(self.server)
        self.image_id = self._create_image()["id"]
        self.addCleanup(self.await_guest_calls)
        self.copy = self.patch(nova_images, "convert_image")
        self.patch(host.Host, "_get_domain", side_effect=self._find_domain)
        self.patch(host.Host, "list_instance_domains", side_effect=self._list_domains)
        self.patch(host.Host, "has_min_version", return_value=True)
        self.patch(nova_imagebackend.Image, "resolve_driver_format")
        self.patch(compute_utils, "disk_ops_semaphore", compute_utils.UnlimitedSemaphore())
        self.patch(test_driver.libvirt_utils, "file_open", side_effect=test_driver._fake_file_like_object)
        self.driver = driver.LibvirtDriver(fake.FakeVirtAPI(), False)

    def patch(self, owner, name, *new, **how):
        patch = mock.patch.object(owner, name, *new, **how)
        self.addCleanup(patch.stop)
        return patch.start()

    def _find_domain(self, server):
        if server.uuid not in self.domains:
            raise exception.InstanceNotFound(instance_id=server.uuid)
        return self.domains[server.uuid]

    def _list_domains(self, only_running=True):
        domains = self.domains.values()
        return [each for each in domains if not only_running or each.state != fakelibvirt.VIR_DOMAIN_SHUTOFF]

    def give_domain(self, server, devices=()):
        domain = self.domains[server.uuid] = Domain(server.uuid, devices)
        self.mark(server).parent.mkdir(exist_ok=True)
        if f"{server.uuid}_disk" not in self.engine.disks:
            self.engine.add_disk(f"{server.uuid}_disk")
        return domain

    def mark(self, server=None):
        """The file that tells a later life of nova-compute that the server's guest may be frozen."""
        return self._servers_files / (server or self.server).uuid / "nova-rbd-snap.frozen"

    def another_server(self, uuid=uuidsentinel.another):
        """One more server on the same host. :returns: it and its domain."""
        server = objects.Instance(**{**test_driver._create_test_instance(), "id": 2, "uuid": uuid})
        server.info_cache = objects.InstanceInfoCache(network_info=None)
        return server, self.give_domain(server)

    def give_pci_devices(self):
        """Give the server a device by its flavor, and a port that is a whole network card."""
        requests = {GPU: uuidsentinel.gpu, PORT: uuidsentinel.port}
        self.server.pci_requests = objects.InstancePCIRequests(
            requests=[
                objects.InstancePCIRequest(request_id=requests[GPU], alias_name="gpu"),
                objects.InstancePCIRequest(request_id=requests[PORT], alias_name=None),
            ]
        )
        self.server.pci_devices = objects.PciDeviceList(
            objects=[
                objects.PciDevice(compute_node_id=1, address=address, request_id=request, extra_info={})
                for address, request in requests.items()
            ]
        )
        card = network_model.VIF(
            id=uuidsentinel.port,
            type=network_model.VIF_TYPE_HOSTDEV,
            vnic_type=network_model.VNIC_TYPE_DIRECT_PHYSICAL,
            profile={"pci_slot": PORT},
        )
        self.server.info_cache.network_info = network_model.NetworkInfo([card])
        self.domain = self.give_domain(self.server, [GPU, PORT])

    def snapshot(self, server=None, update_task_state=None):
        """Ask for a snapshot as the manager does; returns the image's record."""
        update = update_task_state or self.mock_update_task_state
        self.driver.snapshot(self.context, server or self.server, self.image_id, update)
        return self.image_service.show(self.context, self.image_id)

    @staticmethod
    def guest_calls():
        """The threads in which libvirt is asked something about a guest."""
        return [thread for thread in threading.enumerate() if thread.name == "nova-rbd-snap-guest"]

    def await_guest_calls(self):
        for thread in self.guest_calls():
            thread.join(PATIENCE_SECONDS)
        self.assertEqual([], self.guest_calls())

    def assert_no_image(self):
        self.assertNotEqual("active", self.image_service.show(self.context, self.image_id)["status"])
        self.assert_nothing_left()

    def assert_nothing_left(self):
        self.assertEqual([], self.engine.left)
        self.assertEqual(set(), self.engine.jobs)
