"""A TCP proxy that drops answers, breaks connections, and stops forwarding.

It parses the frame headers of HTTP/2 (RFC 9113, section 4.1) to recognise requests and answers, so
that a test determines what is lost without relying on timing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Self

CHUNK = 1 << 16
PREFACE = 24
"""Bytes that a client sends before its first frame."""
HEADERS = 1
"""The type of the first frame of a request, and of an answer."""


class Frames:
    """Parses the types of frames from a stream of bytes that arrives in pieces."""

    def __init__(self, skip: int = 0) -> None:
        self._skip = skip
        self._head = b""

    def types(self, data: bytes) -> Iterator[int]:
        """Returns the types of the frames that begin in this piece."""
        while data:
            if self._skip:
                passed = min(self._skip, len(data))
                self._skip -= passed
                data = data[passed:]
                continue
            taken = 9 - len(self._head)
            self._head, data = self._head + data[:taken], data[taken:]
            if len(self._head) == 9:
                self._skip = int.from_bytes(self._head[:3], "big")
                kind, self._head = self._head[3], b""
                yield kind


class Proxy:
    """Listens on a free loopback port, and forwards connections to `target`.

    Attributes:
        target: `HOST:PORT` of the server. While it is empty, every new connection is closed.
        lose: The number of answers to drop. Each breaks its connection at its first frame. The
            trailers of an answer count as an answer of their own.
        cuts: Byte counts. The first connection breaks after the first number of bytes from the
            server, the second after the second, and so on. Later connections do not break.
        silence_at_request: The number, from 1, of the request from which on answers are withheld;
            0: never. The server still receives the whole request.
        requested_at: The times of all requests, in seconds of a monotonic clock.
        answers: The number of header frames from the server, dropped ones included.
        connections: The number of connections accepted.
        closed: The number of connections closed because `target` did not accept one.
    """

    def __init__(self) -> None:
        self.target = ""
        self.lose = 0
        self.cuts: list[int] = []
        self.silence_at_request = 0
        self.requested_at: list[float] = []
        self.answers = 0
        self.connections = 0
        self.closed = 0
        self.address = ""
        self._speaks = asyncio.Event()
        self._speaks.set()
        self._answers = asyncio.Event()
        self._answers.set()
        self._dead: set[asyncio.Task[None]] = set()
        self._news = asyncio.Condition()
        self._server: asyncio.Server | None = None
        self._open: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        opened = dict(self._open)
        for task in opened:
            task.cancel()
        await asyncio.gather(*opened, return_exceptions=True)
        for writer in opened.values():
            # A task that was cancelled before its first step has closed nothing.
            writer.transport.abort()

    @property
    def requests(self) -> int:
        """The number of requests over all connections."""
        return len(self.requested_at)

    def cut(self) -> None:
        """Breaks all current connections."""
        for writer in self._open.values():
            writer.transport.abort()

    def silence(self) -> None:
        """Stops forwarding in both directions; still accepts connections."""
        self._speaks.clear()

    def speak(self) -> None:
        """Resumes forwarding, starting with the data that was withheld."""
        self._speaks.set()
        self._answers.set()

    def strand(self) -> None:
        """Stops forwarding on all current connections, permanently; new ones work."""
        self._dead.update(self._open)

    async def until(self, what: str, least: int, seconds: float = 30) -> None:
        """Waits until the attribute `what` has at least this value."""
        try:
            async with asyncio.timeout(seconds), self._news:
                await self._news.wait_for(lambda: getattr(self, what) >= least)
        except TimeoutError:
            text = f"{what}: {getattr(self, what)}, not {least}, after {seconds:g} s"
            raise AssertionError(text) from None

    async def _notify(self) -> None:
        async with self._news:
            self._news.notify_all()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._server is None or not self._server.is_serving():
            writer.transport.abort()
            return
        task = asyncio.get_running_loop().create_task(self._connected(reader, writer))
        self._open[task] = writer

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.connections += 1
        await self._notify()
        try:
            await self._serve(reader, writer, task)
        except asyncio.CancelledError:
            # asyncio would log the error; only `__aexit__` cancels.
            pass
        finally:
            writer.transport.abort()
            del self._open[task]

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, task: asyncio.Task[None]
    ) -> None:
        await self._speaks.wait()
        host, _, port = self.target.rpartition(":")
        try:
            if not host:
                raise ConnectionRefusedError
            back, forth = await asyncio.open_connection(host, int(port))
        except OSError:
            self.closed += 1
            await self._notify()
            return
        ways = (
            asyncio.create_task(self._forth(reader, forth, task)),
            asyncio.create_task(self._back(back, writer, task)),
        )
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            # Before the await, which may be cancelled.
            forth.transport.abort()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _forth(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, owner: asyncio.Task[None]
    ) -> None:
        frames = Frames(PREFACE)
        with suppress(OSError):
            while data := await reader.read(CHUNK):
                await self._let_through(owner)
                new = sum(kind == HEADERS for kind in frames.types(data))
                self.requested_at += [time.monotonic()] * new
                if new and 0 < self.silence_at_request <= self.requests:
                    # The server still receives the rest of the request, which may arrive later.
                    self._answers.clear()
                await self._notify()
                writer.write(data)
                await writer.drain()

    async def _back(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, owner: asyncio.Task[None]
    ) -> None:
        frames = Frames()
        left = self.cuts.pop(0) if self.cuts else None
        with suppress(OSError):
            while data := await reader.read(CHUNK):
                await self._let_through(owner)
                await self._answers.wait()
                new = sum(kind == HEADERS for kind in frames.types(data))
                self.answers += new
                if new and self.lose > 0:
                    self.lose -= 1
                    await self._notify()
                    return
                await self._notify()
                writer.write(data if left is None else data[:left])
                await writer.drain()
                if left is not None and (left := left - len(data)) <= 0:
                    await self._let_go(writer)
                    return

    async def _let_through(self, owner: asyncio.Task[None]) -> None:
        if owner in self._dead:
            await asyncio.Event().wait()
        await self._speaks.wait()

    async def _let_go(self, writer: asyncio.StreamWriter) -> None:
        # An abort would discard the bytes before the break.
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
