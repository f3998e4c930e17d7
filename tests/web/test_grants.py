"""Tokens for browsers: one session, one purpose, a short life; tickets: one path, once."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx2
import pytest
from google.rpc import code_pb2  # type: ignore[import-untyped]
from sse_starlette import EventSourceResponse, ServerSentEvent

from runlane.metadata import MetadataSource
from runlane.wire import Wire
from runlane_server.testing import LocalServer
from runlane_web import known
from runlane_web.errors import Refused
from runlane_web.gateway import Limits
from runlane_web.grants import MAX_PER_CALLER, TICKET_SECONDS, Grants
from runlane_web.guard import Policy
from runlane_web.known import KnownTokens
from runlane_web.sse import EventStream
from runlane_web.upstream import RETRY, Upstream
from support.callers import World, guarded
from support.door import Door, Event, canonical, door, events, reason, violation

THEIRS = "s-theirs"


async def ask(
    opened: Door, verb: str, path: str, token: str, body: dict[str, Any] | None = None
) -> httpx2.Response:
    headers = {"Authorization": f"Bearer {token}"}
    if body is None:
        return await opened.http.request(verb, path, headers=headers)
    return await opened.http.request(verb, path, headers=headers, json=body)


async def grant(
    opened: Door, world: World, purpose: str, who: str = "run", ttl: str = "60s"
) -> str:
    body = {"sessionId": THEIRS, "purpose": purpose, "ttl": ttl}
    got = await ask(opened, "POST", "/v1/tokens", world.texts[who], body)
    assert (got.status_code, got.json()["ttl"]) == (200, ttl), got.text
    return str(got.json()["token"])


ALLOWED: tuple[tuple[str, str, dict[str, Any] | None, set[str]], ...] = (
    ("GET", f"/v1/sessions/{THEIRS}", None, {"follow", "chat"}),
    ("GET", f"/v1/sessions/{THEIRS}/messages", None, {"follow", "chat"}),
    ("GET", f"/v1/sessions/{THEIRS}/runs", None, {"follow", "chat"}),
    ("GET", f"/v1/input-requests?session_id={THEIRS}", None, {"follow", "chat"}),
    ("GET", "/v1/input-requests", None, set()),
    ("POST", "/v1/input-requests/any:answer", {"text": "x"}, set()),
    ("GET", "/v1/runs/r-theirs", None, {"follow", "chat"}),
    ("GET", "/v1/runs/r-theirs:wait?timeout=0.001s", None, {"follow", "chat"}),
    ("POST", f"/v1/sessions/{THEIRS}/runs", {"prompt": "[]"}, {"chat"}),
    ("POST", f"/v1/sessions/{THEIRS}:cancel", {}, {"chat"}),
    ("GET", "/v1/sessions", None, set()),
    ("GET", "/v1/runs", None, set()),
    ("GET", "/v1/sessions/other/messages", None, set()),
    ("POST", "/v1/sessions", {"sessionId": THEIRS}, set()),
    ("POST", "/v1/runs:cancelAll", {}, set()),
    ("POST", "/v1/runs/r-theirs:cancel", {}, set()),
    ("POST", "/v1/runs", {"sessionId": "other", "prompt": "x"}, set()),
    ("POST", "/v1/runs", {"sessionId": THEIRS, "prompt": "x", "allowMissing": True}, set()),
    ("DELETE", f"/v1/sessions/{THEIRS}", None, set()),
    ("GET", "/v1/agents", None, set()),
    ("POST", "/v1/tokens", {"sessionId": THEIRS, "purpose": "chat"}, set()),
)


@pytest.mark.parametrize("purpose", ["follow", "chat"])
async def test_a_grant_allows_its_purpose_in_its_session_only(purpose: str, tmp_path: Path) -> None:
    async with guarded(tmp_path) as world, door(world.wire.address, Policy()) as opened:
        token = await grant(opened, world, purpose)
        for verb, path, body, purposes in ALLOWED:
            got = await ask(opened, verb, path, token, body)
            refused = (401,) if path == "/v1/tokens" else (403,)
            expected = (200,) if purpose in purposes else refused
            assert got.status_code in expected, (verb, path, got.text)


async def test_an_open_stream_and_a_wait_end_with_their_grant(tmp_path: Path) -> None:
    run, all_runs = "/v1/runs/r-theirs/events", f"/v1/runs:subscribe?session_ids={THEIRS}"
    async with guarded(tmp_path) as world, door(world.wire.address, Policy()) as opened:
        token = await grant(opened, world, "follow", ttl="1s")
        bearer = {"Authorization": f"Bearer {token}"}
        made = await ask(opened, "POST", "/v1/tickets", token, {"path": run})
        ticket = {"ticket": made.json()["ticket"]}
        *ends, waited = await asyncio.gather(
            last_event(opened, run, headers=bearer),
            last_event(opened, all_runs, headers=bearer),
            last_event(opened, run, params=ticket),
            ask(opened, "GET", "/v1/runs/r-theirs:wait?timeout=20s", token),
        )
        for event in ends:
            assert isinstance(event, Event)
            assert (event.name, event.data["code"]) == ("error", code_pb2.UNAUTHENTICATED)
            assert "expired" in event.data["message"]
        assert isinstance(waited, httpx2.Response)
        assert (waited.status_code, reason(waited)) == (401, "UNAUTHENTICATED")
        # The browser reconnects to the same address, and gives up after this code.
        again = [await opened.http.get(run, headers=bearer)]
        again.append(await opened.http.get(run, params=ticket))
        assert [each.status_code for each in again] == [401, 401]


async def last_event(opened: Door, path: str, **more: Any) -> Event:
    async with opened.http.stream("GET", path, **more) as response:
        assert response.status_code == 200
        return [event async for event in events(response)][-1]


async def test_a_message_that_is_there_is_not_read_after_the_end(tmp_path: Path) -> None:
    async with guarded(tmp_path) as world:
        wire = Wire(
            world.wire.address,
            credentials=None,
            metadata=MetadataSource({"authorization": f"Bearer {world.texts['run']}"}),
            options=(),
            timeout=60.0,
            retry=RETRY,
        )
        route = canonical("/runlane.v1.RunService/SubscribeRun")
        late, ended = (
            EventStream(
                Upstream(wire, wire),
                route,
                route.request(run_id="r-theirs"),
                resumed=False,
                seconds=seconds,
            )
            for seconds in (60.0, 0.0)
        )
        with pytest.raises(Refused, match="expired"):
            await ended.response()
        ended.close()
        answer = await late.response()
        assert isinstance(answer, EventSourceResponse)
        late._until = asyncio.get_running_loop().time()
        (only,) = [each async for each in answer.body_iterator]
        assert isinstance(only, ServerSentEvent)
        assert only.event == "error"
        await wire.close()


async def test_a_grant_has_no_more_rights_than_who_made_it(tmp_path: Path) -> None:
    async with guarded(tmp_path) as world, door(world.wire.address, Policy()) as opened:
        token = await grant(opened, world, "chat", who="read")
        got = await ask(opened, "POST", f"/v1/sessions/{THEIRS}:cancel", token, {})
        assert (got.status_code, reason(got)) == (403, "PERMISSION_DENIED")
        stranger = await grant(opened, world, "chat", who="stranger")
        got = await ask(opened, "GET", f"/v1/sessions/{THEIRS}", stranger)
        assert (got.status_code, reason(got)) == (404, "SESSION_NOT_FOUND")


async def test_a_grant_ends_with_the_token_that_made_it(tmp_path: Path) -> None:
    async with guarded(tmp_path) as world, door(world.wire.address, Policy()) as opened:
        token = await grant(opened, world, "chat")
        world.revoke("run")
        world.look()
        got = await ask(opened, "GET", f"/v1/sessions/{THEIRS}", token)
        assert (got.status_code, reason(got)) == (401, "UNAUTHENTICATED")


async def test_a_ticket_opens_its_path_once(tmp_path: Path) -> None:
    path = "/v1/runs/r-theirs/events"
    async with guarded(tmp_path) as world, door(world.wire.address, Policy()) as opened:
        token = await grant(opened, world, "follow")
        got = await ask(opened, "POST", "/v1/tickets", token, {"path": path})
        ticket = {"ticket": got.json()["ticket"]}
        async with httpx2.AsyncClient(base_url=opened.http.base_url) as browser:
            assert (await browser.get("/v1/runs/r-theirs", params=ticket)).status_code == 401
            got = await ask(opened, "POST", "/v1/tickets", token, {"path": path})
            ticket = {"ticket": got.json()["ticket"]}
            async with browser.stream("GET", path, params=ticket) as first:
                assert first.status_code == 200
            again = await browser.get(path, params=ticket)
            assert (again.status_code, violation(again)[0]) == (401, "ticket")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "sessionId"),
        ({"sessionId": 5, "purpose": "chat"}, "sessionId"),
        ({"sessionId": "s"}, "purpose"),
        ({"sessionId": "s", "purpose": "everything"}, "purpose"),
        ({"sessionId": "s", "purpose": "chat", "ttl": "2h"}, "ttl"),
        ({"sessionId": "s", "purpose": "chat", "ttl": "3601s"}, "ttl"),
        ({"sessionId": "s", "purpose": "chat", "ttl": "-5s"}, "ttl"),
        ({"sessionId": "s", "purpose": "chat", "ttl": 60}, "ttl"),
        ({"sessionId": "s", "purpose": "chat", "scope": "x"}, "scope"),
        ({"\ud800": 1}, "?"),
        ({"sessionId": "s", "purpose": "chat", "ttl": {}}, "ttl"),
        ({"sessionId": "s", "purpose": "chat", "ttl": "\ud800s"}, "ttl"),
    ],
)
async def test_a_wrong_wish_for_a_token_is_refused(
    body: dict[str, Any], field: str, tmp_path: Path
) -> None:
    async with guarded(tmp_path) as world, door(world.wire.address, Policy()) as opened:
        headers = {
            "Authorization": f"Bearer {world.texts['run']}",
            "Content-Type": "application/json",
        }
        text = json.dumps(body)
        got = await opened.http.post("/v1/tokens", content=text, headers=headers)
        assert (got.status_code, violation(got)[0]) == (400, field)


async def test_streams_of_grants_count_under_the_caller_that_made_them(tmp_path: Path) -> None:
    path = f"/v1/runs:subscribe?session_ids={THEIRS}"
    limits = Limits(streams_per_caller=1)
    async with guarded(tmp_path) as world, door(world.wire.address, Policy(), limits) as opened:
        first, second = [await grant(opened, world, "follow") for _ in range(2)]
        headers = {"Authorization": f"Bearer {first}"}
        async with opened.http.stream("GET", path, headers=headers) as stream:
            assert stream.status_code == 200
            got = await ask(opened, "GET", path, second)
            assert (got.status_code, reason(got)) == (429, "OVERLOADED")


@pytest.mark.parametrize("path", ["/v1/tokens", "/v1/tickets"])
async def test_an_invented_token_makes_nothing(path: str, tmp_path: Path) -> None:
    body = (
        {"path": "/v1/agents"} if path == "/v1/tickets" else {"sessionId": "s", "purpose": "chat"}
    )
    async with guarded(tmp_path) as world, door(world.wire.address, Policy()) as opened:
        for token in ("invented", "rlg_invented"):
            got = await ask(opened, "POST", path, token, body)
            assert (got.status_code, reason(got)) == (401, "UNAUTHENTICATED")


async def test_a_server_without_access_control_makes_no_tokens() -> None:
    body = {"sessionId": "s", "purpose": "chat"}
    async with LocalServer() as server, door(server.address, Policy()) as opened:
        got = await ask(opened, "POST", "/v1/tokens", "any", body)
        assert (got.status_code, reason(got)) == (400, "SERVER_IS_OPEN")


def test_tickets_are_counted_under_the_token_of_the_server() -> None:
    now = [0.0]
    grants = Grants(lambda: now[0])
    first, second = (grants.make("caller", "chat", "s", 60) for _ in range(2))
    tickets = [grants.make_ticket(first, "/p") for _ in range(MAX_PER_CALLER)]
    for token in (first, second, "caller"):
        with pytest.raises(Refused, match="too many"):
            grants.make_ticket(token, "/p")
    grants.make_ticket("another", "/p")
    grants.redeem(tickets[5], "/p")
    grants.make_ticket(second, "/p")
    with pytest.raises(Refused, match="too many"):
        grants.make_ticket(second, "/p")
    now[0] = TICKET_SECONDS
    for _ in range(MAX_PER_CALLER):
        grants.make_ticket(second, "/p")


async def test_a_token_is_asked_about_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    async def ask_server(token: str) -> None:
        asked.append(token)

    monkeypatch.setattr(known, "MAX_KNOWN", 2)
    tokens = KnownTokens(ask_server)
    for token in ("a", "a", "b", "c", "b", "a"):  # c forgets a
        await tokens.check(token)
    assert asked == ["a", "b", "c", "a"]
    monkeypatch.setattr(known, "KNOWN_SECONDS", -1.0)
    for _ in range(2):
        await tokens.check("d")
    assert asked[4:] == ["d", "d"]
    monkeypatch.setattr(known, "KNOWN_SECONDS", 60.0)
    monkeypatch.setattr(known, "CONFIRMED_SECONDS", -1.0)
    await tokens.check("d")
    await tokens.confirm("d")
    assert asked[6:] == ["d"]


def test_grants_and_tickets_expire_and_are_bounded() -> None:
    now = [0.0]
    grants = Grants(lambda: now[0])
    token = grants.make("caller", "chat", "s", 60)
    ticket = grants.make_ticket(token, "/p")
    now[0] = TICKET_SECONDS
    with pytest.raises(Refused, match="ticket"):
        grants.redeem(ticket, "/p")
    now[0] = 60
    with pytest.raises(Refused, match="expired"):
        grants.find(token)
    for _ in range(MAX_PER_CALLER):
        grants.make("caller", "chat", "s", 60)
    with pytest.raises(Refused, match="too many"):
        grants.make("caller", "chat", "s", 60)
    grants.make("another", "chat", "s", 60)
    now[0] = 120
    grants.make("caller", "chat", "s", 60)
