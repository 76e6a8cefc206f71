# SPDX-License-Identifier: Apache-2.0
"""What a snapshot may do to a guest: nothing that outlasts it, and nothing at all to one that does not answer."""

# ruff: noqa: PT009, PT027 - Nova's harness is unittest, and its environments have no pytest

import itertools
from unittest import mock

import ddt
import world
from nova import exception, test
from nova.storage import rbd_utils
from nova.tests.fixtures import libvirt as fakelibvirt

from nova_rbd_snap import errors
from nova_rbd_snap.openstack import guest, imagebackend

FAILURE = test.TestingException("what went wrong first")
DELETED = exception.UnexpectedDeletingTaskStateError(instance_uuid="it", expected="a snapshot", actual="deleting")


def disk_cannot_be_frozen(case):
    """Our ladder's last rung without a snapshot to read: Nova suspends the guest before its copy."""
    case.flags(ways=["nova"], group="rbd_snap")
    case.engine.meanwhile["reserve_freeze"] = world.failing(errors.Refused("no snapshot of this disk"))


def live_snapshots_are_disabled(case):
    """Nova alone: it suspends the guest before it does anything else."""
    case.flags(enabled=False, group="rbd_snap")
    case.flags(disable_libvirt_livesnapshot=True, group="workarounds")
    case.patch(rbd_utils.RBDDriver, "get_fsid", side_effect=exception.Forbidden)


SUSPENDING = (disk_cannot_be_frozen, live_snapshots_are_disabled)


def direct_snapshot(case):
    case.patch(imagebackend.Rbd, "direct_snapshot", side_effect=FAILURE)
    return FAILURE


def copy(case):
    case.copy.side_effect = FAILURE
    return FAILURE


def copy_by_qemu_img(case):
    """As Nova reports it, with one of the errors that make it fall back where the direct way raises them."""
    case.copy.side_effect = exception.ImageUnacceptable(image_id="an image", reason="qemu-img failed")
    return case.copy.side_effect


def upload(case):
    case.patch(case.image_service, "update", side_effect=FAILURE)
    return FAILURE


def task_state(number, error):
    """The update of the task state of that number."""

    def fail(case):
        case.mock_update_task_state.side_effect = itertools.chain([None] * number, [error], itertools.repeat(None))
        return error

    fail.__name__ = f"task state {number} {type(error).__name__}"
    return fail


#: What may go wrong while the guest is suspended; each returns the error that it goes wrong with.
BREAKING = (
    direct_snapshot,
    copy,
    copy_by_qemu_img,
    upload,
    *(task_state(number, error) for number in range(4) for error in (FAILURE, DELETED)),
)


