# SPDX-License-Identifier: Apache-2.0
"""Run Nova's own tests with our classes in the place of Nova's.

``make_env.py`` says which interpreter to run this with. It puts our ``Rbd`` and ``LibvirtDriver`` where Nova's test
modules look for theirs, runs the classes of ``CLASSES``, and compares what failed with ``exceptions.toml``: a failure
not listed there fails the run, and so does a listed test that passes, an entry that restates nothing, and a run in
which Nova's classes were used after all.

``--stock`` runs the same tests without swapping anything, to tell a broken environment from a broken plugin.
"""

import argparse
import collections
import functools
import importlib
import importlib.metadata
import inspect
import os
import pathlib
import sys
import tempfile
import time
import types
import unittest

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]

#: Tests of ours that go with Nova's, beside this file.
OURS = ("behaviour", "behaviour_copy", "behaviour_guest", "behaviour_deletion")

#: Most exceptions a release may have.
MOST_EXCEPTIONS = 8

LIBVIRT = "nova.tests.unit.virt.libvirt."
# The driver's tests come first: test_imagebackend leaves mocks of the Ceph bindings behind in Nova's modules, and a
# driver that needs them to be there must not pass because of that.
CLASSES = (
    LIBVIRT + "test_driver.LibvirtSnapshotTests",
    LIBVIRT + "test_imagebackend.RbdTestCase",
    LIBVIRT + "test_imagebackend.BackendTestCase",
    # Nothing of ours: the methods of Nova's that we inherit, on the libraries installed here.
    "nova.tests.unit.storage.test_rbd.RbdTestCase",
)


# ---- the swap ------------------------------------------------------------------------------------------------------


class Proof:
    """What the tests really used: how many objects of whose class, and which methods of ours."""

    def __init__(self):
        self.built = collections.Counter()
        self.called = collections.Counter()

    def watch(self, ours, stock):
        """Count every *stock* object from now on, and every call of a method that *ours* defines."""
        build = stock.__init__

        @functools.wraps(build)
        def counted(self_, *args, **kwargs):
            self.built[f"{'our' if isinstance(self_, ours) else 'stock'} {stock.__name__}"] += 1
            return build(self_, *args, **kwargs)

        stock.__init__ = counted
        for name, member in list(vars(ours).items()):
            if isinstance(member, types.FunctionType) and not name.startswith("__"):
                setattr(ours, name, self._count_calls(member, f"{ours.__name__}.{name}"))

    def _count_calls(self, method, name):
        @functools.wraps(method)
        def counted(*args, **kwargs):
            self.called[name] += 1
            return method(*args, **kwargs)

        # Nova compares the signatures of overridden methods, without looking through wrappers.
        counted.__signature__ = inspect.signature(method)
        return counted

    def gaps(self):
        """Why the run is no proof, as sentences."""
        for name in ("Rbd", "LibvirtDriver"):
            if not self.built[f"our {name}"]:
                yield f"no test used our {name}"
            if self.built[f"stock {name}"]:
                yield f"{self.built[f'stock {name}']} times a test used Nova's own {name}"
        for name in ("Rbd.direct_snapshot", "LibvirtDriver.snapshot"):
            if not self.called[name]:
                yield f"no test called our {name}"

    def __str__(self):
        counts = [f"{number} {what}" for what, number in sorted((self.built + self.called).items())]
        return ", ".join(counts)


class SwappedModule(types.ModuleType):
    """A module seen with some of its names replaced; everything else, patches included, is the module's own."""

    def __init__(self, module, **replaced):
        super().__init__(module.__name__)
        self.__dict__.update(_module=module, _replaced=replaced)

    def __getattribute__(self, name):
        if name.startswith("__"):
            return super().__getattribute__(name)
        own = super().__getattribute__("__dict__")
        return own["_replaced"][name] if name in own["_replaced"] else getattr(own["_module"], name)

    def __setattr__(self, name, value):
        setattr(self.__dict__["_module"], name, value)

    def __delattr__(self, name):
        delattr(self.__dict__["_module"], name)


def swap():
    """Put our classes where Nova's tests look for Nova's, and return the proof that gets filled."""
    # First of all: from 34 on Nova chooses eventlet or threads in the first of these, before that in the second.
    for chooser in ("nova.tests.unit", "nova.test"):
        importlib.import_module(chooser)
    from nova.virt.libvirt import driver as stock_driver
    from nova.virt.libvirt import imagebackend as stock_imagebackend

    from nova_rbd_snap.openstack import driver, imagebackend

    proof = Proof()
    proof.watch(imagebackend.Rbd, stock_imagebackend.Rbd)
    proof.watch(driver.LibvirtDriver, stock_driver.LibvirtDriver)

    # Before the test modules are imported: their decorators patch methods of the class they find here.
    stock_imagebackend.Rbd = imagebackend.Rbd
    from nova.tests.unit.virt.libvirt import test_driver

    # Only in the eyes of the tests: up to Nova 32 LibvirtDriver.__init__ says super(LibvirtDriver, self), looks that
    # name up in its module, and would find our subclass and call itself for ever.
    test_driver.libvirt_driver = SwappedModule(stock_driver, LibvirtDriver=driver.LibvirtDriver)
    return proof


