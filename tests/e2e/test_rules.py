"""The rules over the wire: a real server process, the real client, real sockets."""

from __future__ import annotations

import asyncio
import itertools
import signal
from datetime import timedelta
from pathlib import Path

import pytest

from runlane import (
    CancelScope,
    Client,
    DeadlineExceeded,
    Draining,
    EmptyPrompt,
    FinishReason,
    Folded,
    QueueFull,
    Role,
    RunComplete,
    RunIdConflict,
    RunlaneError,
    RunRetryPolicy,
    RunState,
    SessionBusy,
    SessionMissing,
    SessionNotFound,
    Started,
    Step,
    ToolResult,
    Usage,
    WhenBusy,
)
from support.server import ServerProcess, serving
from support.staging import SECONDS, at_latch, say, script
from support.wire import Wire, check_turn, text_of, wait_for_text

S = RunState
STEP = {"step": True}


# --- Accept -------------------------------------------------------------------------------------


async def test_r01_an_accepted_run_survives_a_kill(server: ServerProcess, wire: Wire) -> None:
    await wire.start_blocked("s", "g")
    queued = await wire.accept("s", say("later"))
    await server.kill()
    await server.start()
    complete = await wire.end(queued)
    assert (complete.accept_seq, complete.text) == (2, "later")


async def test_r02_empty_prompts_and_unknown_sessions_are_refused(wire: Wire) -> None:
    with pytest.raises(EmptyPrompt) as empty:
        await wire.client.run_accepted("s", "  ", allow_missing=True)
    assert [v.field for v in empty.value.violations] == ["prompt"]
    with pytest.raises(SessionMissing):
        await wire.client.run_accepted("", "x")
    with pytest.raises(SessionNotFound):
        await wire.client.run_accepted("s", "x")
    await wire.end(await wire.client.run_accepted("s", "x", allow_missing=True))


async def test_r03_a_run_id_always_names_the_same_run(wire: Wire) -> None:
    first = await wire.accept("s", say("x"), run_id="r")
    complete = await wire.end(first)
    again = await wire.accept("s", say("x"), run_id="r")
    assert (again.run.state, again.run.run_complete) == (S.COMPLETED, complete)
    async for event in wire.client.subscribe_run_complete(cursor=again.cursor):
        assert event == complete
        break
    with pytest.raises(RunIdConflict):
        await wire.accept("s", say("y"), run_id="r")
    with pytest.raises(RunIdConflict):
        await wire.accept("t", say("x"), run_id="r")


async def test_r04_accept_seq_increases_in_accept_order(wire: Wire) -> None:
    await wire.start_blocked("s", "g")
    handles = [await wire.accept("s", say(str(n))) for n in range(5)]
    assert [handle.run.accept_seq for handle in handles] == [2, 3, 4, 5, 6]
    await wire.open_latch("g")


async def test_r05_a_run_outlives_its_caller(server: ServerProcess, wire: Wire) -> None:
    async with Client(server.address) as caller:
        handle = await Wire(caller).accept("s", *at_latch("g"), say("done"))
        following = asyncio.create_task(anext(aiter(handle.events())))
        await following
    await wire.open_latch("g")
    complete = await wire.end(await wire.client.attach(handle.run_id))
    assert (complete.state, complete.text) == (S.COMPLETED, "<g>done")


async def test_r06_a_refused_accept_leaves_nothing_behind(tmp_path: Path) -> None:
    async with (
        serving(tmp_path, "--agent", "scripted", "--max-waiting-runs", "1") as server,
        Client(server.address) as client,
    ):
        wire = Wire(client)
        active = await wire.start_blocked("s", "g")
        queued = await wire.accept("s", say("x"))
        for n in range(5):
            with pytest.raises(QueueFull):
                await wire.accept("s", say("y"), run_id=f"refused-{n}")
        assert [run.run_id async for run in client.list_runs("s")] == [
            queued.run_id,
            active.run_id,
        ]
        await wire.open_latch("g")
        await wire.end(queued)
        session = await client.get_session("s")
        assert (session.busy, session.waiting_runs) == (False, 0)


# --- Order --------------------------------------------------------------------------------------


async def test_r07_runs_execute_one_at_a_time_in_accept_order(wire: Wire) -> None:
    subscription = wire.client.subscribe_run_complete(from_beginning=True)
    active = await wire.start_blocked("s", "g")
    queued = [await wire.accept("s", say(str(n))) for n in range(10)]
    runs = [run async for run in wire.client.list_runs("s", states=[S.ACTIVE])]
    assert [run.run_id for run in runs] == [active.run_id]
    await wire.open_latch("g")
    await wire.end(queued[-1])
    ended: list[RunComplete] = []
    async for complete in subscription:
        ended += [complete] if complete.session_id == "s" else []
        if len(ended) == 11:
            break
    assert [c.accept_seq for c in ended] == list(range(1, 12))
    for earlier, later in itertools.pairwise(ended):
        assert later.started_at is not None
        assert earlier.ended_at <= later.started_at


