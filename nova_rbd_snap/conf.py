# SPDX-License-Identifier: Apache-2.0
"""The ``[rbd_snap]`` options, and :class:`Settings`: what the engine needs of nova.conf, as plain values.

nova-compute, the engine and the command line read the same nova.conf; only this module knows option names.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Optional

from oslo_config import cfg

from nova_rbd_snap.flatten.bounds import Bounds
from nova_rbd_snap.flatten.means import MANAGER, WORKER
from nova_rbd_snap.ledger.job import BACKGROUND, INLINE, NEVER

GROUP = cfg.OptGroup(
    "rbd_snap",
    title="Snapshots inside Ceph",
    help="Snapshots of RBD-backed servers by cloning inside Ceph (nova-rbd-snap). Takes effect with "
    "[DEFAULT] compute_driver = rbd_snap.LibvirtDriver.",
)

#: The rungs of the ladder that exist, best first.
WAYS = ("clone", "copy", "nova")

#: The formats of what is uploaded.
RAW, QCOW2 = "raw", "qcow2"

#: What the name of a section begins with that tells of a store of Glance's; the store's name follows.
_STORE_SECTION = "rbd_snap_store_"
#: Name of the store that the options of [rbd_snap] itself tell of.
_THE_STORE = "glance"

_STORE_GROUP = cfg.OptGroup(
    f"{_STORE_SECTION}name",
    title="One of Glance's rbd stores",
    help="See [rbd_snap] glance_stores: one such section for each name there, which ends the section's.",
)

OPTIONS = [
    cfg.BoolOpt(
        "enabled",
        default=True,
        help="Take new snapshots with nova-rbd-snap. False means Nova's own way for new snapshots; what "
        "nova-rbd-snap made earlier is still looked after.",
    ),
    cfg.ListOpt(
        "ways",
        default=["clone", "nova"],
        item_type=cfg.types.String(choices=WAYS),
        help="Ways to take a snapshot, tried in this order until one succeeds. 'clone' clones the disk inside "
        "Ceph. 'copy' copies what is allocated of it, to where Glance keeps images or through Glance's API, while the "
        "guest runs and without a local file. 'nova' is Nova's own full copy through a local file; without it a "
        "snapshot that the others cannot take fails.",
    ),
    cfg.StrOpt(
        "glance_pool",
        help="Pool of the Glance rbd store that snapshots are cloned, or copied, into. Unset: the pool of the disk's "
        "parent; for a disk without a parent that of the store [libvirt] images_rbd_glance_store_name names, else that "
        "of the server's base image.",
    ),
    cfg.StrOpt(
        "glance_ceph_conf",
        help="Path of the Ceph configuration file of the cluster that glance_pool is in, where that is another than "
        "Nova's: nothing can be cloned then, and snapshots are copied there.",
    ),
    cfg.StrOpt(
        "glance_rbd_user",
        help="Ceph user, without 'client.', for glance_ceph_conf. It needs mon and osd 'profile rbd' there.",
    ),
    cfg.ListOpt(
        "glance_stores",
        default=[],
        help="Further rbd stores of Glance's that snapshots are copied into where they cannot be cloned, tried in this "
        "order. Each has a section, [rbd_snap_store_far] for the one called far, with the options ceph_conf, rbd_user, "
        "pool and, where data and metadata are apart, data_pool.",
    ),
    cfg.StrOpt(
        "glance_data_pool",
        help="Data pool of the clone, where Glance keeps its data in an erasure-coded pool. Unset: the one that "
        "Glance's own images in the destination pool use.",
    ),
    cfg.StrOpt(
        "copy_format",
        choices=[
            (QCOW2, "only what is allocated is sent"),
            (RAW, "every byte is sent, but zeros are not read; images in an rbd store can be cloned by it"),
        ],
        help="Format of a copy that is uploaded through Glance's API, where [libvirt] snapshot_image_format does not "
        "say. Unset: raw if Glance's store is an rbd one, else qcow2.",
    ),
    cfg.IntOpt(
        "copy_memory",
        default=64,
        min=16,
        help="MiB that all copies of this host together may have read and not yet written.",
    ),
    cfg.IntOpt(
        "copy_bandwidth",
        default=0,
        min=0,
        help="MiB a second that all copies of this host together may write or send; 0 for no limit.",
    ),
    cfg.IntOpt(
        "copy_attempts",
        default=3,
        min=1,
        help="How often a copy is uploaded that is broken off on its way. One to an rbd store goes on where it was.",
    ),
    cfg.StrOpt(
        "flatten",
        default=INLINE,
        choices=[
            (INLINE, "before the image becomes usable"),
            (BACKGROUND, "soon after the image became usable"),
            (NEVER, "not at all; a server's disk that images depend on is kept in the trash until they are deleted"),
        ],
        help="When the snapshot's copy-on-write link to the server's disk is cut. Until then whoever reads the image "
        "reads the disk as well: 'background' and 'never' need 'profile rbd-read-only' on Nova's pool for the Ceph "
        "users of Glance, Cinder and other Nova pools. With clone_format = 1 it is always 'inline'.",
    ),
    cfg.ListOpt(
        "flatten_overrides",
        default=["flavor"],
        item_type=cfg.types.String(choices=("flavor", "image")),
        help="What may choose another 'flatten' for a server: the extra spec rbd_snap:flatten of its flavor, the "
        "property rbd_snap_flatten of its image, which tenants may set. The flavor's counts where both do. Empty: none "
        "may.",
    ),
    cfg.StrOpt(
        "flatten_engine",
        default=WORKER,
        choices=[
            (WORKER, "the hosts that do the job"),
            (MANAGER, "the Ceph manager, whose queue takes one rbd image of the whole cluster after the other"),
        ],
        help="Who copies the data of an image that is flattened in the background. The manager of some builds of Ceph "
        "18 dies of such a task, and of the same one again at each start: try 'ceph rbd task add flatten' first.",
    ),
    cfg.IntOpt(
        "never_max_used_percent",
        default=80,
        min=0,
        max=100,
        help="With flatten = never: from so much of Nova's pool in use on, images are flattened in the background all "
        "the same, for disks of deleted servers fill it. 100 for never doing so.",
    ),
    cfg.IntOpt(
        "flatten_workers",
        default=1,
        min=0,
        help="How many images this host flattens in the background at once; 0 leaves that to other hosts, and to "
        "'nova-rbd-snap worker'. Disks of deleted servers it removes all the same.",
    ),
    cfg.IntOpt(
        "flatten_limit",
        default=4,
        min=1,
        help="How many images are flattened in the background at once in the whole cloud, and how many disks of "
        "deleted servers removed. The same on every host.",
    ),
    cfg.StrOpt(
        "delete",
        default="now",
        choices=[
            ("now", "at once, which takes as long as they are large"),
            ("trash", "to the trash of their pool at once, and from there in the background"),
        ],
        help="How the disks of a server that is deleted are removed. The space is free when that is done.",
    ),
    cfg.IntOpt(
        "clone_depth_soft",
        default=4,
        min=1,
        help="An image that reads through more rbd images than this is flattened in the background even if 'flatten' "
        "is 'never'. Chains grow when servers are booted from snapshots of servers that were.",
    ),
    cfg.IntOpt(
        "clone_depth_hard",
        default=8,
        min=1,
        help="An image that would read through more rbd images than this is flattened before it becomes usable.",
    ),
    cfg.IntOpt(
        "disk_snapshots_soft",
        default=250,
        min=1,
        help="With more snapshots on a server's disk than this, each new one has the oldest image that depends on the "
        "disk flattened in the background.",
    ),
    cfg.IntOpt(
        "disk_snapshots_hard",
        default=450,
        min=1,
        help="With as many snapshots on a server's disk, a new image is flattened before it becomes usable.",
    ),
    cfg.Opt(  # IntOpt takes no choices in the oslo.config of Nova 26
        "clone_format",
        default=2,
        type=cfg.types.Integer(
            choices=[
                (2, "no protected snapshot on the server's disk; read by every librbd since Ceph 13 (Mimic)"),
                (1, "the older format, for clusters with clients older than that"),
            ]
        ),
        help="Format of the clone.",
    ),
    cfg.IntOpt(
        "operation_timeout",
        default=60,
        min=5,
        help="Seconds without progress after which the cluster or Glance is taken not to answer. It bounds each "
        "single operation, never the length of a copy that moves.",
    ),
    cfg.IntOpt(
        "reclaim_interval",
        default=60,
        min=1,
        help="Seconds between two looks at what earlier snapshots could not finish or undo; what can be ended is. A "
        "look costs one read of the ledger.",
    ),
    cfg.StrOpt(
        "auth_section",
        default="service_user",
        help="Section with the keystone credentials that are used where no user's token is at hand: to look at image "
        "records, and delete those that would wait for ever, for jobs in doubt or left by a nova-compute that died, "
        "and for 'nova-rbd-snap sweep'. Their user needs the role admin, to see every project's images.",
    ),
]

#: Those of a store's section.
_STORE_OPTIONS = [
    cfg.StrOpt("ceph_conf", default="", help="Path of the store's Ceph configuration file."),
    cfg.StrOpt("rbd_user", help="Ceph user, without 'client.', with mon and osd 'profile rbd' there."),
    cfg.StrOpt("pool", help="The store's pool."),
    cfg.StrOpt("data_pool", help="Pool of the data. Unset: as Glance's own images in the pool have it."),
]

#: What we read of Nova's own options where Nova is not there to register them. Names and meaning are Nova's.
_NOVAS: dict[Optional[str], list[Any]] = {
    None: [
        cfg.StrOpt("instances_path", default="$state_path/instances"),
        # Nova's is the folder of its own package, which only Nova knows.
        cfg.StrOpt("state_path", default="unknown"),
    ],
    "libvirt": [
        cfg.StrOpt("images_type", default="default"),
        cfg.StrOpt("images_rbd_pool", default="rbd"),
        cfg.StrOpt("images_rbd_ceph_conf", default=""),
        cfg.StrOpt("rbd_user"),
        cfg.StrOpt("snapshots_directory", default="$instances_path/snapshots"),
    ],
}


class BadOption(Exception):
    """An option's value cannot be used; the message names the option and the remedy."""


