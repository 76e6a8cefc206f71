# SPDX-License-Identifier: Apache-2.0
"""Snapshots of OpenStack instances on Ceph RBD, by cloning inside the cluster.

``openstack/`` is the border to Nova and Glance, ``ceph/`` the border to librados and librbd; everything between
them is plain Python that runs without either. ``docs/design/`` says how the parts fit.
"""
