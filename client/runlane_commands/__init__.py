"""Where the commands `runlane` and `runlane-conformance` are entered: before gRPC is loaded.

Its core writes to stderr by itself, in a form of its own, and reads just once, when it is loaded,
that it is not to. What matters is told by our own errors, in words for people.
"""

from __future__ import annotations

import os


def runlane() -> None:
    """The command `runlane`; leaves with its exit code."""
    _silence()
    from runlane.cli import main  # noqa: PLC0415 - it loads gRPC

    main()


def conformance() -> None:
    """The command `runlane-conformance`; leaves with its exit code."""
    _silence()
    from runlane.conformance import main  # noqa: PLC0415 - it loads gRPC

    main()


def _silence() -> None:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
