"""A raw HTTP/2 client that sends what no gRPC library would: messages in part, strange paths."""

from __future__ import annotations

import asyncio
import fcntl
import socket
import struct
import sys
import termios
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from proofs.fuzz.frames import (
    ACK,
    CALL,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    WINDOW,
    block,
    frame,
    settings,
)

INITIAL_WINDOW = 4
"""The setting with the window of each new stream."""

DEFAULT_WINDOW = 65_535
MAX_FRAME = 16_384

TCP_CLOSE = 7
"""The state of a connection that was reset, in Linux."""


def message(data: bytes) -> bytes:
    """A gRPC message with its prefix."""
    return b"\0" + struct.pack(">I", len(data)) + data


class RawConnection:
    """A connection whose frames are acknowledged and counted."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._windows: Counter[int] = Counter()
        self._initial = DEFAULT_WINDOW
        self._connection_window = DEFAULT_WINDOW
        self._changed = asyncio.Event()
        self._next = 1
        self.ended: set[int] = set()
        """The streams that the server has ended."""
        self.sent: Counter[int] = Counter()
        """Bytes of data sent on each stream."""
        self.closed = False

    @property
    def is_reset(self) -> bool:
        """Whether the kernel knows that the other side takes nothing more."""
        connection = self._writer.get_extra_info("socket")
        if connection.fileno() < 0:  # a write has failed
            return True
        state: int = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
        return state == TCP_CLOSE

    def open(self, path: str | bytes, **fields: str) -> int:
        """Opens a call; returns its stream. In the name of a field, `_` stands for `-`."""
        stream, self._next = self._next, self._next + 2
        text = path if isinstance(path, str) else path.decode("latin-1")
        headers = {**CALL, ":path": text, **{k.replace("_", "-"): v for k, v in fields.items()}}
        encoded = block(headers)
        if isinstance(path, bytes):
            # The literal was encoded as UTF-8, which doubles the byte; restore it.
            encoded = encoded.replace(
                bytes([len(text.encode())]) + text.encode(), bytes([len(path)]) + path
            )
        self._writer.write(frame(HEADERS, encoded, flags=END_HEADERS, stream=stream))
        return stream

    async def write(self, frames: bytes) -> None:
        """Sends frames of any kind."""
        self._writer.write(frames)
        await self._writer.drain()

    async def until_received(self) -> None:
        """Waits until the kernel of the server has all that was sent."""
        connection = self._writer.get_extra_info("socket")
        while self._writer.transport.get_write_buffer_size() or unacknowledged(connection):
            await asyncio.sleep(0.001)

    async def send(self, stream: int, data: bytes, *, end: bool = False) -> None:
        """Sends data as fast as the server allows."""
        sent = 0
        while sent < len(data):
            window = min(self._connection_window, self._initial + self._windows[stream])
            if window <= 0:
                await self.changed()
                continue
            part = data[sent : sent + min(window, MAX_FRAME)]
            sent += len(part)
            self._connection_window -= len(part)
            self._windows[stream] -= len(part)
            self.sent[stream] += len(part)
            flags = END_STREAM if end and sent == len(data) else 0
            self._writer.write(frame(DATA, part, flags=flags, stream=stream))
            await self._writer.drain()

    async def send_for(self, seconds: float, stream: int, data: bytes) -> int:
        """Sends data for a time; returns how many bytes the server took."""
        before = self.sent[stream]
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.send(stream, data)
        return self.sent[stream] - before

    async def until_ended(self, *streams: int) -> None:
        """Waits until the server has ended these calls."""
        while not self.ended.issuperset(streams):
            if self.closed:
                raise ConnectionError("the server closed the connection")
            await self.changed()

    async def changed(self) -> None:
        """Waits for the next frame of the server."""
        self._changed.clear()
        await self._changed.wait()

    async def read_frames(self) -> None:
        """Reads until the connection closes."""
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await self._reader.readexactly(9)
                body = await self._reader.readexactly(int.from_bytes(head[:3], "big"))
                self._on_frame(head[3], head[4], int.from_bytes(head[5:], "big"), body)
                self._changed.set()
        self.closed = True
        self._changed.set()

    def _on_frame(self, kind: int, flags: int, stream: int, body: bytes) -> None:
        if kind == SETTINGS and not flags & ACK:
            self._initial = dict(struct.iter_unpack(">HI", body)).get(INITIAL_WINDOW, self._initial)
            self._writer.write(frame(SETTINGS, flags=ACK))
        elif kind == PING and not flags & ACK:
            self._writer.write(frame(PING, body, flags=ACK))
        elif kind == WINDOW:
            more = int.from_bytes(body, "big")
            if stream:
                self._windows[stream] += more
            else:
                self._connection_window += more
        elif kind == RST_STREAM or (kind in (HEADERS, DATA) and flags & END_STREAM):
            self.ended.add(stream)


def unacknowledged(connection: socket.socket) -> int:
    """The bytes that were sent and that the other side has not confirmed."""
    sent = fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4))
    return int.from_bytes(sent, sys.byteorder)


@asynccontextmanager
async def raw_connection(
    address: str, window: int | None = None, *, source: str | None = None
) -> AsyncIterator[RawConnection]:
    """Connects, from the address `source`; `window` is the window of streams that this side
    announces."""
    reader, writer = await _connect(address, source)
    writer.write(PREFACE + (settings() if window is None else settings((INITIAL_WINDOW, window))))
    connection = RawConnection(reader, writer)
    reading = asyncio.create_task(connection.read_frames())
    try:
        yield connection
    finally:
        reading.cancel()
        with suppress(asyncio.CancelledError):
            await reading
        writer.close()


async def _connect(
    address: str, source: str | None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if address.startswith("unix:"):
        return await asyncio.open_unix_connection(address.removeprefix("unix:"))
    host, _, port = address.rpartition(":")
    local = None if source is None else (source, 0)
    return await asyncio.open_connection(host, int(port), local_addr=local)
