# SPDX-License-Identifier: Apache-2.0
"""The engine: does the work in Ceph, as a child process of nova-compute and with neither eventlet nor Nova in it.

``service.py`` is the engine as plain calls, usable in one process: what a clone is to be (``cloning.py``), whose a job
is (``ownership.py``), over which connection (``connection.py``). ``upkeep.py`` is what it does unasked, ``notices.py``
how it tells, ``wiring.py`` what it is put together from. ``server.py`` and ``client.py`` are the two ends of the socket
that it is reached over, ``wire.py`` what travels there.
``docs/design/engine.rst`` says why it is a process.
"""

from typing import Callable

#: Told the step's name, bytes done and bytes in all (0 where unknown), whenever there is progress.
Report = Callable[[str, int, int], None]


def unheard(step: str, done: int, total: int) -> None:
    """The :data:`Report` of work whose progress nobody follows."""
