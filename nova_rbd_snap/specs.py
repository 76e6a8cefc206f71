# SPDX-License-Identifier: Apache-2.0
"""Names of things in a cluster, as values: an rbd image, a snapshot of it, and the URL Glance knows it by."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import quote, unquote

#: What Nova's servers and Glance's images are called by, as a pattern.
UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"

#: Name of the snapshot Glance's rbd store makes of every image and its readers clone from
#: (glance_store, ``DEFAULT_SNAPNAME``).
GLANCE_SNAP = "snap"


@dataclass(frozen=True)
class ImageSpec:
    """An rbd image by pool and name."""

    pool: str
    name: str

    def __str__(self) -> str:
        return f"{self.pool}/{self.name}"

    def snap(self, name: str) -> SnapSpec:
        """The snapshot *name* of this rbd image."""
        return SnapSpec(self, name)


@dataclass(frozen=True)
class SnapSpec:
    """A snapshot of an rbd image."""

    image: ImageSpec
    name: str

    def __str__(self) -> str:
        return f"{self.image}@{self.name}"


@dataclass(frozen=True)
class Location:
    """A snapshot in a certain cluster, as Glance's rbd store writes it: ``rbd://fsid/pool/image/snap``."""

    fsid: str
    snap: SnapSpec

    @property
    def url(self) -> str:
        """The URL with every part quoted, ``/`` included, as glance_store does."""
        parts = (self.fsid, self.snap.image.pool, self.snap.image.name, self.snap.name)
        return "rbd://" + "/".join(quote(part, safe="") for part in parts)

    @classmethod
    def parse(cls, url: str) -> Location:
        """The location *url* names.

        :raises ValueError: it is not an rbd URL of four parts.
        """
        scheme, _, rest = url.partition("://")
        parts = [unquote(part) for part in rest.split("/")]
        if scheme != "rbd" or len(parts) != 4 or not all(parts):
            raise ValueError(f"not an rbd location of four parts: {url!r}")
        fsid, pool, image, snap = parts
        return cls(fsid, ImageSpec(pool, image).snap(snap))


#: Clients bind to no port; what has one is a daemon.
_CLIENT = re.compile(r"(?:(?:v1|v2|any):)?(\[?([0-9a-fA-F.:]+)\]?:0/([0-9]{1,10}))")
#: Ceph keeps 32 bits of a nonce: a larger one would mean another client, or with 2**32 a whole host.
_NONCES = range(1, 1 << 32)


def client_address(text: str) -> str:
    """The address of one librados client, as the blocklist takes it: ``192.0.2.1:0/3817``.

    :param text: as librados gives it, perhaps as a list and with the messenger's version.
    :raises ValueError: it names no single client. Without its nonce, or with nonce 0, an address means every client of
        a machine, the guests among them (``docs/design/ceph.rst``).
    """
    first = text.strip()
    if first.startswith("[v"):
        first = first[1:-1].split(",")[0]
    found = _CLIENT.fullmatch(first)
    if found is None or int(found[3]) not in _NONCES:
        raise ValueError(f"{text!r} is not the address of one client: host:0/nonce")
    ipaddress.ip_address(found[2])
    return found[1]
