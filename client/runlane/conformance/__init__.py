"""Whether a server keeps the rules R1 to R30, found out over the wire.

    runlane-conformance 127.0.0.1:50051

The server is one that was started with `--harness --agent scripted` and has nothing else to do: it
is cancelled, crashed, drained and moved ahead in time. Each rule has one or more cases, in the
module for its part of the rules; a case stages what the rule is about by means of the gates.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command. What it needs beyond the client comes with the extra `cli`."""
    try:
        from runlane.conformance.app import main as run  # noqa: PLC0415 - click may be missing
    except ModuleNotFoundError as error:
        if error.name != "click":
            raise
        sys.exit("runlane-conformance: click is not installed; try: pip install 'runlane[cli]'")
    run()