async def test_r08_a_session_with_work_never_looks_idle(wire: Wire) -> None:
    first = await wire.start_blocked("s", "g")
    last = [await wire.accept("s", say(str(n))) for n in range(30)][-1]
    opening = asyncio.create_task(wire.open_latch("g"))
    looked = 0
    while True:
        session = await wire.client.get_session("s")
        looked += 1
        if not session.busy:
            break
        assert session.active_run_id or session.waiting_runs
    await opening
    assert (await wire.client.get_run(last.run_id)).state is S.COMPLETED
    assert (await wire.end(first)).state is S.COMPLETED
    assert looked > 1


async def test_r09_a_session_is_busy_until_its_cancelled_agent_returns(wire: Wire) -> None:
    stubborn = await wire.accept("s", *at_latch("g", ignore_cancel=True))
    await wire.wait_for_latch(stubborn, "g")
    await wire.client.cancel("s")
    session = await wire.client.get_session("s")
    assert session.busy
    assert (await wire.client.get_run(stubborn.run_id)).state is S.CANCELLING
    after = await wire.accept("s", say("next"))
    assert after.run.state is S.QUEUED
    await wire.open_latch("g")
    assert (await wire.end(stubborn)).state is S.CANCELLED
    assert (await wire.end(after)).text == "next"


# --- Cancel -------------------------------------------------------------------------------------


async def test_r10_r20_a_receipt_names_every_accepted_run(wire: Wire) -> None:
    host = await wire.accept("s", *at_latch("a"), STEP, *at_latch("b"))
    await wire.wait_for_latch(host, "a")
    folded = await wire.accept("s", say("and this"), when_busy=WhenBusy.FOLD)
    await wire.open_latch("a")
    await wire.wait_for_latch(host, "b")
    queued = await wire.accept("s", say("x"))
    receipt = await wire.client.cancel("s", reason="enough")
    assert [(c.run_id, c.accept_seq, c.state_when_cancelled) for c in receipt.cancelled] == [
        (host.run_id, 1, S.ACTIVE),
        (folded.run_id, 2, S.FOLDED),
        (queued.run_id, 3, S.QUEUED),
    ]
    assert receipt.fence_accept_seq == 3
    for handle in (host, folded, queued):
        complete = await wire.end(handle)
        assert (complete.state, complete.cancel_reason) == (S.CANCELLED, "enough")


async def test_r11_a_run_accepted_after_a_cancel_is_not_touched(wire: Wire) -> None:
    await wire.start_blocked("s", "g")
    receipt = await wire.client.cancel("s")
    after = await wire.accept("s", say("after"))
    assert after.run.accept_seq > receipt.fence_accept_seq
    assert (await wire.end(after)).text == "after"


async def test_r12_cancel_of_an_idle_session_does_nothing(wire: Wire) -> None:
    await wire.client.create_session("s")
    for n in range(3):
        receipt = await wire.client.cancel("s")
        assert (receipt.cancelled, receipt.fence_accept_seq) == ((), n)
        assert (await wire.end(await wire.accept("s", say("x")))).state is S.COMPLETED
    assert len(await wire.messages("s")) == 6


async def test_r13_a_repeated_cancel_is_a_no_op(wire: Wire) -> None:
    stubborn = await wire.accept("s", *at_latch("g", ignore_cancel=True))
    await wire.wait_for_latch(stubborn, "g")
    receipts = [await wire.client.cancel("s") for _ in range(3)]
    assert [len(receipt.cancelled) for receipt in receipts] == [1, 0, 0]
    await wire.open_latch("g")
    assert (await wire.end(stubborn)).state is S.CANCELLED


async def test_r14_cancel_on_entry_writes_the_turn(wire: Wire) -> None:
    await wire.start_blocked("s", "g")
    queued = await wire.accept("s", say("x"))
    await wire.client.cancel(run_id=queued.run_id)
    complete = await wire.end(queued)
    assert complete.attempt == 0
    turn = [m for m in await wire.messages("s") if m.run_id == queued.run_id]
    assert [(m.role, m.finish_reason) for m in turn] == [
        (Role.USER, None),
        (Role.ASSISTANT, FinishReason.CANCELED),
    ]
    check_turn(complete, turn)
    await wire.open_latch("g")


