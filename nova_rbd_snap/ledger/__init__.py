# SPDX-License-Identifier: Apache-2.0
"""What is in flight, durably, in RADOS: ``job.py`` is one record, ``store.py`` the object that holds them.

``docs/design/ledger.rst`` is the page to read first: which keys there are, who may change them, in which order.
"""