@dataclass(frozen=True)
class Store:
    """An rbd store of Glance's, wherever.

    :ivar ceph_conf: as :class:`Settings` has it, and *ceph_user*.
    :ivar data_pool: None for what Glance's own images there use.
    """

    name: str
    ceph_conf: str
    ceph_user: Optional[str]
    pool: str
    data_pool: Optional[str] = None


@dataclass(frozen=True)
class Settings:
    """What the engine needs to know.

    :ivar in_ceph: the servers' disks are there; else *pool* and all that is kept in it are not.
    :ivar pool: Nova's pool, where the servers' disks and the ledger are.
    :ivar ceph_conf: path of the Ceph configuration file, empty for librados' own search.
    :ivar ceph_user: cephx user without ``client.``, None for librados' default.
    :ivar operation_timeout: seconds, as *reclaim_interval*.
    :ivar glance_pool: in Nova's cluster; None, too, where Glance's pool is in another.
    :ivar stores: what copies go into, the first first.
    :ivar copy_memory: bytes; *copy_bandwidth*: bytes a second, or 0.
    :ivar snapshots_directory: where Nova's own full copy keeps its files; None where the configuration does not tell.
    """

    pool: str
    ceph_conf: str
    ceph_user: Optional[str]
    glance_pool: Optional[str]
    glance_data_pool: Optional[str]
    clone_format: int
    flatten: str
    flatten_engine: str
    never_max_used_percent: int
    flatten_workers: int
    flatten_limit: int
    bounds: Bounds
    delete: str
    operation_timeout: int
    reclaim_interval: int
    auth_section: str
    in_ceph: bool = True
    stores: tuple[Store, ...] = ()
    copy_memory: int = 64 << 20
    copy_bandwidth: int = 0
    copy_attempts: int = 3
    snapshots_directory: Optional[str] = None

    @classmethod
    def read(cls, conf: Any) -> Settings:
        """The settings in *conf*, an oslo.config ``ConfigOpts`` with our and Nova's options registered.

        :raises BadOption: a value is out of its range.
        """
        _validate(conf)
        ours, copies = conf.rbd_snap, conf.libvirt.snapshots_directory
        return cls(
            pool=conf.libvirt.images_rbd_pool,
            ceph_conf=conf.libvirt.images_rbd_ceph_conf or "",
            ceph_user=conf.libvirt.rbd_user,
            glance_pool=None if ours.glance_ceph_conf else ours.glance_pool,
            glance_data_pool=None if ours.glance_ceph_conf else ours.glance_data_pool,
            in_ceph=conf.libvirt.images_type == "rbd",
            stores=tuple(_stores(conf)),
            copy_memory=ours.copy_memory << 20,
            copy_bandwidth=ours.copy_bandwidth << 20,
            copy_attempts=ours.copy_attempts,
            clone_format=ours.clone_format,
            flatten=ours.flatten,
            flatten_engine=ours.flatten_engine,
            never_max_used_percent=ours.never_max_used_percent,
            flatten_workers=ours.flatten_workers,
            flatten_limit=ours.flatten_limit,
            bounds=Bounds(
                ours.clone_depth_soft, ours.clone_depth_hard, ours.disk_snapshots_soft, ours.disk_snapshots_hard
            ),
            delete=ours.delete,
            operation_timeout=ours.operation_timeout,
            reclaim_interval=ours.reclaim_interval,
            auth_section=ours.auth_section,
            snapshots_directory=copies if os.path.isabs(copies) else None,
        )


