"""`python -m runlane_server`, and the command `runlane-server`."""

import sys

from runlane_commands.streams import keep_exit_code, reporting_output
from runlane_server.extras import missing


def main() -> None:
    """Runs the command; exits with its exit code, and with one line if an extra is missing."""
    keep_exit_code()
    try:
        from runlane_server.cli.main import main as run  # noqa: PLC0415 - its imports are an extra
    except ImportError as error:
        if line := missing(error):
            sys.stderr.write(f"runlane-server: error: {line}\n")
            sys.exit(2)
        raise
    with reporting_output("runlane-server"):
        run()


if __name__ == "__main__":
    main()
