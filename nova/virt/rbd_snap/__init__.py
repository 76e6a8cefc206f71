# SPDX-License-Identifier: Apache-2.0
"""Where Nova's loader finds the driver: ``compute_driver = rbd_snap.LibvirtDriver``.

Nova imports ``nova.virt.<compute_driver>``, so this one module is installed inside its package.
"""

from nova_rbd_snap.openstack.driver import LibvirtDriver

__all__ = ["LibvirtDriver"]