def _stores(conf: Any) -> Iterator[Store]:
    """:raises BadOption: one lacks what tells its pool."""
    ours = conf.rbd_snap
    if ours.glance_ceph_conf:
        if not ours.glance_pool:
            raise BadOption(
                "[rbd_snap] glance_ceph_conf is set and glance_pool is not; name the pool of Glance's rbd store there"
            )
        yield Store(
            _THE_STORE, ours.glance_ceph_conf, ours.glance_rbd_user, ours.glance_pool, ours.glance_data_pool
        )
    for name in ours.glance_stores:
        section = f"{_STORE_SECTION}{name}"
        conf.register_opts(_STORE_OPTIONS, group=section)
        found = conf[section]
        if not found.pool:
            raise BadOption(f"[rbd_snap] glance_stores names {name!r}, but [{section}] pool is not set; set it")
        yield Store(name, found.ceph_conf, found.rbd_user, found.pool, found.data_pool)


def _validate(conf: Any) -> None:
    """:raises BadOption: for the first option of ours whose value cannot be used."""
    for option in OPTIONS:
        try:
            conf.rbd_snap[option.name]
        except ValueError as error:
            raise BadOption(f"[rbd_snap] {option.name}: {error}; correct it or remove the line") from error
    for bound in ("clone_depth", "disk_snapshots"):
        soft, hard = conf.rbd_snap[f"{bound}_soft"], conf.rbd_snap[f"{bound}_hard"]
        if soft > hard:
            raise BadOption(
                f"[rbd_snap] {bound}_soft is {soft} and {bound}_hard is {hard}; make the hard one the larger"
            )
    ways = conf.rbd_snap.ways
    # Nova's copy leaves the task states as no other way may find them.
    if not ways or len(set(ways)) != len(ways) or "nova" in ways[:-1]:
        raise BadOption(f"[rbd_snap] ways is {','.join(ways)!r}; name each way once, and 'nova' last")


