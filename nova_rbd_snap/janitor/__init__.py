# SPDX-License-Identifier: Apache-2.0
"""What is left of earlier work, and who may clear it away.

``jobs.py`` ends jobs whose request is over, ``disks.py`` removes the disks of a server that is being deleted, whatever
snapshots were left on them. ``leftovers.py`` plans and executes a sweep of what has no job at all: ``strays.py`` in the
pools, ``copies.py`` on the local disk, in the words of ``findings.py``. Doubt means keep.
"""