@ddt.ddt
class SuspendedGuest(world.ServerCase):
    """A guest that Nova suspends for its own copy is afterwards as it was before."""

    def setUp(self):
        super().setUp()
        self.give_pci_devices()

    def test_after_success(self):
        """Nova's own doing, in the world of these tests: the yardstick for what follows."""
        for suspend in SUSPENDING:
            before = self.domain.picture()
            suspend(self)
            self._assert_snapshot(self.snapshot(), disk_format="raw")
            self.assertEqual(before, self.domain.picture())
        self.assertEqual(len(SUSPENDING), self.domain.suspensions)

    @ddt.named_data(*world.crossed(SUSPENDING, BREAKING))
    def test_whatever_breaks(self, suspend, break_it):
        """It runs again with its PCI device and its port, each attached once, and the request fails with the cause."""
        before = self.domain.picture()
        suspend(self)
        error = break_it(self)
        self.assertIs(error, self.assertRaises(type(error), self.snapshot))
        self.assertEqual(before, self.domain.picture())
        self.assert_no_image()

    def test_paused_guest_stays_paused(self):
        """As libvirt starts what it saved."""
        self.domain.state = fakelibvirt.VIR_DOMAIN_PAUSED
        live_snapshots_are_disabled(self)
        task_state(0, FAILURE)(self)
        self.assertRaises(test.TestingException, self.snapshot)
        self.assertEqual((fakelibvirt.VIR_DOMAIN_PAUSED, 1), (self.domain.state, self.domain.suspensions))

    def test_guest_that_need_not_be_suspended(self):
        """Of a copy that reads a frozen snapshot the guest notices nothing, even where live snapshots are disabled."""
        self.flags(ways=["nova"], group="rbd_snap")
        self.flags(disable_libvirt_livesnapshot=True, group="workarounds")
        before = self.domain.picture()
        copy(self)
        self.assertRaises(test.TestingException, self.snapshot)
        self.assertEqual((before, 0), (self.domain.picture(), self.domain.suspensions))
        self.assert_no_image()

    def test_suspension_whose_answer_was_lost(self):
        """It is suspended although libvirt said it could not be: it runs again all the same."""
        before = self.domain.picture()
        live_snapshots_are_disabled(self)

        def save(flags):
            world.Domain.managedSave(self.domain, flags)
            raise FAILURE

        self.domain.managedSave = save
        self.assertRaises(test.TestingException, self.snapshot)
        self.assertEqual(before, self.domain.picture())

    @ddt.named_data(*world.crossed(SUSPENDING, ("createWithFlags", "attachDeviceFlags")))
    def test_guest_that_cannot_be_resumed(self, suspend, call):
        """The request fails with what went wrong first: the copy if it did, else the resuming itself."""
        suspend(self)
        cannot = world.libvirt_error("no memory left")
        setattr(self.domain, call, world.failing(cannot))
        self.assertIs(cannot, self.assertRaises(fakelibvirt.libvirtError, self.snapshot))
        self.give_pci_devices()
        setattr(self.domain, call, world.failing(cannot))
        copy(self)
        self.assertIs(FAILURE, self.assertRaises(test.TestingException, self.snapshot))

    def test_guest_that_is_resumed_at_the_second_try(self):
        before = self.domain.picture()
        disk_cannot_be_frozen(self)
        start = self.domain.createWithFlags
        self.domain.createWithFlags = mock.Mock(wraps=start, side_effect=[world.libvirt_error("busy"), mock.DEFAULT])
        self._assert_snapshot(self.snapshot(), disk_format="raw")
        self.assertEqual(before, self.domain.picture())

    def test_guest_that_is_stopped_after_it_was_resumed(self):
        """Its tenant wanted that, and it stays off."""

        def stop_and_fail(*_, **__):
            self.assertEqual(fakelibvirt.VIR_DOMAIN_RUNNING, self.domain.state)
            self.domain.state = fakelibvirt.VIR_DOMAIN_SHUTOFF
            raise FAILURE

        disk_cannot_be_frozen(self)
        self.patch(self.image_service, "update", side_effect=stop_and_fail)
        self.assertRaises(test.TestingException, self.snapshot)
        self.assertEqual(fakelibvirt.VIR_DOMAIN_SHUTOFF, self.domain.state)

    def test_two_requests_at_once(self):
        """The one that fails first resumes its own guest, and not the other's, which is still needed suspended."""
        live_snapshots_are_disabled(self)
        others, others_domain = self.another_server()
        before, others_before = self.domain.picture(), others_domain.picture()
        conductor = world.Silence(self)

        def update_late(**_):
            conductor()
            raise FAILURE

        request = world.Beside(lambda: self.snapshot(update_task_state=update_late))
        self.assertTrue(conductor.begun.wait(world.PATIENCE_SECONDS))
        update = world.failing(FAILURE)
        self.assertRaises(test.TestingException, self.snapshot, others, update_task_state=update)
        self.assertEqual(others_before, others_domain.picture())
        self.assertEqual(fakelibvirt.VIR_DOMAIN_SHUTOFF, self.domain.state)
        conductor.end()
        self.assertRaises(test.TestingException, request.end)
        self.assertEqual(before, self.domain.picture())