def make_readable(conf: Any) -> None:
    """Put defaults where a value of ours cannot be used: for services that go on without us.

    oslo.service reads every option when a service starts, and ends it at the first that cannot be read.
    """
    for option in OPTIONS:
        try:
            conf.rbd_snap[option.name]
        except ValueError:
            conf.set_override(option.name, option.default, group=GROUP.name)


def reasons_for_no_clone(conf: Any) -> Iterator[str]:
    """Why the clone way will be refused whatever the disk, as sentences that name the option and the remedy."""
    if conf.libvirt.images_type != "rbd":
        yield (
            f"[libvirt] images_type is {conf.libvirt.images_type!r}: only disks in Ceph can be cloned; "
            "set it to rbd, or set compute_driver back to libvirt.LibvirtDriver"
        )
    snapshot_format = conf.libvirt.snapshot_image_format
    if snapshot_format not in (None, RAW):
        yield (
            f"[libvirt] snapshot_image_format is {snapshot_format!r}, but a clone holds raw bytes: every snapshot "
            "will be a copy; unset it, or set it to raw"
        )
    if conf.rbd_snap.glance_ceph_conf:
        yield (
            f"[rbd_snap] glance_ceph_conf is {conf.rbd_snap.glance_ceph_conf!r}: between two clusters nothing can be "
            "cloned, and every snapshot will be a copy"
        )


