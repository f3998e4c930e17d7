"""Deliveries to endpoints that nobody trusts."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import ip_network

import pytest

from runlane_server.webhooks.destination import Destinations
from runlane_server.webhooks.sender import MAX_ANSWER, DeliveryFailed, Sender
from support.endpoint import Serve, endpoint, http, listening

LOCAL = Destinations([ip_network("127.0.0.0/8")])
BODY = b'{"type":"x","data":{}}'


@asynccontextmanager
async def serving(serve: Serve) -> AsyncIterator[str]:
    async with listening(serve) as port:
        yield f"http://127.0.0.1:{port}/"


def replying(*parts: bytes, endless: bytes = b"", closes: bool = True) -> Serve:
    """Sends parts after the head of a request, and then something without end."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for part in parts:
            writer.write(part)
            await writer.drain()
        while endless:
            writer.write(endless)
            await writer.drain()
        if not closes:
            await reader.read()

    return serve


async def problem_of(serve: Serve, timeout: float = 20.0) -> str:
    sender = Sender(LOCAL, timeout=timeout)
    try:
        async with serving(serve) as url:
            with pytest.raises(DeliveryFailed) as raised:
                await sender.post(url, {}, BODY, tenant="t")
    finally:
        sender.close()
    return str(raised.value)


async def test_connections_are_kept_and_replaced_when_the_endpoint_closes_them() -> None:
    sender = Sender(LOCAL)
    async with endpoint() as served:
        for _ in range(5):
            assert (await sender.post(served.url, {"A": "b"}, BODY, tenant="t")).status == 200
        assert served.connections == 1
        served.answer = lambda _: http(200, b"{}", "Connection: close")
        for _ in range(3):
            await sender.post(served.url, {}, BODY, tenant="t")
        assert served.connections == 3
        assert [it.path for it in served.attempts] == ["/hook"] * 8
        assert served.attempts[0].headers["host"] == f"127.0.0.1:{served.port}"
    sender.close()


async def test_a_connection_that_was_closed_meanwhile_is_no_failure() -> None:
    def once(keep: bytes = http(200)) -> Serve:
        return replying(keep)  # and closes, without saying so

    sender = Sender(LOCAL)
    async with serving(once()) as url:
        for _ in range(5):
            assert (await sender.post(url, {}, BODY, tenant="t")).status == 200
    sender.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.0 200 OK\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\ncontent-length:3\r\n\r\nabc",
    ],
)
async def test_every_framing_of_an_answer_is_understood(answer: bytes) -> None:
    sender = Sender(LOCAL)
    async with serving(replying(answer)) as url:
        found = await sender.post(url, {}, BODY, tenant="t")
    assert (found.status, found.content[-3:]) == (200, b"abc")
    sender.close()


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (b"\x00\xff garbage\r\n\r\n", "not HTTP/1.1"),
        (b"HTTP/2 200\r\n\r\n", "not HTTP/1.1"),
        (b"HTTP/1.1 999 OK\r\n\r\n", "not HTTP/1.1"),
        (b"HTTP/1.1 200 OK\r\nA: b", "cut off"),
        (b"", "closed without an answer"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 10, "too many interim"),
        (b"HTTP/1.1 200 OK\r\nA: " + b"x" * 2 * MAX_ANSWER, f"more than {MAX_ANSWER} bytes"),
    ],
)
async def test_r55_garbage_fails_with_its_reason(answer: bytes, problem: str) -> None:
    assert problem in await problem_of(replying(answer))


@pytest.mark.parametrize(
    ("parts", "endless"),
    [
        ((), b""),
        ((b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n",), b""),
        ((b"HTTP/1.1 200 OK\r\n",), b""),
    ],
)
async def test_r55_a_slow_answer_ends_with_the_time_limit(
    parts: tuple[bytes, ...], endless: bytes
) -> None:
    serve = replying(*parts, endless=endless, closes=False)
    assert await problem_of(serve, timeout=0.3) == "no answer within 0.3 s"


@pytest.mark.parametrize(
    "head", [b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"]
)
async def test_r55_an_endless_answer_takes_bounded_memory_and_ends(head: bytes) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sender = Sender(LOCAL, timeout=5.0)
    async with serving(replying(head, endless=b"1000\r\n" + b"x" * 4096 + b"\r\n")) as url:
        if head.endswith(b"\r\n\r\n"):
            assert len((await sender.post(url, {}, BODY, tenant="t")).content) < 3 * MAX_ANSWER
        else:
            with pytest.raises(DeliveryFailed, match="more than"):
                await sender.post(url, {}, BODY, tenant="t")
    sender.close()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB


async def test_r55_a_redirect_is_not_followed() -> None:
    async with endpoint() as secret, endpoint() as served:
        served.answer = lambda _: http(307, b"", f"Location: {secret.url}")
        sender = Sender(LOCAL)
        assert (await sender.post(served.url, {}, BODY, tenant="t")).status == 307
        assert secret.attempts == []
        sender.close()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "2130706433", "0x7f000001", "127.1"])
async def test_r55_a_name_of_a_private_address_is_refused_in_every_spelling(host: str) -> None:
    async with endpoint() as served:
        sender = Sender(Destinations())
        with pytest.raises(DeliveryFailed, match=r"not a global one|cannot be resolved, or"):
            await sender.post(f"http://{host}:{served.port}/", {}, BODY, tenant="t")
        assert served.connections == 0
        sender.close()
