# SPDX-License-Identifier: Apache-2.0
"""What is written of an rbd image in the trash of its pool, as bytes (``cls::rbd::TrashImageSpec``).

Python's binding cannot list a trash that holds a parent: it raises ``IndexError`` (observed on 16.2.15 and 18.2.7).
"""

from __future__ import annotations

import struct

from nova_rbd_snap.ceph.interface import TrashInfo

#: The RADOS object, and what its keys begin with; the id of the rbd image follows.
OBJECT, KEY = "rbd_trash", "id_"

#: Who put it there (``cls::rbd::TrashImageSource``): its removal, which it did not survive only as a parent.
_USER_PARENT = 4


def decode(key: str, value: bytes) -> TrashInfo:
    """The entry with that key."""
    source, length = struct.unpack_from("<6xBI", value)
    name = value[11 : 11 + length].decode(errors="backslashreplace")
    _, _, kept_until, _ = struct.unpack_from("<IIII", value, 11 + length)
    return TrashInfo(key[len(KEY) :], name, source == _USER_PARENT, float(kept_until))
