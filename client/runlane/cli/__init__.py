"""The `runlane` command; requires the extra `cli`.

Import only `main` from here. The rest of the client must never import this package, because its
dependencies may be missing.
"""

from __future__ import annotations

import os
import sys

from runlane_commands.streams import keep_exit_code


def main() -> None:
    """Runs the command; exits with its exit code, and with one line on stderr for an error."""
    keep_exit_code()
    try:
        # Not at the top of the module, because its dependencies may be missing.
        from runlane.cli.app import runlane  # noqa: PLC0415
        from runlane.cli.terminal import prepare  # noqa: PLC0415

        prepare()
        runlane(prog_name="runlane")
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if missing := _missing_dependency(error):
            sys.exit(f"runlane: {missing} is not installed; run: pip install 'runlane[cli]'")
        if os.environ.get("RUNLANE_DEBUG"):
            raise
        sys.exit(f"Error: {type(error).__name__}: {error} (set RUNLANE_DEBUG=1 for a traceback)")


def _missing_dependency(error: Exception) -> str:
    """Returns the dependency of the extra `cli` whose import failed; empty for other errors."""
    if not isinstance(error, ModuleNotFoundError):
        return ""
    package = (error.name or "").partition(".")[0]
    return package if package in {"click", "prometheus_client", "prompt_toolkit", "rich"} else ""
