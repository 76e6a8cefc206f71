# SPDX-License-Identifier: Apache-2.0
"""Options from files, as a process without Nova reads them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from oslo_config import cfg

from nova_rbd_snap import conf


def loaded(tmp_path: Path, text: str) -> cfg.ConfigOpts:
    path = tmp_path / "nova.conf"
    path.write_text(text)
    return conf.load(["--config-file", str(path)])


def test_defaults_are_usable(tmp_path: Path) -> None:
    """An empty file is a valid configuration: clone format 2, librados' own search for everything."""
    settings = conf.Settings.read(loaded(tmp_path, ""))
    assert settings.clone_format == 2
    assert (settings.pool, settings.ceph_conf, settings.ceph_user) == ("rbd", "", None)


def test_novas_options_are_read_as_nova_means_them(tmp_path: Path) -> None:
    """Pool, ceph.conf and user are Nova's own options; nothing is said twice."""
    text = "[libvirt]\nimages_rbd_pool = vms\nimages_rbd_ceph_conf = /x/ceph.conf\nrbd_user = nova\nunknown_to_us = 1\n"
    settings = conf.Settings.read(loaded(tmp_path, text))
    assert (settings.pool, settings.ceph_conf, settings.ceph_user) == ("vms", "/x/ceph.conf", "nova")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("enabled", "perhaps"),
        ("ways", "teleport"),
        ("ways", ""),
        ("flatten", "sometimes"),
        ("clone_format", "3"),
        ("clone_format", "two"),
        ("operation_timeout", "4"),
        ("operation_timeout", "soon"),
    ],
)
def test_bad_value_is_named(tmp_path: Path, option: str, value: str) -> None:
    """A value that cannot be used is reported with section and option."""
    with pytest.raises(conf.BadOption, match=re.escape(f"[rbd_snap] {option}")):
        conf.Settings.read(loaded(tmp_path, f"[rbd_snap]\n{option} = {value}\n"))


FAR = """
[rbd_snap]
glance_ceph_conf = /far.conf
glance_rbd_user = nova
glance_pool = images
glance_stores = edge
[rbd_snap_store_edge]
ceph_conf = /edge.conf
rbd_user = edge
pool = edge-images
data_pool = edge-data
"""


def test_stores_elsewhere(tmp_path: Path) -> None:
    """The one that [rbd_snap] itself tells of comes first; its pool is none of Nova's cluster then."""
    settings = conf.Settings.read(loaded(tmp_path, FAR))
    assert settings.stores == (
        conf.Store("glance", "/far.conf", "nova", "images"),
        conf.Store("edge", "/edge.conf", "edge", "edge-images", "edge-data"),
    )
    assert settings.glance_pool is None


@pytest.mark.parametrize(
    ("missing", "option"),
    [("glance_pool = images", "glance_pool"), ("pool = edge-images", "[rbd_snap_store_edge] pool")],
)
def test_store_without_its_pool(tmp_path: Path, missing: str, option: str) -> None:
    with pytest.raises(conf.BadOption, match=re.escape(option)):
        conf.Settings.read(loaded(tmp_path, FAR.replace(f"{missing}\n", "")))


@pytest.mark.parametrize(
    ("snapshot_format", "rules_out"), [("raw", set()), ("qcow2", {"clone"}), ("vmdk", {"clone", "copy"})]
)
def test_formats_that_rule_a_way_out(tmp_path: Path, snapshot_format: str, rules_out: set[str]) -> None:
    text = f"[libvirt]\nimages_type = rbd\nsnapshot_image_format = {snapshot_format}\n"
    options = loaded(tmp_path, text)
    options.register_opt(cfg.StrOpt("snapshot_image_format"), group="libvirt")
    found = {"clone"} if list(conf.reasons_for_no_clone(options)) else set()
    found |= {"copy"} if conf.reason_for_no_copy(options) else set()
    assert found == rules_out


def test_bad_values_can_be_made_readable(tmp_path: Path) -> None:
    """A service that goes on without us can read every option, as oslo.service does at its start."""
    options = loaded(tmp_path, "[rbd_snap]\nclone_format = 7\noperation_timeout = soon\nglance_pool = images\n")
    conf.make_readable(options)
    found = {option.name: options.rbd_snap[option.name] for option in conf.OPTIONS}
    assert (found["clone_format"], found["operation_timeout"], found["glance_pool"]) == (2, 60, "images")


def test_register_is_repeatable() -> None:
    """Driver and Rbd class may both register the options."""
    options = cfg.ConfigOpts()
    conf.register(options)
    conf.register(options)
    assert options.rbd_snap.enabled


def test_every_option_says_what_it_is_for() -> None:
    """Each option has a help text that starts with a capital letter and ends with a full stop."""
    for group, options in conf.list_opts():
        for text in (group.help, *(option.help for option in options)):
            assert re.fullmatch(r"[A-Z].*\.", text, re.DOTALL)
