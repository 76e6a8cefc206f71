# SPDX-License-Identifier: Apache-2.0
"""The border to Ceph: nothing outside this folder imports ``rados`` or ``rbd``.

``cluster.py`` is what the rest calls, ``translate.py`` turns the bindings' exceptions into ours.
"""
