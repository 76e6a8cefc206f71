# SPDX-License-Identifier: Apache-2.0
"""What the tests listed in ``exceptions.toml`` are about, said as behaviour.

Nova's originals assert which calls Nova's own ``RBDDriver`` gets. Ours never calls it: the work is done by the engine,
in another process. So these look at what is left in Glance's pool, in the image record and at the guest instead. They
run in Nova's own harness, on every release, with the engine and Glance held in memory; ``run.py`` runs them with
Nova's.
"""

# ruff: noqa: PT009, PT027 - Nova's harness is unittest, and its environments have no pytest

from unittest import mock

from nova import context as nova_context
from nova import exception, objects, test
from nova.storage import rbd_utils
from nova.tests import fixtures as nova_fixtures
from nova.tests.unit.virt.libvirt import test_driver
from nova.virt import driver as nova_driver
from nova.virt import fake
from nova.virt import images as nova_images
from nova.virt.libvirt import guest as libvirt_guest
from nova.virt.libvirt import imagebackend as nova_imagebackend

from nova_rbd_snap import errors
from nova_rbd_snap.openstack import driver, glance, imagebackend, images, process
from nova_rbd_snap.specs import ImageSpec, Location

FSID = "f51d"
NOVA_POOL = "nova-pool"
GLANCE_POOL = "glance-pool"
SERVER = "11111111-2222-3333-4444-555555555555"
DISK = f"{SERVER}_disk"


class EngineInMemory:
    """The engine as nova-compute sees it.

    :ivar left: what exists because of a snapshot request: rbd images in Glance's pool, frozen snapshots.
    :ivar jobs: what awaits nova-compute's ``finish`` or ``rollback``.
    :ivar error: what making a clone meets; the engine has then undone itself.
    """

    def __init__(self):
        self.left = {}
        self.jobs = set()
        self.error = None
        self.parent_pool = GLANCE_POOL

    def describe(self, disk):
        return {"fsid": FSID, "pool": NOVA_POOL, "parent_pool": self.parent_pool}

    def clone(self, image_id, disk, dest_pool, report):
        if self.error:
            raise self.error
        self.jobs.add(image_id)
        self.left[image_id] = f"{dest_pool}/{image_id}@snap, made of {disk}"
        return Location(FSID, ImageSpec(dest_pool, image_id).snap("snap")).url

    def freeze(self, job_id, disk, report):
        self.jobs.add(job_id)
        self.left[job_id] = f"{disk}@{job_id}"
        return job_id

    def finish(self, image_id):
        self.jobs.remove(image_id)

    def rollback(self, job_id):
        self.jobs.discard(job_id)
        return self.left.pop(job_id, None) is not None


class GlanceInMemory:
    """Our way into the images of Nova's own Glance fixture.

    :ivar error: what asking for the location meets; nothing changes then.
    """

    def __init__(self, service):
        self._images = service.images
        self.error = None

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

    def set_properties(self, image_id, properties):
        image = self._image(image_id)
        for name, value in properties.items():
            (image if name.endswith("_format") else image["properties"])[name] = value

    def post_location(self, image_id, url):
        if self.error:
            raise self.error
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