@ddt.ddt
class AskedQemu(world.ServerCase):
    """Without an answer from QEMU there is no snapshot: it would cost the guest its disk."""

    @ddt.data("clone nova", "clone", "nova")
    def test_silent_qemu_is_left_alone(self, ways):
        """No rung is taken, and a second request asks nothing while the first question is unanswered."""
        self.flags(ways=ways.split(), group="rbd_snap")
        self.patch(guest, "_ANSWER_SECONDS", 0.01)
        self.domain.blockStats = silence = world.Silence(self)
        for state in (fakelibvirt.VIR_DOMAIN_RUNNING, fakelibvirt.VIR_DOMAIN_PAUSED):
            self.domain.state = state
            before = self.domain.picture()
            error = self.assertRaises(exception.NovaException, self.snapshot)
            self.assertIn("find out why QEMU hangs", str(error))
            self.assert_no_image()
            self.assertEqual((before, 0), (self.domain.picture(), self.domain.suspensions))
            self.copy.assert_not_called()
            self.assertEqual(1, len(self.guest_calls()))
        silence.end()
        self.await_guest_calls()
        self.patch(guest, "_ANSWER_SECONDS", world.PATIENCE_SECONDS)
        self._assert_snapshot(self.snapshot(), disk_format="raw")

    def test_silent_qemu_is_not_suspended_either(self):
        """Where the engine cannot freeze its disk: to suspend it would ask more of it, and take for ever."""
        disk_cannot_be_frozen(self)
        self.patch(guest, "_ANSWER_SECONDS", 0.01)
        self.domain.blockStats = world.Silence(self)
        self.assertRaises(exception.NovaException, self.snapshot)
        self.assertEqual(0, self.domain.suspensions)
        self.copy.assert_not_called()

    def test_other_guests_are_not_held_up(self):
        self.patch(guest, "_ANSWER_SECONDS", 0.01)
        self.domain.blockStats = world.Silence(self)
        self.assertRaises(exception.NovaException, self.snapshot)
        self.patch(guest, "_ANSWER_SECONDS", world.PATIENCE_SECONDS)
        others, _ = self.another_server()
        self._assert_snapshot(self.snapshot(others), disk_format="raw")

    def test_question_that_fails_is_no_answer(self):
        self.domain.blockStats = world.failing(world.libvirt_error("cannot acquire state change lock"))
        error = self.assertRaises(exception.NovaException, self.snapshot)
        self.assertIn("cannot acquire state change lock", str(error))
        self.assert_no_image()
        self.copy.assert_not_called()

    def test_guest_that_is_off_is_not_asked(self):
        """Nor held still: there is nobody."""
        self.domain.state = fakelibvirt.VIR_DOMAIN_SHUTOFF
        self.server.system_metadata.update(image_hw_qemu_guest_agent="yes", image_os_require_quiesce="yes")
        self.patch(guest, "_ANSWER_SECONDS", 0.01)
        self.domain.blockStats = self.domain.fsFreeze = world.Silence(self)
        for way in ("clone", "nova"):
            self.flags(ways=[way], group="rbd_snap")
            self._assert_snapshot(self.snapshot(), disk_format="raw")

    def test_guest_that_goes_off_when_asked(self):
        """It has no disk to lose any more."""

        def go_off(_):
            self.domain.state = fakelibvirt.VIR_DOMAIN_SHUTOFF
            raise world.libvirt_error("domain is not running")

        self.domain.blockStats = go_off
        self._assert_snapshot(self.snapshot(), disk_format="raw")


def failing_agent(case):
    """It says at once that it cannot."""
    unresponsive = world.libvirt_error("the agent is not connected", fakelibvirt.VIR_ERR_AGENT_UNRESPONSIVE)
    case.domain.fsFreeze = world.failing(unresponsive)


def silent_agent(case):
    """It freezes, and nobody hears of it."""
    case.patch(guest, "_FREEZE_SECONDS", 0.01)
    silence = world.Silence(case)
    case.domain.fsFreeze = lambda: (world.Domain.fsFreeze(case.domain), silence())


def agent_that_fails_late(case):
    """It freezes, and says that it failed to; and at first has no ear for a thaw."""
    case.patch(guest, "_AT_ONCE_SECONDS", 0)
    case.patch(guest, "_PAUSE_SECONDS", 0)
    case.domain.fsFreeze = lambda: (world.Domain.fsFreeze(case.domain), failing())
    failing = world.failing(world.libvirt_error("the agent's answer was lost"))
    thaw = case.domain.fsThaw
    case.domain.fsThaw = mock.Mock(wraps=thaw, side_effect=[world.libvirt_error("busy"), mock.DEFAULT])


AGENTS = (failing_agent, silent_agent, agent_that_fails_late)


