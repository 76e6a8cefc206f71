# SPDX-License-Identifier: Apache-2.0
"""Stock Nova's direct snapshot, ours, and the bare work, side by side on the lab's cloud 31; see ``make bench``.

*seconds* run from the moment nova-compute begins the snapshot ("instance snapshotting" in its log) to the moment the
image is active; for the bare work from its first call. *done* is when nothing is left to do: for Nova, when the server
takes the next task; for the bare work, when the snapshot of the disk is removed. All three snapshot the same disks of
running servers, 10 GB thin, random data written. How long a snapshot waits depends on how long ago the monitors' last
proposal was, so the samples of each case go evenly round that second. Nova's configuration is read only when it starts,
so stock and ours take turns in blocks of a few samples, the bare work one by one between them; the first snapshot after
each restart does not count. Between two samples the image is deleted and the OSDs come to rest.

By default Glance reads and hashes every image that was registered by POST locations, once it is active: no part of
any *seconds*, but for a 10 GB disk a minute of work beside the next samples. The benchmark switches it off meanwhile
(``do_secure_hash = false``).
"""

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import sys
import time

import bare
import proposals
from cloud import GIB, MIB, Cloud, NotAsAsked, Timing

RESULT = pathlib.Path(__file__).parents[1] / "build" / "bench.json"
SIZES = {"64 MiB": 64 * MIB, "1 GiB": GIB, "3 GiB": 3 * GIB}
CASES = ("bare", "stock", "ours")
SAMPLES_PER_BLOCK = 3

SNAPSHOTS_FOR_MEMORY = 20
GROWTH_LIMIT = 16 * MIB
ENGINE_LIMIT = 96 * MIB
BARE_FACTOR = 1.1
#: By package, the service that runs it.
_SERVICES = {"nova": "nova-compute", "nova-rbd-snap": "nova-compute", "glance": "glance-api"}


def measure_bare(cloud, glance, server_id, *, flatten=True):
    """One run of the bare work."""
    record = glance.post("/v2/images", json={"name": "bench", "visibility": "private"}).json()
    disk, image_id = cloud.disk(server_id), record["id"]
    url = f"rbd://{cloud.ceph.get_fsid()}/{cloud.images_pool}/{image_id}/snap"
    # What Nova says of a snapshot, more or less.
    properties = {
        "disk_format": "raw",
        "container_format": "bare",
        "image_location": "snapshot",
        "image_state": "available",
        "owner_id": record["owner"],
    }
    began = time.monotonic()
    bare.make_active(
        cloud.vms, cloud.images, glance, cloud.wait_until_active,
        disk=disk, image_id=image_id, url=url, properties=properties, flatten=flatten,
    )  # fmt: skip
    active = time.monotonic()
    bare.remove_source(cloud.vms, disk=disk, image_id=image_id)
    return Timing(image_id, active - began, time.monotonic() - began)


def measure_nova(cloud, case, server_id):
    """One snapshot by nova-compute, which must have gone the way of *case*."""
    timing, log = cloud.snapshot(server_id, "bench")
    if (f"Snapshot to image {timing.image_id}: cloned" in log) != (case == "ours") or "standard snapshot" in log:
        raise NotAsAsked(f"this was not {case}'s own way:\n{log}")
    return timing


