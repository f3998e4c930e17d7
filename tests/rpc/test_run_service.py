"""RunService over a real socket: every rpc and its errors."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc import StatusCode

from runlane.v1 import run_pb2, session_service_pb2
from runlane.v1 import run_service_pb2 as pb
from runlane_server.core.limits import Limits
from runlane_server.rpc import runs as runs_module
from runlane_server.store.memory.store import MemoryStore
from support.rpc_wire import Wire, decode_error, over_any_store, refused, serving
from support.staging import script

pytestmark = over_any_store


def a_run(session_id: str = "s", prompt: str = "hello", **fields: Any) -> pb.RunAcceptedRequest:
    return pb.RunAcceptedRequest(session_id=session_id, prompt=prompt, allow_missing=True, **fields)


async def accept(
    wire: Wire, session_id: str = "s", prompt: str = "hello", **fields: Any
) -> run_pb2.Run:
    return (await wire.runs.RunAccepted(a_run(session_id, prompt, **fields))).run


async def ended(wire: Wire, run_id: str) -> run_pb2.Run:
    return (await wire.runs.WaitRun(pb.WaitRunRequest(run_id=run_id), timeout=20)).run


async def hold(wire: Wire, session_id: str = "s") -> str:
    """Starts a run that stays active until the gate `go` opens."""
    run = await accept(wire, session_id, script({"text": "a"}, {"wait": "go"}, {"text": "b"}))
    await wire.latches.reached("go")
    return run.run_id


# --- Accept and read ----------------------------------------------------------------------------


async def test_an_accepted_run_completes() -> None:
    async with serving() as wire:
        answer = await wire.runs.RunAccepted(
            a_run(
                run_id="mine",
                metadata={"k": "v"},
                timeout=Duration(seconds=5),
                max_attempts=3,
                when_busy=run_pb2.WHEN_BUSY_FOLD,
                attachments=[run_pb2.Attachment(name="n", text="t")],
            )
        )
        run = answer.run
        assert (run.session_id, run.run_id, run.accept_seq) == ("s", "mine", 1)
        assert (dict(run.metadata), run.timeout.seconds, run.max_attempts) == ({"k": "v"}, 5, 3)
        assert run.when_busy == run_pb2.WHEN_BUSY_FOLD
        assert run.prompt_excerpt == "hello"
        assert len(answer.cursor) <= 128
        end = await ended(wire, "mine")
        assert end.state == run_pb2.RUN_STATE_COMPLETED
        assert end.run_complete.text.startswith("hello")
        assert end.run_complete.finish_reason == run_pb2.FINISH_REASON_STOP
        got = (await wire.runs.GetRun(pb.GetRunRequest(run_id="mine"))).run
        assert got == end


async def test_a_run_without_an_id_gets_one() -> None:
    async with serving() as wire:
        first, second = await accept(wire), await accept(wire)
        assert first.run_id < second.run_id
        assert (first.accept_seq, second.accept_seq) == (1, 2)


async def test_r03_the_same_request_returns_the_same_run() -> None:
    async with serving() as wire:
        first = await wire.runs.RunAccepted(a_run(run_id="mine"))
        end = await ended(wire, "mine")
        again = await wire.runs.RunAccepted(a_run(run_id="mine"))
        assert again.run == end
        assert again.cursor == first.cursor


async def test_r05_a_run_continues_after_its_caller_leaves() -> None:
    async with serving() as wire:
        call = wire.runs.RunAccepted(a_run(run_id="mine"))
        await asyncio.sleep(0)
        call.cancel()
        again = await wire.runs.RunAccepted(a_run(run_id="mine"))
        assert again.run.accept_seq == 1
        assert (await ended(wire, "mine")).state == run_pb2.RUN_STATE_COMPLETED


async def test_a_wait_ends_after_its_timeout() -> None:
    async with serving() as wire:
        run_id = await hold(wire)
        request = pb.WaitRunRequest(run_id=run_id, timeout=Duration())
        assert (await wire.runs.WaitRun(request)).run.state == run_pb2.RUN_STATE_ACTIVE
        wire.latches.open("go")
        assert (await ended(wire, run_id)).run_complete.text == "ab"


async def test_runs_are_listed_in_pages_newest_first() -> None:
    async with serving() as wire:
        ids = [(await accept(wire, f"s{n % 2}")).run_id for n in range(7)]
        for run_id in ids:
            await ended(wire, run_id)
        request = pb.ListRunsRequest(page_size=3)
        pages: list[list[str]] = []
        while True:
            answer = await wire.runs.ListRuns(request)
            pages.append([run.run_id for run in answer.runs])
            assert all(run.run_complete.text == "" for run in answer.runs)
            if not answer.next_page_token:
                break
            request.page_token = answer.next_page_token
        assert [len(page) for page in pages] == [3, 3, 1]
        assert [run_id for page in pages for run_id in page] == ids[::-1]


async def test_runs_are_listed_by_session_and_state() -> None:
    async with serving() as wire:
        other = await accept(wire, "other")
        await ended(wire, other.run_id)
        active = await hold(wire)
        waiting = await accept(wire)

        async def listed(**fields: Any) -> list[str]:
            answer = await wire.runs.ListRuns(pb.ListRunsRequest(**fields))
            return [run.run_id for run in answer.runs]

        assert await listed(session_id="s") == [waiting.run_id, active]
        assert await listed(states=[run_pb2.RUN_STATE_QUEUED]) == [waiting.run_id]
        assert await listed(states=[run_pb2.RUN_STATE_COMPLETED]) == [other.run_id]
        assert await listed(session_id="nobody") == []


# --- Cancel -------------------------------------------------------------------------------------


async def test_r20_a_receipt_names_every_run_with_its_state() -> None:
    async with serving() as wire:
        active = await hold(wire)
        waiting = (await accept(wire)).run_id
        receipt = await wire.runs.Cancel(pb.CancelRequest(session_id="s", reason="enough"))
        assert [(r.session_id, r.run_id, r.accept_seq) for r in receipt.cancelled] == [
            ("s", active, 1),
            ("s", waiting, 2),
        ]
        assert [r.state_when_cancelled for r in receipt.cancelled] == [
            run_pb2.RUN_STATE_ACTIVE,
            run_pb2.RUN_STATE_QUEUED,
        ]
        assert receipt.fence_accept_seq == 2
        for run_id in (active, waiting):
            end = await ended(wire, run_id)
            assert end.state == run_pb2.RUN_STATE_CANCELLED
            assert end.run_complete.cancel_reason == "enough"


async def test_r12_a_cancel_of_an_idle_session_covers_nothing() -> None:
    async with serving() as wire:
        run = await accept(wire)
        await ended(wire, run.run_id)
        receipt = await wire.runs.Cancel(pb.CancelRequest(session_id="s"))
        assert not receipt.cancelled


@pytest.mark.parametrize(
    ("scope", "covered"),
    [(pb.CANCEL_SCOPE_ACTIVE, ["active"]), (pb.CANCEL_SCOPE_WAITING, ["waiting"])],
)
async def test_r18_a_cancel_covers_only_its_scope(
    scope: pb.CancelScope.ValueType, covered: list[str]
) -> None:
    async with serving() as wire:
        names = {await hold(wire): "active", (await accept(wire)).run_id: "waiting"}
        receipt = await wire.runs.Cancel(pb.CancelRequest(session_id="s", scope=scope))
        assert [names[run.run_id] for run in receipt.cancelled] == covered
        wire.latches.open("go")


async def test_r18_a_run_is_cancelled_by_its_id_alone() -> None:
    async with serving() as wire:
        await hold(wire)
        waiting = (await accept(wire)).run_id
        receipt = await wire.runs.Cancel(pb.CancelRequest(run_id=waiting))
        assert [run.run_id for run in receipt.cancelled] == [waiting]
        wire.latches.open("go")


async def test_r18_cancel_all_lists_only_sessions_with_work() -> None:
    async with serving() as wire:
        await ended(wire, (await accept(wire, "idle")).run_id)
        active = [await hold(wire, "a"), await hold(wire, "b")]
        answer = await wire.runs.CancelAll(pb.CancelAllRequest(reason="all"))
        found = {s.session_id: [r.run_id for r in s.cancelled] for s in answer.sessions}
        assert found == {"a": active[:1], "b": active[1:]}
        assert [s.fence_accept_seq for s in answer.sessions] == [1, 1]


async def waiting(wire: Wire, sessions: int) -> dict[str, list[str]]:
    """Accepts two runs in each of some sessions; none of them starts."""
    names = [f"s{n:03}" for n in range(sessions)]
    return {name: [(await accept(wire, name)).run_id for _ in range(2)] for name in names}


def covered(answer: pb.CancelAllResponse) -> dict[str, list[str]]:
    return {it.session_id: [run.run_id for run in it.cancelled] for it in answer.sessions}


async def test_r20_cancel_all_continues_page_by_page() -> None:
    async with serving(Limits(max_active_runs=0)) as wire:
        runs = await waiting(wire, 5)
        pages = []
        request = pb.CancelAllRequest(page_size=4)
        while True:
            answer = await wire.runs.CancelAll(request)
            pages.append(covered(answer))
            assert answer.omitted_runs == 0
            request.page_token = answer.next_page_token
            if not request.page_token:
                break
        assert [len(page) for page in pages] == [2, 2, 1]
        assert {name: ids for page in pages for name, ids in page.items()} == runs


async def test_r20_a_page_has_at_least_one_session() -> None:
    async with serving(Limits(max_active_runs=0)) as wire:
        runs = await waiting(wire, 2)
        answer = await wire.runs.CancelAll(pb.CancelAllRequest(page_size=1))
        assert covered(answer) == {"s000": runs["s000"]}
        assert answer.next_page_token


async def test_r11_a_later_page_spares_a_run_accepted_after_its_session_was_cancelled() -> None:
    async with serving(Limits(max_active_runs=0)) as wire:
        runs = await waiting(wire, 2)
        first = await wire.runs.CancelAll(pb.CancelAllRequest(page_size=2))
        later = (await accept(wire, "s000")).run_id
        rest = await wire.runs.CancelAll(
            pb.CancelAllRequest(page_size=2, page_token=first.next_page_token)
        )
        assert covered(rest) == {"s001": runs["s001"]}
        assert not rest.next_page_token
        found = (await wire.runs.GetRun(pb.GetRunRequest(run_id=later))).run
        assert found.state == run_pb2.RUN_STATE_ACCEPTED


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"page_size": 1, "page_token": "x"}, "page_token"),
        ({"page_size": -1}, "page_size"),
        ({"page_token": "AbCd"}, "page_size"),
    ],
)
async def test_a_wrong_page_of_cancel_all_is_refused_and_cancels_nothing(
    fields: dict[str, Any], field: str
) -> None:
    async with serving(Limits(max_active_runs=0)) as wire:
        run_id = (await accept(wire)).run_id
        error = await refused(wire.runs.CancelAll(pb.CancelAllRequest(**fields)))
        assert error.code is StatusCode.INVALID_ARGUMENT
        assert field in error.fields
        found = (await wire.runs.GetRun(pb.GetRunRequest(run_id=run_id))).run
        assert found.state == run_pb2.RUN_STATE_ACCEPTED


async def test_r20_without_pages_all_is_cancelled_and_receipts_beyond_the_limit_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runs_module, "PAGE_BYTES", 300)
    async with serving(Limits(max_active_runs=0)) as wire:
        runs = await waiting(wire, 5)
        answer = await wire.runs.CancelAll(pb.CancelAllRequest())
        shown = covered(answer)
        assert 0 < len(shown) < 5
        assert shown.items() <= runs.items()
        assert answer.omitted_runs == 2 * (5 - len(shown))
        left = await wire.runs.CancelAll(pb.CancelAllRequest())
        assert left == pb.CancelAllResponse()


# --- Follow -------------------------------------------------------------------------------------

Subscription = grpc.aio.UnaryStreamCall[
    pb.SubscribeRunCompleteRequest, pb.SubscribeRunCompleteResponse
]


async def read(call: Any) -> pb.SubscribeRunCompleteResponse:
    answer = await call.read()
    assert isinstance(answer, pb.SubscribeRunCompleteResponse)
    return answer


async def test_a_subscription_starts_with_a_progress_mark_and_gets_every_end() -> None:
    async with serving() as wire:
        before = await accept(wire)
        await ended(wire, before.run_id)
        call = wire.runs.SubscribeRunComplete(pb.SubscribeRunCompleteRequest())
        assert (await read(call)).HasField("progress")
        ids = [(await accept(wire, f"s{n}")).run_id for n in range(3)]
        events = [await read(call) for _ in ids]
        assert {event.run_complete.run_id for event in events} == set(ids)
        assert len({event.cursor for event in events}) == 3
        call.cancel()


async def test_r25_a_subscription_resumes_after_its_cursor() -> None:
    async with serving() as wire:
        ids = []
        for n in range(4):
            ids.append((await accept(wire, prompt=str(n))).run_id)
            await ended(wire, ids[-1])
        whole = wire.runs.SubscribeRunComplete(pb.SubscribeRunCompleteRequest(from_beginning=True))
        await read(whole)
        events = [await read(whole) for _ in ids]
        assert [event.run_complete.run_id for event in events] == ids
        whole.cancel()
        rest = wire.runs.SubscribeRunComplete(
            pb.SubscribeRunCompleteRequest(cursor=events[1].cursor)
        )
        mark = await read(rest)
        assert (mark.cursor, mark.HasField("progress")) == (events[1].cursor, True)
        assert [(await read(rest)).run_complete.run_id for _ in range(2)] == ids[2:]
        rest.cancel()


async def test_the_cursor_of_an_accept_precedes_the_events_of_its_run() -> None:
    async with serving() as wire:
        answer = await wire.runs.RunAccepted(a_run())
        await ended(wire, answer.run.run_id)
        call = wire.runs.SubscribeRunComplete(
            pb.SubscribeRunCompleteRequest(cursor=answer.cursor, run_ids=[answer.run.run_id])
        )
        await read(call)
        assert (await read(call)).run_complete.run_id == answer.run.run_id
        call.cancel()


async def test_a_filtered_subscription_gets_only_matching_events() -> None:
    async with serving() as wire:
        call = wire.runs.SubscribeRunComplete(
            pb.SubscribeRunCompleteRequest(session_ids=["a"], run_ids=["b1"])
        )
        await read(call)
        for session_id, run_id in (("b", "b0"), ("a", "a0"), ("b", "b1"), ("c", "c0"), ("a", "a1")):
            await accept(wire, session_id, run_id=run_id)
            await ended(wire, run_id)
        assert [(await read(call)).run_complete.run_id for _ in range(3)] == ["a0", "b1", "a1"]
        call.cancel()


async def test_an_idle_subscription_gets_advancing_progress_marks() -> None:
    async with serving(progress_interval=0.02) as wire:
        call = wire.runs.SubscribeRunComplete(pb.SubscribeRunCompleteRequest(run_ids=["none"]))
        first = await read(call)
        await ended(wire, (await accept(wire)).run_id)
        mark = await read(call)
        while mark.cursor == first.cursor:
            mark = await read(call)
        assert mark.HasField("progress")
        assert mark.progress.time.ToMicroseconds() > first.progress.time.ToMicroseconds()
        call.cancel()


async def test_events_of_a_run_are_in_order_without_gaps_and_end() -> None:
    async with serving() as wire:
        call_it = {"id": "1", "name": "look", "arguments": {}}
        found = {"id": "1", "name": "look", "content": "found"}
        run = await accept(
            wire,
            prompt=script(
                {"reasoning": "hm"},
                {"tool_call": call_it},
                {"tool_result": found},
                {"text": "done"},
            ),
        )
        call = wire.runs.SubscribeRun(pb.SubscribeRunRequest(run_id=run.run_id))
        events = [answer.event async for answer in call]
        assert [event.index for event in events] == list(range(1, len(events) + 1))
        assert [event.WhichOneof("event") for event in events] == [
            "accepted",
            "started",
            "reasoning_delta",
            "tool_call",
            "tool_result",
            "text_delta",
            "run_complete",
        ]
        late = wire.runs.SubscribeRun(pb.SubscribeRunRequest(run_id=run.run_id, after_index=5))
        assert [answer.event async for answer in late] == events[5:]
        known = wire.runs.SubscribeRun(pb.SubscribeRunRequest(run_id=run.run_id, after_index=7))
        assert [answer.event async for answer in known] == []


# --- Refusals -----------------------------------------------------------------------------------


async def test_an_accept_is_refused_with_its_reason() -> None:
    limits = Limits(max_waiting_runs=1, max_prompt_bytes=200)
    async with serving(limits) as wire:
        await hold(wire)
        await accept(wire, run_id="mine")
        accepted = wire.runs.RunAccepted

        async def reason(request: pb.RunAcceptedRequest) -> tuple[str, StatusCode, list[str]]:
            error = await refused(accepted(request))
            return error.reason, error.code, error.fields

        bad = StatusCode.INVALID_ARGUMENT
        assert await reason(a_run(session_id="")) == ("SESSION_MISSING", bad, ["session_id"])
        assert await reason(a_run(prompt=" ")) == ("EMPTY_PROMPT", bad, ["prompt"])
        assert await reason(a_run(prompt="x" * 201)) == ("PROMPT_TOO_LARGE", bad, ["prompt"])
        assert await reason(a_run(session_id="a\n", max_attempts=-1)) == (
            "INVALID_ARGUMENT",
            bad,
            ["session_id", "max_attempts"],
        )
        unknown = pb.RunAcceptedRequest(session_id="unknown", prompt="p")
        assert (await reason(unknown))[:2] == ("SESSION_NOT_FOUND", StatusCode.NOT_FOUND)
        full = await refused(accepted(a_run()))
        assert (full.reason, full.code) == ("QUEUE_FULL", StatusCode.RESOURCE_EXHAUSTED)
        busy = await reason(a_run(when_busy=run_pb2.WHEN_BUSY_REJECT))
        assert busy[:2] == ("SESSION_BUSY", StatusCode.FAILED_PRECONDITION)
        taken = ("RUN_ID_CONFLICT", StatusCode.ALREADY_EXISTS)
        assert (await reason(a_run(run_id="mine", prompt="other")))[:2] == taken
        assert (await reason(a_run(run_id="mine", session_id="other")))[:2] == taken
        wire.latches.open("go")


async def test_an_overloaded_node_sends_a_retry_delay() -> None:
    async with serving(Limits(max_waiting_total=1, max_active_runs=0)) as wire:
        await accept(wire, "a")
        error = await refused(wire.runs.RunAccepted(a_run("b")))
        assert (error.reason, error.code) == ("OVERLOADED", StatusCode.RESOURCE_EXHAUSTED)
        assert error.retry_after


async def test_a_draining_node_sends_the_cursor_to_resume_from() -> None:
    async with serving() as wire:
        answer = await wire.runs.RunAccepted(a_run())
        await ended(wire, answer.run.run_id)
        call = wire.runs.SubscribeRunComplete(pb.SubscribeRunCompleteRequest())
        last = await read(call)
        active = await hold(wire)
        waiting = asyncio.create_task(refused(wire.runs.WaitRun(pb.WaitRunRequest(run_id=active))))
        following = wire.runs.SubscribeRun(pb.SubscribeRunRequest(run_id=active, after_index=3))
        await following.wait_for_connection()
        wire.coordinator.begin_drain()
        drains = ("DRAINING", StatusCode.UNAVAILABLE)
        error = await refused(wire.runs.RunAccepted(a_run()))
        assert (error.reason, error.code) == drains
        wire.coordinator.feed.close()
        ends = []
        for stream in (call, following):
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await stream.read()
            ends.append(decode_error(raised.value))
        ends.append(await waiting)
        assert [(end.reason, end.code) for end in ends] == [drains] * 3
        assert ends[0].metadata["cursor"] == last.cursor
        wire.latches.open("go")


async def test_unknown_runs_are_not_found() -> None:
    async with serving() as wire:
        not_found = ("RUN_NOT_FOUND", StatusCode.NOT_FOUND)
        for call in (
            wire.runs.GetRun(pb.GetRunRequest(run_id="none")),
            wire.runs.WaitRun(pb.WaitRunRequest(run_id="none")),
            wire.runs.Cancel(pb.CancelRequest(run_id="none")),
            wire.runs.SubscribeRun(pb.SubscribeRunRequest(run_id="none")).read(),
        ):
            error = await refused(call)
            assert (error.reason, error.code) == not_found
        error = await refused(wire.runs.Cancel(pb.CancelRequest(session_id="none")))
        assert (error.reason, error.code) == ("SESSION_NOT_FOUND", StatusCode.NOT_FOUND)
        for call in (
            wire.runs.GetRun(pb.GetRunRequest()),
            wire.runs.WaitRun(pb.WaitRunRequest()),
            wire.runs.SubscribeRun(pb.SubscribeRunRequest()).read(),
        ):
            error = await refused(call)
            assert (error.reason, error.code) == ("RUN_MISSING", StatusCode.INVALID_ARGUMENT)


async def test_an_index_beyond_the_last_event_is_refused() -> None:
    async with serving() as wire:
        run_id = (await accept(wire)).run_id
        await ended(wire, run_id)
        request = pb.SubscribeRunRequest(run_id=run_id, after_index=99)
        error = await refused(wire.runs.SubscribeRun(request).read())
        assert (error.reason, error.fields) == ("INVALID_ARGUMENT", ["after_index"])


async def test_invalid_cursors_are_refused() -> None:
    async with serving() as wire, serving(store=MemoryStore()) as other:
        await ended(other, (await accept(other)).run_id)
        foreign = await read(other.runs.SubscribeRunComplete(pb.SubscribeRunCompleteRequest()))
        for cursor in ("garbage", "ä", foreign.cursor, ""):
            request = pb.SubscribeRunCompleteRequest(cursor=cursor)
            error = await refused(wire.runs.SubscribeRunComplete(request).read())
            assert (error.reason, error.code) == ("CURSOR_INVALID", StatusCode.INVALID_ARGUMENT)
            assert error.fields == ["cursor"]


async def test_r25_a_compacted_cursor_gets_the_oldest_cursor() -> None:
    async with serving() as wire:
        first = await wire.runs.RunAccepted(a_run())
        await ended(wire, first.run.run_id)
        await ended(wire, (await accept(wire)).run_id)
        assert await wire.store.compact(2**62, 1) == 1
        request = pb.SubscribeRunCompleteRequest(cursor=first.cursor)
        error = await refused(wire.runs.SubscribeRunComplete(request).read())
        assert (error.reason, error.code) == ("CURSOR_COMPACTED", StatusCode.OUT_OF_RANGE)
        resumed = wire.runs.SubscribeRunComplete(
            pb.SubscribeRunCompleteRequest(cursor=error.metadata["oldest_cursor"])
        )
        await read(resumed)
        assert (await read(resumed)).run_complete.accept_seq == 2
        resumed.cancel()


async def test_invalid_page_tokens_are_refused() -> None:
    async with serving() as wire:
        for n in range(2):
            await ended(wire, (await accept(wire, f"s{n}")).run_id)
        token = (await wire.runs.ListRuns(pb.ListRunsRequest(page_size=1))).next_page_token
        for call in (
            wire.runs.ListRuns(pb.ListRunsRequest(page_token="x")),  # noqa: S106
            wire.runs.ListRuns(pb.ListRunsRequest(page_token=token, session_id="s0")),
            wire.runs.ListRuns(pb.ListRunsRequest(page_token=token, states=[1])),  # type: ignore[list-item]
            wire.sessions.ListSessions(session_service_pb2.ListSessionsRequest(page_token=token)),
        ):
            error = await refused(call)
            assert (error.reason, error.code) == (
                "PAGE_TOKEN_INVALID",
                StatusCode.INVALID_ARGUMENT,
            )


@pytest.mark.parametrize("data", [b"\x0a\x02\xff\xfe", b"\x0a\x05a", b"\x0f"])
async def test_bytes_that_are_not_a_request_are_refused(data: bytes) -> None:
    """A session id that is not UTF-8, a truncated one, and garbage."""
    async with serving() as wire:
        raw: Any = wire.channel.unary_unary("/runlane.v1.RunService/RunAccepted")
        error = await refused(raw(data))
        assert (error.reason, error.code) == ("INVALID_ARGUMENT", StatusCode.INVALID_ARGUMENT)
        stream: Any = wire.channel.unary_stream("/runlane.v1.RunService/SubscribeRun")
        error = await refused(stream(data).read())
        assert error.code is StatusCode.INVALID_ARGUMENT


async def test_a_message_over_4_mib_is_refused() -> None:
    async with serving() as wire:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await wire.runs.RunAccepted(a_run(prompt="x" * (4 << 20)))
        assert raised.value.code() is StatusCode.RESOURCE_EXHAUSTED


async def test_an_error_with_a_thousand_violations_arrives() -> None:
    async with serving() as wire:
        request = pb.SubscribeRunCompleteRequest(session_ids=["ä" * 100] * 1000)
        error = await refused(wire.runs.SubscribeRunComplete(request).read())
        assert error.reason == "INVALID_ARGUMENT"
        assert error.fields[0] == "session_ids[0]"


async def test_an_idle_stream_of_a_run_gets_progress_marks() -> None:
    async with serving(progress_interval=0.05) as wire:
        run = await accept(wire, prompt='[{"wait": "go"}]')
        call = wire.runs.SubscribeRun(pb.SubscribeRunRequest(run_id=run.run_id, after_index=2))
        kinds = []
        async for answer in call:
            assert answer.HasField("progress") is not answer.HasField("event")
            kinds.append("mark" if answer.HasField("progress") else "event")
            wire.latches.open("go")
        assert (kinds[0], kinds[-1], kinds.count("event")) == ("mark", "event", 1)
