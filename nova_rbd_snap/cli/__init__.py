# SPDX-License-Identifier: Apache-2.0
"""``nova-rbd-snap``: what an operator may ask for, on the machine of a nova-compute and with its configuration.

``app.py`` is the command and how it fails, ``commands.py`` what it can do, ``machine.py`` the local disk as it sees it.
``docs/operating.rst`` is its manual.
"""