class Bench:
    """One run: servers with data, and what was measured on them."""

    def __init__(self, cloud):
        self.cloud = cloud
        self.glance = cloud.glance_as_nova()
        self.servers = {}
        self.timings = {(case, size): [] for case in CASES for size in SIZES}
        self.samples = 1

    def boot(self):
        for size, count in SIZES.items():
            self.servers[size] = self.cloud.boot(f"bench-{count // MIB}")
            self.cloud.write(self.servers[size], (os.urandom(4 * MIB) for _ in range(count // (4 * MIB))))

    def remove(self):
        for server_id in self.servers.values():
            self.cloud.delete_server(server_id)

    def sample(self, case, size):
        self.cloud.check_room()
        server_id = self.servers[size]
        proposals.await_moment(self.cloud.vms, len(self.timings[case, size]) % self.samples / self.samples)
        if case == "bare":
            timing = measure_bare(self.cloud, self.glance, server_id)
        else:
            timing = measure_nova(self.cloud, case, server_id)
        if self.cloud.settled(timing.image_id)["os_hash_value"]:
            raise NotAsAsked("Glance hashes")
        self.cloud.delete_image(timing.image_id)
        self.cloud.wait_until_trimmed()
        return timing

    def block(self, case, count):
        """Samples of *case* at every size, each with one of the bare work beside it as long as those are wanted."""
        self.cloud.restart_nova_compute(enabled=case == "ours")
        self.sample(case, "64 MiB")
        for size in SIZES:
            for _ in range(count):
                if case == "ours":
                    self.keep("bare", size)
                self.keep(case, size)
                print(".", end="", flush=True)

    def keep(self, case, size):
        self.timings[case, size].append(self.sample(case, size))

    def run(self, samples):
        self.samples = samples
        while samples > 0:
            count = min(samples, SAMPLES_PER_BLOCK)
            self.block("stock", count)
            self.block("ours", count)
            samples -= count
        print(flush=True)

    def rows(self):
        medians = {key: statistics.median(t.active for t in timings) for key, timings in self.timings.items()}
        for size, written in SIZES.items():
            for case in CASES:
                timings = self.timings[case, size]
                active, done = [t.active for t in timings], [t.done for t in timings]
                yield {
                    "case": case,
                    "policy": "inline",
                    "written_bytes": written,
                    "seconds": round(medians[case, size], 3),
                    "spread": [round(min(active), 3), round(max(active), 3)],
                    "done_seconds": round(statistics.median(done), 3),
                    "done_spread": [round(min(done), 3), round(max(done), 3)],
                    "ratio_to_bare": round(medians[case, size] / medians["bare", size], 3),
                    "ratio_to_stock": round(medians[case, size] / medians["stock", size], 3),
                    "samples": [round(value, 3) for value in active],
                }


def resident_bytes(pid):
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise NotAsAsked(f"process {pid} has no resident memory")


def engine_pid(parent):
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            command = (path / "cmdline").read_bytes()
            if b"nova_rbd_snap.engine" in command and f"PPid:\t{parent}\n" in (path / "status").read_text():
                return int(path.name)
    raise NotAsAsked("nova-compute has no engine")


def measure_memory(bench):
    """Resident memory of nova-compute before the first and after the last of some snapshots, and of the engine."""
    bench.cloud.restart_nova_compute(enabled=True)
    pid = bench.cloud.nova_compute_pid()
    before = resident_bytes(pid)
    for _ in range(SNAPSHOTS_FOR_MEMORY):
        bench.sample("ours", "64 MiB")
    return {
        "snapshots": SNAPSHOTS_FOR_MEMORY,
        "nova_compute_before_bytes": before,
        "nova_compute_growth_bytes": resident_bytes(pid) - before,
        "engine_bytes": resident_bytes(engine_pid(pid)),
    }


def environment(cloud):
    """What the numbers depend on."""
    status = json.loads(cloud.ceph_command("status --format json"))
    return {
        "ceph": cloud.ceph_command("version").split()[2],
        "osds": status["osdmap"]["num_osds"],
        "replicas": int(cloud.ceph_command(f"osd pool get {cloud.vms_pool} size").split()[1]),
        "paxos_propose_interval_seconds": float(cloud.ceph_command("config get mon paxos_propose_interval")),
        **{name: cloud.version(service, name) for name, service in _SERVICES.items()},
        "glance_do_secure_hash": "false during this run (default true: hashing begins once the image is active)",
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
        "guests": "running, halted, QEMU without KVM",
    }


def goals(rows, memory):
    """Each goal as a sentence, and whether it was met."""
    found = {(row["case"], row["written_bytes"]): row for row in rows}
    for size, written in SIZES.items():
        ours = found["ours", written]
        yield (
            f"{size}: at most {BARE_FACTOR} x the bare work ({ours['ratio_to_bare']})",
            ours["ratio_to_bare"] <= BARE_FACTOR,
        )
        yield f"{size}: never longer than stock ({ours['ratio_to_stock']})", ours["ratio_to_stock"] <= 1
    growth, engine = memory["nova_compute_growth_bytes"], memory["engine_bytes"]
    yield f"nova-compute grows by less than 16 MiB ({growth / MIB:.1f})", growth < GROWTH_LIMIT
    yield f"the engine stays under 96 MiB ({engine / MIB:.1f})", engine < ENGINE_LIMIT


def show(rows, memory, about):
    samples = len(rows[0]["samples"])
    print(f"\nSeconds until the image is active, and until all is done: medians of {samples} (min..max)\n")
    print("written   case   active                done                  x bare  x stock")
    for row in rows:
        size = next(size for size, written in SIZES.items() if written == row["written_bytes"])
        cells = [
            f"{row[value]:6.2f} ({row[spread][0]:.2f}..{row[spread][1]:.2f})"
            for value, spread in (("seconds", "spread"), ("done_seconds", "done_spread"))
        ]
        print(
            f"{size:9} {row['case']:6} {cells[0]:21} {cells[1]:21} "
            f"{row['ratio_to_bare']:6.2f}  {row['ratio_to_stock']:7.2f}"
        )
    print("\n" + "\n".join(f"{name}: {value}" for name, value in about.items()))
    verdicts = list(goals(rows, memory))
    print("\n" + "\n".join(f"{'PASS' if met else 'FAIL'}  {goal}" for goal, met in verdicts))
    return all(met for _, met in verdicts)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=9, help="of each case at each size (default: %(default)s)")
    samples = parser.parse_args().samples

    cloud = Cloud()
    about = environment(cloud)
    bench = Bench(cloud)
    with cloud.without_hashes():
        try:
            bench.boot()
            bench.run(samples)
            memory = measure_memory(bench)
        finally:
            bench.remove()
    rows = list(bench.rows())
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"rows": rows, "memory": memory, "environment": about}, indent=2) + "\n")
    sys.exit(0 if show(rows, memory, about) else 1)


if __name__ == "__main__":
    main()
