# SPDX-License-Identifier: Apache-2.0
"""Names as values, and Glance's URLs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nova_rbd_snap.specs import ImageSpec, Location

part = st.text(min_size=1).filter(lambda text: not any(0xD800 <= ord(letter) <= 0xDFFF for letter in text))


@given(part, part, part, part)
def test_url_round_trip(fsid: str, pool: str, image: str, snap: str) -> None:
    """Whatever the names contain, parsing the URL gives the location again, and it has exactly four parts."""
    location = Location(fsid, ImageSpec(pool, image).snap(snap))
    assert Location.parse(location.url) == location
    assert location.url.count("/") == 5


def test_url_is_what_glance_writes() -> None:
    """Every character that glance_store quotes is quoted, ``/`` included."""
    assert Location("f", ImageSpec("a/b", "c d").snap("é")).url == "rbd://f/a%2Fb/c%20d/%C3%A9"


@pytest.mark.parametrize(
    "url", ["", "rbd://a/b/c", "rbd://a/b/c/d/e", "rbd://a//c/d", "file://a/b/c/d", "rbd:a/b/c/d", "rbd://image"]
)
def test_other_urls_are_refused(url: str) -> None:
    """Anything but an rbd URL of four parts, glance's short form included, is a ValueError."""
    with pytest.raises(ValueError, match="not an rbd location"):
        Location.parse(url)


def test_specs_read_like_rbd() -> None:
    """In messages they look as the rbd command writes them."""
    assert str(ImageSpec("vms", "disk").snap("now")) == "vms/disk@now"
