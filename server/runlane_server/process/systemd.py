"""Notifies systemd of the server's state (`sd_notify`), for a unit with `Type=notify`."""

from __future__ import annotations

import os
import socket
from contextlib import suppress

READY = "READY=1"
STOPPING = "STOPPING=1"


def notify(state: str) -> None:
    """Sends a state to the service manager, if one listens.

    It never fails: a manager that misses a state acts on its own timeouts.
    """
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path.startswith("@"):  # the abstract namespace, where names begin with a NUL
        path = f"\0{path[1:]}"
    if not path:
        return
    kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
    with suppress(OSError, ValueError), socket.socket(socket.AF_UNIX, kind) as sender:
        sender.sendto(state.encode(), path)
