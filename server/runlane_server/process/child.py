"""`python -m runlane_server.process.child NUMBER`: one of the processes of `--processes`.

Only `processes.py` starts it, with a socket as its stdin. The parent writes the settings to the
socket as one line of JSON. The child answers with one line, `serving` or `error REASON`. After that
nothing is sent: when the socket closes, the parent is gone, and the child shuts down.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress

from runlane_server.agents.command.prctl import protect_memory

if __name__ == "__main__":
    # Before the imports, which take long: programs of other processes may already run.
    protect_memory()

from runlane_commands.streams import keep_exit_code
from runlane_server.config import Config
from runlane_server.core.errors import StartError
from runlane_server.process.app import ChildProcess, run

SERVING = "serving"
ERROR = "error "

ORPHAN_GRACE = 30.0
"""Seconds, beyond the timeouts of its settings, in which a child without a parent must shut down.
No other process is left to kill one that hangs."""


def main() -> None:
    """Serves until the parent ends this process or is gone."""
    keep_exit_code()
    try:
        number, parent = int(sys.argv[1]), _take_stdin()
    except (IndexError, ValueError, OSError):
        sys.stderr.write(
            "runlane-server: error: only runlane-server --processes starts this program\n"
        )
        sys.exit(2)
    with parent.makefile("rb") as lines:
        settings = lines.readline()
    if not settings:
        sys.exit(1)  # the parent is already gone
    config = Config.from_json(settings)
    threading.Thread(target=_follow_parent, args=(parent, config), daemon=True).start()
    try:
        code = run(config, ChildProcess(number, lambda: _send(parent, SERVING)))
    except StartError as error:
        _send(parent, ERROR + " ".join(str(error).split()))
        code = error.exit_code
    sys.exit(code)


def _take_stdin() -> socket.socket:
    """The socket to the parent. Programs that this process starts do not inherit it."""
    parent = socket.socket(fileno=os.dup(0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return parent


def _send(parent: socket.socket, line: str) -> None:
    with suppress(OSError):  # the parent is gone, which `_follow_parent` handles
        parent.sendall(f"{line}\n".encode())


def _follow_parent(parent: socket.socket, config: Config) -> None:
    """Shuts this process down when the parent is gone, also if it was killed.

    It runs in a thread, so it works before the event loop does and while an agent blocks the loop.
    """
    with suppress(OSError):
        while parent.recv(1):
            pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(config.drain_timeout + config.limits.cancel_grace + ORPHAN_GRACE)
    os._exit(1)


if __name__ == "__main__":
    main()
