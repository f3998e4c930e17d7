"""`python -m runlane_server.process.child NUMBER`: one of the processes of `--processes`.

`processes.py` alone starts it, with a socket for its stdin. The parent writes the settings there,
one line of JSON; the process answers with one line, `serving` or `error WHY`. From then on the
socket says one thing: when it closes, the parent is gone, and the process ends too.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress

from runlane_server.config import Config
from runlane_server.core.errors import StartError
from runlane_server.process.app import Child, run

SERVING = "serving"
ERROR = "error "

LAST_SECONDS = 30.0
"""How many seconds longer than its settings allow a process without a parent may take to stop. No
other process is left to kill one that hangs."""


def main() -> None:
    """Serves as one of several, until the parent says so or is gone."""
    try:
        number, control = int(sys.argv[1]), _take_control()
    except (IndexError, ValueError, OSError):
        sys.stderr.write(
            "runlane-server: error: only runlane-server --processes starts this program\n"
        )
        sys.exit(2)
    with control.makefile("rb") as lines:
        settings = lines.readline()
    if not settings:
        sys.exit(1)  # the parent is gone already
    config = Config.of(**json.loads(settings))
    threading.Thread(target=_go_with_parent, args=(control, config), daemon=True).start()
    try:
        code = run(config, Child(number, lambda: _tell(control, SERVING)))
    except StartError as error:
        _tell(control, ERROR + " ".join(str(error).split()))
        code = error.exit_code
    sys.exit(code)


def _take_control() -> socket.socket:
    """The socket to the parent. Programs that this process starts do not get it."""
    control = socket.socket(fileno=os.dup(0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return control


def _tell(control: socket.socket, line: str) -> None:
    with suppress(OSError):  # the parent is gone, which is seen to elsewhere
        control.sendall(f"{line}\n".encode())


def _go_with_parent(control: socket.socket, config: Config) -> None:
    """Ends this process in good order when the parent is gone, however that came about.

    In a thread: it works before the event loop does, and also where an agent blocks the loop.
    """
    with suppress(OSError):
        while control.recv(1):
            pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(config.drain_timeout + config.limits.cancel_grace + LAST_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    main()
