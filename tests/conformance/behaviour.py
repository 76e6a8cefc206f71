# SPDX-License-Identifier: Apache-2.0
"""What the tests listed in ``exceptions.toml`` are about, said as behaviour.

Nova's originals assert which calls Nova's own ``RBDDriver`` gets. Ours never calls it: the work is done by the engine,
in another process. So these look at what is left in Glance's pool, in the image record and at the guest instead. They
run in Nova's own harness, on every release, on ``world.py``; ``run.py`` runs them with Nova's.
"""

# ruff: noqa: PT009, PT027 - Nova's harness is unittest, and its environments have no pytest

from unittest import mock

import world
from nova import context as nova_context
from nova import exception, objects, test
from nova.tests import fixtures as nova_fixtures
from nova.tests.fixtures import libvirt as fakelibvirt
from nova.virt import driver as nova_driver
from nova.virt import fake
from nova.virt.libvirt import imagebackend as nova_imagebackend

from nova_rbd_snap import errors
from nova_rbd_snap.openstack import driver, glance, imagebackend

SERVER = "11111111-2222-3333-4444-555555555555"
IMAGE = "22222222-2222-4222-8222-222222222222"


class DriverBehaviour(world.ServerCase):
    """A snapshot request of a running server."""

    def test_snapshot_is_a_clone_in_glances_pool(self):
        """The image is active, raw, and held by Glance's pool; the guest never noticed."""
        image = self.snapshot()
        self._assert_snapshot(image, disk_format="raw")
        self.assertEqual(f"rbd://{world.FSID}/{world.GLANCE_POOL}/{self.image_id}/snap", image["location"])
        self.assertEqual([self.image_id], self.engine.left)
        self.assertEqual(set(), self.engine.jobs)
        self.copy.assert_not_called()
        self.assertEqual(0, self.domain.suspensions)

    def test_clone_without_permission_falls_back_to_a_copy(self):
        """The image is active all the same, by Nova's copy, and the attempt left nothing behind."""
        self.engine.meanwhile["clone"] = world.failing(errors.NoPermission("Glance's pool is read-only"))
        image = self.snapshot()
        self._assert_snapshot(image, disk_format="raw")
        self.assertNotIn("location", image)
        self.copy.assert_called_once()
        self.assert_nothing_left()

    def test_encrypted_disk_is_copied(self):
        """What libvirt encrypts is not cloned: the image would hold bytes that nobody can read."""
        self.domain.encrypted = True
        self._assert_snapshot(self.snapshot(), disk_format="raw")
        self.copy.assert_called_once()
        self.assert_nothing_left()

    def test_pool_that_glance_does_not_tell_now(self):
        """A mere hint that cannot be had is no reason to fail: the disk is copied."""
        self.engine.remove_disk(f"{self.server.uuid}_disk")
        self.engine.add_flat_disk(f"{self.server.uuid}_disk")
        self.patch(glance.time, "sleep")
        with mock.patch.object(self.glance, "record", side_effect=errors.GlanceSilent("no answer")):
            image = self.snapshot()
        self._assert_snapshot(image, disk_format="raw")
        self.copy.assert_called_once()
        self.assert_nothing_left()

    def test_clone_that_cannot_be_registered_is_removed(self):
        """Whatever Glance has against it, what was cloned is removed before the request fails."""
        self.flags(ways=["clone"], group="rbd_snap")
        for error in (errors.NotRegistered("refused"), errors.NotAuthorized("the token has expired")):
            self.glance.error = error
            self.assertRaises(exception.NovaException, self.snapshot)
            self.assert_nothing_left()

    def test_clone_is_kept_in_doubt(self):
        """An error nobody expected says nothing of what Glance did: the clone stays, and so does its job."""
        self.flags(ways=["clone"], group="rbd_snap")
        self.glance.error = RuntimeError("registering met a bug")
        self.assertRaises(exception.NovaException, self.snapshot)
        self.assertEqual({self.image_id}, self.engine.jobs)
        self.assertEqual([self.image_id], self.engine.left)

    def test_clone_whose_record_was_deleted_is_removed(self):
        """The user gave the image up: the clone goes, no copy is tried, and Nova learns why."""
        self.glance.error = errors.RecordGone("deleted meanwhile")
        with mock.patch.object(self.glance, "record", side_effect=errors.RecordGone("deleted meanwhile")):
            self.assertRaises(exception.ImageNotFound, self.snapshot)
        self.copy.assert_not_called()
        self.assert_nothing_left()

    def test_flavor_or_image_chooses_when_it_is_flattened(self):
        """The flavor before the image, each where it may; what is no policy is not heeded."""
        both = ["flavor", "image"]
        for flavor, image, heeded, is_flat in (
            (None, None, both, True),
            ("never", None, both, False),
            (None, "background", both, False),
            ("inline", "never", both, True),
            ("never", "inline", ["image"], True),
            (None, "never", ["flavor"], True),
            ("never", "never", [], True),
            ("sometimes", None, both, True),
            ("sometimes", "never", both, False),
        ):
            self.flags(flatten_overrides=heeded, group="rbd_snap")
            self.server.flavor.extra_specs = {"rbd_snap:flatten": flavor} if flavor else {}
            self.server.system_metadata.pop("image_rbd_snap_flatten", None)
            if image:
                self.server.system_metadata["image_rbd_snap_flatten"] = image
            self.image_id = self._create_image()["id"]
            self._assert_snapshot(self.snapshot(), disk_format="raw")
            self.assertEqual(is_flat, self.engine.is_flat(self.image_id), (flavor, image, heeded))

    def test_image_that_glance_can_only_read_once_it_is_flat(self):
        """It is flattened there and then, and so are the next ones; no copy is made, and nothing is left but the
        question whether Glance has learnt to read others."""
        self.glance.reads = self.engine.is_flat
        self.server.flavor.extra_specs = {"rbd_snap:flatten": "never"}
        for _ in range(2):
            image = self.snapshot()
            self._assert_snapshot(image, disk_format="raw")
            self.assertTrue(self.engine.is_flat(self.image_id))
            self.assertEqual({"probe-glance-pool"}, self.engine.jobs)
            self.glance.reads = lambda image_id: self.assertTrue(self.engine.is_flat(image_id)) or True
            self.image_id = self._create_image()["id"]
        self.copy.assert_not_called()

    def test_server_that_is_being_shelved(self):
        """Nova removes its disks once the driver returns: it returns when the image is active, and raises otherwise."""
        self.domain.state = fakelibvirt.VIR_DOMAIN_SHUTOFF
        self.engine.meanwhile["clone"] = world.failing(errors.NoPermission("Glance's pool is read-only"))
        upload = self.patch(self.image_service, "update")
        for broken in (self.copy, upload, self.mock_update_task_state):
            broken.side_effect = test.TestingException
            self.assertRaises(test.TestingException, self.snapshot)
            self.assert_no_image()
            broken.side_effect = None
        self.engine.meanwhile.clear()
        self._assert_snapshot(self.snapshot(), disk_format="raw")


