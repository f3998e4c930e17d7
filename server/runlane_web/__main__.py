"""The command `runlane-web`."""

from __future__ import annotations

import sys

from runlane_commands.streams import keep_exit_code, reporting_output
from runlane_web.memory import protect_memory


def main() -> None:
    """Runs the command. Ends with exit code 2 where the extra is not installed."""
    protect_memory()
    keep_exit_code()
    try:
        from runlane_web.cli import web  # noqa: PLC0415 - a missing extra has a line of its own
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in (
            "click",
            "h11",
            "sse_starlette",
            "starlette",
            "uvicorn",
        ):
            raise
        print(  # noqa: T201 - the command's own output
            f"runlane-web: {error.name} is not installed; install the extra: "
            "pip install 'runlane[web]'",
            file=sys.stderr,
        )
        sys.exit(2)
    with reporting_output("runlane-web"):
        web()


if __name__ == "__main__":
    main()
