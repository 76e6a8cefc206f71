# SPDX-License-Identifier: Apache-2.0
"""The clone way on real servers, from the request to the active image, and back where Glance or the tenant objects."""

from __future__ import annotations

import uuid
from typing import Any

import pytest

from nova_rbd_snap import errors
from nova_rbd_snap.engine import unheard
from nova_rbd_snap.ledger.job import copy_id
from nova_rbd_snap.openstack import clone, registration
from tests.functional.world import World


def assert_whole(world: World, disk: str, image_id: str, before: dict[str, Any]) -> None:
    """The image is active and has the disk's bytes, and nothing else is left."""
    assert world.status(image_id) == "active"
    assert world.content(world.images, image_id, "snap") == world.content(world.vms, disk)
    after = world.picture()
    assert [name for name, _ in after.pop(f"{world.images}/{image_id}")] == ["snap"]
    assert after == before


@pytest.mark.parametrize("clone_format", [1, 2])
@pytest.mark.parametrize("user", ["tenant", "untrusted"])
def test_image_becomes_active(world: World, disk: str, image_id: str, user: str, clone_format: int) -> None:
    """In both formats of clones, and by both of Glance's interfaces: the new one is for trusted services only."""
    before, engine = world.picture(), world.engine(clone_format=clone_format)
    url = world.clone(engine, disk, image_id)
    world.register(engine, getattr(world, user), image_id, url)
    assert_whole(world, disk, image_id, before)


def test_record_was_deleted(world: World, disk: str, image_id: str) -> None:
    before, engine = world.picture(), world.engine()
    url = world.clone(engine, disk, image_id)
    world.service.delete(image_id)
    with pytest.raises(errors.RecordGone):
        world.register(engine, world.tenant, image_id, url)
    assert world.picture() == before


def test_record_has_other_data(world: World, disk: str, image_id: str) -> None:
    """Somebody uploaded into the record: theirs stays, ours goes."""
    before, engine = world.picture(), world.engine()
    url = world.clone(engine, disk, image_id)
    world.tenant.set_properties(image_id, registration.RAW)
    world.tenant._call(
        "PUT",
        f"/v2/images/{image_id}/file",
        data=b"other data",
        headers={"Content-Type": "application/octet-stream", "x-image-meta-store": "file"},
    )
    with pytest.raises(errors.GlanceError) as caught:
        world.register(engine, world.tenant, image_id, url)
    assert not isinstance(caught.value, errors.InDoubt)
    assert world.status(image_id) == "active"
    assert world.picture() == before


def test_frozen_disk(world: World, disk: str) -> None:
    """What a full copy reads stays as it was, and goes when it is no more wanted."""
    before, engine = world.picture(), world.engine()
    content = world.content(world.vms, disk)
    job_id = copy_id(str(uuid.uuid4()))
    snap = clone.freeze(engine, job_id, disk, lambda job_id: engine.perform(job_id, None, unheard))
    assert world.content(world.vms, disk, snap) == content
    assert engine.rollback(job_id)
    assert world.picture() == before
