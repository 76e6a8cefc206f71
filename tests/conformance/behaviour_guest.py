# SPDX-License-Identifier: Apache-2.0
"""What a snapshot may do to a guest: nothing that outlasts it, and nothing at all to one that does not answer."""

# ruff: noqa: PT009, PT027 - Nova's harness is unittest, and its environments have no pytest

import contextvars
import itertools
from unittest import mock

import ddt
import world
from nova import exception, test
from nova.storage import rbd_utils
from nova.tests.fixtures import libvirt as fakelibvirt
from nova.virt.libvirt import guest as nova_guest
from nova.virt.libvirt import host
from oslo_utils.fixture import uuidsentinel

from nova_rbd_snap import errors
from nova_rbd_snap.openstack import driver, guest, imagebackend, process

FAILURE = test.TestingException("what went wrong first")
UNEXPECTED = exception.UnexpectedTaskStateError(instance_uuid="it", expected="a snapshot", actual="another task")
#: What a request meets whose server is being deleted.
DELETING = exception.UnexpectedDeletingTaskStateError(instance_uuid="it", expected="a snapshot", actual="deleting")
DELETED = exception.InstanceNotFound(instance_id="it")

#: States in which there is a QEMU although the guest itself does nothing.
LIFELESS = (nova_guest.VIR_DOMAIN_PMSUSPENDED, fakelibvirt.VIR_DOMAIN_CRASHED)


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
    *(task_state(number, error) for number in range(4) for error in (FAILURE, UNEXPECTED)),
)
#: And because the server goes; where Nova suspends the guest first, it has resumed it before the last number.
GOING = tuple(task_state(number, error) for number in range(4) for error in (DELETING, DELETED))
WHILE_OFF = tuple(task_state(number, error) for number in range(3) for error in (DELETING, DELETED))


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

    @ddt.named_data(*world.crossed(WHILE_OFF))
    def test_server_that_goes_meanwhile(self, go):
        """Its guest stays off: its disks and its ports are being removed."""
        live_snapshots_are_disabled(self)
        error = go(self)
        self.assertIs(error, self.assertRaises(type(error), self.snapshot))
        self.assertEqual(fakelibvirt.VIR_DOMAIN_SHUTOFF, self.domain.state)
        self.assert_no_image()

    @ddt.named_data(*world.crossed(GOING))
    def test_server_that_goes_is_left_as_nova_leaves_it(self, go):
        """With the devices that it had then."""
        live_snapshots_are_disabled(self)
        pictures = []
        for snapshot in (self.snapshot, self.snapshot_by_nova):
            self.give_pci_devices()
            error = go(self)
            self.assertIs(error, self.assertRaises(type(error), snapshot))
            pictures.append(self.domain.picture())
        self.assertEqual(pictures[1], pictures[0])

    def snapshot_by_nova(self):
        """With nobody who looks after the guest when Nova's own driver has done."""
        nova = driver.LibvirtDriver.__base__
        request = self.driver, self.context, self.server, self.image_id, self.mock_update_task_state
        contextvars.copy_context().run(nova.snapshot, *request)

    @ddt.named_data(*world.crossed(GOING))
    def test_server_that_goes_while_its_guest_runs(self, go):
        """It was not suspended yet, or Nova has resumed it: nobody ends it here."""
        before = self.domain.picture()
        disk_cannot_be_frozen(self)
        error = go(self)
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

    @ddt.data("reserve_freeze", "snap")
    def test_engine_that_dies_over_the_freeze(self, call):
        """The next one freezes the disk."""
        self.flags(ways=["nova"], group="rbd_snap")
        self.engine.meanwhile[call] = mock.Mock(side_effect=[errors.EngineLost("killed"), None])
        before = self.domain.picture()
        self._assert_snapshot(self.snapshot(), disk_format="raw")
        self.assertEqual((before, 0), (self.domain.picture(), self.domain.suspensions))
        self.assert_nothing_left()

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
        for state in (fakelibvirt.VIR_DOMAIN_RUNNING, fakelibvirt.VIR_DOMAIN_PAUSED, *LIFELESS):
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
        disk_cannot_be_frozen(self)
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
    case.patch(guest, "_PAUSES_SECONDS", (0.01, 0.01))
    freeze_and_fail(case, world.libvirt_error("the agent's answer was lost"))


def freeze_and_fail(case, error):
    case.domain.fsFreeze = lambda: (world.Domain.fsFreeze(case.domain), world.failing(error)())
    thaw = case.domain.fsThaw
    case.domain.fsThaw = mock.Mock(wraps=thaw, side_effect=[error, mock.DEFAULT])


def lost_connection(case):
    """It freezes, and libvirtd goes before it could say so."""
    case.patch(guest, "_PAUSES_SECONDS", (0.01, 0.01))
    freeze_and_fail(case, world.libvirt_error("client socket is closed", source=fakelibvirt.VIR_FROM_RPC))


def lost_remote(case):
    """As an older libvirt says it."""
    case.patch(guest, "_PAUSES_SECONDS", (0.01, 0.01))
    freeze_and_fail(case, world.libvirt_error("cannot recv data", source=fakelibvirt.VIR_FROM_REMOTE))


