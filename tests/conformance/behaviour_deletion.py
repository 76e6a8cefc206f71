# SPDX-License-Identifier: Apache-2.0
"""A server that is deleted takes its snapshots under way with it, and its disks; and waits for none of them."""

# ruff: noqa: PT009, PT027 - Nova's harness is unittest, and its environments have no pytest

import threading

import ddt
import world
from nova import exception
from nova.compute import task_states
from nova.storage import rbd_utils
from nova.tests.fixtures import libvirt as fakelibvirt

from nova_rbd_snap import errors
from nova_rbd_snap.openstack import requests


class GoingServer(world.ServerCase):
    """A server that may be deleted."""

    def setUp(self):
        super().setUp()
        self.patch(rbd_utils.RBDDriver, "cleanup_volumes", side_effect=self.remove_as_nova)
        self.mock_update_task_state.side_effect = self.update_task_state
        others, _ = self.another_server()
        self.disk = f"{self.server.uuid}_disk"
        self.local, self.held = f"{self.disk}.local", f"{self.disk}.held"
        self.others_disk = f"{others.uuid}_disk"
        self.engine.add_disk(self.local)

    def remove_as_nova(self, is_meant):
        for disk in filter(is_meant, self.engine.disks):
            self.engine.remove_disk(disk)

    def hold_a_disk(self):
        """One that an operator took a snapshot of."""
        self.engine.add_disk(self.held)
        self.engine.take(self.held)

    def update_task_state(self, task_state, expected_state=None):
        """As the manager's: nothing becomes of a server that is being deleted."""
        if self.server.task_state == task_states.DELETING:
            raise exception.UnexpectedDeletingTaskStateError(
                instance_uuid=self.server.uuid, expected=expected_state, actual=self.server.task_state
            )

    def delete(self, task_state=task_states.DELETING):
        """As far as it matters here: Nova has ended the server's QEMU, and has its disks removed."""
        self.server.task_state = task_state
        self.domain.state = fakelibvirt.VIR_DOMAIN_SHUTOFF
        self.driver._cleanup_rbd(self.server)

    def hold(self, step):
        """Let the engine stay at *step* until its work is cancelled; returns what is set once it is there."""
        reached = threading.Event()

        def stay():
            reached.set()
            self.engine.await_cancel()

        self.engine.meanwhile[step] = stay
        return reached

    def assert_given_up(self, request):
        """*request* fails as Nova's manager expects it of a server that is being deleted, and nothing is left of it."""
        self.assertRaises(exception.UnexpectedDeletingTaskStateError, request)
        self.copy.assert_not_called()
        self.assert_no_image()