class DriverBehaviour(test_driver._BaseSnapshotTests):
    """A snapshot request of a running server."""

    def setUp(self):
        super().setUp()
        self.engine, self.glance = EngineInMemory(), GlanceInMemory(self.image_service)
        use(self, self.engine, self.glance)
        self.image_id = self._create_image()["id"]
        self.suspend = self.patch(driver.LibvirtDriver, "suspend")
        self.copy = self.patch(nova_images, "convert_image")
        self.patch(test_driver.libvirt_utils, "find_disk", return_value=(f"rbd:{NOVA_POOL}/{DISK}", "raw"))

    def patch(self, owner, name, **how):
        patch = mock.patch.object(owner, name, **how)
        self.addCleanup(patch.stop)
        return patch.start()

    def assert_nothing_left(self):
        self.assertEqual({}, self.engine.left)
        self.assertEqual(set(), self.engine.jobs)

    def test_snapshot_is_a_clone_in_glances_pool(self):
        """The image is active, raw, and held by Glance's pool; the guest never noticed."""
        image = self._snapshot(self.image_id)
        self._assert_snapshot(image, disk_format="raw")
        self.assertEqual(f"rbd://{FSID}/{GLANCE_POOL}/{self.image_id}/snap", image["location"])
        self.assertEqual([self.image_id], list(self.engine.left))
        self.assertEqual(set(), self.engine.jobs)
        self.copy.assert_not_called()
        self.suspend.assert_not_called()

    def test_clone_without_permission_falls_back_to_a_copy(self):
        """The image is active all the same, by Nova's copy, and the attempt left nothing behind."""
        self.engine.error = errors.NoPermission("Glance's pool is read-only")
        image = self._snapshot(self.image_id)
        self._assert_snapshot(image, disk_format="raw")
        self.assertNotIn("location", image)
        self.copy.assert_called_once()
        self.assert_nothing_left()

    def test_encrypted_disk_is_copied(self):
        """What libvirt encrypts is not cloned: the image would hold bytes that nobody can read."""
        source = "<source protocol='rbd'><encryption format='luks'/></source>"
        self.patch(
            libvirt_guest.Guest,
            "get_xml_desc",
            return_value=f"<domain><devices><disk type='network'>{source}</disk></devices></domain>",
        )
        self._assert_snapshot(self._snapshot(self.image_id), disk_format="raw")
        self.copy.assert_called_once()
        self.assert_nothing_left()

    def test_pool_that_glance_does_not_tell_now(self):
        """A mere hint that cannot be had is no reason to fail: the disk is copied."""
        self.engine.parent_pool = None
        self.patch(glance.time, "sleep")
        with mock.patch.object(self.glance, "record", side_effect=errors.GlanceSilent("no answer")):
            image = self._snapshot(self.image_id)
        self._assert_snapshot(image, disk_format="raw")
        self.copy.assert_called_once()
        self.assert_nothing_left()

    def test_clone_that_cannot_be_registered_is_removed(self):
        """Whatever Glance has against it, what was cloned is removed before the request fails."""
        self.flags(ways=["clone"], group="rbd_snap")
        for error in (errors.NotRegistered("refused"), errors.NotAuthorized("the token has expired")):
            self.glance.error = error
            self.assertRaises(exception.NovaException, self._snapshot, self.image_id)
            self.assert_nothing_left()

    def test_clone_is_kept_in_doubt(self):
        """An error nobody expected says nothing of what Glance did: the clone stays, and so does its job."""
        self.flags(ways=["clone"], group="rbd_snap")
        self.glance.error = RuntimeError("registering met a bug")
        self.assertRaises(exception.NovaException, self._snapshot, self.image_id)
        self.assertEqual({self.image_id}, self.engine.jobs)
        self.assertEqual([self.image_id], list(self.engine.left))

    def test_clone_whose_record_was_deleted_is_removed(self):
        """The user gave the image up: the clone goes, no copy is tried, and Nova learns why."""
        self.glance.error = errors.RecordGone("deleted meanwhile")
        with mock.patch.object(self.glance, "record", side_effect=errors.RecordGone("deleted meanwhile")):
            self.assertRaises(exception.ImageNotFound, self._snapshot, self.image_id)
        self.copy.assert_not_called()
        self.assert_nothing_left()


class RbdBehaviour(test.NoDBTestCase):
    """The Rbd class alone, as Nova's own driver would use it."""

    def setUp(self):
        super().setUp()
        self.engine = EngineInMemory()
        use(self, self.engine, mock.sentinel.glance)
        self.disk = imagebackend.Rbd(objects.Instance(id=1, uuid=SERVER), "disk")

    def direct_snapshot(self, image_format="raw"):
        return self.disk.direct_snapshot(nova_context.get_admin_context(), "snap-1", image_format, "image-1", "base-1")

    def test_direct_snapshot_returns_the_clone(self):
        """The location names a clone of the disk, in the pool of the disk's parent, under the image's id."""
        self.assertEqual(f"rbd://{FSID}/{GLANCE_POOL}/image-1/snap", self.direct_snapshot())
        self.assertEqual({"image-1": f"{GLANCE_POOL}/image-1@snap, made of {DISK}"}, self.engine.left)

    def test_direct_snapshot_of_another_format_is_refused(self):
        """A clone holds raw bytes: Nova's copy converts them to what was asked for."""
        self.assertRaises(exception.ImageUnacceptable, self.direct_snapshot, image_format="qcow2")
        self.assertEqual({}, self.engine.left)

    def test_failed_direct_snapshot_starts_novas_copy(self):
        """Permission missing: nothing is left, and Nova gets an error that makes it copy."""
        self.engine.error = errors.NoPermission("Glance's pool is read-only")
        self.assertRaises((NotImplementedError, exception.ImageUnacceptable, exception.Forbidden), self.direct_snapshot)
        self.assertEqual({}, self.engine.left)


class LoaderBehaviour(test.NoDBTestCase):
    """Nothing swapped: nova.conf alone brings both classes in."""

    def test_nova_loads_our_driver_and_the_driver_brings_our_rbd(self):
        self.useFixture(nova_fixtures.LibvirtFixture())
        with mock.patch.object(nova_imagebackend, "Rbd", imagebackend.Rbd.__base__):
            loaded = nova_driver.load_compute_driver(fake.FakeVirtAPI(), "rbd_snap.LibvirtDriver")
        self.assertIs(driver.LibvirtDriver, type(loaded))
        self.assertIs(imagebackend.Rbd, loaded.image_backend.BACKEND["rbd"])