AGENTS = (failing_agent, silent_agent, agent_that_fails_late, lost_connection, lost_remote)


def turned_off(case):
    domain = case.domains[case.server.uuid]
    domain.state = fakelibvirt.VIR_DOMAIN_SHUTOFF
    domain.fsThaw = world.failing(world.libvirt_error("domain is not running"))


def turned_off_while_libvirtd_restarts(case):
    """What came of the old connection is of no use any more."""
    case.domain.info = case.domain.fsThaw = world.failing(
        world.libvirt_error("client socket is closed", source=fakelibvirt.VIR_FROM_RPC)
    )
    case.give_domain(case.server)
    turned_off(case)


def deleted(case):
    del case.domains[case.server.uuid]


#: How there comes to be no guest any more that could be frozen.
ENDINGS = (turned_off, turned_off_while_libvirtd_restarts, deleted)


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
        self.assertFalse(self.mark().exists())

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

    def test_required_of_a_disk_that_cannot_be_frozen(self):
        """A copy of a suspended guest lacks what that had not written yet."""
        self.require()
        disk_cannot_be_frozen(self)
        self.assert_refused()

    @ddt.data(*LIFELESS)
    def test_required_of_a_guest_that_is_asleep_or_crashed(self, state):
        self.require()
        failing_agent(self)
        self.domain.state = state
        self.assert_refused()

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
        stuck, marked = world.Silence(self), []

        def freeze_late():
            stuck()
            marked.append(self.mark().exists())
            world.Domain.fsFreeze(self.domain)

        self.domain.fsFreeze = freeze_late
        self.assert_crash_consistent(self.snapshot())
        self.assertTrue(self.domain.until(lambda: self.domain.thaws))
        stuck.end()
        self.assert_thawed()
        self.assertEqual([True], marked)

    @ddt.data("best effort", "required")
    def test_guest_that_an_earlier_snapshot_has_not_let_go(self, how):
        """Its thaw would come amid this freeze: this snapshot is crash-consistent, or none."""
        self.patch(guest, "_AT_ONCE_SECONDS", 0.01)
        stuck = world.Silence(self)
        self.domain.fsThaw = lambda: (stuck(), world.Domain.fsThaw(self.domain))
        self._assert_snapshot(self.snapshot(), disk_format="raw")
        self.assertTrue(stuck.begun.wait(world.PATIENCE_SECONDS))
        if how == "required":
            self.require()
            error = self.assertRaises(exception.NovaException, self.snapshot)
            self.assertIn("not let go", str(error))
        else:
            self.assert_crash_consistent(self.snapshot())
        self.assertEqual(1, self.domain.freezes)
        stuck.end()
        self.assert_thawed()

    def test_marked_while_it_may_be_frozen(self):
        """From before the freeze until after the thaw, lest it stay frozen when nova-compute dies."""
        marked = []
        self.domain.fsFreeze = lambda: (marked.append(self.mark().exists()), world.Domain.fsFreeze(self.domain))
        self.engine.meanwhile["snap"] = lambda: marked.append(self.mark().exists())
        self.domain.fsThaw = lambda: (world.Domain.fsThaw(self.domain), marked.append(self.mark().exists()))
        self._assert_snapshot(self.snapshot(), disk_format="raw")
        self.assert_thawed()
        self.assertEqual([True] * 3, marked)

    @ddt.data("best effort", "required")
    def test_guest_that_cannot_be_marked(self, how):
        """It is not frozen."""
        self.mark().parent.rmdir()
        if how == "required":
            self.require()
            self.assert_refused()
        else:
            self.assert_crash_consistent(self.snapshot())
        self.await_guest_calls()
        self.assertEqual(0, self.domain.freezes)

    def complaints(self):
        """What the log says at ERROR about the server's guest."""
        lines = self.stdlog.logger.output.splitlines()
        return [line for line in lines if " ERROR " in line and f"guest of server {self.server.uuid}" in line]

    @ddt.data("agent", "libvirtd")
    def test_guest_that_cannot_be_thawed_for_long(self, whose):
        """It is thawed when it can be, be that tomorrow; the operator is told once, after a minute."""
        clock = self.patch(guest, "time", world.Clock())
        attempts = []

        def until_tomorrow(answer, error):
            if self.domain.frozen:
                attempts.append((clock.now, len(self.complaints()), self.mark().exists()))
                if clock.now < 24 * 3600:
                    raise error
            return answer()

        if whose == "agent":
            error = world.libvirt_error("the agent is busy", fakelibvirt.VIR_ERR_AGENT_UNRESPONSIVE)
            self.domain.fsThaw = lambda: until_tomorrow(lambda: world.Domain.fsThaw(self.domain), error)
        else:
            error = exception.HypervisorUnavailable()
            found = mock.Mock(side_effect=lambda _: until_tomorrow(lambda: self.domain, error))
            self.patch(host.Host, "_get_domain", found)
        self._assert_snapshot(self.snapshot(), disk_format="raw")
        self.assert_thawed()
        times, told, marked = zip(*attempts)
        pauses = [later - earlier for earlier, later in zip(times, times[1:]) if later > earlier]
        self.assertEqual([1, 2, 4, 8, 16, 32, 60], pauses[:7])
        self.assertEqual({60}, set(pauses[7:]))
        self.assertEqual({0}, {number for now, number in zip(times, told) if now < guest._THAW_SECONDS})
        self.assertEqual({1}, {number for now, number in zip(times, told) if now > 2 * guest._THAW_SECONDS})
        self.assertEqual({True}, set(marked))
        self.assertIn("remedy: ", *self.complaints())

    @ddt.data(fakelibvirt.VIR_ERR_AGENT_UNRESPONSIVE, fakelibvirt.VIR_ERR_INTERNAL_ERROR)
    def test_freeze_that_is_refused(self, code):
        """At once, by the agent or by libvirt: nothing is frozen, and an agent that cannot thaw either is let be."""
        refused = world.failing(world.libvirt_error("no agent", code))
        self.domain.fsFreeze = self.domain.fsThaw = refused
        self.assert_crash_consistent(self.snapshot())
        self.await_guest_calls()
        self.assertEqual(2, refused.call_count)
        self.assertEqual((-2, False), (self.domain.agent_patience, self.mark().exists()))

    @ddt.named_data(*world.crossed(ENDINGS))
    def test_guest_that_goes_while_it_is_frozen(self, end):
        """There is nobody to thaw: that is no longer tried, and nobody is bothered with it."""
        self.patch(guest, "_PAUSES_SECONDS", (0.01, 0.01))
        self.patch(guest, "_THAW_SECONDS", world.PATIENCE_SECONDS)
        self.engine.meanwhile["snap"] = lambda: end(self)
        self._assert_snapshot(self.snapshot(), disk_format="raw")
        self.await_guest_calls()
        self.assertEqual([], self.complaints())
        self.assertFalse(self.mark().exists())


