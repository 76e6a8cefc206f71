# SPDX-License-Identifier: Apache-2.0
"""How long a snapshot takes by each policy of flattening, and a deletion; see ``make bench-policies``.

As ``bench.py`` measures it, side by side in one run, at the monitors' default of one proposal a second and at ten:
stock Nova; ours with ``inline``, ``background`` (no worker flattens meanwhile) and ``never``; the bare work, with the
flatten and without. Then, at the default:

- what ``never`` costs by the size of a thin disk, and by how many snapshots the disk has already;
- eight servers at once beside one;
- a snapshot while a worker flattens another image, or while Glance hashes one, beside one when nothing does;
- how long the deletion of a server with a large disk takes, by stock Nova and with ``delete = trash``.

The largest disk is written thinly: 256 KiB in every object of 4 MiB. It runs on cloud 34 of the lab: in 31 each call to
the conductor takes half a second, whoever makes it, and a snapshot has two of them.
"""

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import proposals
import rbd
from bench import environment, measure_bare
from cloud import GIB, MIB, Cloud, NotAsAsked, wait_for

RESULT = pathlib.Path(__file__).parents[1] / "build" / "bench-policies.json"
#: Bytes in all, and those written at the start of each object.
SIZES = {
    "64 MiB": (64 * MIB, 4 * MIB),
    "1 GiB": (GIB, 4 * MIB),
    "4 GiB": (4 * GIB, 4 * MIB),
    "16 GiB": (16 * GIB, MIB // 4),
}
SMALLEST, LARGEST = "64 MiB", "16 GiB"
INTERVALS = (1.0, 0.1)
#: The same for what is not measured.
HURRIED = 0.05
POLICIES = ("inline", "background", "never")
OBJECT = 4 * MIB
THIN = {"16 GiB": 16 * GIB, "128 GiB": 128 * GIB, "1 TiB": 1024 * GIB}
EARLIER = (0, 10, 100, 400)
AT_ONCE = 8
BARE_FACTOR, SIZE_FACTOR, AT_ONCE_FACTOR, BESIDE_FACTOR, DELETE_SECONDS = 1.2, 1.1, 1.5, 1.2, 2.0
STOCK_FACTOR = {1.0: 6, 0.1: 10}


class Bench:
    """One run."""

    def __init__(self, cloud, samples):
        self.cloud, self.samples = cloud, samples
        self.glance = cloud.glance_as_nova()
        self.servers = {}

    def boot(self):
        for size, (count, written) in SIZES.items():
            server = self.servers[size] = self.cloud.boot(f"policies-{count // MIB}", flavor="huge")
            with rbd.Image(self.cloud.vms, self.cloud.disk(server)) as disk:
                for offset in range(OBJECT * 4, OBJECT * 4 + count, OBJECT):
                    disk.write(os.urandom(written), offset)
                disk.flush()

    def restart(self, case, **options):
        """Nova-compute as *case* has it; the first snapshot after that does not count."""
        if case != "stock":
            options = {"flatten": case, "flatten_workers": 0, **options}
        self.cloud.restart_nova_compute(enabled=case != "stock", **options)
        self.clear(self.cloud.snapshot(self.servers[SMALLEST], "first")[0].image_id)

    def clear(self, *image_ids):
        for image_id in image_ids:
            self.cloud.delete_image(image_id)
        self.cloud.purge()
        self.cloud.wait_until_trimmed()

    def seconds(self, case, server, number, interval=1.0):
        """One snapshot that is as *case* says, the *number*-th of its kind; its image is gone afterwards."""
        self.cloud.check_room()
        proposals.await_moment(self.cloud.vms, number % self.samples / self.samples, interval)
        if case.startswith("bare"):
            timing = measure_bare(self.cloud, self.glance, server, flatten=case == "bare")
        else:
            timing, log = self.cloud.snapshot(server, "policies")
            if ("cloned in" in log) != (case != "stock") or "standard snapshot" in log:
                raise NotAsAsked(f"this was not {case}'s own way:\n{log}")
            if self.cloud.is_flat(timing.image_id) != (case in ("stock", "inline")):
                raise NotAsAsked(f"{case}: the image is flat, or is not")
        self.clear(timing.image_id)
        print(".", end="", flush=True)
        return timing.active

    def median(self, case, server):
        return statistics.median(self.seconds(case, server, number) for number in range(self.samples))

    # -- what is measured ----------------------------------------------------------------------------------------

    def policies(self, interval):
        """Medians by case and size."""
        found = {}
        beside = {"inline": "bare", "never": "bare, not flat"}
        for case in ("stock", *POLICIES):
            self.restart(case)
            for size, server in self.servers.items():
                for number in range(self.samples):
                    for each in (case, *([beside[case]] if case in beside else [])):
                        found.setdefault((each, size), []).append(self.seconds(each, server, number, interval))
        return {key: statistics.median(values) for key, values in found.items()}

    def thin(self):
        """What ``never`` costs, by the size of a disk that is empty."""
        found = {}
        for size, count in THIN.items():
            server = self.cloud.boot("thin")
            with rbd.Image(self.cloud.vms, self.cloud.disk(server)) as disk:
                disk.resize(count)
            found[size] = self.median("never", server)
            self.cloud.delete_server(server)
        return found

    def crowded(self):
        """What it costs, by how many snapshots the disk has already."""
        server, found, have = self.cloud.boot("crowded"), {}, 0
        with rbd.Image(self.cloud.vms, self.cloud.disk(server)) as disk:
            for count in EARLIER:
                with self.cloud.proposing_every(HURRIED):
                    for number in range(have, count):
                        disk.create_snap(f"earlier-{number}")
                have = count
                found[count] = self.median("never", server)
            with self.cloud.proposing_every(HURRIED):
                for number in range(have):
                    disk.remove_snap(f"earlier-{number}")
        self.cloud.delete_server(server)
        return found

    def at_once(self):
        """One snapshot alone, and the slowest of eight at once of eight servers' disks."""

        def snapshot(one, server):
            return one.snapshot(server, "at-once")[0]

        servers = [self.cloud.boot(f"at-once-{number}") for number in range(AT_ONCE)]
        for server in servers:
            self.cloud.write(server, [os.urandom(OBJECT)])
        self.restart("never", at_once=AT_ONCE)
        found = {1: [], AT_ONCE: []}
        # A connection to the databases and one to the APIs of each one's own.
        with ThreadPoolExecutor(AT_ONCE) as pool:
            clouds = list(pool.map(lambda _: Cloud(), servers))
            for number in range(self.samples):
                for count, times in found.items():
                    proposals.await_moment(self.cloud.vms, number / self.samples)
                    made = list(pool.map(snapshot, clouds[:count], servers))
                    times.append(max(timing.active for timing in made))
                    self.clear(*(timing.image_id for timing in made))
        for server in servers:
            self.cloud.delete_server(server)
        return tuple(statistics.median(times) for times in found.values())

    def beside(self, begin, goes_on):
        """Medians of a small snapshot alone, and while something large goes on.

        :param begin: begins that, and returns what *goes_on* and :meth:`clear` need to know.
        """
        small, alone, beside = self.servers[SMALLEST], [], []
        for number in range(self.samples):
            alone.append(self.seconds("background", small, number))
            image_id = begin()
            proposals.await_moment(self.cloud.vms, number / self.samples)
            timing, _ = self.cloud.snapshot(small, "beside")
            if not goes_on(image_id):
                raise NotAsAsked("it was over before the snapshot was")
            beside.append(timing.active)
            self.clear(image_id, timing.image_id)
        return statistics.median(alone), statistics.median(beside)

    def beside_a_flatten(self):
        """While a worker flattens an image of the largest disk."""

        def begin():
            image_id = self.cloud.snapshot(self.servers[LARGEST], "large")[0].image_id
            wait_for(lambda: self.cloud.is_locked(image_id), "a worker flattens", pause=0.05)
            return image_id

        self.restart("background", flatten_workers=1)
        return self.beside(begin, lambda image_id: not self.cloud.is_flat(image_id))

    def beside_hashing(self):
        """While Glance hashes an image of the largest disk; and how many seconds it hashes."""

        def begin():
            return self.cloud.snapshot(self.servers[LARGEST], "large")[0].image_id

        def goes_on(image_id):
            return not self.cloud.image(image_id)["os_hash_value"]

        self.restart("background")
        found = self.beside(begin, goes_on)
        image_id = begin()
        began = time.monotonic()
        wait_for(lambda: not goes_on(image_id), "Glance has hashed the image", 900)
        hashed = time.monotonic() - began
        self.clear(image_id)
        return found, hashed

    def deletion(self, size):
        """Seconds until a server with a thin disk of that size is gone."""
        server = self.cloud.boot("deletion")
        with rbd.Image(self.cloud.vms, self.cloud.disk(server)) as disk:
            disk.resize(THIN[size])
        return self.cloud.delete_server(server)


def goals(result):
    """Each goal as a sentence, and whether it was met."""
    medians = result["medians"]
    for interval in INTERVALS:
        for policy in POLICIES[1:]:
            times = {size: medians[interval, policy, size] for size in SIZES}
            for size, seconds in times.items():
                ratio = seconds / medians[interval, "bare, not flat", size]
                yield f"{interval} s, {policy}, {size}: at most 1.2 x bare ({ratio:.2f})", ratio <= BARE_FACTOR
            spread = max(times.values()) / min(times.values())
            yield f"{interval} s, {policy}: within 10 % at every size ({spread:.2f})", spread <= SIZE_FACTOR
            ratio = medians[interval, "stock", "4 GiB"] / times["4 GiB"]
            wanted = STOCK_FACTOR[interval]
            yield f"{interval} s, {policy}, 4 GiB: {wanted} x faster than stock ({ratio:.1f})", ratio >= wanted
    one, many = result["at_once"]
    yield f"{AT_ONCE} servers at once: at most 1.5 x one ({many / one:.2f})", many / one <= AT_ONCE_FACTOR
    alone, beside = result["beside_a_flatten"]
    yield f"beside a flatten: at most 1.2 x alone ({beside / alone:.2f})", beside / alone <= BESIDE_FACTOR
    for size, (_, ours) in result["deletions"].items():
        yield f"deletion of {size}: under 2 s ({ours:.1f})", ours < DELETE_SECONDS


def show(result):
    cases, medians = ("bare", "bare, not flat", "stock", *POLICIES), result["medians"]
    print("\n\nSeconds until the image is active, medians\n")
    print(f"{'interval':10}{'written':10}" + "".join(f"{case:>16}" for case in cases))
    for interval in INTERVALS:
        for size in SIZES:
            cells = (f"{medians[interval, case, size]:16.2f}" for case in cases)
            print(f"{interval:<10}{size:10}" + "".join(cells))
    print()
    for name, value in result.items():
        if name != "medians":
            print(f"{name}: {value}")
    verdicts = list(goals(result))
    print("\n" + "\n".join(f"{'PASS' if met else 'FAIL'}  {goal}" for goal, met in verdicts))
    return all(met for _, met in verdicts)


def run(bench):
    """Everything, by name."""
    cloud, result = bench.cloud, {}
    with cloud.without_hashes():
        medians = result["medians"] = {}
        for interval in INTERVALS:
            with cloud.proposing_every(interval):
                for (case, size), seconds in bench.policies(interval).items():
                    medians[interval, case, size] = seconds
        bench.restart("never", delete="trash")
        result["never, by size of a thin disk"] = bench.thin()
        result["never, by earlier snapshots"] = bench.crowded()
        ours = {size: bench.deletion(size) for size in ("16 GiB", "1 TiB")}
        bench.restart("stock")
        # of stock Nova, and ours
        result["deletions"] = {size: (bench.deletion(size), seconds) for size, seconds in ours.items()}
        result["at_once"] = bench.at_once()  # one, and the slowest of eight
        result["beside_a_flatten"] = bench.beside_a_flatten()  # alone, and beside it
    result["beside_hashing"], result["hashing"] = bench.beside_hashing()
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=7, help="of each case at each size (default: %(default)s)")
    cloud = Cloud()
    bench = Bench(cloud, parser.parse_args().samples)
    with contextlib.ExitStack() as stack:
        stack.enter_context(cloud.readers())
        stack.enter_context(cloud.flavor("huge", 24))
        try:
            bench.boot()
            result = run(bench)
        finally:
            for server in bench.servers.values():
                cloud.delete_server(server)
    rows = [
        {"interval": interval, "case": case, "size": size, "seconds": round(value, 3)}
        for (interval, case, size), value in result["medians"].items()
    ]
    RESULT.parent.mkdir(exist_ok=True)
    about = environment(cloud)
    RESULT.write_text(json.dumps({**result, "medians": rows, "environment": about}, indent=2) + "\n")
    sys.exit(0 if show(result) else 1)


if __name__ == "__main__":
    main()
