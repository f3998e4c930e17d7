"""Fewer wake-ups of the event loop by gRPC.

A thread of gRPC writes a byte to a socket for each operation that is done. The loop reads one byte
in each of its iterations, and with the first one handles all operations that are done. The other
bytes cost an iteration each that finds nothing: on a busy node as many as messages are sent.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVarTuple

Arguments = TypeVarTuple("Arguments")

MAX_BYTES = 1 << 12
"""The most bytes that are read at once."""


class GrpcLoop(asyncio.AbstractEventLoop):
    """A base of event loops that read these bytes at once."""

    def add_reader(self, fd: Any, callback: Callable[[*Arguments], Any], *args: *Arguments) -> None:
        """Calls back when a file can be read."""
        if isinstance(fd, socket.socket) and is_of_grpc(callback):
            super().add_reader(fd, read_all, fd, partial(callback, *args))
        else:
            super().add_reader(fd, callback, *args)


def with_wakeups(kind: type[asyncio.AbstractEventLoop]) -> type[GrpcLoop]:
    """A kind of event loop with fewer wake-ups."""
    return type(kind.__name__, (GrpcLoop, kind), {})


def is_of_grpc(callback: Callable[..., Any]) -> bool:
    """Whether it handles the operations of gRPC that are done."""
    method = callback.func if isinstance(callback, partial) else callback
    return type(getattr(method, "__self__", None)).__name__ == "PollerCompletionQueue"


def read_all(wakeups: socket.socket, handle: Callable[[], object]) -> None:
    """Reads all bytes but one, which `handle` reads. An operation is queued before its byte is
    written, so `handle` finds those of all bytes."""
    count = len(wakeups.recv(MAX_BYTES, socket.MSG_PEEK))
    if count > 1:
        wakeups.recv(count - 1)
    handle()
