# SPDX-License-Identifier: Apache-2.0
"""Work that nobody waits for: jobs of the ledger that any host may do, one at a time, under leases."""
