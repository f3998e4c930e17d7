"""Requests that cannot be served: each gets the right code, with reason and field."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
import pytest_asyncio
from starlette.requests import Request
from starlette.types import Message

from runlane_server.testing import LocalServer
from runlane_web import assets, connections, guard, known
from runlane_web.errors import Refused
from runlane_web.gateway import Limits
from runlane_web.guard import Policy
from support.callers import guarded
from support.door import OWN, Door, door, reason, violation

ACCEPT = {"sessionId": "s", "prompt": "p", "allowMissing": True}
JSON = {"Content-Type": "application/json"}


# The tests share a server, since each of them asks for something that is refused.
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module", name="opened")
async def _opened() -> AsyncIterator[Door]:
    async with LocalServer() as server, door(server.address) as found:
        yield found


@pytest.mark.parametrize(
    ("body", "field", "problem"),
    [
        (b"{", "body", "is not valid JSON (line 1, column 2"),
        (b"[]", "body", "must be a JSON object"),
        (b'"x"', "body", "must be a JSON object"),
        (b"\xff", "body", "is not UTF-8"),
        (b'{"prompt": NaN}', "body", "is not valid JSON (NaN is no number)"),
        (b'{"a":' * 2000 + b"1" + b"}" * 2000, "body", "is nested more than 32 levels deep"),
        (b'{"a":' * 40 + b"1" + b"}" * 40, "body", "is nested more than 32 levels deep"),
        (b'{"a":' + b"[" * 4000 + b"]" * 4000 + b"}", "body", "is nested more than"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "body", "has more than 4096 elements"),
        (b'{"a": [' + b"1," * 4096 + b"1]}", "body", "has more than 4096 elements"),
        (b'{"a": [' + b"{}," * 4096 + b"1]}", "body", "has more than 4096 elements"),
        (b'{"promt": "x"}', "promt", "does not exist"),
        (b'{"prompt": "x", "prompt": "y"}', "prompt", "is given twice"),
        (b'{"sessionId": "a", "session_id": "b"}', "session_id", "is given twice"),
        (b'{"session_id": "a", "sessionId": "a"}', "sessionId", "is given twice"),
        (b'{"retryPolicy": {"maxBackoff": "1s", "max_backoff": "2s"}}', "max_backoff", "is given"),
        (b'{"whenBusy": 1e999}', "body", ""),
        (b'{"maxAttempts": 1e999}', "maxAttempts", ""),
        (b'{"\\ud800": 1}', "?", "does not exist"),
        (b'{"timeout": 1e999}', "timeout", ""),
        (b'{"prompt": 5}', "prompt", "must be a text"),
        (b'{"maxAttempts": "x"}', "maxAttempts", "must be a whole number"),
        (b'{"maxAttempts": 1.5}', "maxAttempts", ""),
        (b'{"maxAttempts": 99999999999}', "maxAttempts", ""),
        (b'{"whenBusy": "NO"}', "whenBusy", "Invalid enum value NO"),
        (b'{"timeout": "long"}', "timeout", "Duration must end with letter"),
        (b'{"metadata": {"a": 1}}', "metadata", "must be a text"),
        (b'{"metadata": []}', "metadata", ""),
        (b'{"attachments": [{"name": 3}]}', "attachments.name", "must be a text"),
        (b'{"attachments": [{"nam": 3}]}', "attachments.nam", "does not exist"),
        (b'{"attachments": [{"text": "x", "data": "eA=="}]}', "attachments", ""),
        (b'{"prompt": "\\ud800"}', "prompt", ""),
        (b'{"sessionId": "", "prompt": "x"}', "session_id", "is missing"),
    ],
)
async def test_a_bad_body_is_refused(opened: Door, body: bytes, field: str, problem: str) -> None:
    got = await opened.http.post("/v1/runs", content=body, headers=JSON)
    assert got.status_code == 400, got.text
    assert violation(got)[0] == field, got.text
    assert violation(got)[1].startswith(problem), got.text


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/v1/runs?pageSize=x", "page_size"),
        ("/v1/runs?pageSize=1&pageSize=2", "pageSize"),
        ("/v1/runs?pageSize=1&page_size=2", "page_size"),
        ("/v1/runs?nix=1", "nix"),
        ("/v1/runs?states=RUN_STATE_LATE", "states"),
        ("/v1/runs:subscribe?from_beginning=1", "from_beginning"),
        ("/v1/runs?session_id=%FF", "query"),
        ("/v1/sessions/a/runs?session_id=b", "session_id"),
        ("/v1/runs?" + "session_ids=x&" * 2200, "query"),
    ],
)
async def test_a_bad_query_is_refused(opened: Door, path: str, field: str) -> None:
    got = await opened.http.get(path)
    assert (got.status_code, violation(got)[0]) == (400, field), got.text


async def test_a_get_with_a_body_is_refused(opened: Door) -> None:
    got = await opened.http.request("GET", "/v1/runs", content=b"{}", headers=JSON)
    assert (got.status_code, violation(got)[0]) == (400, "body")


async def test_a_session_in_the_path_and_another_in_the_body_are_refused(opened: Door) -> None:
    got = await opened.http.post("/v1/sessions/a/runs", json={"session_id": "b", "prompt": "x"})
    assert (got.status_code, violation(got)[0]) == (400, "session_id")


async def test_the_idempotency_key_is_the_run_id(opened: Door) -> None:
    key = {"Idempotency-Key": "mine"}
    first = await opened.http.post("/v1/runs", json=ACCEPT, headers=key)
    again = await opened.http.post("/v1/runs", json=ACCEPT, headers=key)
    assert first.json()["run"]["runId"] == again.json()["run"]["runId"] == "mine"
    other = await opened.http.post("/v1/runs", json=ACCEPT | {"prompt": "q"}, headers=key)
    assert (other.status_code, reason(other)) == (409, "RUN_ID_CONFLICT")
    both = await opened.http.post("/v1/runs", json=ACCEPT | {"run_id": "x"}, headers=key)
    assert (both.status_code, violation(both)[0]) == (400, "run_id")


async def test_r46_the_idempotency_key_is_the_id_of_an_update(opened: Door) -> None:
    key = {"Idempotency-Key": "mine"}
    change = {"prompt": "p", "updateMask": "prompt", "updateId": "x"}
    both = await opened.http.patch("/v1/runs/r", json=change, headers=key)
    assert (both.status_code, violation(both)[0]) == (400, "update_id")
    long = {"Idempotency-Key": "x" * 200}
    got = await opened.http.patch("/v1/runs/r", json=change | {"updateId": ""}, headers=long)
    assert (got.status_code, violation(got)[0]) == (400, "update_id")


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_a_body_of_another_type_is_refused(opened: Door, content_type: str) -> None:
    """A form of another site can send these without asking."""
    headers = {"Content-Type": content_type}
    got = await opened.http.post("/v1/runs", content=b'{"prompt": "x"}', headers=headers)
    assert (got.status_code, violation(got)[0]) == (415, "Content-Type")


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "", "127.0.0.1.evil", "[", "[::1", "[x]:1"]
)
async def test_another_host_is_refused(opened: Door, host: str) -> None:
    """The name of another site can be made to resolve to this address."""
    got = await opened.http.get("/v1/runs", headers={"Host": host})
    assert (got.status_code, reason(got)) == (421, "HOST_NOT_ALLOWED")


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://127.0.0.1", "http://[", "http://[x]"]
)
async def test_a_page_of_another_origin_is_refused(opened: Door, origin: str) -> None:
    got = await opened.http.get("/v1/runs", headers={"Origin": origin})
    assert (got.status_code, reason(got)) == (403, "ORIGIN_NOT_ALLOWED")
    assert "access-control-allow-origin" not in got.headers


async def test_a_page_of_the_same_origin_may_call(opened: Door) -> None:
    origin = f"http://{opened.host}:{opened.port}"
    assert (await opened.http.get("/v1/runs", headers={"Origin": origin})).status_code == 200


async def test_a_page_of_an_allowed_origin_may_call_and_read() -> None:
    origin = "https://app.example.com"
    policy = Policy(origins=frozenset({origin}), token=OWN.token)
    async with LocalServer() as server, door(server.address, policy) as opened:
        asked = await opened.http.options("/v1/runs", headers={"Origin": origin})
        got = await opened.http.get("/v1/runs", headers={"Origin": origin})
        refused = await opened.http.get("/v1/runs/none", headers={"Origin": origin})
    assert asked.status_code == 204
    assert "authorization" in asked.headers["access-control-allow-headers"]
    for each in (asked, got, refused):
        assert each.headers["access-control-allow-origin"] == origin
    assert refused.status_code == 404


@pytest.mark.parametrize("header", [None, "", "Bearer", "Basic eDp5", "Bearer wrong", "x"])
async def test_a_caller_without_the_token_is_refused(opened: Door, header: str | None) -> None:
    async with httpx2.AsyncClient(base_url=opened.http.base_url) as http:
        headers = {} if header is None else {"Authorization": header}
        got = await http.get("/v1/runs", headers=headers)
    assert (got.status_code, reason(got)) == (401, "UNAUTHENTICATED")
    assert got.headers["www-authenticate"] == "Bearer"


async def test_a_caller_is_refused_before_the_body_is_read(opened: Door) -> None:
    reader, writer = await asyncio.open_connection(opened.host, opened.port)
    writer.write(
        b"POST /v1/runs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4000000\r\n"
        b"Content-Type: application/json\r\n\r\n"
    )
    assert b" 401 " in await reader.readline()
    writer.close()


@pytest.mark.parametrize(
    "length", [b"Content-Length: 8193", b"Content-Length: 4000000", b"Transfer-Encoding: chunked"]
)
async def test_a_large_body_is_not_read_of_a_caller_that_the_server_refuses(
    length: bytes, tmp_path: Path
) -> None:
    async with guarded(tmp_path) as world, door(world.wire.address, Policy()) as opened:
        reader, writer = await asyncio.open_connection(opened.host, opened.port)
        writer.write(
            b"POST /v1/runs HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer invented\r\n"
            b"Content-Type: application/json\r\n" + length + b"\r\n\r\n"
        )
        async with asyncio.timeout(5):
            assert b" 401 " in await reader.readline()
        writer.close()


@pytest.mark.parametrize("path", [b"/v1/runs", b"/v1/tokens"])
async def test_a_caller_that_is_revoked_while_its_body_arrives_is_refused_before_it_is_parsed(
    path: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known, "CONFIRMED_SECONDS", 0.0)
    body = b"{" * 10_000  # the parser answers 400
    async with guarded(tmp_path) as world, door(world.wire.address, Policy()) as opened:
        reader, writer = await asyncio.open_connection(opened.host, opened.port)
        head = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" % path
        bearer = f"Authorization: Bearer {world.texts['admin']}\r\n".encode()
        writer.write(head + bearer + b"Expect: 100-continue\r\nContent-Length: 10000\r\n\r\n")
        # The body is read now, so the caller was accepted.
        assert b" 100 " in await reader.readline()
        world.revoke("admin")
        world.look()
        writer.write(body)
        assert await reader.readline() == b"\r\n"
        async with asyncio.timeout(20):
            assert b" 401 " in await reader.readline()
        writer.close()


async def test_a_large_body_of_a_caller_that_the_server_knows_is_read(tmp_path: Path) -> None:
    body = {"sessionId": "new", "prompt": "x" * 100_000}
    async with guarded(tmp_path) as world, door(world.wire.address, Policy()) as opened:
        headers = {"Authorization": f"Bearer {world.texts['read']}"}
        got = await opened.http.post("/v1/runs", json=body, headers=headers)
        assert (got.status_code, reason(got)) == (403, "PERMISSION_DENIED")


@pytest.mark.parametrize(
    ("path", "limit"),
    [
        ("/v1/runs", 4 << 20),
        ("/v1/sessions/s/runs", 4 << 20),
        ("/v1/runs:subscribe", 512 << 10),
        ("/v1/sessions", 512 << 10),
        ("/v1/runs:cancelAll", 64 << 10),
        ("/v1/tokens", 64 << 10),
    ],
)
async def test_a_body_that_is_too_large_is_refused(opened: Door, path: str, limit: int) -> None:
    got = await opened.http.post(path, content=b" " * (limit + 1), headers=JSON)
    assert (got.status_code, violation(got)[0]) == (413, "body")
    got = await opened.http.post(path, content=b" " * (limit - 1) + b"x", headers=JSON)
    assert (got.status_code, violation(got)[0]) == (400, "body")

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(65):
            yield b" " * (limit // 64)

    got = await opened.http.post(path, content=chunks(), headers=JSON)
    assert (got.status_code, violation(got)[0]) == (413, "body")


def sent(*chunks: bytes) -> Request:
    """A request whose body comes in these chunks, and then stops without an end."""
    waiting = list(chunks)

    async def receive() -> Message:
        if not waiting:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": waiting.pop(0), "more_body": True}

    return Request({"type": "http", "method": "POST", "headers": []}, receive)


async def test_bodies_of_one_caller_take_a_quarter_at_most() -> None:
    bodies = guard.Bodies(limit=40)
    reading = [asyncio.create_task(bodies.read(sent(b"12345"), "a", 100)) for _ in range(2)]
    await asyncio.sleep(0)  # both read until there is no more
    with pytest.raises(Refused, match="too many bodies"):
        await bodies.read(sent(b"1"), "a", 100)
    other = asyncio.create_task(bodies.read(sent(b"1234567890"), "b", 100))
    await asyncio.sleep(0)
    assert not other.done()
    for task in (*reading, other):
        task.cancel()
    await asyncio.gather(*reading, other, return_exceptions=True)
    with pytest.raises(Refused, match="is larger"):
        await bodies.read(sent(b"1234567890"), "a", 9)


async def test_a_body_that_does_not_come_is_given_up(
    opened: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "BODY_TIMEOUT", 0.05)
    reader, writer = await asyncio.open_connection(opened.host, opened.port)
    writer.write(
        b"POST /v1/runs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n"
        b"Authorization: Bearer " + OWN.token.encode() + b"\r\n\r\n{"
    )
    assert b" 408 " in await reader.readline()
    writer.close()


async def test_a_silent_connection_is_closed(opened: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_TIMEOUT", 0.05)
    reader, writer = await asyncio.open_connection(opened.host, opened.port)
    writer.write(b"GET /v1/runs HTTP/1.1\r\nX-")
    assert await reader.read() == b""
    writer.close()


@pytest.mark.parametrize(
    ("first", "rest"),
    [
        (b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\n\r\n", b"G"),
        (b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET / HTTP/1.1\r\nX-"),
        (b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n", b"x"),
    ],
)
async def test_a_connection_that_begins_another_request_is_closed(
    opened: Door, monkeypatch: pytest.MonkeyPatch, first: bytes, rest: bytes
) -> None:
    monkeypatch.setattr(connections, "HEAD_TIMEOUT", 0.3)
    reader, writer = await asyncio.open_connection(opened.host, opened.port)
    writer.write(first)
    assert b" 404 " in await reader.readline()
    writer.write(rest)
    async with asyncio.timeout(5):
        with suppress(ConnectionResetError):
            await reader.read()
    writer.close()


async def test_a_connection_between_two_requests_and_in_one_is_kept(
    opened: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEAD_TIMEOUT", 0.2)
    run = (await opened.http.post("/v1/runs", json=ACCEPT)).json()["run"]["runId"]
    path = f"/v1/runs/{run}"
    reader, writer = await asyncio.open_connection(opened.host, opened.port)
    bearer = b"Authorization: Bearer " + OWN.token.encode() + b"\r\n\r\n"
    request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n".encode() + bearer
    for _ in range(2):
        writer.write(request)
        assert b" 200 " in await reader.readline()
        await asyncio.sleep(0.4)  # longer than a head may take
        await reader.read(100_000)
    writer.write(b"GET /v1/runs:subscribe HTTP/1.1\r\nHost: localhost\r\n" + bearer)
    assert b" 200 " in await reader.readline()
    await asyncio.sleep(0.4)
    assert not reader.at_eof()
    writer.close()


async def test_too_many_streams_of_one_caller_are_refused() -> None:
    async with (
        LocalServer() as server,
        door(server.address, limits=Limits(streams_per_caller=1)) as opened,
        opened.http.stream("GET", "/v1/runs:subscribe") as first,
    ):
        assert first.status_code == 200
        got = await opened.http.get("/v1/runs:subscribe")
        assert (got.status_code, reason(got)) == (429, "OVERLOADED")
        assert got.headers["retry-after"] == "1"


def connections_to(address: str) -> int:
    """The number of open connections to a local port, seen from their clients."""
    remote = f":{int(address.rpartition(':')[2]):04X} 01 "
    tables = [Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6")]
    return sum(table.count(remote) for table in tables)


async def test_streams_and_other_calls_have_channels_of_their_own() -> None:
    async with (
        LocalServer() as server,
        door(server.address) as opened,
        opened.http.stream("GET", "/v1/runs:subscribe") as first,
    ):
        assert first.status_code == 200
        assert connections_to(server.address) == 1
        assert (await opened.http.get("/v1/runs")).status_code == 200
        assert connections_to(server.address) == 2


async def test_a_header_cannot_be_injected(opened: Door) -> None:
    got = await opened.http.get("/v1/runs/x%0d%0aSet-Cookie:%20a=b")
    assert got.status_code == 400
    assert "set-cookie" not in got.headers


async def test_every_answer_forbids_sniffing_framing_and_caching(opened: Door) -> None:
    for path in ("/v1/runs", "/v1/runs/none", "/nowhere", "/openapi.json", *assets.paths()):
        headers: Any = (await opened.http.get(path)).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]


async def test_a_server_that_is_away_is_unavailable() -> None:
    async with LocalServer() as server, door(server.address) as opened:
        await server.stop()
        for path in ("/v1/runs", "/v1/runs/x/events", "/v1/runs:subscribe"):
            got = await opened.http.get(path)
            assert got.status_code == 503, path


async def test_a_method_that_is_not_served_names_those_that_are(opened: Door) -> None:
    got = await opened.http.put("/v1/sessions/s")
    assert (got.status_code, got.headers["allow"]) == (405, "DELETE, GET, PATCH")


async def test_a_server_without_access_control_needs_a_token_of_the_gateway() -> None:
    """Else any word would do as a token."""
    async with LocalServer() as server, door(server.address, Policy()) as opened:
        for path in ("/v1/runs", "/v1/runs:subscribe"):
            got = await opened.http.get(path, headers={"Authorization": "Bearer any"})
            assert (got.status_code, reason(got)) == (400, "SERVER_IS_OPEN")
