"""The `runlane` command. What it needs beyond the client comes with the extra `cli`."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Runs the command and leaves with its exit code; whatever happens is told in one line."""
    try:
        # Here and not above, as both of these may be missing.
        from runlane.cli.app import runlane  # noqa: PLC0415
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in {"click", "rich"}:
            raise
        sys.exit(f"runlane: {missing} is not installed; try: pip install 'runlane[cli]'")
    try:
        runlane(prog_name="runlane")
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if os.environ.get("RUNLANE_DEBUG"):
            raise
        sys.exit(f"Error: {type(error).__name__}: {error} (RUNLANE_DEBUG=1 shows where)")
