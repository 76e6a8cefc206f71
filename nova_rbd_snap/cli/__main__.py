# SPDX-License-Identifier: Apache-2.0
"""The console script, also as ``python -m nova_rbd_snap.cli`` where no script was installed."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command that the process was started with; returns its exit code."""
    try:
        from nova_rbd_snap.cli.app import App
    except ImportError as error:
        # The engine does without it, so a nova-compute may well lack it.
        print(f"nova-rbd-snap: {sys.executable} lacks what the command needs: {error}; install cliff", file=sys.stderr)
        return 2
    return App().run(sys.argv[1:] or ["--help"])


if __name__ == "__main__":
    sys.exit(main())
