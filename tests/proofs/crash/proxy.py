"""A TCP proxy that can hold back data, or break its connections."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Self, TypeAlias

Target: TypeAlias = tuple[str, int] | str
"""A host and a port, or the path of a socket in the file system."""

CHUNK = 1 << 16


class Proxy:
    """Listens on a free loopback port, and forwards to `target`.

    `holding` is set once the proxy holds back data.
    """

    def __init__(self) -> None:
        self.target: Target | None = None
        self.port = 0
        self._open = asyncio.Event()
        self._open.set()
        self.holding = asyncio.Event()
        self._refusing = False
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        self._break()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self, *, reset: bool) -> None:
        """Lets nothing through: connections fall silent; with `reset`, old and new ones break."""
        self._open.clear()
        self._refusing = reset
        if reset:
            self._break()

    def mend(self) -> None:
        """Lets all data through, including the data that was held back."""
        self._refusing = False
        self.holding.clear()
        self._open.set()

    def _break(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        try:
            if not self._refusing:
                await self._serve(reader, writer)
        except OSError:
            pass
        except asyncio.CancelledError:
            # The server of asyncio would log it; only `__aexit__` cancels.
            pass
        finally:
            writer.transport.abort()
            self._writers.discard(writer)
            self._tasks.discard(task)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._open.wait()
        if isinstance(self.target, str):
            back, forth = await asyncio.open_unix_connection(self.target)
        elif self.target is not None:
            back, forth = await asyncio.open_connection(*self.target)
        else:
            return
        self._writers.add(forth)
        ways = [
            asyncio.create_task(self._pass_on(reader, forth)),
            asyncio.create_task(self._pass_on(back, writer)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            forth.transport.abort()
            self._writers.discard(forth)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(CHUNK):
                if not self._open.is_set():
                    self.holding.set()
                    await self._open.wait()
                writer.write(data)
                await writer.drain()