def reason_for_no_copy(conf: Any) -> Optional[str]:
    """Why the copy way will be refused whatever the disk, as :func:`reasons_for_no_clone` tells."""
    snapshot_format = conf.libvirt.snapshot_image_format
    if snapshot_format in (None, RAW, QCOW2):
        return None
    return (
        f"[libvirt] snapshot_image_format is {snapshot_format!r}: every snapshot will be Nova's own full copy; unset "
        "it, or set it to raw or qcow2"
    )


def reasons_for_inline(conf: Any) -> Iterator[str]:
    """Why images are flattened at once although another policy is set, as :func:`reasons_for_no_clone` tells."""
    if conf.rbd_snap.flatten != INLINE and conf.rbd_snap.clone_format == 1:
        yield (
            f"[rbd_snap] flatten is {conf.rbd_snap.flatten!r}, but with clone_format = 1 it is always 'inline'; set "
            "clone_format = 2, if every client of the cluster can read that, or flatten = inline"
        )


def register(conf: Any) -> None:
    """Make the ``[rbd_snap]`` options known to *conf*; repeatable."""
    conf.register_group(GROUP)
    conf.register_opts(OPTIONS, group=GROUP)


def arguments(conf: Any) -> list[str]:
    """What makes another process read the configuration that *conf*, or a command line, names."""
    files = [word for file in conf.config_file or () for word in ("--config-file", file)]
    folders = [word for folder in conf.config_dir or () for word in ("--config-dir", folder)]
    return files + folders


def load(words: Sequence[str]) -> Any:
    """nova.conf as read by a process without Nova.

    :param words: ``--config-file`` and ``--config-dir`` as nova-compute got them; empty for its default files.
    :raises BadOption: there is no such file, or it cannot be read.
    """
    conf = cfg.ConfigOpts()
    register(conf)
    for group, options in _NOVAS.items():
        conf.register_opts(options, group=group)
    try:
        conf(list(words), project="nova", prog="nova-compute")
    except cfg.Error as error:
        raise BadOption(f"nova-compute's configuration cannot be read: {error}") from error
    return conf


def cloud(nova_conf: Any) -> str:
    """Keystone's URL and the region as configured, which tell one cloud's Glance from another's.

    Of Placement's section, for nova-compute does not start without it; our own may come, and change, at any time.
    """
    # Read apart: keystoneauth, which is imported once that is needed, registers the same options otherwise.
    conf = cfg.ConfigOpts()
    conf.register_opt(cfg.StrOpt("auth_section", default="placement"), group="placement")
    conf.register_opt(cfg.StrOpt("region_name"), group="glance")
    conf(arguments(nova_conf), project="nova", prog="nova-compute")
    section = conf.placement.auth_section
    conf.register_opt(cfg.StrOpt("auth_url", default=""), group=section)
    return " ".join(filter(None, (conf[section].auth_url.rstrip("/"), conf.glance.region_name)))


def list_opts() -> list[tuple[Any, list[Any]]]:
    """For the entry point ``oslo.config.opts``."""
    return [(GROUP, OPTIONS), (_STORE_GROUP, _STORE_OPTIONS)]