@ddt.ddt
class FrozenByAnEarlierLife(world.ServerCase):
    """Guests that were frozen when nova-compute died."""

    def setUp(self):
        super().setUp()
        self.freeze(self.server)
        self.others, self.others_domain = self.another_server()

    def freeze(self, server):
        self.domains[server.uuid].frozen = True
        self.domains[server.uuid].agent_patience = guest._FREEZE_SECONDS
        self.mark(server).touch()

    def assert_thawed(self):
        """So is the guest, and libvirt waits for its agent as before."""
        self.await_guest_calls()
        domain = self.domains[self.server.uuid]
        self.assertEqual((False, -2), (domain.frozen, domain.agent_patience))
        self.assertFalse(self.mark().exists())

    def test_those_that_run_and_bear_a_mark(self):
        """They are let go, and no others: who froze those is their own affair."""
        off, off_domain = self.another_server(uuidsentinel.off)
        self.freeze(off)
        off_domain.state = fakelibvirt.VIR_DOMAIN_SHUTOFF
        self.others_domain.frozen = True
        guest.thaw_all(self.driver)
        self.assert_thawed()
        self.assertEqual((True, 0), (self.others_domain.frozen, off_domain.thaws))

    def test_one_that_hangs(self):
        """It holds up neither nova-compute's start, nor the others, nor the engine."""
        self.patch(driver.LibvirtDriver.__base__, "init_host")
        identity = self.patch(process, "await_identity", world.Silence(self))
        self.freeze(self.others)
        self.domain.fsThaw = hanging = world.Silence(self)
        self.driver.init_host("here")
        self.assertFalse(self.engine.kept.is_set())
        identity.end()
        self.assertTrue(self.others_domain.until(lambda: not self.others_domain.frozen))
        self.assertTrue(self.engine.kept.wait(world.PATIENCE_SECONDS))
        self.assertTrue(hanging.begun.wait(world.PATIENCE_SECONDS))
        self.assertTrue(self.mark().exists())

    def test_libvirtd_that_restarts_meanwhile(self):
        """The guest is found anew, for what came of the old connection is of no use any more."""
        self.patch(guest, "_PAUSES_SECONDS", (0.01, 0.01))
        lost = world.libvirt_error("client socket is closed", source=fakelibvirt.VIR_FROM_RPC)

        def restart():
            self.domain.fsThaw = world.failing(lost)
            self.give_domain(self.server)
            self.freeze(self.server)
            raise lost

        self.domain.fsThaw = restart
        guest.thaw_all(self.driver)
        self.assert_thawed()

    @ddt.named_data(*world.crossed(ENDINGS))
    def test_guest_that_goes_meanwhile(self, end):
        """There is nobody to thaw."""
        self.patch(guest, "_PAUSES_SECONDS", (0.01, 0.01))

        def go():
            end(self)
            raise world.libvirt_error("the agent is gone")

        self.domain.fsThaw = go
        guest.thaw_all(self.driver)
        self.await_guest_calls()
        self.assertFalse(self.mark().exists())
