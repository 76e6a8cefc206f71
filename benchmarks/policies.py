# SPDX-License-Identifier: Apache-2.0
"""How long a snapshot takes by each policy of flattening, and a deletion; see ``make bench-policies``.

As ``bench.py`` measures it, side by side in one run, at the monitors' default of one proposal a second and at ten:
stock Nova; ours with ``inline``, ``background`` (no worker flattens meanwhile) and ``never``; the bare work, with the
flatten and without. Then what ``never`` costs by the size of a thin disk, and by how many snapshots the disk has
already; and how long the deletion of a server with a large disk takes, by stock Nova and with ``delete = trash``.

Larger disks are written thinly: 256 KiB in every object of 4 MiB.
"""

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import sys
import time

import rbd
from bench import environment, measure_bare
from cloud import GIB, MIB, Cloud, NotAsAsked

RESULT = pathlib.Path(__file__).parents[1] / "build" / "bench-policies.json"
#: Bytes written at the start of each object.
SIZES = {
    "64 MiB": (64 * MIB, 4 * MIB),
    "1 GiB": (GIB, 4 * MIB),
    "4 GiB": (4 * GIB, MIB // 4),
    "16 GiB": (16 * GIB, MIB // 4),
}
INTERVALS = (1.0, 0.1)
POLICIES = ("inline", "background", "never")
OBJECT = 4 * MIB
THIN = {"16 GiB": 16 * GIB, "128 GiB": 128 * GIB, "1 TiB": 1024 * GIB}
EARLIER = (0, 10, 100, 400)
BARE_FACTOR, SIZE_FACTOR, DELETE_SECONDS = 1.2, 1.1, 2.0
STOCK_FACTOR = {1.0: 6, 0.1: 10}


class Bench:
    """One run."""

    def __init__(self, cloud, samples):
        self.cloud, self.samples = cloud, samples
        self.glance = cloud.glance_as_nova()
        self.servers, self.found = {}, {}

    def boot(self):
        for size, (count, written) in SIZES.items():
            server = self.servers[size] = self.cloud.boot(f"policies-{count // MIB}", flavor="huge")
            with rbd.Image(self.cloud.vms, self.cloud.disk(server)) as disk:
                for offset in range(OBJECT * 4, OBJECT * 4 + count, OBJECT):
                    disk.write(os.urandom(written), offset)
                disk.flush()

    def measure(self, interval, case, size):
        """One snapshot that is as *case* says; its image is gone afterwards."""
        self.cloud.check_room()
        server = self.servers[size]
        if case.startswith("bare"):
            timing = measure_bare(self.cloud, self.glance, server, flatten=case == "bare")
        else:
            timing, log = self.cloud.snapshot(server, "policies")
            if ("cloned in" in log) != (case != "stock") or "standard snapshot" in log:
                raise NotAsAsked(f"this was not {case}'s own way:\n{log}")
            if self.is_flat(timing.image_id) != (case in ("stock", "inline")):
                raise NotAsAsked(f"{case}: the image is flat, or is not")
        self.found.setdefault((interval, case, size), []).append(timing.active)
        self.cloud.delete_image(timing.image_id)
        self.cloud.purge()
        self.cloud.wait_until_trimmed()
        print(".", end="", flush=True)

    def is_flat(self, image_id):
        with rbd.Image(self.cloud.images, image_id, read_only=True) as image:
            try:
                image.parent_info()
            except rbd.ImageNotFound:
                return True
            return False

    def round(self, interval):
        for case in ("stock", *POLICIES):
            options = {"flatten": case, "flatten_workers": 0} if case != "stock" else {}
            self.cloud.restart_nova_compute(enabled=case != "stock", **options)
            self.measure(interval, case, "64 MiB")
            del self.found[interval, case, "64 MiB"][0]  # the first after a restart
            for size in SIZES:
                for _ in range(self.samples):
                    self.measure(interval, case, size)
                    if case == "inline":
                        self.measure(interval, "bare", size)
                    if case == "never":
                        self.measure(interval, "bare, not flat", size)

    def medians(self):
        return {key: statistics.median(values) for key, values in self.found.items() if values}


def thin(cloud, samples):
    """What ``never`` costs by the size of the disk: seconds, by size."""
    found = {}
    for size, count in THIN.items():
        server = cloud.boot("thin")
        with rbd.Image(cloud.vms, cloud.disk(server)) as disk:
            disk.resize(count)
        found[size] = statistics.median(one(cloud, server) for _ in range(samples))
        cloud.delete_server(server)
        cloud.purge()
    return found


def one(cloud, server):
    timing, _ = cloud.snapshot(server, "policies")
    cloud.delete_image(timing.image_id)
    cloud.purge()
    return timing.active


def crowded(cloud, samples):
    """The same by how many snapshots the disk has already."""
    server, found = cloud.boot("crowded"), {}
    with rbd.Image(cloud.vms, cloud.disk(server)) as disk:
        have = 0
        for count in EARLIER:
            for number in range(have, count):
                disk.create_snap(f"earlier-{number}")
            have = count
            found[count] = statistics.median(one(cloud, server) for _ in range(samples))
        for snap in list(disk.list_snaps()):
            disk.remove_snap(snap["name"])
    cloud.delete_server(server)
    return found


def deletion(cloud, size):
    """Seconds until a server with a thin disk of that size is gone."""
    server = cloud.boot("deletion")
    with rbd.Image(cloud.vms, cloud.disk(server)) as disk:
        disk.resize(size)
    began = time.monotonic()
    cloud.delete_server(server)
    return time.monotonic() - began


def goals(medians, deletions):
    """Each goal as a sentence, and whether it was met."""
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
    for size, (_, ours) in deletions.items():
        yield f"deletion of {size}: under 2 s ({ours:.1f})", ours < DELETE_SECONDS


def show(medians, thin_disks, crowds, deletions):
    cases = ("bare", "bare, not flat", "stock", *POLICIES)
    print("\n\nSeconds until the image is active, medians\n")
    print(f"{'interval':10}{'written':10}" + "".join(f"{case:>16}" for case in cases))
    for interval in INTERVALS:
        for size in SIZES:
            cells = (f"{medians[interval, case, size]:16.2f}" for case in cases)
            print(f"{interval:<10}{size:10}" + "".join(cells))
    print("\nnever, by size of a thin disk:", {size: round(value, 2) for size, value in thin_disks.items()})
    print("never, by earlier snapshots:", {count: round(value, 2) for count, value in crowds.items()})
    print("deletion, stock and ours:", {size: [round(each, 2) for each in pair] for size, pair in deletions.items()})
    verdicts = list(goals(medians, deletions))
    print("\n" + "\n".join(f"{'PASS' if met else 'FAIL'}  {goal}" for goal, met in verdicts))
    return all(met for _, met in verdicts)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=5, help="of each case at each size (default: %(default)s)")
    samples = parser.parse_args().samples
    cloud = Cloud()
    bench = Bench(cloud, samples)
    with contextlib.ExitStack() as stack:
        stack.enter_context(cloud.without_hashes())
        stack.enter_context(cloud.readers())
        stack.enter_context(cloud.flavor("huge", 24))
        try:
            bench.boot()
            for interval in INTERVALS:
                with cloud.proposing_every(interval):
                    bench.round(interval)
            cloud.restart_nova_compute(enabled=True, flatten="never", delete="trash")
            thin_disks, crowds = thin(cloud, samples), crowded(cloud, samples)
            ours = {size: deletion(cloud, THIN[size]) for size in ("16 GiB", "1 TiB")}
            cloud.restart_nova_compute(enabled=False)
            deletions = {size: (deletion(cloud, THIN[size]), ours[size]) for size in ours}
        finally:
            for server in bench.servers.values():
                cloud.delete_server(server)
    medians = bench.medians()
    rows = [
        {"interval": interval, "case": case, "size": size, "seconds": round(value, 3)}
        for (interval, case, size), value in medians.items()
    ]
    RESULT.parent.mkdir(exist_ok=True)
    result = {
        "rows": rows,
        "thin": thin_disks,
        "earlier_snapshots": crowds,
        "deletions": deletions,
        "environment": environment(cloud),
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(0 if show(medians, thin_disks, crowds, deletions) else 1)


if __name__ == "__main__":
    main()
