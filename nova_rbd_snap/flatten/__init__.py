# SPDX-License-Identifier: Apache-2.0
"""Flattening of clones that are images already, out of the tenant's way (``docs/design/flatten.rst``)."""
