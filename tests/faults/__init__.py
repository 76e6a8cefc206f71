# SPDX-License-Identifier: Apache-2.0
"""The fault matrix: what may go wrong with a snapshot, and what is promised then. Read ``matrix.py`` first."""

import pytest

# Before they are imported, or their assertions do not show what they compared.
pytest.register_assert_rewrite("tests.faults.outcome", "tests.faults.fake", "tests.faults.real")