async def test_r15_a_cancel_before_the_first_text_writes_the_user_message_once(wire: Wire) -> None:
    handle = await wire.accept("s", {"wait": "g"})
    async for event in handle.events():
        if isinstance(event.body, Started):
            break
    await wire.client.cancel("s")
    complete = await wire.end(handle)
    messages = await wire.messages("s")
    assert [(m.role, text_of(m)) for m in messages] == [
        (Role.USER, script({"wait": "g"})),
        (Role.ASSISTANT, ""),
    ]
    check_turn(complete, messages)


async def test_r16_a_cancel_mid_stream_keeps_the_text_and_closes_tool_calls(wire: Wire) -> None:
    call = {"tool_call": {"id": "1", "name": "look", "arguments": {"at": "it"}}}
    handle = await wire.accept("s", say("so far"), call, *at_latch("g"), say("never"))
    await wire.wait_for_latch(handle, "g")
    await handle.cancel()
    complete = await wire.end(handle)
    assert complete.text == "so far<g>"
    messages = await wire.messages("s")
    check_turn(complete, messages)
    assert messages[-1].role is Role.TOOL
    assert all(isinstance(part, ToolResult) and part.is_error for part in messages[-1].parts)
    history = await wire.end(await wire.accept("s", {"say": "history"}))
    assert "so far" in history.text


async def test_r17_the_terminal_record_is_written_while_the_server_shuts_down(
    server: ServerProcess, wire: Wire
) -> None:
    handle = await wire.start_blocked("s", "g")
    receipt = await wire.client.cancel("s")
    server.send(signal.SIGTERM)
    assert await server.wait() == 0
    assert [c.run_id for c in receipt.cancelled] == [handle.run_id]
    await server.start()
    complete = await wire.end(handle)
    assert (complete.state, complete.text) == (S.CANCELLED, "<g>")
    check_turn(complete, await wire.messages("s"))


async def test_r18_a_cancel_covers_exactly_its_scope(wire: Wire) -> None:
    active = await wire.start_blocked("s", "g")
    one, two, three = [await wire.accept("s", say(str(n))) for n in range(3)]
    elsewhere = await wire.start_blocked("t", "h")

    async def covered(session_id: str = "", **options: object) -> list[str]:
        receipt = await wire.client.cancel(session_id, **options)  # type: ignore[arg-type]
        return [c.run_id for c in receipt.cancelled]

    assert await covered(run_id=two.run_id) == [two.run_id]
    assert await covered("s", scope=CancelScope.WAITING) == [one.run_id, three.run_id]
    four = await wire.accept("s", say("4"))
    assert await covered("s", scope=CancelScope.ACTIVE) == [active.run_id]
    assert (await wire.end(four)).state is S.COMPLETED
    five = await wire.start_blocked("s", "i")
    receipts = await wire.client.cancel_all("closing")
    assert {c.run_id for r in receipts for c in r.cancelled} == {five.run_id, elsewhere.run_id}
    assert (await wire.end(elsewhere)).cancel_reason == "closing"


# --- Complete -----------------------------------------------------------------------------------


async def test_r21_r23_every_end_has_exactly_one_complete_terminal_event(
    server: ServerProcess, wire: Wire
) -> None:
    handles = {
        "completed": await wire.accept("a", say("x"), {"usage": {"input_tokens": 1}}),
        "failed": await wire.accept("b", {"fail": "no", "reason": "NO"}),
        "timeout": await wire.accept("c", {"wait": "never"}, timeout=0.05),
        "cancelled": await wire.start_blocked("d", "g"),
        "dropped": await wire.accept("d", say("x")),
    }
    await wire.client.cancel("d")
    handles["interrupted"] = await wire.start_blocked("e", "h")
    for name in ("completed", "failed", "timeout", "cancelled", "dropped"):
        await wire.end(handles[name])
    await server.kill()
    await server.start()
    ended = {name: await wire.end(handle) for name, handle in handles.items()}
    assert {name: (c.state, c.finish_reason) for name, c in ended.items()} == {
        "completed": (S.COMPLETED, FinishReason.STOP),
        "failed": (S.FAILED, FinishReason.ERROR),
        "timeout": (S.FAILED, FinishReason.TIMEOUT),
        "cancelled": (S.CANCELLED, FinishReason.CANCELED),
        "dropped": (S.CANCELLED, FinishReason.CANCELED),
        "interrupted": (S.FAILED, FinishReason.INTERRUPTED),
    }
    assert ended["failed"].error is not None
    assert ended["failed"].error.reason == "NO"
    assert ended["completed"].usage == Usage(input_tokens=1)
    logged: list[str] = []
    async for complete in wire.client.subscribe_run_complete(from_beginning=True):
        assert complete == next(c for c in ended.values() if c.run_id == complete.run_id)
        logged.append(complete.run_id)
        if len(logged) == len(handles):
            break
    assert sorted(logged) == sorted(handle.run_id for handle in handles.values())


