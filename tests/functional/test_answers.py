# SPDX-License-Identifier: Apache-2.0
"""Whatever Glance answers, or does not: the right error, and either nothing left or an image that is whole."""

from __future__ import annotations

import pytest

from nova_rbd_snap import errors
from nova_rbd_snap.engine.service import Engine
from tests.fakes.glance_proxy import GlanceProxy, Request
from tests.functional.test_clone import assert_whole
from tests.functional.world import World


def registers(request: Request) -> bool:
    return request.registers


def sets_properties(request: Request) -> bool:
    return request.method == "PATCH" and not request.registers


def cloned(world: World, disk: str, image_id: str) -> tuple[Engine, str]:
    engine = world.engine()
    return engine, world.clone(engine, disk, image_id)


@pytest.mark.parametrize(
    ("hits", "status", "error"),
    [
        (registers, 400, errors.NotRegistered),
        (registers, 401, errors.NotAuthorized),
        (registers, 403, errors.NotRegistered),
        (registers, 404, errors.RecordGone),
        (registers, 409, errors.NotRegistered),
        (registers, 413, errors.NotRegistered),
        (registers, 500, errors.NotRegistered),
        (registers, 503, errors.NotRegistered),
        (sets_properties, 401, errors.NotAuthorized),
        (sets_properties, 409, errors.NotRegistered),
        (sets_properties, 503, errors.NotRegistered),
    ],
)
def test_refusal(
    world: World, disk: str, image_id: str, proxy: GlanceProxy, *, hits: object, status: int, error: type[Exception]
) -> None:
    """A refusal is what it is, and the clone is undone."""
    before = world.picture()
    engine, url = cloned(world, disk, image_id)
    proxy.break_(hits, status=status)
    with pytest.raises(error):
        world.register(engine, world.through_proxy(), image_id, url)
    assert proxy.seen
    assert world.picture() == before
    assert world.status(image_id) == "queued"


@pytest.mark.parametrize("held", [False, True], ids=["reset", "hang"])
def test_answer_to_the_location_is_lost(
    world: World, disk: str, image_id: str, proxy: GlanceProxy, held: bool
) -> None:
    """Glance took the location and nobody heard of it: the record tells."""
    before = world.picture()
    engine, url = cloned(world, disk, image_id)
    proxy.break_(registers, asked=True, held=held)
    world.register(engine, world.through_proxy(), image_id, url)
    assert proxy.hits == 1
    assert_whole(world, disk, image_id, before)


@pytest.mark.parametrize("held", [False, True], ids=["reset", "hang"])
def test_location_is_lost(world: World, disk: str, image_id: str, proxy: GlanceProxy, held: bool) -> None:
    """It may still arrive, for all one can know: clone and job are kept, until nova-compute's end settles them."""
    before = world.picture()
    engine, url = cloned(world, disk, image_id)
    proxy.break_(registers, held=held)
    with pytest.raises(errors.InDoubt):
        world.register(engine, world.through_proxy(), image_id, url)
    assert world.jobs() == {*before["jobs"], image_id}
    assert f"{world.images}/{image_id}" in world.picture()
    engine.settle()
    assert world.picture() == before


def test_no_answer_before_the_location(world: World, disk: str, image_id: str, proxy: GlanceProxy) -> None:
    """Without the properties no location is sent, so there is no doubt: the clone is undone."""
    before = world.picture()
    engine, url = cloned(world, disk, image_id)
    proxy.break_(sets_properties)
    with pytest.raises(errors.GlanceSilent):
        world.register(engine, world.through_proxy(), image_id, url)
    assert proxy.hits > 1
    assert world.picture() == before


def test_glance_is_not_there(world: World, disk: str, image_id: str) -> None:
    before = world.picture()
    engine, url = cloned(world, disk, image_id)
    with pytest.raises(errors.GlanceSilent):
        world.register(engine, world.tenant_through("http://127.0.0.1:1"), image_id, url)
    assert world.picture() == before
