# SPDX-License-Identifier: Apache-2.0
"""The border to OpenStack: nothing outside this folder imports Nova or talks to Glance.

One module per seam of Nova: ``driver.py`` (LibvirtDriver), ``imagebackend.py`` (Rbd), ``images.py`` (the request's
token and image properties), ``guest.py`` (QEMU's monitor, the guest's agent), ``process.py`` (nova-compute's engine).
``clone.py`` is the clone way as the seams share it, ``ondisks.py`` who is at work on a server's disks. ``glance.py``
and ``registration.py`` know Glance but not Nova, and serve the engine, too, with ``keystone.py``.
"""