async def test_r22_the_transcript_is_readable_when_the_event_arrives(wire: Wire) -> None:
    subscription = wire.client.subscribe_run_complete(from_beginning=True)
    for n in range(10):
        await wire.accept(f"s{n}", say("x"))
    seen = 0
    async for complete in subscription:
        check_turn(complete, await wire.messages(complete.session_id))
        seen += 1
        if seen == 10:
            break


async def test_r24_the_failure_of_one_run_does_not_end_the_wait_for_another(wire: Wire) -> None:
    failing = await wire.accept("s", *at_latch("g"), {"fail": "no"})
    other = await wire.accept("s", say("fine"))
    waiting = asyncio.create_task(wire.end(other))
    await wire.open_latch("g")
    assert (await wire.end(failing)).state is S.FAILED
    assert (await waiting).text == "fine"


async def test_r25_a_subscription_continues_across_restarts(
    server: ServerProcess, wire: Wire
) -> None:
    subscribed = asyncio.Event()
    texts: list[str] = []

    async def listen() -> None:
        async for complete in wire.client.subscribe_run_complete(session_ids=["s"]):
            subscribed.set()
            if complete.text != "0":
                texts.append(complete.text)
            if len(texts) == 9:
                return

    listening = asyncio.create_task(listen())
    while not subscribed.is_set():
        await wire.end(await wire.accept("s", say("0")))
    for n in range(1, 4):
        for m in range(3):
            await wire.end(await wire.accept("s", say(f"{n}.{m}")))
        if n < 3:
            await (server.kill() if n == 1 else server.stop())
            await server.start()
    async with asyncio.timeout(SECONDS):
        await listening
    assert texts == [f"{n}.{m}" for n in range(1, 4) for m in range(3)]


# --- Fold and queue -----------------------------------------------------------------------------


async def test_r26_a_fold_run_joins_the_active_turn_at_its_next_step(wire: Wire) -> None:
    host = await wire.accept("s", *at_latch("g"), STEP, say("end"))
    await wire.wait_for_latch(host, "g")
    folded = await wire.client.run_accepted("s", "and this", when_busy=WhenBusy.FOLD)
    late = await wire.client.run_accepted("s", "me too", when_busy=WhenBusy.FOLD)
    await wire.client.cancel(run_id=late.run_id)
    await wire.open_latch("g")
    complete, joined = await wire.end(host), await wire.end(folded)
    assert complete.text == "[folded: and this]end"
    assert (joined.folded_into, joined.message_id) == (host.run_id, complete.message_id)
    assert (await wire.end(late)).state is S.CANCELLED
    kinds = [type(event.body) async for event in folded.events()]
    assert kinds[-2:] == [Folded, RunComplete]


async def test_r27_queue_waits_reject_refuses_and_interrupt_goes_first(wire: Wire) -> None:
    active = await wire.accept("s", *at_latch("g"), STEP, say("end"))
    await wire.wait_for_latch(active, "g")
    queued = await wire.accept("s", say("queued"), when_busy=WhenBusy.QUEUE)
    with pytest.raises(SessionBusy):
        await wire.accept("s", say("x"), when_busy=WhenBusy.REJECT)
    urgent = await wire.accept("s", say("urgent"), when_busy=WhenBusy.INTERRUPT)
    ends = [await wire.end(handle) for handle in (active, urgent, queued)]
    assert [c.state for c in ends] == [S.CANCELLED, S.COMPLETED, S.COMPLETED]
    assert ends[1].ended_at <= ends[2].ended_at
    assert ends[2].folded_into is None


async def test_r28_a_completion_leaves_nothing_that_affects_the_next_run(wire: Wire) -> None:
    for n in range(50):
        first = await wire.accept("s", say(str(n)))
        cancelling = asyncio.create_task(wire.client.cancel("s"))
        complete = await wire.end(first)
        receipt = await cancelling
        assert bool(receipt.cancelled) == (complete.state is S.CANCELLED)
        assert (await wire.end(await wire.accept("s", say("next")))).state is S.COMPLETED


