"""Server-sent events: the ids resume a stream, across restarts of server and gateway."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx2
import pytest

from runlane_server.testing import LocalServer
from support.door import Door, Event, door, events, reason, violation
from support.rpc_wire import serving

RESTARTS = int(os.environ.get("RUNLANE_RESTARTS", "20"))
"""How often server and gateway restart under a stream; `make restarts` does it 1,000 times."""

SECONDS = 60 + RESTARTS * 2


async def accept(opened: Door, session_id: str, prompt: str, **more: Any) -> str:
    body = {"sessionId": session_id, "prompt": prompt, "allowMissing": True, **more}
    got = await opened.http.post("/v1/runs", json=body)
    assert got.status_code == 200, got.text
    return str(got.json()["run"]["runId"])


async def wait(opened: Door, run_id: str) -> None:
    got = await opened.http.get(f"/v1/runs/{run_id}:wait", params={"timeout": "20s"})
    assert got.json()["run"]["state"] == "RUN_STATE_COMPLETED"


def last(event: Event) -> dict[str, str]:
    return {"Last-Event-ID": event.id}


async def take(response: httpx2.Response, name: str, number: int) -> Sequence[Event]:
    """Reads a number of events of that name."""
    taken: list[Event] = []
    async for event in events(response):
        if event.name == name:
            taken.append(event)
        if len(taken) == number:
            break
    return taken


async def test_the_events_of_a_run_have_names_ids_and_the_data_of_the_rpc() -> None:
    async with LocalServer() as server, door(server.address) as opened:
        run_id = await accept(opened, "s", "hello")
        async with opened.http.stream("GET", f"/v1/runs/{run_id}/events") as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            got = [event async for event in events(response)]
    assert [event.name for event in got] == ["accepted", "started", "text_delta", "run_complete"]
    assert [event.id for event in got] == ["1", "2", "3", "4"]
    assert got[2].data["event"]["textDelta"] == {"text": "hello"}
    assert got[3].data["event"]["runComplete"]["runId"] == run_id


@pytest.mark.parametrize(
    "text", ["a\nb", "\r\n\r\ndata: x", "id: 7", "a\u2028b", "</script>", "é😀"]
)
async def test_no_text_breaks_out_of_its_event(text: str) -> None:
    async with LocalServer() as server, door(server.address) as opened:
        run_id = await accept(opened, "s", text)
        async with opened.http.stream("GET", f"/v1/runs/{run_id}/events") as response:
            raw = await response.aread()
    lines = raw.decode().split("\n")
    data = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert len(data) == 4
    assert data[2]["event"]["textDelta"]["text"] == text


async def test_a_run_is_resumed_after_an_event_and_ends_with_no_content() -> None:
    async with LocalServer() as server, door(server.address) as opened:
        run_id = await accept(opened, "s", "hello")
        path = f"/v1/runs/{run_id}/events"
        async with opened.http.stream("GET", path) as response:
            got = [event async for event in events(response)]
        async with opened.http.stream("GET", path, headers=last(got[1])) as response:
            assert [event async for event in events(response)] == got[2:]
        # A browser reconnects after the end of a stream; this code ends that.
        assert (await opened.http.get(path, headers=last(got[3]))).status_code == 204


@pytest.mark.parametrize("value", ["x", "-1", "1.5", "9" * 40, "٣"])
async def test_an_id_that_is_none_is_refused(value: str) -> None:
    async with LocalServer() as server, door(server.address) as opened:
        run_id = await accept(opened, "s", "hello")
        headers = {b"Last-Event-ID": value.encode()}
        got = await opened.http.get(f"/v1/runs/{run_id}/events", headers=headers)
        assert (got.status_code, violation(got)[0]) == (400, "Last-Event-ID")


async def test_a_cursor_that_is_none_is_refused() -> None:
    async with LocalServer() as server, door(server.address) as opened:
        got = await opened.http.get("/v1/runs:subscribe", headers={"Last-Event-ID": "x"})
        assert (got.status_code, reason(got)) == (400, "CURSOR_INVALID")


async def test_a_dropped_connection_does_not_cancel_the_run() -> None:
    async with LocalServer("scripted") as server, door(server.address) as opened:
        run_id = await accept(opened, "s", json.dumps([{"text": "a"}, {"wait": "g"}]))
        async with opened.http.stream("GET", f"/v1/runs/{run_id}/events") as response:
            assert await take(response, "text_delta", 1)
        server.gates.open("g")
        got = await opened.http.get(f"/v1/runs/{run_id}:wait", params={"timeout": "20s"})
    assert got.json()["run"]["state"] == "RUN_STATE_COMPLETED"


async def test_a_waiting_call_ends_when_its_caller_is_gone() -> None:
    async with LocalServer("scripted") as server, door(server.address) as opened:
        run_id = await accept(opened, "s", json.dumps([{"wait": "g"}]))
        with pytest.raises(httpx2.ReadTimeout):
            await opened.http.get(f"/v1/runs/{run_id}:wait", timeout=0.2)
        server.gates.open("g")
        got = await opened.http.get(f"/v1/runs/{run_id}:wait", params={"timeout": "20s"})
    assert got.status_code == 200


@pytest.mark.timeout(SECONDS)
async def test_r25_a_stream_survives_restarts_of_the_server(tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/runlane.db"
    async with (
        LocalServer(store=store) as server,
        door(server.address) as opened,
        opened.http.stream("GET", "/v1/runs:subscribe") as response,
    ):
        stream = events(response)
        assert (await anext(stream)).name == "progress"
        wanted, got = [], []
        for n in range(2 * RESTARTS):
            wanted.append(await accept(opened, f"s{n % 3}", f"prompt {n}"))
            if n % 2:
                await server.restart()
        async for event in stream:
            if event.name == "run_complete":
                got.append(event.data["runComplete"]["runId"])
            if len(got) == len(wanted):
                break
    assert sorted(got) == sorted(wanted)


@pytest.mark.timeout(SECONDS)
async def test_r25_a_reader_resumes_by_the_last_id_after_a_restart_of_the_gateway(
    tmp_path: Path,
) -> None:
    async with LocalServer(store=f"sqlite:///{tmp_path}/runlane.db") as server:
        wanted: list[str] = []
        got: list[str] = []
        position: dict[str, str] = {}
        for n in range(RESTARTS):
            async with door(server.address) as opened:
                wanted += [await accept(opened, "s", f"{n}-{m}") for m in range(3)]
                query = {} if position else {"from_beginning": "true"}
                async with opened.http.stream(
                    "GET", "/v1/runs:subscribe", params=query, headers=position
                ) as response:
                    # It reads one event less than there are, so that some remain.
                    for event in await take(response, "run_complete", len(wanted) - len(got) - 1):
                        got.append(event.data["runComplete"]["runId"])
                        position = last(event)
    assert got == wanted[: len(got)]
    assert len(got) == len(wanted) - 1


async def test_a_reader_that_comes_back_waits_for_a_server_that_is_away(tmp_path: Path) -> None:
    """A browser does not reconnect after an answer that is an error."""
    store = f"sqlite:///{tmp_path}/runlane.db"
    async with LocalServer(store=store) as server, door(server.address) as opened:
        path = f"/v1/runs/{await accept(opened, 's', 'hello')}/events"
        async with opened.http.stream("GET", path) as response:
            first = await anext(events(response))
        await server.stop()
        reading = asyncio.create_task(opened.http.get(path, headers=last(first)))
        await server.start()
        assert "event: run_complete" in (await reading).text


async def test_r25_a_compacted_cursor_is_an_event_whose_id_resumes() -> None:
    async with serving() as wire, door(wire.address) as opened:
        first = await accept(opened, "s", json.dumps([{"text": "one"}]))
        await wait(opened, first)
        position = {"from_beginning": "true"}
        async with opened.http.stream("GET", "/v1/runs:subscribe", params=position) as response:
            mark = await anext(events(response))
        second = await accept(opened, "s", json.dumps([{"text": "two"}]))
        await wait(opened, second)
        assert await wire.store.compact(2**62, 1) == 1
        async with opened.http.stream("GET", "/v1/runs:subscribe", headers=last(mark)) as response:
            (lost,) = [event async for event in events(response)]
        assert (lost.name, lost.data["details"][0]["reason"]) == (
            "cursor_compacted",
            "CURSOR_COMPACTED",
        )
        async with opened.http.stream("GET", "/v1/runs:subscribe", headers=last(lost)) as response:
            (complete,) = await take(response, "run_complete", 1)
        assert complete.data["runComplete"]["runId"] == second


async def test_r25_post_subscribes_with_more_ids_than_an_address_holds() -> None:
    async with LocalServer() as server, door(server.address) as opened:
        run_id = await accept(opened, "s", "hello")
        ids = [run_id, *(f"{n:0100}" for n in range(999))]
        async with opened.http.stream(
            "POST", "/v1/runs:subscribe", json={"runIds": ids, "fromBeginning": True}
        ) as response:
            (complete,) = await take(response, "run_complete", 1)
        assert complete.data["runComplete"]["runId"] == run_id


async def test_r45_a_late_reader_gets_the_open_question_and_its_withdrawal() -> None:
    async with LocalServer("scripted") as server, door(server.address) as opened:
        run_id = await accept(opened, "s", json.dumps([{"ask": {"text": "Why?"}}]))
        path = f"/v1/runs/{run_id}/events"
        async with opened.http.stream("GET", path) as first:
            assert await take(first, "input_requested", 1)
        async with opened.http.stream("GET", path) as late:
            (asked,) = await take(late, "input_requested", 1)
        request = asked.data["event"]["inputRequested"]["inputRequest"]
        assert request["text"] == "Why?"
        cancelled = await opened.http.post(f"/v1/runs/{run_id}:cancel", json={})
        (receipt,) = cancelled.json()["cancelled"]
        assert receipt["stateWhenCancelled"] == "RUN_STATE_INPUT_REQUIRED"
        async with opened.http.stream("GET", path, headers=last(asked)) as response:
            (withdrawn,) = await take(response, "input_withdrawn", 1)
    assert withdrawn.data["event"]["inputWithdrawn"]["inputRequestId"] == request["inputRequestId"]


async def test_r51_a_session_is_streamed_and_resumed_after_an_event() -> None:
    async with LocalServer() as server, door(server.address) as opened:
        await wait(opened, await accept(opened, "s", "hello"))
        path, wanted = "/v1/sessions/s/events", {"withDeltas": "true"}
        parts: list[Event] = []
        got: list[Event] = []
        second = ""
        async with opened.http.stream("GET", path, params=wanted) as response:
            async for event in events(response):
                if event.name == "snapshot":
                    parts.append(event)
                    if not event.data["snapshot"].get("continues"):
                        second = await accept(opened, "s", "again")
                got += [event] if event.name == "run_event" else []
                if len(got) == 4:
                    break
        # A part of a snapshot is no position.
        assert [bool(event.id) for event in parts] == [False] * (len(parts) - 1) + [True]
        assert got[0].data["runEvent"]["runId"] == second
        assert "accepted" in got[0].data["runEvent"]["event"]
        async with opened.http.stream("GET", path, params=wanted, headers=last(got[0])) as response:
            again = await take(response, "run_event", 3)
        assert [event.data for event in again] == [event.data for event in got[1:]]


async def test_a_mark_of_an_idle_stream_of_a_run_is_no_position() -> None:
    async with serving(progress_interval=0.05) as wire, door(wire.address) as opened:
        run_id = await accept(opened, "s", json.dumps([{"wait": "go"}]))
        got: list[Event] = []
        async with opened.http.stream("GET", f"/v1/runs/{run_id}/events") as response:
            async for event in events(response):
                got.append(event)
                if event.name == "progress":
                    wire.latches.open("go")
        marks = [event for event in got if event.name == "progress"]
        assert {(mark.id, "event" in mark.data) for mark in marks} == {("", False)}
        assert [event.id for event in got if event.id] == ["1", "2", "3"]
