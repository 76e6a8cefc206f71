# SPDX-License-Identifier: Apache-2.0
"""Death at any point: nova-compute and its engine are killed at random instants, on a real Ceph with a real Glance.

``worker.py`` is what nova-compute is to the engine, in a process that can be killed; ``scene.py`` is one disk and the
image that is made of it, ``guest.py`` who uses the disk meanwhile; ``instants.py`` chooses the instants and plays them.
"""