class RbdBehaviour(test.NoDBTestCase):
    """The Rbd class alone, as Nova's own driver would use it."""

    def setUp(self):
        super().setUp()
        self.engine = world.ObservedEngine()
        self.engine.add_disk(f"{SERVER}_disk")
        world.use(self, self.engine, mock.sentinel.glance)
        self.disk = imagebackend.Rbd(objects.Instance(id=1, uuid=SERVER), "disk")

    def direct_snapshot(self, image_format="raw"):
        return self.disk.direct_snapshot(nova_context.get_admin_context(), "snap-1", image_format, IMAGE, "base-1")

    def test_direct_snapshot_returns_the_clone(self):
        """The location names a clone of the disk, in the pool of the disk's parent, under the image's id."""
        self.assertEqual(f"rbd://{world.FSID}/{world.GLANCE_POOL}/{IMAGE}/snap", self.direct_snapshot())
        self.assertEqual([IMAGE], self.engine.left)

    def test_direct_snapshot_of_another_format_is_refused(self):
        """A clone holds raw bytes: Nova's copy converts them to what was asked for."""
        self.assertRaises(exception.ImageUnacceptable, self.direct_snapshot, image_format="qcow2")
        self.assertEqual([], self.engine.left)

    def test_failed_direct_snapshot_starts_novas_copy(self):
        """Permission missing: nothing is left, and Nova gets an error that makes it copy."""
        self.engine.meanwhile["clone"] = world.failing(errors.NoPermission("Glance's pool is read-only"))
        self.assertRaises((NotImplementedError, exception.ImageUnacceptable, exception.Forbidden), self.direct_snapshot)
        self.assertEqual([], self.engine.left)


class LoaderBehaviour(test.NoDBTestCase):
    """Nothing swapped: nova.conf alone brings both classes in."""

    def test_nova_loads_our_driver_and_the_driver_brings_our_rbd(self):
        self.useFixture(nova_fixtures.LibvirtFixture())
        with mock.patch.object(nova_imagebackend, "Rbd", imagebackend.Rbd.__base__):
            loaded = nova_driver.load_compute_driver(fake.FakeVirtAPI(), "rbd_snap.LibvirtDriver")
        self.assertIs(driver.LibvirtDriver, type(loaded))
        self.assertIs(imagebackend.Rbd, loaded.image_backend.BACKEND["rbd"])
