# SPDX-License-Identifier: Apache-2.0
"""Copies, where nothing can be cloned: stock Nova's, ours, and the bare tools; see ``make bench-copies``.

Of a disk of 20 GiB with 2 GiB written, and one of 3 GiB that is full, each of a running server: to a Glance that keeps
images in files, and to one that keeps them in another Ceph cluster, of which nova-compute may write to the pool. Each
sample of a case is beside one of the others; the image is deleted before the next.

*seconds* run from the moment nova-compute begins the snapshot to the moment the image is active. The bare tools are
``qemu-img convert`` from the one cluster to the other, and ``curl`` with the very bytes that ours sends, ready in a
file; they are compared with the step of ours that does the same. *guest down* is for how long QEMU did not run.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import threading
import time
import uuid

import libvirt
import rados
import rbd
from bench import RESULT, engine_pid, environment, resident_bytes
from cloud import GIB, MIB, Cloud, NotAsAsked, wait_for

sys.path.append(str(pathlib.Path(__file__).parents[1]))
from nova_rbd_snap.ceph.librbd import LibrbdCluster
from nova_rbd_snap.copy.limits import Limits
from nova_rbd_snap.copy.qcow2 import Qcow2
from nova_rbd_snap.copy.stream import stream
from nova_rbd_snap.specs import ImageSpec

FAR_CONF = "/etc/ceph16/remote.conf"
GLANCE_CONF = pathlib.Path("/etc/glance/lab.d/bench-copies.conf")
SNAPSHOTS = pathlib.Path("/var/lib/nova/snapshots")
COPY_MEMORY = 64 * MIB
#: Gigabytes of the disk, and bytes written.
DISKS = {"sparse": (20, 2 * GIB), "full": (3, 3 * GIB)}
PLACES = ("file", "far")
BLOCK = 4 * MIB

MOVED_FACTOR, TOOL_FACTOR, STOCK_FACTOR, GROWTH_LIMIT = 1.02, 0.9, 4, COPY_MEMORY + 16 * MIB
EXTENTS_SECONDS = 2.0


class Watch:
    """What happens in the meantime: to the guest, to the local disk, to nova-compute and to its engine."""

    def __init__(self, cloud, server):
        self.pids = {"nova_compute": cloud.nova_compute_pid()}
        with contextlib.suppress(NotAsAsked):
            self.pids["engine"] = engine_pid(self.pids["nova_compute"])
        self._domain = libvirt.openReadOnly("qemu:///system").lookupByUUIDString(server)
        self._over, self._thread = threading.Event(), threading.Thread(target=self._watch)
        self.down = self.local = 0.0

    def __enter__(self):
        self._before = {name: (resident_bytes(pid), self._cpu(pid)) for name, pid in self.pids.items()}
        for pid in self.pids.values():  # the peak counts from now on
            pathlib.Path(f"/proc/{pid}/clear_refs").write_text("5")
        self._thread.start()
        return self

    def __exit__(self, *raised):
        self._over.set()
        self._thread.join()
        self.growth = {name: self._peak(pid) - self._before[name][0] for name, pid in self.pids.items()}
        self.cpu = {name: self._cpu(pid) - self._before[name][1] for name, pid in self.pids.items()}

    def _watch(self):
        last = time.monotonic()
        while not self._over.wait(0.02):
            now = time.monotonic()
            if self._domain.state()[0] != libvirt.VIR_DOMAIN_RUNNING:
                self.down += now - last
            last = now
            with contextlib.suppress(OSError):  # what was there is gone
                found = [path.stat() for path in SNAPSHOTS.rglob("*") if path.is_file()]
                self.local = max(self.local, sum(each.st_blocks * 512 for each in found))

    @staticmethod
    def _cpu(pid):
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @staticmethod
    def _peak(pid):
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024


class Bench:
    """One run."""

    def __init__(self, cloud, samples):
        self.cloud, self.samples = cloud, samples
        self.far = rados.Rados(rados_id="admin", conffile=FAR_CONF)
        self.far.connect()
        self.far_images = self.far.open_ioctx(cloud.images_pool)
        self.user = cloud.nova_conf["libvirt"]["rbd_user"]
        self.servers, self.found = {}, {}

    def boot(self):
        for name, (gigabytes, written) in DISKS.items():
            server = self.servers[name] = self.cloud.boot(f"copies-{name}", flavor=f"copies-{gigabytes}")
            with rbd.Image(self.cloud.vms, self.cloud.disk(server)) as disk:
                for offset in range(0, written, BLOCK):
                    # Not over the guest's boot sector.
                    start = max(offset, MIB)
                    disk.write(os.urandom(offset + BLOCK - start), start)
                disk.flush()

    # -- one copy ------------------------------------------------------------------------------------------------

    def by_nova(self, server, wanted):
        """One snapshot by nova-compute, whose log must have *wanted*."""
        with Watch(self.cloud, server) as watch:
            timing, log = self.cloud.snapshot(server, "copies")
        found = re.search(wanted, log)
        if not found:
            raise NotAsAsked(f"the log has no {wanted!r}:\n{log}")
        return timing, found, watch

    def stock(self, name, place):
        timing, _, watch = self.by_nova(self.servers[name], "standard snapshot")
        self.clear(timing.image_id)
        return {"seconds": timing.active, "guest_down_seconds": watch.down, "local_bytes": watch.local}

    def ours(self, name, place):
        wanted = r"copied into store .* \((.*)\) as" if place == "far" else r"uploaded in .* \((.*)\), (\d+) bytes"
        timing, found, watch = self.by_nova(self.servers[name], wanted)
        steps = {step: float(seconds) for step, seconds in (each.split(" ") for each in found[1].split(", "))}
        moved = self.written(timing.image_id) if place == "far" else int(found[2])
        self.clear(timing.image_id)
        return {
            "seconds": timing.active,
            "step_seconds": steps["copy" if place == "far" else "upload"],
            "moved_bytes": moved,
            "guest_down_seconds": watch.down,
            "local_bytes": watch.local,
            "growth_bytes": watch.growth,
            "cpu_seconds": watch.cpu["engine"],
        }

    def written(self, image_id):
        """Bytes there."""
        counts = []
        with rbd.Image(self.far_images, image_id, "snap", read_only=True) as image:
            image.diff_iterate(0, image.size(), None, lambda o, n, e: counts.append(n), whole_object=False)
        return sum(counts)

    def tool(self, name, place):
        with self.frozen(name) as snap:
            return self.convert(snap) if place == "far" else self.curl(snap)

    @contextlib.contextmanager
    def frozen(self, name):
        disk = self.cloud.disk(self.servers[name])
        with rbd.Image(self.cloud.vms, disk) as image:
            image.create_snap("copies")
        try:
            yield ImageSpec(self.cloud.vms_pool, disk).snap("copies")
        finally:
            with rbd.Image(self.cloud.vms, disk) as image:
                image.remove_snap("copies")

    def convert(self, snap):
        source = f"rbd:{snap}:id={self.user}:conf=/etc/ceph/ceph.conf"
        dest = f"rbd:{self.cloud.images_pool}/copies:id={self.user}:conf={FAR_CONF}"
        began = time.monotonic()
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "raw", source, dest], check=True)
        seconds = time.monotonic() - began
        rbd.RBD().remove(self.far_images, "copies")
        return {"step_seconds": seconds}

    def curl(self, snap):
        body, glance = pathlib.Path(f"/tmp/{uuid.uuid4()}"), self.cloud.glance_as_nova()
        cluster = LibrbdCluster(conf="/etc/ceph/ceph.conf", user=self.user, timeout_seconds=60, clone_format=2)
        try:
            with cluster.open_snap(snap) as source, body.open("wb") as file:
                layout = Qcow2(source.size, source.extents(lambda done, total: True))
                for chunk in stream(source, layout.parts(), Limits()):
                    file.write(chunk)
            formats = {"disk_format": "qcow2", "container_format": "bare"}
            record = glance.post("/v2/images", json={"name": "copies", **formats}).json()
            url = f"http://127.0.0.1:9292/v2/images/{record['id']}/file"
            headers = ("Content-Type: application/octet-stream", f"X-Auth-Token: {glance.get_token()}")
            words = [word for header in headers for word in ("-H", header)]
            began = time.monotonic()
            subprocess.run(["curl", "-sSf", "-X", "PUT", *words, "-T", str(body), url], check=True)
            seconds = time.monotonic() - began
        finally:
            body.unlink()
        self.clear(record["id"], glance)
        return {"step_seconds": seconds}

    def clear(self, image_id, glance=None):
        if glance is None:
            self.cloud.delete_image(image_id)
        else:
            glance.delete(f"/v2/images/{image_id}")
        self.cloud.wait_until_trimmed()

    # -- all of them ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def glance_in(self, place):
        """Within the block images go to *place*."""
        store = f"rbd_store_pool = {self.cloud.images_pool}\nrbd_store_ceph_conf = {FAR_CONF}\n"
        user = self.cloud.glance_conf["ceph"]["rbd_store_user"]
        GLANCE_CONF.write_text(
            "[DEFAULT]\ndo_secure_hash = false\nenabled_backends = ceph:rbd, ec:rbd, file:file, far:rbd\n"
            f"[glance_store]\ndefault_backend = {place}\n[far]\n{store}rbd_store_user = {user}\n"
        )
        self.cloud._restart_glance()
        try:
            yield
        finally:
            GLANCE_CONF.unlink()
            self.cloud._restart_glance()

    @contextlib.contextmanager
    def nothing_to_clone_into(self):
        """Within the block nova-compute's user may only read Glance's pool."""
        words = ["auth", "get", f"client.{self.user}", "--format", "json"]
        (before,) = json.loads(subprocess.run(["ceph", *words], check=True, capture_output=True).stdout)
        pool = self.cloud.images_pool
        less = before["caps"]["osd"].replace(f"profile rbd pool={pool}", f"profile rbd-read-only pool={pool}")
        self.set_caps({**before["caps"], "osd": less})
        try:
            yield
        finally:
            self.set_caps(before["caps"])

    def set_caps(self, caps):
        words = [word for pair in caps.items() for word in pair]
        subprocess.run(["ceph", "auth", "caps", f"client.{self.user}", *words], check=True, capture_output=True)

    def run(self):
        far = {
            "glance_ceph_conf": FAR_CONF,
            "glance_rbd_user": self.user,
            "glance_pool": self.cloud.images_pool,
        }
        with self.nothing_to_clone_into():
            for place in PLACES:
                with self.glance_in(place):
                    self.cloud.restart_nova_compute(enabled=False)
                    self.measure("stock", place)
                    options = far if place == "far" else {"copy_format": "qcow2"}
                    self.cloud.restart_nova_compute(enabled=True, ways="copy", **options)
                    for each in DISKS:  # the first after its start does not count
                        self.ours(each, place)
                    self.measure("ours", place)

    def measure(self, case, place):
        for name in DISKS:
            for _ in range(self.samples):
                self.cloud.check_room()
                for each in (case, "tool") if case == "ours" else (case,):
                    self.found.setdefault((each, name, place), []).append(getattr(self, each)(name, place))
                    print(".", end="", flush=True)

    def extents_of_a_tebibyte(self):
        """Seconds it takes to tell what is allocated of a thin disk of 1 TiB."""
        image = ImageSpec(self.cloud.vms_pool, f"{uuid.uuid4()}_copies")
        rbd.RBD().create(self.cloud.vms, image.name, 1024 * GIB)
        cluster = LibrbdCluster(conf="/etc/ceph/ceph.conf", user=self.user, timeout_seconds=60, clone_format=2)
        try:
            with rbd.Image(self.cloud.vms, image.name) as disk:
                for number in range(100):
                    disk.write(b"data", number * 10 * GIB)
                disk.create_snap("frozen")
            times = []
            for _ in range(self.samples):
                with cluster.open_snap(image.snap("frozen")) as source:
                    began = time.monotonic()
                    if len(source.extents(lambda done, total: True)) != 100:
                        raise NotAsAsked("these are not all extents")
                    times.append(time.monotonic() - began)
            with rbd.Image(self.cloud.vms, image.name) as disk:
                disk.remove_snap("frozen")
        finally:
            rbd.RBD().remove(self.cloud.vms, image.name)
        return statistics.median(times)

    def rows(self):
        for (case, name, place), samples in self.found.items():
            allocated = DISKS[name][1]
            row = {"case": f"copy-{case}", "disk": name, "to": place, "written_bytes": allocated}
            for key in samples[0]:
                values = [sample[key] for sample in samples]
                if key == "growth_bytes":
                    row[key] = {process: max(value[process] for value in values) for process in values[0]}
                else:
                    row[key] = round(statistics.median(values), 3)
            tool, stock = (self.found.get((other, name, place)) for other in ("tool", "stock"))
            if case == "ours":
                row["ratio_moved_to_allocated"] = round(row["moved_bytes"] / allocated, 3)
                of_tool = statistics.median(sample["step_seconds"] for sample in tool)
                row["ratio_to_tool"] = round(of_tool / row["step_seconds"], 3)  # of rates
                of_stock = statistics.median(sample["seconds"] for sample in stock)
                row["ratio_to_stock"] = round(of_stock / row["seconds"], 2)
                row["cpu_seconds_per_gib"] = round(row["cpu_seconds"] / (allocated / GIB), 2)
            yield row


def goals(rows, extents_seconds):
    """Each goal as a sentence, and whether it was met."""
    for row in rows:
        if row["case"] != "copy-ours":
            continue
        what = f"{row['disk']} to {row['to']}"
        moved, tool, stock = row["ratio_moved_to_allocated"], row["ratio_to_tool"], row["ratio_to_stock"]
        yield f"{what}: moved at most 1.02 x what is allocated ({moved})", moved <= MOVED_FACTOR
        yield f"{what}: no byte on the local disk ({row['local_bytes']:.0f})", row["local_bytes"] == 0
        yield f"{what}: the guest runs on ({row['guest_down_seconds']:.1f} s)", row["guest_down_seconds"] == 0
        yield f"{what}: at least 0.9 of the tool's rate ({tool})", tool >= TOOL_FACTOR
        wanted = STOCK_FACTOR if row["disk"] == "sparse" else 1
        yield f"{what}: {wanted} x faster than stock ({stock})", stock >= wanted
        growth = row["growth_bytes"]
        yield f"{what}: the engine grows by {growth['engine'] / MIB:.0f} MiB", growth["engine"] <= GROWTH_LIMIT
        grown = growth["nova_compute"] / MIB
        yield f"{what}: nova-compute does not grow ({grown:.1f} MiB)", growth["nova_compute"] < 2 * MIB
    yield f"extents of 1 TiB in under 2 s ({extents_seconds:.2f})", extents_seconds < EXTENTS_SECONDS


def show(rows, extents_seconds):
    columns = (
        "seconds", "step_seconds", "guest_down_seconds", "ratio_moved_to_allocated", "ratio_to_tool", "ratio_to_stock",
        "cpu_seconds_per_gib",
    )  # fmt: skip
    print(f"\n\n{'':22}" + "".join(f"{name.replace('_', ' ')[:24]:>26}" for name in columns) + f"{'local GiB':>12}")
    for row in sorted(rows, key=lambda row: (row["to"], row["disk"], row["case"])):
        cells = "".join(f"{row.get(name, ''):>26}" for name in columns)
        print(f"{row['to']:5}{row['disk']:7}{row['case'][5:]:10}{cells}{row.get('local_bytes', 0) / GIB:>12.2f}")
    verdicts = list(goals(rows, extents_seconds))
    print("\n" + "\n".join(f"{'PASS' if met else 'FAIL'}  {goal}" for goal, met in verdicts))
    return all(met for _, met in verdicts)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=3, help="of each case (default: %(default)s)")
    cloud = Cloud()
    bench = Bench(cloud, parser.parse_args().samples)
    with contextlib.ExitStack() as stack:
        for gigabytes, _ in DISKS.values():
            stack.enter_context(cloud.flavor(f"copies-{gigabytes}", gigabytes))
        try:
            bench.boot()
            bench.run()
        finally:
            for server in bench.servers.values():
                cloud.delete_server(server)
    extents_seconds, rows = bench.extents_of_a_tebibyte(), list(bench.rows())
    RESULT.parent.mkdir(exist_ok=True)
    told = json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": [], "environment": environment(cloud)}
    told["rows"] = [row for row in told["rows"] if not row["case"].startswith("copy-")] + rows
    told["extents_of_1_tib_seconds"] = round(extents_seconds, 3)
    RESULT.write_text(json.dumps(told, indent=2) + "\n")
    sys.exit(0 if show(rows, extents_seconds) else 1)


if __name__ == "__main__":
    wait_for(lambda: pathlib.Path(FAR_CONF).exists(), "lab/lab up ceph16", 5)
    main()