async def test_r30_a_cancel_covers_runs_that_wait_for_the_agent(tmp_path: Path) -> None:
    (tmp_path / "slow_agent.py").write_text(SLOW_AGENT)
    async with (
        serving(tmp_path, "--agent", "slow_agent:agent") as server,
        Client(server.address) as client,
    ):
        covered = await client.run_accepted("a", "x", allow_missing=True)
        kept = await client.run_accepted("b", "y", allow_missing=True)
        assert kept.run.state is S.ACCEPTED
        receipt = await client.cancel("a")
        assert [c.state_when_cancelled for c in receipt.cancelled] == [S.ACCEPTED]
        (tmp_path / "ready").touch()
        assert (await kept.completed(SECONDS)).text == "y"
        assert (await covered.completed(SECONDS)).attempt == 0


async def test_r30_runs_fail_when_the_agent_never_gets_ready(tmp_path: Path) -> None:
    (tmp_path / "slow_agent.py").write_text(SLOW_AGENT)
    async with (
        serving(tmp_path, "--agent", "slow_agent:agent", "--ready-timeout", "1s") as server,
        Client(server.address) as client,
    ):
        handle = await client.run_accepted("a", "x", allow_missing=True)
        complete = await handle.completed(SECONDS)
        assert complete.error is not None
        assert complete.error.reason == "AGENT_NOT_READY"


SLOW_AGENT = """
import asyncio
from pathlib import Path

from runlane_server.core.model import TextDelta


class SlowAgent:
    async def start(self):
        while not Path("ready").exists():
            await asyncio.sleep(0.01)

    async def run(self, turn):
        yield TextDelta(turn.prompt.text)

    async def close(self):
        pass


agent = SlowAgent()
"""


# --- Shutdown -----------------------------------------------------------------------------------


async def test_a_draining_server_finishes_active_runs_and_notifies_subscribers(
    server: ServerProcess, wire: Wire
) -> None:
    handle = await wire.accept("s", *at_latch("g"), say("done"))
    await wire.wait_for_latch(handle, "g")
    other = await wire.start_blocked("t", "h")
    losses: list[RunlaneError] = []
    subscription = wire.client.subscribe_run_complete(cursor=other.cursor, on_lost=losses.append)
    server.send(signal.SIGTERM)
    await _refused(server)
    await other.cancel()
    assert (await anext(subscription)).run_id == other.run_id
    await handle.cancel()
    assert (await anext(subscription)).run_id == handle.run_id
    ending = asyncio.create_task(anext(subscription))
    assert await server.wait() == 0
    await server.start()
    later = await wire.accept("s", say("later"))
    assert (await ending).run_id == later.run_id
    assert isinstance(losses[0], Draining)
    await subscription.aclose()


async def _refused(server: ServerProcess) -> None:
    """Returns once the draining server refuses runs."""
    async with asyncio.timeout(SECONDS), Client(server.address, timeout=0.2) as client:
        for n in itertools.count():
            try:
                await Wire(client).accept(f"probe {n}", say("x"))
            except Draining:
                return
            except DeadlineExceeded:  # it may stall
                continue


# --- Attempts -----------------------------------------------------------------------------------


async def test_r38_a_backoff_survives_a_kill(server: ServerProcess, wire: Wire) -> None:
    policy = RunRetryPolicy(2, initial_backoff=timedelta(seconds=1), after_output=True)
    handle = await wire.accept(
        "s", say("a"), {"fail": "busy", "attempts": 1}, say("b"), retry_policy=policy
    )
    run = handle.run
    while (run.attempt, run.state) != (1, S.ACCEPTED):
        run = await wire.client.get_run(handle.run_id)
        assert run.attempt < 2, "the backoff was over before the test saw it"
    assert run.retry_policy == policy
    await server.kill()
    await server.start()
    complete = await wire.end(handle)
    assert (complete.state, complete.text, complete.attempt) == (S.COMPLETED, "ab", 2)
    check_turn(complete, await wire.messages("s"))


async def test_r39_a_step_is_not_repeated_after_a_kill(server: ServerProcess, wire: Wire) -> None:
    """The step of the first attempt is stored when the agent goes on; that of a step that was not
    reached is not."""
    steps = [{"once": "a"}, *at_latch("g"), {"once": "b"}]
    handle = await wire.accept("s", *steps, max_attempts=3)
    await wait_for_text(handle, "1<g>")
    for attempt in (2, 3):
        await server.kill()
        await server.start()
        assert await wait_for_text(handle, "<g>", attempt=attempt) == "1<g>"
    await wire.open_latch("g")
    complete = await wire.end(handle)
    assert (complete.text, complete.attempt) == ("1<g>3", 3)
    found = [event.body async for event in handle.events() if isinstance(event.body, Step)]
    assert found == [Step("a", "1"), Step("b", "3")]
