"""Sends requests to endpoints that nobody trusts: bounded in time and bytes, to pinned addresses.

A name is resolved once for each connection, all its addresses are checked, and the connection goes
to one of them. Redirects are not followed. Of an answer the status is used, and for a challenge
whether its value is there; nothing of it is kept.

It speaks HTTP/1.1 by itself: a client library resolves the name again when it connects, or takes an
address only through a transport of its own making, and reads an answer without these limits.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from runlane_server.webhooks.connections import Connection, Endpoint, IdleConnections
from runlane_server.webhooks.destination import Destinations, Refused, Target
from runlane_server.webhooks.names import Names

TIMEOUT = 15.0
"""Seconds for a delivery, from the resolution of the name to the end of the answer."""

MAX_ANSWER = 16 << 10
"""Bytes of the head of an answer, and of its body."""

MAX_ADDRESSES = 3
"""Addresses of a name that are tried."""

MAX_INTERIM = 5

_STATUS = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9]{2})[ \r\n]")
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,9})[ \t]*\r\n", re.IGNORECASE)
_CLOSE = re.compile(rb"\r\nconnection:[^\r\n]*close", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:", re.IGNORECASE)


class DeliveryFailed(Exception):
    """A delivery failed. The text is for the owner of the webhook."""


class _Silent(Exception):
    """The endpoint closed a connection without an answer."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer of an endpoint. `content` is the beginning of it, head included."""

    status: int
    content: bytes


class Sender:
    """Posts deliveries, and keeps connections for the next ones."""

    def __init__(self, destinations: Destinations, *, timeout: float = TIMEOUT) -> None:
        self._destinations = destinations
        self._timeout = timeout
        self._idle = IdleConnections()
        self._tls: ssl.SSLContext | None = None
        self._names = Names()

    def close(self) -> None:
        """Closes all idle connections."""
        self._idle.close()
        self._names.close()

    async def post(
        self, url: str, headers: Mapping[str, str], body: bytes, *, tenant: str
    ) -> Answer:
        """Sends a request. Raises DeliveryFailed if there is no answer, and NamesBusy."""
        try:
            target = Target.parse(url)
            async with asyncio.timeout(self._timeout):
                return await self._post(target, _encode(target, headers, body), tenant)
        except TimeoutError:
            raise DeliveryFailed(f"no answer within {self._timeout:g} s") from None
        except (Refused, ValueError) as error:
            raise DeliveryFailed(str(error)) from error
        except ssl.SSLError as error:
            raise DeliveryFailed(f"TLS failed: {error.reason or 'unknown reason'}") from error
        except (OSError, _Silent) as error:
            raise DeliveryFailed(_why(error)) from error

    async def _post(self, target: Target, request: bytes, tenant: str) -> Answer:
        endpoint = Endpoint(tenant, target.is_https, target.host, target.port)
        kept = self._idle.take(endpoint)
        if kept is not None:
            # The endpoint may have closed it; a delivery may arrive twice anyway.
            with suppress(OSError, _Silent):
                return await self._exchange(endpoint, kept, request)
        return await self._exchange(endpoint, await self._connect(target, endpoint), request)

    async def _exchange(self, endpoint: Endpoint, connection: Connection, request: bytes) -> Answer:
        reusable = False
        try:
            connection.writer.write(request)
            await connection.writer.drain()
            answer, reusable = await _read(connection.reader)
            return answer
        finally:
            if reusable:
                self._idle.put(endpoint, connection)
            else:
                connection.close()

    async def _connect(self, target: Target, endpoint: Endpoint) -> Connection:
        addresses = await self._resolve(target, endpoint.tenant)
        tls = self._context() if target.is_https else None
        for n, address in enumerate(addresses, 1):
            try:
                return await Connection.open(address, endpoint, tls=tls, limit=MAX_ANSWER)
            except ssl.SSLError:
                raise
            except OSError:
                if n == len(addresses):
                    raise
        raise AssertionError("unreachable")

    async def _resolve(self, target: Target, tenant: str) -> Sequence[str]:
        """The addresses of a host. Raises Refused if one of them is not allowed."""
        addresses = await self._names.addresses(target.host, tenant)
        self._destinations.check_found(target, addresses)
        return addresses[:MAX_ADDRESSES]

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = ssl.create_default_context()
        return self._tls


async def _read(reader: asyncio.StreamReader) -> tuple[Answer, bool]:
    """An answer, and whether the connection can be used again."""
    for _ in range(MAX_INTERIM):
        head = await _read_head(reader)
        found = _STATUS.match(head)
        if found is None:
            raise DeliveryFailed("the answer is not HTTP/1.1")
        status = int(found[2])
        if status >= 200:
            break
    else:
        raise DeliveryFailed("the answer has too many interim responses")
    keeps = found[1] == b"1" and not _CLOSE.search(head)
    if status in {204, 304}:
        return Answer(status, head), keeps
    body, is_whole = await _read_body(reader, head)
    return Answer(status, head + body), keeps and is_whole


async def _read_body(reader: asyncio.StreamReader, head: bytes) -> tuple[bytes, bool]:
    """The body of an answer, or the beginning of it; and whether it is whole."""
    try:
        if _CHUNKED.search(head):
            return await _read_chunks(reader)
        length = _LENGTH.search(head)
        if length is not None and int(length[1]) <= MAX_ANSWER:
            return await reader.readexactly(int(length[1])), True
        return await reader.read(MAX_ANSWER), False
    except asyncio.IncompleteReadError as error:
        return error.partial, False
    except ValueError:  # a chunk without a size, or a line that is too long
        return b"", False


async def _read_chunks(reader: asyncio.StreamReader) -> tuple[bytes, bool]:
    body = b""
    while True:
        size = int((await reader.readline()).partition(b";")[0], 16)
        if not 0 <= size <= MAX_ANSWER - len(body):
            return body, False
        chunk = await reader.readexactly(size + 2)
        if not size:
            return body, chunk == b"\r\n"
        body += chunk[:-2]


async def _read_head(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError:
        raise DeliveryFailed(f"the head of the answer has more than {MAX_ANSWER} bytes") from None
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise DeliveryFailed("the answer is not HTTP/1.1, or was cut off") from None
        raise _Silent from None


def _encode(target: Target, headers: Mapping[str, str], body: bytes) -> bytes:
    lines = {"Host": target.authority, **headers, "Content-Length": str(len(body))}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"POST {target.path} HTTP/1.1\r\n{head}\r\n".encode() + body


def _why(error: Exception) -> str:
    if isinstance(error, _Silent):
        return "the connection was closed without an answer"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    return "connection failed"
