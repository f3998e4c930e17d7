"""An endpoint of webhooks: a real HTTP server that verifies signatures and records deliveries."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from standardwebhooks import Webhook as Verifier

_LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Delivery:
    """A request to the endpoint."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def message(self) -> dict[str, Any]:
        """The body."""
        found: dict[str, Any] = json.loads(self.body)
        return found

    @property
    def data(self) -> dict[str, Any]:
        """The event that it reports."""
        data: dict[str, Any] = self.message["data"]
        return data

    def verify(self, secret: str) -> None:
        """Raises if it is not signed with a secret, by the reference implementation."""
        Verifier(secret).verify(self.body.decode(), self.headers)


@dataclass
class Endpoint:
    """Answers deliveries with `answer`, a status or whole bytes, and records those it accepts."""

    answer: Callable[[Delivery], int | bytes] = lambda _: 200
    answers_challenges: bool = True
    port: int = 0
    accepted: list[Delivery] = field(default_factory=list)
    attempts: list[Delivery] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    connections: int = 0
    in_flight: int = 0
    most_in_flight: int = 0
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.gate.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"

    def run_ids(self, session_id: str = "") -> list[str]:
        """The ids of the runs of accepted deliveries, each once, in order of their first."""
        found = (it.data for it in self.accepted)
        return list(
            dict.fromkeys(it["runId"] for it in found if session_id in {"", it["sessionId"]})
        )

    def event_ids(self, session_id: str = "") -> list[str]:
        """The ids of the runs and the input requests of accepted deliveries, in the same way."""
        found = (it.data for it in self.accepted)
        return list(
            dict.fromkeys(
                it.get("inputRequestId", it["runId"])
                for it in found
                if session_id in {"", it["sessionId"]}
            )
        )

    async def until(self, condition: Callable[[], bool], seconds: float = 30.0) -> None:
        """Waits for a condition that deliveries change."""
        async with asyncio.timeout(seconds):
            while not condition():
                self._changed.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(0.2):  # something else may have changed it
                        await self._changed.wait()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        self.connections += 1
        while True:
            await self._exchange(reader, writer)

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        found = _LENGTH.search(head)
        assert found is not None
        first, *lines = head.decode().strip().split("\r\n")
        headers = {name.lower(): value for name, value in (it.split(": ", 1) for it in lines)}
        delivery = Delivery(first.split()[1], headers, await reader.readexactly(int(found[1])))
        writer.write(await self._answer(delivery))
        await writer.drain()

    async def _answer(self, delivery: Delivery) -> bytes:
        if delivery.message.get("type") == "webhook.challenge":
            value = delivery.data["challenge"] if self.answers_challenges else "no"
            return http(200, value.encode())
        self.attempts.append(delivery)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        self._changed.set()
        await self.gate.wait()
        self.in_flight -= 1
        answer = self.answer(delivery)
        if isinstance(answer, bytes):
            return answer
        if 200 <= answer < 300:
            self.accepted.append(delivery)
        self._changed.set()
        return http(answer)


def http(status: int, body: bytes = b"{}", *headers: str) -> bytes:
    """An answer."""
    lines = "".join(f"{line}\r\n" for line in (f"Content-Length: {len(body)}", *headers))
    return f"HTTP/1.1 {status} Text\r\n{lines}\r\n".encode() + body


Serve: TypeAlias = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def listening(serve: Serve, port: int = 0) -> AsyncIterator[int]:
    """Serves connections while the context is open, and closes them at its end."""
    open_: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        open_[task] = writer
        try:
            await serve(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()
            del open_[task]

    server = await asyncio.start_server(on_connection, "127.0.0.1", port)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for writer in open_.values():
            writer.transport.abort()
        if open_:
            await asyncio.wait(tuple(open_), timeout=5.0)


@asynccontextmanager
async def endpoint(**options: Any) -> AsyncIterator[Endpoint]:
    """Serves while the context is open."""
    served = Endpoint(**options)
    async with listening(served.serve, served.port) as port:
        served.port = port
        try:
            yield served
        finally:
            served.gate.set()
