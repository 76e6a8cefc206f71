# SPDX-License-Identifier: Apache-2.0
"""Two snapshots of one running server, stock Nova's and ours, and a new server from ours: see ``make demo``.

Everything said at the end was measured in this run: seconds from nova-compute's start of the snapshot to the active
image; bytes as the OSDs count what their clients read and wrote meanwhile; libvirt's own word on whether the guest
stopped; and every name in both pools and the ledger, before and after.
"""

import argparse
import contextlib
import hashlib
import json
import pathlib
import random
import sys
import threading

import libvirt
import rbd

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))
from cloud import GIB, MIB, Cloud

BLOCK = 4 * MIB
#: The data a guest might have written: the same in each run.
SEED = "nova-rbd-snap"

LOOK_AROUND = """\
The lab is still up. To look around:
  lab/lab exec 31 bash                                         enter the cloud
  lab/lab exec 31 openstack --os-cloud demo server list        act as its tenant
  lab/lab exec 31 openstack --os-cloud demo server create --image base --flavor tiny --nic none --wait one
  lab/lab exec 31 openstack --os-cloud demo server image create --name mine --wait one
  lab/lab exec 31 grep -E 'Snapshot to image|nova.rbd.snap' /var/log/lab/nova-compute.log
  lab/lab exec 31 rbd --id admin ls -l images-31               what is in Glance's pool; vms-31 is Nova's
  lab/lab exec ceph ceph -s
  lab/lab down                                                 take it all down
"""


def say(text):
    print(text, flush=True)


def known_data():
    """A GiB that cannot be compressed, in blocks."""
    source = random.Random(SEED)
    for _ in range(GIB // BLOCK):
        yield source.randbytes(BLOCK)


def checksum(ioctx, name, snap=None):
    """SHA-256 of the whole rbd image; blocks of zeros count by their place only, or it would take minutes."""
    digest = hashlib.sha256()
    with rbd.Image(ioctx, name, snapshot=snap, read_only=True) as image:
        size = image.size()
        for offset in range(0, size, BLOCK):
            data = image.read(offset, min(BLOCK, size - offset))
            if data.count(0) != len(data):
                digest.update(offset.to_bytes(8, "big") + data)
    return f"{digest.hexdigest()[:16]} ({size // GIB} GiB)"


class Guests:
    """Counts how often libvirt says that a guest stopped running."""

    _STOPPED = (libvirt.VIR_DOMAIN_EVENT_SUSPENDED, libvirt.VIR_DOMAIN_EVENT_STOPPED)

    def __init__(self):
        self._stops = []
        libvirt.virEventRegisterDefaultImpl()
        threading.Thread(target=self._listen, daemon=True).start()
        self._connection = libvirt.openReadOnly("qemu:///system")
        self._connection.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._on_event, None)

    @staticmethod
    def _listen():
        while True:
            libvirt.virEventRunDefaultImpl()

    def _on_event(self, _connection, domain, event, _detail, _opaque):
        if event in self._STOPPED:
            self._stops.append(domain.UUIDString())

    def stops(self, server_id):
        return self._stops.count(server_id)


def traffic(cloud, osds):
    """Bytes that clients have read from, and written to, all OSDs so far."""
    read = written = 0
    for osd in osds:
        _, answer, _ = cloud.ceph.osd_command(osd, json.dumps({"prefix": "perf dump", "logger": "osd"}), b"")
        counters = json.loads(answer)["osd"]
        read += counters["op_out_bytes"]
        written += counters["op_in_bytes"]
    return read, written


class Demo:
    """One run; what it makes is removed at its end."""

    def __init__(self, cloud, clean_up):
        self.cloud = cloud
        self.clean_up = clean_up
        self.guests = Guests()
        self.osds = json.loads(cloud.ceph_command("osd ls --format json"))
        self.rows = []
        self.checksums = {}
        self.leftovers = []

    def boot(self, name, **arguments):
        server_id = self.cloud.boot(name, **arguments)
        self.clean_up.callback(self.cloud.delete_server, server_id)
        return server_id

    def snapshot(self, way, server_id, *, enabled):
        """Take one snapshot and note all there is to say of it."""
        self.cloud.restart_nova_compute(enabled=enabled)
        pools, stops, before = self.cloud.picture(), self.guests.stops(server_id), traffic(self.cloud, self.osds)
        moved = []

        def count():
            # Now, for Glance may go on to read the image in order to hash it.
            moved.extend(after - start for start, after in zip(before, traffic(self.cloud, self.osds)))

        timing, _ = self.cloud.snapshot(server_id, f"demo-{way}", on_active=count)
        self.clean_up.callback(self.cloud.delete_image, timing.image_id)
        image = f"{self.cloud.images_pool}/{timing.image_id}"
        left = self.cloud.picture() - pools - {image, f"{image}@snap"}
        self.leftovers += sorted(left)
        self.rows.append(
            (
                way,
                f"{timing.active:.1f}",
                " + ".join(f"{count / GIB:.2f}" for count in moved),
                "yes" if self.guests.stops(server_id) > stops else "no",
                ", ".join(sorted(left)) or "nothing",
            )
        )
        self.cloud.settled(timing.image_id)
        return timing.image_id

    def check(self, what, ioctx, name, snap=None):
        self.checksums[what] = checksum(ioctx, name, snap)

    def run(self):
        cloud = self.cloud
        say("Booting a server on a 10 GB disk in Ceph, and writing 1 GiB of known data into the disk ...")
        server_id = self.boot("demo-source")
        cloud.write(server_id, known_data())
        self.check("the server's disk", cloud.vms, cloud.disk(server_id))

        say("Taking a snapshot as stock Nova does, then one of ours ...")
        self.snapshot("stock", server_id, enabled=False)
        image_id = self.snapshot("ours", server_id, enabled=True)
        self.check("the disk after both", cloud.vms, cloud.disk(server_id))
        self.check("our image", cloud.images, image_id, "snap")

        say("Booting a new server from our image ...")
        new_id = self.boot("demo-new", image=image_id)
        self.check("the new server's disk", cloud.vms, cloud.disk(new_id))

    def show(self):
        """Print what was found; whether all is as it should be."""
        head = ("snapshot", "seconds", "GiB read + written", "guest stopped", "left behind")
        widths = [max(len(row[column]) for row in [head, *self.rows]) for column in range(len(head))]
        say("")
        for row in [head, *self.rows]:
            say("  " + "   ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
        say("")
        for what, found in self.checksums.items():
            say(f"  {what:22} sha256 {found}")
        same = len(set(self.checksums.values())) == 1
        say(f"  {'all the same' if same else 'THESE DIFFER'}\n")
        return same and not self.leftovers


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave the demo's servers and images")
    keep = parser.parse_args().keep

    cloud = Cloud()
    cloud.check_room()
    before = cloud.picture()
    with contextlib.ExitStack() as clean_up:
        demo = Demo(cloud, clean_up)
        demo.run()
        good = demo.show()
        if keep:
            clean_up.pop_all()
            say("The demo's servers and images are kept.")
    if not keep:
        rubbish = sorted(cloud.picture() ^ before)
        say(f"Servers and images removed; left behind in both pools and the ledger: {', '.join(rubbish) or 'nothing'}")
        good = good and not rubbish
    say("")
    say(LOOK_AROUND)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
