"""The command `runlane-conformance`: checks over the wire that a server follows the rules.

The server must be a dedicated one, started with `--harness --agent scripted`. `cases` has one or
more cases per rule; each uses gates to force one order of events. Import only `main` from here. The
package must never import the server.
"""

from __future__ import annotations

import sys

from runlane_commands.streams import keep_exit_code


def main() -> None:
    """Runs the command; requires the extra `cli`."""
    keep_exit_code()
    try:
        from runlane.conformance.app import main as run  # noqa: PLC0415 - its imports may be missing
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in {"click", "rich"}:
            raise
        sys.exit(
            f"runlane-conformance: {missing} is not installed; run: pip install 'runlane[cli]'"
        )
    run()