@ddt.ddt
class DeletedServer(GoingServer):
    """What Nova asks the driver for once the server's QEMU is gone."""

    def test_its_disks_are_removed_and_no_others(self):
        self.delete()
        self.assertEqual({self.others_disk}, self.engine.disks)

    def test_what_is_left_is_told(self):
        """The server is deleted all the same; the operator reads which disk is left, and what holds it."""
        self.hold_a_disk()
        self.delete()
        self.assertEqual({self.others_disk, self.held}, self.engine.disks)
        told = [line for line in self.stdlog.logger.output.splitlines() if self.held in line]
        self.assertEqual(1, len(told))
        self.assertIn(" WARNING ", told[0])

    @ddt.data(task_states.REBUILDING, task_states.REBUILD_BLOCK_DEVICE_MAPPING, task_states.REBUILD_SPAWNING)
    def test_rebuild_for_which_a_disk_is_left(self, task_state):
        """It fails and says why: the disk that is left would be the rebuilt server's."""
        self.hold_a_disk()
        error = self.assertRaises(exception.NovaException, self.delete, task_state)
        self.assertIn(self.held, str(error))
        self.assertEqual({self.others_disk, self.held}, self.engine.disks)
        self.engine.give_up(self.held)
        self.delete(task_state)
        self.assertEqual({self.others_disk}, self.engine.disks)

    @ddt.data(("clone", "snap"), ("clone", "flatten"), ("nova", "snap"))
    @ddt.unpack
    def test_snapshot_under_way_is_undone(self, way, step):
        self.flags(ways=[way], group="rbd_snap")
        reached = self.hold(step)
        request = world.Beside(self.snapshot)
        self.assertTrue(reached.wait(world.PATIENCE_SECONDS))
        self.delete()
        self.assert_given_up(request.end)
        self.assertEqual({self.others_disk}, self.engine.disks)

    def test_full_copy_under_way(self):
        """The snapshot that it reads goes with the disk, and nothing becomes of it."""
        self.flags(ways=["nova"], group="rbd_snap")
        self.copy.side_effect = copying = world.Silence(self)
        request = world.Beside(self.snapshot)
        self.assertTrue(copying.begun.wait(world.PATIENCE_SECONDS))
        self.assertEqual(1, len(self.engine.left))
        self.delete()
        self.assertEqual(({self.others_disk}, []), (self.engine.disks, self.engine.left))
        copying.end()
        self.assertRaises(exception.UnexpectedDeletingTaskStateError, request.end)
        self.assert_no_image()

    @ddt.data("cancel", "remove_disks")
    def test_snapshot_that_begins_meanwhile(self, call):
        """It never comes to the engine, where it would hold a disk that is being removed."""
        self.engine.meanwhile[call] = lambda: self.assert_given_up(self.snapshot)
        self.delete()
        self.assertEqual([], self.engine.asked)
        self.assertEqual({self.others_disk}, self.engine.disks)

    def test_snapshot_that_had_just_begun(self):
        """It was let through, and comes to the engine only after that was asked what is under way."""
        self.hold("flatten")
        on_its_way = world.Silence(self)
        self.engine.meanwhile["describe"] = on_its_way
        self.engine.meanwhile["cancel"] = on_its_way.end
        request = world.Beside(self.snapshot)
        self.assertTrue(on_its_way.begun.wait(world.PATIENCE_SECONDS))
        self.delete()
        self.assert_given_up(request.end)
        self.assertEqual({self.others_disk}, self.engine.disks)

    def test_without_an_engine(self):
        """Nova removes the disks as it always did."""
        for call in ("cancel", "remove_disks"):
            self.engine.meanwhile[call] = world.failing(errors.EngineUnavailable("it cannot be started"))
        self.delete()
        self.assertEqual({self.others_disk}, self.engine.disks)

    @ddt.data(errors.Unreachable, errors.EngineStuck)
    def test_cluster_that_does_not_answer(self, error):
        """The deletion fails, and can be tried again; Nova's own would wait for the cluster for ever."""
        for call in ("cancel", "remove_disks"):
            self.engine.meanwhile[call] = world.failing(error("no answer"))
        self.assertRaises(exception.NovaException, self.delete)
        self.assertEqual({self.disk, self.local, self.others_disk}, self.engine.disks)
        self.engine.meanwhile.clear()
        self.delete()
        self.assertEqual({self.others_disk}, self.engine.disks)

    def test_after_a_deletion_that_failed(self):
        """The server can have snapshots again."""
        self.engine.meanwhile["remove_disks"] = world.failing(errors.Unreachable("no answer"))
        self.assertRaises(exception.NovaException, self.delete)
        self.server.task_state = task_states.IMAGE_SNAPSHOT
        self._assert_snapshot(self.snapshot(), disk_format="raw")

    def test_resize_that_is_reverted(self):
        """Nova's own business: the disk itself is kept, for it is rolled back."""
        self.delete(task_states.RESIZE_REVERTING)
        self.assertEqual({self.disk, self.others_disk}, self.engine.disks)


@ddt.ddt
class ShelvedServer(GoingServer):
    """Nova shelves and deletes under one lock: that a server is to go shows in its task state alone."""

    def setUp(self):
        super().setUp()
        self.server.task_state = task_states.SHELVING
        self.patch(requests, "_LOOK_SECONDS", 0.01)

    def assert_no_record(self):
        self.assertNotIn(self.image_id, self.image_service.images)
        self.assert_nothing_left()

    def test_deletion_that_waits_for_the_shelve(self):
        """It ends the shelve, and its image record with it: Nova deletes none of a shelve."""
        reached = self.hold("flatten")
        request = world.Beside(self.snapshot)
        self.assertTrue(reached.wait(world.PATIENCE_SECONDS))
        self.server.task_state = task_states.DELETING
        self.assertRaises(exception.UnexpectedDeletingTaskStateError, request.end)
        self.assert_no_record()

    @ddt.data("clone", "clone nova")
    def test_shelve_that_fails(self, ways):
        """Nothing would ever come of the record."""
        self.flags(ways=ways.split(), group="rbd_snap")
        self.engine.meanwhile["snap"] = world.failing(errors.Unreachable("no answer"))
        self.assertRaises(exception.NovaException, self.snapshot)
        self.assert_no_record()

    def test_snapshot_that_fails(self):
        """Of it Nova deletes the record itself."""
        self.server.task_state = task_states.IMAGE_SNAPSHOT
        self.engine.meanwhile["snap"] = world.failing(errors.Unreachable("no answer"))
        self.assertRaises(exception.NovaException, self.snapshot)
        self.assert_no_image()

    def test_shelve(self):
        self._assert_snapshot(self.snapshot(), disk_format="raw")
