# SPDX-License-Identifier: Apache-2.0
"""The way 'copy' as nova-compute takes it: with its own Nova, and an engine in memory."""

# ruff: noqa: PT009, PT027 - Nova's harness is unittest, and its environments have no pytest

import world
from nova import exception
from nova.compute import task_states
from nova.tests.fixtures import libvirt as fakelibvirt

from nova_rbd_snap import errors
from nova_rbd_snap.openstack import process


class CopiedServer(world.ServerCase):
    """A snapshot request of a running server that cannot be cloned."""

    def setUp(self):
        super().setUp()
        self.flags(ways=["clone", "copy", "nova"], group="rbd_snap")
        self.engine.meanwhile["clone"] = world.failing(errors.NoPermission("Glance's pool is read-only"))

    def uploaded(self):
        target, data = self.engine.uploads.sent[self.image_id]
        return target, data

    def test_disk_is_uploaded(self):
        """By the engine, with the request's own token and what Nova says of the image; the guest is let be."""
        self.snapshot()
        target, _ = self.uploaded()
        self.assertEqual({"X-Auth-Token": "secret"}, target.access["headers"])
        self.assertEqual("snapshot", target.properties["image_location"])
        # The disk is a clone of an image of Glance's: those are in Ceph.
        self.assertEqual("raw", target.disk_format)
        self.copy.assert_not_called()
        self.assertEqual(0, self.domain.suspensions)
        self.assert_nothing_left()

    def test_task_states(self):
        """Both transitions are made, once."""
        self.snapshot()
        made = [call[1]["task_state"] for call in self.mock_update_task_state.call_args_list]
        self.assertEqual([task_states.IMAGE_PENDING_UPLOAD, task_states.IMAGE_UPLOADING], made)

    def test_format_that_nova_is_told(self):
        """That counts, and nothing is cloned for it."""
        self.flags(snapshot_image_format="qcow2", group="libvirt")
        self.snapshot()
        target, data = self.uploaded()
        self.assertEqual("qcow2", target.disk_format)
        self.assertTrue(data.startswith(b"QFI"))
        self.assertEqual([f"{self.image_id}-copy"], self.engine.asked)

    def test_format_that_is_novas_own(self):
        """What we cannot write is Nova's to copy."""
        self.flags(snapshot_image_format="vmdk", group="libvirt")
        self.snapshot()
        self.copy.assert_called_once()
        self.assertEqual({}, self.engine.uploads.sent)
        self.assert_nothing_left()

    def test_upload_that_fails(self):
        """Nova's own copy is made, of a disk that is frozen anew."""
        self.engine.meanwhile["upload"] = world.failing(errors.NotRegistered("Glance takes no upload"))
        self._assert_snapshot(self.snapshot(), disk_format="raw")
        self.copy.assert_called_once()
        self.assertEqual(0, self.domain.suspensions)
        self.assert_nothing_left()

    def test_upload_that_would_fail_again(self):
        """So would Nova's."""
        self.engine.meanwhile["upload"] = world.failing(errors.NotAuthorized("the token has expired"))
        self.assertRaises(exception.NovaException, self.snapshot)
        self.copy.assert_not_called()
        self.assert_nothing_left()

    def test_engine_that_dies_over_it(self):
        """The next one sends it."""
        deaths = [errors.EngineLost("the engine ended")]

        def die():
            if deaths:
                raise deaths.pop()

        self.engine.meanwhile["upload"] = die
        self.snapshot()
        self.uploaded()
        self.copy.assert_not_called()
        self.assert_nothing_left()

    def test_encrypted_disk(self):
        """Is not ours to read."""
        self.domain.encrypted = True
        self._assert_snapshot(self.snapshot(), disk_format="raw")
        self.assertEqual({}, self.engine.uploads.sent)
        self.copy.assert_called_once()

    def test_progress_is_shown(self):
        """To the server's owner."""
        shown = []
        self.patch(process, "stores", return_value=[])
        self.patch(type(self.server), "save", side_effect=lambda *args, **more: shown.append(self.server.progress))
        self.snapshot()
        self.assertIn(100, shown)


class DiskInFile(world.ServerCase):
    """A server whose disk is in a file."""

    def setUp(self):
        super().setUp()
        self.flags(ways=["clone", "copy", "nova"], group="rbd_snap")
        self.flags(images_type="qcow2", group="libvirt")
        self.domain.file = "/instances/disk"

    def test_server_that_is_off(self):
        """Its disk is read as what libvirt says it is, and Nova copies nothing."""
        self.domain.state = fakelibvirt.VIR_DOMAIN_SHUTOFF
        self.snapshot()
        self.assertEqual([(self.server.uuid, "/instances/disk", "qcow2")], self.engine.uploaded_files)
        self.copy.assert_not_called()

    def test_running_server(self):
        """Is Nova's, which snapshots it while it runs."""
        self.patch(self.driver, "_live_snapshot")
        self.snapshot()
        self.assertEqual([], self.engine.uploaded_files)

    def test_way_that_is_not_wanted(self):
        self.flags(ways=["clone", "nova"], group="rbd_snap")
        self.domain.state = fakelibvirt.VIR_DOMAIN_SHUTOFF
        extracted = self.patch(world.test_driver.libvirt_utils, "extract_snapshot")
        self.snapshot()
        extracted.assert_called_once()
        self.assertEqual([], self.engine.uploaded_files)

    def test_upload_that_fails(self):
        """Nova's own copy is made."""
        self.domain.state = fakelibvirt.VIR_DOMAIN_SHUTOFF
        self.engine.meanwhile["upload_file"] = world.failing(errors.DiskError("cannot be read"))
        extracted = self.patch(world.test_driver.libvirt_utils, "extract_snapshot")
        self.snapshot()
        extracted.assert_called_once()
