# SPDX-License-Identifier: Apache-2.0
"""nova-compute is gone and its engine asks the real Glance, with the service's credentials, what became of a clone."""

from __future__ import annotations

import pytest

from nova_rbd_snap import errors
from nova_rbd_snap.openstack import registration
from tests.functional.test_clone import assert_whole
from tests.functional.world import World


def test_image_that_is_active_is_kept(world: World, disk: str, image_id: str) -> None:
    before, engine = world.picture(), world.engine()
    url = world.clone(engine, disk, image_id)
    world.tenant.set_properties(image_id, registration.RAW)
    world.untrusted.patch_location(image_id, url)
    assert world.jobs() == {*before["jobs"], image_id}
    engine.settle()
    assert_whole(world, disk, image_id, before)


def test_record_that_waits_goes_with_its_clone(world: World, disk: str, image_id: str) -> None:
    before, engine = world.picture(), world.engine()
    world.clone(engine, disk, image_id)
    engine.settle()
    assert world.picture() == before
    with pytest.raises(errors.RecordGone):
        world.status(image_id)


def test_the_next_engine_of_the_host_takes_over(world: World, disk: str, image_id: str) -> None:
    """It undoes what another one of the same host did; one of another host does not touch it."""
    before = world.picture()
    world.clone(world.engine(), disk, image_id)
    assert world.engine(host="another").cancel(disk.split("_", maxsplit=1)[0]) == []
    assert image_id in world.jobs()
    assert world.engine().rollback(image_id)
    assert world.picture() == before
