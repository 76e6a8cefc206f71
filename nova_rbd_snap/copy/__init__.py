# SPDX-License-Identifier: Apache-2.0
"""From the allocated extents of a frozen disk to where they belong: a stream of bytes, or another rbd image.

Knows nothing of Nova, nor of whom it works for.
"""
