"""The entry points of the commands `runlane`, `runlane-conformance` and `runlane-web`.

This package is separate because importing `runlane` loads gRPC. gRPC writes its own messages to
stderr and reads the variable that silences it only while it is loaded. It must never import gRPC or
`runlane` at the top level.
"""

from __future__ import annotations

import os


def runlane() -> None:
    """Runs the command `runlane`; exits with its exit code."""
    _silence_grpc()
    from runlane.cli import main  # noqa: PLC0415 - loads gRPC

    main()


def conformance() -> None:
    """Runs the command `runlane-conformance`; exits with its exit code."""
    _silence_grpc()
    from runlane.conformance import main  # noqa: PLC0415 - loads gRPC

    main()


def web() -> None:
    """Runs the command `runlane-web`; exits with its exit code."""
    _silence_grpc()
    from runlane_web.__main__ import main  # noqa: PLC0415 - loads gRPC

    main()


def _silence_grpc() -> None:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