@ddt.ddt
class QuiescedGuest(world.ServerCase):
    """A guest with an agent is held still for the one moment that counts, and whatever happens not longer."""

    def setUp(self):
        super().setUp()
        self.server.system_metadata["image_hw_qemu_guest_agent"] = "yes"

    def require(self):
        self.server.system_metadata["image_os_require_quiesce"] = "yes"

    def assert_thawed(self):
        """It has been frozen, is not so any more, nor will be, and libvirt waits for its agent as before."""
        self.await_guest_calls()
        self.assertLess(0, self.domain.freezes)
        self.assertEqual((False, -2), (self.domain.frozen, self.domain.agent_patience))

    def assert_crash_consistent(self, image):
        """There is an image, and the log says what it is worth."""
        self._assert_snapshot(image, disk_format="raw")
        self.assertIn("crash-consistent", self.stdlog.logger.output)

    def assert_refused(self):
        """The request fails and says what to do; there is neither a snapshot nor a copy."""
        error = self.assertRaises(exception.NovaException, self.snapshot)
        self.assertIn("os_require_quiesce", str(error))
        self.assert_no_image()
        self.copy.assert_not_called()
        self.assertEqual(0, self.domain.suspensions)

    @ddt.data("best effort", "required")
    def test_held_still_for_the_snap_alone(self, how):
        """Before the snapshot is begun, and until it is there; meanwhile the agent has to answer soon."""
        if how == "required":
            self.require()
        seen = []
        self.engine.meanwhile["snap"] = lambda: seen.append((self.domain.frozen, self.domain.agent_patience))
        self.engine.meanwhile["clone"] = lambda: seen.append(self.domain.until(lambda: not self.domain.frozen))
        self._assert_snapshot(self.snapshot(), disk_format="raw")
        self.assertEqual([(True, guest._FREEZE_SECONDS), True], seen)
        self.assert_thawed()
        self.assertNotIn("crash-consistent", self.stdlog.logger.output)

    def test_held_still_for_the_snap_of_a_copy(self):
        self.flags(ways=["nova"], group="rbd_snap")
        seen = []
        self.engine.meanwhile["snap"] = lambda: seen.append(self.domain.frozen)
        self.copy.side_effect = lambda *_: seen.append(self.domain.until(lambda: not self.domain.frozen))
        self._assert_snapshot(self.snapshot(), disk_format="raw")
        self.assertEqual([True, True], seen)
        self.assert_thawed()

    def let_snap_be_late(self):
        """The snapshot is there only after the guest had to be let go."""
        self.patch(guest, "_STILL_SECONDS", 0.05)
        self.patch(guest, "_MARGIN_SECONDS", 0)
        self.engine.meanwhile["snap"] = lambda: self.domain.until(lambda: self.domain.thaws)

    def test_late_snapshot(self):
        """It is kept for what it is worth."""
        self.let_snap_be_late()
        self.assert_crash_consistent(self.snapshot())
        self.assert_thawed()

    def test_late_snapshot_where_stillness_is_required(self):
        """It is worth nothing."""
        self.require()
        self.let_snap_be_late()
        self.assert_refused()
        self.assert_thawed()

    @ddt.named_data(*world.crossed(("clone nova", "nova"), AGENTS))
    def test_required_of_an_agent_that_cannot(self, ways, agent):
        self.flags(ways=ways.split(), group="rbd_snap")
        self.require()
        agent(self)
        self.assert_refused()
        self.assertTrue(self.domain.until(lambda: not self.domain.frozen))

    def test_required_without_an_agent(self):
        self.require()
        del self.server.system_metadata["image_hw_qemu_guest_agent"]
        self.assert_refused()

    @ddt.named_data(*world.crossed(AGENTS))
    def test_best_effort_of_an_agent_that_cannot(self, agent):
        agent(self)
        self.assert_crash_consistent(self.snapshot())
        self.assertTrue(self.domain.until(lambda: not self.domain.frozen))

    def test_guest_without_an_agent(self):
        """Most guests: nothing is asked of them, not even a thaw."""
        del self.server.system_metadata["image_hw_qemu_guest_agent"]
        self._assert_snapshot(self.snapshot(), disk_format="raw")
        self.await_guest_calls()
        self.assertEqual((0, 0), (self.domain.freezes, self.domain.thaws))

    def test_thawed_when_the_snapshot_fails(self):
        self.flags(ways=["clone"], group="rbd_snap")
        self.engine.meanwhile["snap"] = world.failing(errors.NoSpace("the pool is full"))
        self.assertRaises(exception.NovaException, self.snapshot)
        self.assert_thawed()
        self.assert_no_image()

    def test_freeze_that_comes_after_its_thaw(self):
        """libvirt was stuck, and does both in an order of its own: the freeze has not the last word."""
        self.patch(guest, "_FREEZE_SECONDS", 0.01)
        stuck = world.Silence(self)
        self.domain.fsFreeze = lambda: (stuck(), world.Domain.fsFreeze(self.domain))
        self.assert_crash_consistent(self.snapshot())
        self.assertTrue(self.domain.until(lambda: self.domain.thaws))
        stuck.end()
        self.assert_thawed()
