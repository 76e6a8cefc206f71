# SPDX-License-Identifier: Apache-2.0
"""Sixteen snapshots at once beside one, up to the seal; see ``make bench-many``.

The engine's real process, with the configuration of the lab's nova-compute, works on sixteen disks with 4 MiB written
each, at the monitors' default of one proposal a second. One and sixteen take turns; medians are compared.

How long a snapshot has to wait depends on how long ago the last proposal was. So both of a pair begin at the same time
after one, and the pairs go twice round the second.
"""

import json
import os
import pathlib
import statistics
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import proposals
import rados
import rbd

from nova_rbd_snap.engine import unheard
from nova_rbd_snap.engine.client import EngineClient

RESULT = pathlib.Path(__file__).parents[1] / "build" / "bench-many.json"
MANY, ROUNDS, LIMIT = 16, 18, 1.5
DISK_BYTES, WRITTEN_BYTES = 64 << 20, 4 << 20


class Bench:
    """Disks, and an engine that snapshots them."""

    def __init__(self, cluster):
        cloud = os.environ["CLOUD"]
        self.vms, self.images_pool = cluster.open_ioctx(f"vms-{cloud}"), f"images-{cloud}"
        self.disks = [f"{uuid.uuid4()}_disk" for _ in range(MANY)]
        for name in self.disks:
            rbd.RBD().create(self.vms, name, DISK_BYTES)
            with rbd.Image(self.vms, name) as disk:
                disk.write(os.urandom(WRITTEN_BYTES), 0)
        self.engine = EngineClient(
            ("--config-file", "/etc/nova/nova.conf"), host="bench-many", machine=str(uuid.uuid4()), patience_seconds=300
        )
        self.engine.check()

    def snapshot(self, disk):
        image_id = str(uuid.uuid4())
        self.engine.reserve_clone(image_id, disk, self.images_pool)
        self.engine.perform(image_id, None, unheard)
        return image_id

    def seconds(self, disks, share):
        """How long it takes until all are sealed, begun that share of the monitors' interval after a proposal."""
        proposals.await_moment(self.vms, share)
        with ThreadPoolExecutor(len(disks)) as pool:
            began = time.monotonic()
            made = list(pool.map(self.snapshot, disks))
            took = time.monotonic() - began
            list(pool.map(self.engine.rollback, made))
        return took

    def close(self):
        for name in self.disks:
            rbd.RBD().remove(self.vms, name)


def main():
    cluster = rados.Rados(rados_id="admin", conffile="/etc/ceph/ceph.conf")
    cluster.connect()
    bench = Bench(cluster)
    try:
        bench.seconds(bench.disks, 0)  # connections, caches
        shares = [number * 2 / ROUNDS % 1 for number in range(ROUNDS)]
        pairs = [(bench.seconds(bench.disks[:1], share), bench.seconds(bench.disks, share)) for share in shares]
    finally:
        bench.close()
    one, many = (statistics.median(times) for times in zip(*pairs))
    ratio = many / one
    print(f"one      {one:.2f} s ({min(p[0] for p in pairs):.2f}..{max(p[0] for p in pairs):.2f})")
    print(f"sixteen  {many:.2f} s ({min(p[1] for p in pairs):.2f}..{max(p[1] for p in pairs):.2f})")
    print(f"ratio    {ratio:.2f}, wanted at most {LIMIT}: {'PASS' if ratio <= LIMIT else 'FAIL'}")
    RESULT.write_text(json.dumps({"one_seconds": one, "sixteen_seconds": many, "ratio": ratio, "limit": LIMIT}) + "\n")
    return 0 if ratio <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