# ---- the run -------------------------------------------------------------------------------------------------------


class Outcomes(unittest.TestResult):
    """What became of each test: ``failed`` maps its id to the traceback."""

    def __init__(self):
        super().__init__()
        self.failed = {}
        self.ran = []

    def startTest(self, test):
        super().startTest(test)
        self.ran.append(test.id())

    def addError(self, test, err):
        super().addError(test, err)
        self.failed[test.id()] = self.errors[-1][1]

    def addFailure(self, test, err):
        super().addFailure(test, err)
        self.failed[test.id()] = self.failures[-1][1]

    def addUnexpectedSuccess(self, test):
        super().addUnexpectedSuccess(test)
        self.failed[test.id()] = "unexpected success"


def run(names):
    """Run the tests of the classes or modules *names*."""
    suite = unittest.defaultTestLoader.loadTestsFromNames(names)
    outcomes = Outcomes()
    # Some of Nova's tests write where they are.
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        try:
            suite.run(outcomes)
        finally:
            os.chdir(before)
    return outcomes


# ---- the verdict ---------------------------------------------------------------------------------------------------


def exceptions_of(release):
    """The entries of exceptions.toml that apply to *release*, by test id."""
    import tomllib  # newer than the package's own oldest Python, so not at the top

    with open(HERE / "exceptions.toml", "rb") as file:
        entries = tomllib.load(file).get("exception", [])
    return {
        entry["test"]: entry
        for entry in entries
        if entry.get("since", release) <= release <= entry.get("until", release)
    }


def complaints(outcomes, exceptions):
    """What is wrong with this run, as sentences; none means it conforms."""
    for test in sorted(set(outcomes.failed) - set(exceptions)):
        yield f"{test} failed and is no known exception\n{outcomes.failed[test]}"
    for test, entry in sorted(exceptions.items()):
        if test not in outcomes.ran:
            yield f"{test} is listed as an exception but did not run"
        elif test not in outcomes.failed:
            yield f"{test} is listed as an exception but passes: remove it from exceptions.toml"
        if not entry.get("reason"):
            yield f"{test} is listed as an exception without a reason"
        if not _exists(entry.get("restated_by", "")):
            yield f"{test}: its behaviour is restated nowhere, no test is named {entry.get('restated_by')!r}"
    if len(exceptions) > MOST_EXCEPTIONS:
        yield f"{len(exceptions)} exceptions, the limit is {MOST_EXCEPTIONS}"


def _exists(test):
    """Whether our tree has *test*, given as ``tests/unit/test_x.py::test_y``."""
    path, _, name = test.partition("::")
    file = ROOT / path
    return bool(name) and file.is_file() and f"def {name.split('::')[-1].split('[')[0]}(" in file.read_text()


def main():
    parser = argparse.ArgumentParser(description="Run Nova's own tests with our classes swapped in.")
    parser.add_argument("release", type=int, help="the Nova release this environment is for, such as 31")
    parser.add_argument("--stock", action="store_true", help="Nova's own classes, no exceptions")
    options = parser.parse_args()
    version = importlib.metadata.version("nova")
    if int(version.split(".")[0]) != options.release:
        parser.error(f"this environment has Nova {version}; ask make_env.py {options.release} for the interpreter")
    # Hung tests fail. Logs and output stay inside the test that made them.
    for name, value in {"OS_TEST_TIMEOUT": "60", "OS_STDOUT_CAPTURE": "1", "OS_STDERR_CAPTURE": "1"}.items():
        os.environ.setdefault(name, value)

    started = time.monotonic()
    wrong, exceptions = [], {}
    if options.stock:
        outcomes = run(CLASSES)
        wrong += complaints(outcomes, exceptions)
    else:
        exceptions = exceptions_of(options.release)
        proof = swap()
        outcomes = run([*CLASSES, *OURS])
        wrong += complaints(outcomes, exceptions)
        wrong += proof.gaps()
        print(f"used: {proof}")
    for sentence in wrong:
        print(sentence)
    for test, entry in exceptions.items():
        print(f"exception: {test.rsplit('.', 1)[1]}: {entry['reason']} Restated by {entry['restated_by']}")
    for test, reason in outcomes.skipped:
        print(f"skipped by Nova: {test.id().rsplit('.', 1)[1]}: {reason}")
    ours = sum(test.startswith(tuple(f"{name}." for name in OURS)) for test in outcomes.ran)
    print(
        f"nova {options.release}: {len(outcomes.ran) - ours} run, {len(exceptions)} exceptions, {ours} of ours"
        f"{', STOCK CLASSES' if options.stock else ''} ({version}, {time.monotonic() - started:.0f} s)"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
