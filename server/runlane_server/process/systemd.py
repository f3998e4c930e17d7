"""Tells systemd how the server is: `sd_notify`, for a unit with `Type=notify`."""

from __future__ import annotations

import os
import socket
from contextlib import suppress

READY = "READY=1"
STOPPING = "STOPPING=1"


def notify(state: str) -> None:
    """Says a state to the service manager, if there is one that wants to know.

    It never fails: a manager that is not told acts after its own timeouts.
    """
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path.startswith("@"):  # of the abstract namespace, where names begin with a NUL
        path = f"\0{path[1:]}"
    if not path:
        return
    kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
    with suppress(OSError, ValueError), socket.socket(socket.AF_UNIX, kind) as sender:
        sender.sendto(state.encode(), path)
