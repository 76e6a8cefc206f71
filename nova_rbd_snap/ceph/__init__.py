# SPDX-License-Identifier: Apache-2.0
"""The border to Ceph: nothing outside this folder imports ``rados`` or ``rbd``.

``interface.py`` is what the rest calls, ``librbd.py`` does it, ``translate.py`` turns the
bindings' exceptions into ours.
"""
