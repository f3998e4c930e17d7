"""The rules, as users of the in-process API see them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator

import pytest

from runlane_server.agents.base import AgentEvent, Turn
from runlane_server.core.errors import (
    EmptyPrompt,
    QueueFull,
    RunDeleted,
    RunIdConflict,
    RunNotFound,
    SessionBusy,
    SessionMissing,
    SessionNotFound,
)
from runlane_server.core.limits import Limits
from runlane_server.core.model import (
    Attachment,
    CancelScope,
    FinishReason,
    Folded,
    Prompt,
    Role,
    RunComplete,
    RunRequest,
    RunState,
    SessionKey,
    TextDelta,
    ToolResult,
    WhenBusy,
)
from runlane_server.store.base import EventFilter, Store
from support.node import Node, running
from support.staging import SECONDS, STEP, say, script, wait

S = RunState


# --- Accept -------------------------------------------------------------------------------------


async def test_r01_an_accepted_run_is_durable_before_its_agent_acts(node: Node) -> None:
    accepted = await node.accept("s", script(wait("g")))
    stored = await node.coordinator.get_run(accepted.run.run_id)
    assert stored.state in {S.ACCEPTED, S.ACTIVE}
    assert stored.accept_seq == 1
    node.latches.open("g")


@pytest.mark.parametrize(
    "prompt", [Prompt(""), Prompt(" \n"), Prompt("", (Attachment("a", "", b"x"),))]
)
async def test_r02_a_run_without_a_prompt_is_refused(node: Node, prompt: Prompt) -> None:
    with node.coordinator.begin_accepted("s", "r") as accepted, pytest.raises(EmptyPrompt):
        await node.coordinator.run_accepted(accepted, RunRequest("r", prompt), allow_missing=True)
    await idle(node, "s")
    assert await node.store.get_session(SessionKey("default", "s")) is None


async def test_r02_a_text_attachment_is_a_prompt(node: Node) -> None:
    prompt = Prompt("", (Attachment("a.txt", "text/plain", "hello"),))
    complete = await node.coordinator.run("s", prompt)
    assert complete.text == "hello"


async def test_r02_a_missing_or_unknown_session_is_refused(node: Node) -> None:
    with pytest.raises(SessionMissing):
        node.coordinator.begin_accepted("")
    with pytest.raises(SessionNotFound):
        await node.accept("s", "hello", allow_missing=False)
    await idle(node, "s")
    assert not node.coordinator.is_busy()


async def test_r03_the_same_run_id_returns_the_same_run_even_after_its_end(node: Node) -> None:
    first = await node.accept("s", script(wait("g")), run_id="r")
    again = await node.accept("s", script(wait("g")), run_id="r")
    assert again.run.accept_seq == first.run.accept_seq
    node.latches.open("g")
    await node.end("r")
    late = await node.accept("s", script(wait("g")), run_id="r")
    assert late.run.state is S.COMPLETED
    assert late.position == first.position
    assert len(await node.completes()) == 1


@pytest.mark.parametrize("allow_missing", [True, False])
@pytest.mark.parametrize("recreated", [True, False])
async def test_r03_a_run_id_is_not_executed_again_after_its_session_was_deleted(
    node: Node, allow_missing: bool, recreated: bool
) -> None:
    await node.accept("s", script(say("charged")), run_id="r")
    await node.end("r")
    await node.coordinator.sessions.delete("s")
    if recreated:
        await node.coordinator.sessions.create("s")
    for _ in range(2):
        with pytest.raises(RunDeleted, match="use a new run id"):
            await node.accept("s", script(say("charged")), run_id="r", allow_missing=allow_missing)
    with pytest.raises(RunIdConflict):
        await node.accept("s", script(say("twice")), run_id="r")
    with pytest.raises(RunIdConflict):
        await node.accept("t", script(say("charged")), run_id="r")
    assert [it.run_id for it in await node.completes()] == ["r"]
    await node.accept("s", script(say("charged")), run_id="new")
    assert (await node.end("new")).state is S.COMPLETED


@pytest.mark.parametrize(("session_id", "prompt"), [("s", "other"), ("t", "hello")])
async def test_r03_a_run_id_with_another_request_is_a_conflict(
    node: Node, session_id: str, prompt: str
) -> None:
    await node.accept("s", "hello", run_id="r")
    with pytest.raises(RunIdConflict):
        await node.accept(session_id, prompt, run_id="r")
    await node.end("r")
    assert [c.run_id for c in await node.completes()] == ["r"]


async def test_r03_concurrent_accepts_of_one_run_id_make_one_run(node: Node) -> None:
    accepted = await asyncio.gather(*(node.accept("s", "hello", run_id="r") for _ in range(20)))
    assert {a.run.accept_seq for a in accepted} == {1}
    await node.end("r")
    assert len(await node.completes()) == 1


async def test_r03_a_repeated_accept_succeeds_even_if_a_new_one_would_be_refused(
    store: Store,
) -> None:
    async with running(store, limits=Limits(max_waiting_runs=1)) as node:
        await node.start_blocked("s", "g")
        await node.queue("s", "x", run_id="r")
        with pytest.raises(QueueFull):
            await node.queue("s", "y")
        assert (await node.queue("s", "x", run_id="r")).accept_seq == 2
        node.latches.open("g")
        await node.end("r")


async def test_r04_accept_seq_increases_in_accept_order(node: Node) -> None:
    await node.start_blocked("s", "g")
    accepted = await asyncio.gather(*(node.queue("s", str(n)) for n in range(10)))
    assert [run.accept_seq for run in accepted] == list(range(2, 12))
    node.latches.open("g")
    await node.end(accepted[-1].run_id)
    assert [c.accept_seq for c in await node.completes()] == list(range(1, 12))


async def test_r05_a_run_survives_a_caller_that_goes_away(node: Node) -> None:
    caller = asyncio.create_task(node.accept("s", script(wait("g"), say("done")), run_id="r"))
    await asyncio.sleep(0)  # lets it post the command, which cannot be answered yet
    assert not caller.done()
    caller.cancel()
    await asyncio.wait({caller})
    await node.latches.reached("g")
    node.latches.open("g")
    assert (await node.end("r")).text == "done"


async def test_r06_closing_a_reservation_repeatedly_releases_it_once(node: Node) -> None:
    first = node.coordinator.begin_accepted("s")
    second = node.coordinator.begin_accepted("s")
    first.close()
    first.close()
    assert await node.coordinator.is_session_busy("s")
    second.close()
    await idle(node, "s")
    assert (await node.coordinator.run("s", Prompt("hello"))).state is S.COMPLETED


# --- Order --------------------------------------------------------------------------------------


async def test_r07_one_run_is_active_at_a_time_and_the_rest_start_in_order(node: Node) -> None:
    first = await node.start_blocked("s", "g")
    later = [await node.queue("s", str(n)) for n in range(5)]
    assert [await node.state(r.run_id) for r in later] == [S.QUEUED] * 5
    node.latches.open("g")
    await node.end(later[-1].run_id)
    completes = await node.completes()
    assert [c.run_id for c in completes] == [r.run_id for r in (first, *later)]
    for earlier, next_one in itertools.pairwise(completes):
        assert next_one.started_at is not None
        assert earlier.ended_at <= next_one.started_at


async def test_r08_a_session_with_work_never_looks_idle(node: Node) -> None:
    """Checked between the steps of the loop, from the reservation on and over sixty handoffs."""
    accepted = node.coordinator.begin_accepted("s")
    assert await node.coordinator.is_session_busy("s")
    request = RunRequest(accepted.run_id, Prompt(script(wait("g"))))
    await node.coordinator.run_accepted(accepted, request, allow_missing=True)
    for n in range(60):
        await node.queue("s", str(n))
    node.latches.open("g")
    looked = 0
    while True:
        busy = await node.coordinator.is_session_busy("s")
        if len(await node.completes()) == 61:
            break
        # An answer read before the last check may be outdated.
        assert busy, f"looked idle after {looked} looks"
        looked += 1
        await asyncio.sleep(0)
    assert looked > 1


async def test_r09_a_session_stays_busy_until_the_cancelled_agent_has_returned(node: Node) -> None:
    stubborn = await node.accept("s", script(wait("g", ignore_cancel=True)))
    await node.latches.reached("g")
    await node.coordinator.cancel("s")
    await node.latches.cancel_ignored("g")
    after = await node.queue("s", "next")
    assert await node.coordinator.is_session_busy("s")
    assert await node.state(stubborn.run.run_id) is S.CANCELLING
    assert await node.state(after.run_id) is S.QUEUED
    node.latches.open("g")
    assert (await node.end(stubborn.run.run_id)).state is S.CANCELLED
    assert (await node.end(after.run_id)).text == "next"


async def test_r09_an_agent_that_does_not_return_is_fenced_off(store: Store) -> None:
    async with running(store, limits=Limits(cancel_grace=0.01)) as node:
        stubborn = await node.accept("s", script(wait("g", ignore_cancel=True), say("too late")))
        await node.latches.reached("g")
        await node.coordinator.cancel("s")
        complete = await node.end(stubborn.run.run_id)
        assert complete.state is S.CANCELLED
        assert (await node.coordinator.run("s", Prompt("next"))).text == "next"
        node.latches.open("g")
        assert (await node.coordinator.run("s", Prompt("then"))).text == "then"
        assistant = [line for line in await node.lines("s") if line.startswith("assistant")]
        assert assistant == [
            "assistant:  [canceled]",
            "assistant: next [stop]",
            "assistant: then [stop]",
        ]


# --- Cancel -------------------------------------------------------------------------------------


async def test_r10_cancel_covers_active_queued_and_accepted_runs(node: Node) -> None:
    active = await node.start_blocked("s", "g")
    queued = [await node.queue("s", "x") for _ in range(3)]
    receipt = await node.coordinator.cancel("s")
    assert [c.run_id for c in receipt.cancelled] == [r.run_id for r in (active, *queued)]
    for run in (active, *queued):
        assert (await node.end(run.run_id)).state is S.CANCELLED


async def test_r10_cancel_covers_runs_that_wait_for_a_slot(store: Store) -> None:
    async with running(store, limits=Limits(max_active_runs=0)) as node:
        accepted = await node.queue("s", "x")
        receipt = await node.coordinator.cancel("s")
        assert [(c.run_id, c.state) for c in receipt.cancelled] == [(accepted.run_id, S.ACCEPTED)]
        assert (await node.end(accepted.run_id)).attempt == 0


async def test_r10_cancel_covers_every_accept_that_has_begun(node: Node) -> None:
    reserved = [node.coordinator.begin_accepted("s", f"r{n}") for n in range(2)]
    receipt = await node.coordinator.cancel("s")
    assert [c.run_id for c in receipt.cancelled] == ["r0", "r1"]
    for accepted in reserved:
        request = RunRequest(accepted.run_id, Prompt("x"))
        await node.coordinator.run_accepted(accepted, request, allow_missing=True)
        complete = await node.end(accepted.run_id)
        assert (complete.state, complete.attempt) == (S.CANCELLED, 0)


async def test_r10_cancel_by_run_id_alone_covers_an_accept_in_progress(node: Node) -> None:
    accepted = node.coordinator.begin_accepted("s", "mine")
    receipt = await node.coordinator.cancel(run_id="mine")
    assert (receipt.session_id, [c.run_id for c in receipt.cancelled]) == ("s", ["mine"])
    again = await node.coordinator.cancel(run_id="mine")
    assert again.cancelled == (), "a repeated cancel is a no-op (R13)"
    request = RunRequest("mine", Prompt("x"))
    await node.coordinator.run_accepted(accepted, request, allow_missing=True)
    complete = await node.end("mine")
    assert (complete.state, complete.attempt) == (S.CANCELLED, 0)
    with pytest.raises(RunNotFound):
        await node.coordinator.cancel(run_id="another")


async def test_r10_cancel_by_run_id_alone_during_the_commit_of_the_accept(node: Node) -> None:
    for n in range(20):
        accepting = asyncio.create_task(node.accept("s", script(wait("g")), run_id=f"r{n}"))
        for _ in range(n):
            await asyncio.sleep(0)
        if node.coordinator.is_busy():
            receipt = await node.coordinator.cancel(run_id=f"r{n}")
            assert [c.run_id for c in receipt.cancelled] == [f"r{n}"]
        await accepting
        await node.coordinator.cancel(run_id=f"r{n}")
        assert (await node.end(f"r{n}")).state is S.CANCELLED
        await node.coordinator.wait_idle(SECONDS)


async def test_r10_cancel_by_run_id_alone_does_not_know_an_accept_that_was_given_up(
    node: Node,
) -> None:
    accepts = [node.coordinator.begin_accepted("s", "mine") for _ in range(2)]
    accepts[0].close()
    assert (await node.coordinator.cancel(run_id="mine")).cancelled
    accepts[1].close()
    with pytest.raises(RunNotFound):
        await node.coordinator.cancel(run_id="mine")


async def test_r11_cancel_by_run_id_alone_finds_the_run_that_has_the_id(node: Node) -> None:
    """Another accept in progress with its id, in another session, is about to be refused."""
    run = await node.accept("s", script(wait("g")), run_id="mine")
    await node.latches.reached("g")
    conflict = node.coordinator.begin_accepted("t", "mine")
    receipt = await node.coordinator.cancel(run_id="mine")
    assert (receipt.session_id, len(receipt.cancelled)) == ("s", 1)
    with pytest.raises(RunIdConflict):
        await node.coordinator.run_accepted(
            conflict, RunRequest("mine", Prompt("x")), allow_missing=True
        )
    assert (await node.end(run.run.run_id)).state is S.CANCELLED


async def test_r11_a_run_accepted_after_a_cancel_is_not_touched(node: Node) -> None:
    await node.start_blocked("s", "g")
    cancelling = asyncio.create_task(node.coordinator.cancel("s"))
    await asyncio.sleep(0)  # the cancel is posted; the accept follows directly
    after = await node.queue("s", "after")
    receipt = await cancelling
    assert after.run_id not in [c.run_id for c in receipt.cancelled]
    assert after.accept_seq > receipt.fence_accept_seq
    assert (await node.end(after.run_id)).state is S.COMPLETED


async def test_r12_cancel_of_an_idle_session_records_nothing(node: Node) -> None:
    await node.coordinator.sessions.create("s")
    receipt = await node.coordinator.cancel("s")
    assert (receipt.cancelled, receipt.fence_accept_seq) == ((), 0)
    assert (await node.coordinator.run("s", Prompt("hello"))).state is S.COMPLETED
    receipt = await node.coordinator.cancel("s")
    assert (receipt.cancelled, receipt.fence_accept_seq) == ((), 1)
    assert (await node.coordinator.run("s", Prompt("again"))).state is S.COMPLETED
    assert await node.lines("s") == [
        "user: hello",
        "assistant: hello [stop]",
        "user: again",
        "assistant: again [stop]",
    ]


async def test_r13_a_repeated_cancel_covers_nothing_again(node: Node) -> None:
    run = await node.accept("s", script(wait("g", ignore_cancel=True)))
    await node.latches.reached("g")
    first = await node.coordinator.cancel("s")
    second = await node.coordinator.cancel("s")
    assert len(first.cancelled) == 1
    assert second.cancelled == ()
    node.latches.open("g")
    await node.end(run.run.run_id)
    assert len(await node.completes()) == 1


async def test_r14_cancel_on_entry_writes_the_turn(node: Node) -> None:
    await node.start_blocked("s", "g")
    queued = await node.queue("s", "x")
    await node.coordinator.cancel("s", scope=CancelScope.WAITING)
    complete = await node.end(queued.run_id)
    assert complete.finish_reason is FinishReason.CANCELED
    written = [m for m in await node.messages("s") if m.run_id == queued.run_id]
    assert [(m.role, m.finish_reason) for m in written] == [
        (Role.USER, None),
        (Role.ASSISTANT, FinishReason.CANCELED),
    ]
    assert complete.message_id == written[1].message_id
    node.latches.open("g")


async def test_r15_cancelled_before_the_first_text_writes_the_prompt_once(node: Node) -> None:
    run = await node.start_blocked("s", "g")
    await node.coordinator.cancel("s")
    await node.end(run.run_id)
    prompt = script(wait("g"))
    assert await node.lines("s") == [f"user: {prompt}", "assistant:  [canceled]"]


async def test_r16_cancelled_mid_stream_keeps_the_text_and_answers_open_calls(node: Node) -> None:
    call = {"tool_call": {"id": "1", "name": "look", "arguments": {}}}
    run = (await node.accept("s", script(say("so far"), call, wait("g"), say("never")))).run
    await node.latches.reached("g")
    await node.coordinator.cancel("s", reason="enough")
    complete = await node.end(run.run_id)
    assert (complete.text, complete.cancel_reason) == ("so far", "enough")
    last = (await node.messages("s"))[-1]
    assert last.role is Role.TOOL
    assert all(isinstance(part, ToolResult) and part.is_error for part in last.parts)
    heard = [e.body.text for e in await node.events(run.run_id) if isinstance(e.body, TextDelta)]
    assert heard == ["so far"]


async def test_r17_a_cancel_is_committed_while_the_node_stops(store: Store) -> None:
    async with running(store) as node:
        run = await node.accept("s", script(say("so far"), wait("g", ignore_cancel=True)))
        await node.latches.reached("g")
        await node.coordinator.cancel("s")
        stopping = asyncio.create_task(node.coordinator.stop())
        node.latches.open("g")
        await stopping
        complete = await node.coordinator.get_run(run.run.run_id)
        assert complete.state is S.CANCELLED
        assert complete.complete is not None
        assert complete.complete.text == "so far"


async def test_r17_a_run_active_at_shutdown_ends_interrupted(store: Store) -> None:
    async with running(store) as node:
        run = await node.accept("s", script(say("so far"), wait("g")))
        await node.latches.reached("g")
        queued = await node.queue("s", "later")
        await node.coordinator.stop()
        ended = await node.coordinator.get_run(run.run.run_id)
        assert ended.complete is not None
        assert ended.complete.finish_reason is FinishReason.INTERRUPTED
        assert ended.complete.text == "so far"
        assert await node.state(queued.run_id) is S.ACCEPTED
    async with running(store) as node:
        assert (await node.end(queued.run_id)).text == "later"


async def test_r17_an_agent_that_ignores_the_stop_has_not_completed(store: Store) -> None:
    """Its output after the stop is not stored, so its turn is incomplete."""
    async with running(store) as node:
        prompt = script(say("so far"), wait("g", ignore_cancel=True), say(", and more"))
        run = (await node.accept("s", prompt)).run
        await node.latches.reached("g")
        stopping = asyncio.create_task(node.coordinator.stop())
        await node.latches.cancel_ignored("g")
        node.latches.open("g")
        await stopping
        ended = await node.coordinator.get_run(run.run_id)
        assert ended.complete is not None
        assert ended.complete.finish_reason is FinishReason.INTERRUPTED
        assert ended.complete.text == "so far"


async def test_r18_a_run_id_cancels_only_that_run(node: Node) -> None:
    active = await node.start_blocked("s", "g")
    one, other = await node.queue("s", "one"), await node.queue("s", "other")
    receipt = await node.coordinator.cancel(run_id=one.run_id)
    assert [c.run_id for c in receipt.cancelled] == [one.run_id]
    node.latches.open("g")
    assert (await node.end(active.run_id)).state is S.COMPLETED
    assert (await node.end(other.run_id)).state is S.COMPLETED


async def test_r18_scope_active_cancels_only_the_active_run(node: Node) -> None:
    active = await node.start_blocked("s", "g")
    queued = await node.queue("s", "queued")
    receipt = await node.coordinator.cancel("s", scope=CancelScope.ACTIVE)
    assert [c.run_id for c in receipt.cancelled] == [active.run_id]
    assert (await node.end(active.run_id)).state is S.CANCELLED
    assert (await node.end(queued.run_id)).state is S.COMPLETED


async def test_r18_clear_queue_cancels_only_waiting_runs(node: Node) -> None:
    active = await node.start_blocked("s", "g")
    queued = await node.queue("s", "queued")
    receipt = await node.coordinator.clear_queue("s")
    assert [c.run_id for c in receipt.cancelled] == [queued.run_id]
    node.latches.open("g")
    assert (await node.end(active.run_id)).state is S.COMPLETED


async def test_r18_cancel_all_covers_every_session(node: Node) -> None:
    active = [await node.start_blocked(f"s{n}", f"g{n}") for n in range(3)]
    await node.coordinator.run("idle", Prompt("x"))
    receipts = await node.coordinator.cancel_all(reason="closing time")
    covered = {c.run_id for receipt in receipts for c in receipt.cancelled}
    assert covered == {run.run_id for run in active}
    assert {receipt.session_id for receipt in receipts} == {"s0", "s1", "s2"}
    for run in active:
        assert (await node.end(run.run_id)).cancel_reason == "closing time"


async def test_r19_a_cancel_concurrent_with_a_completion_agrees_everywhere(node: Node) -> None:
    """Both are started in the same step of the loop, in either order, many times."""
    outcomes = set()
    for n in range(60):
        session = f"s{n}"
        run = await node.start_blocked(session, f"g{n}")
        if n % 2:
            node.latches.open(f"g{n}")
            await steps(n // 2 % 12)
        cancelling = asyncio.create_task(node.coordinator.cancel(session))
        await steps(n // 2 % 12)
        node.latches.open(f"g{n}")
        receipt = await cancelling
        complete = await node.end(run.run_id)
        outcomes.add(complete.state)
        covered = [c.run_id for c in receipt.cancelled] == [run.run_id]
        assert covered == (complete.state is S.CANCELLED)
        assert await node.state(run.run_id) is complete.state
        last = (await node.messages(session))[-1]
        assert (last.finish_reason is FinishReason.CANCELED) == covered
        assert [c for c in await node.completes() if c.run_id == run.run_id] == [complete]
    assert outcomes == {S.CANCELLED, S.COMPLETED}


async def test_r20_the_receipt_lists_runs_states_and_the_fence(node: Node) -> None:
    host = (await node.accept("s", script(wait("a"), STEP, say("."), wait("b")))).run
    await node.latches.reached("a")
    folded = await node.fold("s", "and this")
    node.latches.open("a")
    await node.latches.reached("b")
    queued = await node.queue("s", "x")
    receipt = await node.coordinator.cancel("s")
    assert [(c.run_id, c.accept_seq, c.state) for c in receipt.cancelled] == [
        (host.run_id, 1, S.ACTIVE),
        (folded.run_id, 2, S.FOLDED),
        (queued.run_id, 3, S.QUEUED),
    ]
    assert receipt.fence_accept_seq == 3


# --- Complete -----------------------------------------------------------------------------------


async def test_r21_every_way_to_end_emits_one_run_complete(node: Node) -> None:
    runs = {
        "completed": await node.queue("a", "x"),
        "failed": (await node.accept("b", script({"fail": "no"}))).run,
        "crashed": (await node.accept("c", script({"crash": "boom"}))).run,
        "timeout": (await node.accept("d", script(wait("never")), timeout=1000)).run,
    }
    active = await node.start_blocked("e", "g")
    dropped = await node.queue("e", "x")
    await node.coordinator.clear_queue("e")
    await node.coordinator.cancel("e")
    runs |= {"cancelled": active, "dropped": dropped}
    ended = {name: await node.end(run.run_id) for name, run in runs.items()}
    assert {name: complete.state for name, complete in ended.items()} == {
        "completed": S.COMPLETED,
        "failed": S.FAILED,
        "crashed": S.FAILED,
        "timeout": S.FAILED,
        "cancelled": S.CANCELLED,
        "dropped": S.CANCELLED,
    }
    assert ended["timeout"].finish_reason is FinishReason.TIMEOUT
    logged = [complete.run_id for complete in await node.completes()]
    assert sorted(logged) == sorted(run.run_id for run in runs.values())


async def test_r22_the_transcript_is_readable_when_run_complete_arrives(node: Node) -> None:
    subscription = node.feed.subscribe("default", EventFilter(), node.feed.position)
    await node.queue("s", "hello")
    page = await subscription.next(SECONDS)
    subscription.close()
    complete = page.events[0].complete
    assert complete.message_id in [m.message_id for m in await node.messages("s")]


async def test_r23_run_complete_carries_every_field(node: Node) -> None:
    steps = script(
        say("fine"),
        {"usage": {"input_tokens": 3, "requests": 1}},
        {"usage": {"output_tokens": 4}},
        {"model": "m"},
        {"finish": "length"},
    )
    run = (await node.accept("s", steps)).run
    complete = await node.end(run.run_id)
    assert (complete.session_id, complete.run_id, complete.accept_seq) == ("s", run.run_id, 1)
    assert (complete.text, complete.finish_reason) == ("fine", FinishReason.LENGTH)
    assert (complete.usage.input_tokens, complete.usage.output_tokens) == (3, 4)
    assert not complete.cancelled
    assert complete.error is None
    assert complete.started_at is not None
    assert complete.accepted_at <= complete.started_at <= complete.ended_at
    assert (await node.messages("s"))[-1].model == "m"


async def test_r24_the_failure_of_one_run_does_not_end_the_wait_for_another(node: Node) -> None:
    failing = (await node.accept("s", script(wait("g"), {"fail": "no", "reason": "NO"}))).run
    other = await node.queue("s", "fine")
    waiting = asyncio.create_task(node.end(other.run_id))
    node.latches.open("g")
    complete = await node.end(failing.run_id)
    assert complete.error is not None
    assert (complete.error.reason, complete.error.message) == ("NO", "no")
    assert (await waiting).text == "fine"


async def test_r25_a_late_subscriber_gets_every_event_once_and_in_order(node: Node) -> None:
    for n in range(5):
        await node.coordinator.run("s", Prompt(str(n)))
    subscription = node.feed.subscribe("default", EventFilter(), 0)
    heard: list[RunComplete] = []
    for n in range(5, 10):
        await node.queue("s", str(n))
    while len(heard) < 10:
        heard += [event.complete for event in (await subscription.next(SECONDS)).events]
    subscription.close()
    assert [complete.text for complete in heard] == [str(n) for n in range(10)]


# --- Fold and queue -----------------------------------------------------------------------------


async def test_r26_fold_runs_join_at_the_next_step_in_accept_order(node: Node) -> None:
    host = (await node.accept("s", script(say("one"), wait("g"), STEP, say("two")))).run
    await node.latches.reached("g")
    first, second = await node.fold("s", "first"), await node.fold("s", "second")
    node.latches.open("g")
    complete = await node.end(host.run_id)
    for run in (first, second):
        ended = await node.end(run.run_id)
        assert (ended.folded_into, ended.message_id) == (host.run_id, complete.message_id)
        assert (ended.text, ended.state) == (complete.text, S.COMPLETED)
        kinds = [type(event.body) for event in await node.events(run.run_id)]
        assert kinds[1:] == [Folded, RunComplete]
    assert (await node.lines("s"))[1:] == [
        "assistant: one [stop]",
        "user: first",
        "user: second",
        "assistant: [folded: first][folded: second]two [stop]",
    ]


async def test_r26_a_run_covered_by_a_cancel_is_not_folded(node: Node) -> None:
    host = (await node.accept("s", script(wait("g"), STEP, say("end")))).run
    await node.latches.reached("g")
    covered, folded = await node.fold("s", "covered"), await node.fold("s", "folded")
    await node.coordinator.cancel(run_id=covered.run_id)
    node.latches.open("g")
    assert (await node.end(host.run_id)).text == "[folded: folded]end"
    assert (await node.end(covered.run_id)).state is S.CANCELLED
    assert (await node.end(folded.run_id)).folded_into == host.run_id


async def test_r26_a_fold_run_after_the_last_step_gets_its_own_turn(node: Node) -> None:
    host = await node.start_blocked("s", "g")
    late = await node.fold("s", "late")
    node.latches.open("g")
    await node.end(host.run_id)
    complete = await node.end(late.run_id)
    assert (complete.folded_into, complete.text) == ("", "late")


async def test_r26_cancelling_a_folded_run_alone_does_not_end_its_turn(node: Node) -> None:
    host = (await node.accept("s", script(wait("a"), STEP, wait("b"), say("end")))).run
    await node.latches.reached("a")
    folded = await node.fold("s", "x")
    node.latches.open("a")
    await node.latches.reached("b")
    receipt = await node.coordinator.cancel(run_id=folded.run_id)
    assert [c.state for c in receipt.cancelled] == [S.FOLDED]
    assert (await node.end(folded.run_id)).state is S.CANCELLED
    node.latches.open("b")
    assert (await node.end(host.run_id)).text == "[folded: x]end"


async def test_r27_a_queue_run_is_never_folded(node: Node) -> None:
    host = (await node.accept("s", script(wait("g"), STEP, say("end")))).run
    await node.latches.reached("g")
    queued = await node.queue("s", "queued")
    node.latches.open("g")
    assert (await node.end(host.run_id)).text == "end"
    assert (await node.end(queued.run_id)).folded_into == ""


async def test_r27_reject_answers_session_busy(node: Node) -> None:
    await node.start_blocked("s", "g")
    with pytest.raises(SessionBusy):
        await node.queue("s", "x", when_busy=WhenBusy.REJECT)
    node.latches.open("g")
    await idle(node, "s")
    run = await node.queue("s", "x", when_busy=WhenBusy.REJECT)
    assert (await node.end(run.run_id)).state is S.COMPLETED


async def test_r27_interrupt_cancels_the_active_run_and_goes_to_the_head(node: Node) -> None:
    active = await node.start_blocked("s", "g")
    queued = await node.queue("s", "queued")
    urgent = await node.queue("s", "urgent", when_busy=WhenBusy.INTERRUPT)
    await node.end(queued.run_id)
    ended = [(c.run_id, c.state) for c in await node.completes()]
    assert ended == [
        (active.run_id, S.CANCELLED),
        (urgent.run_id, S.COMPLETED),
        (queued.run_id, S.COMPLETED),
    ]


async def test_r28_a_completion_leaves_no_cancel_that_could_hit_a_later_run(node: Node) -> None:
    for n in range(20):
        run = await node.start_blocked("s", f"g{n}")
        node.latches.open(f"g{n}")
        cancelling = asyncio.create_task(node.coordinator.cancel("s"))
        await asyncio.sleep(0)
        await cancelling
        await node.end(run.run_id)
        assert (await node.coordinator.run("s", Prompt("next"))).state is S.COMPLETED


# --- In process ---------------------------------------------------------------------------------


async def test_r29_a_burst_on_an_idle_session_starts_one_run(node: Node) -> None:
    prompts = [script(wait("g"), say(str(n))) for n in range(20)]
    accepted = await asyncio.gather(*(node.accept("s", prompt) for prompt in prompts))
    states = [await node.state(a.run.run_id) for a in accepted]
    assert states == [S.ACTIVE, *[S.QUEUED] * 19]
    assert await node.coordinator.queued_prompts("s") == 19
    listed = await node.coordinator.queued_prompts_list("s")
    assert [prompt.text for prompt in listed] == prompts[1:]
    assert node.coordinator.is_busy()
    node.latches.open("g")
    await node.end(accepted[-1].run.run_id)
    assert [c.accept_seq for c in await node.completes()] == list(range(1, 21))


class GettingReady:
    """An agent whose start succeeds or fails when the test says so."""

    def __init__(self) -> None:
        self.tries = 0
        self.ready = asyncio.Event()
        self.started = asyncio.Event()
        self.failures: list[Exception] = []

    async def start(self) -> None:
        self.tries += 1
        if self.failures:
            raise self.failures.pop()
        await self.ready.wait()
        self.started.set()

    async def run(self, turn: Turn) -> AsyncGenerator[AgentEvent, None]:
        yield TextDelta(turn.prompt.text)

    async def close(self) -> None:
        pass


async def test_r30_runs_wait_until_the_agent_is_ready_and_cancel_covers_them(store: Store) -> None:
    agent = GettingReady()
    async with running(store, agent=agent) as node:
        cancelled, kept = await node.accept("a", "x"), await node.accept("b", "y")
        receipt = await node.coordinator.cancel("a")
        assert [c.state for c in receipt.cancelled] == [S.ACCEPTED]
        assert await node.state(kept.run.run_id) is S.ACCEPTED
        agent.ready.set()
        assert (await node.end(kept.run.run_id)).text == "y"
        assert (await node.end(cancelled.run.run_id)).attempt == 0


async def test_r30_runs_that_waited_for_an_agent_that_failed_to_start_end_failed(
    store: Store,
) -> None:
    agent = GettingReady()
    async with running(store, agent=agent, limits=Limits(ready_timeout=0.05)) as node:
        first, second = await node.accept("s", "x"), await node.accept("s", "y")
        for accepted in (first, second):
            complete = await node.end(accepted.run.run_id)
            assert complete.error is not None
            assert complete.error.reason == "AGENT_NOT_READY"
        assert await node.lines("s") == [
            "user: x",
            "assistant:  [error]",
            "user: y",
            "assistant:  [error]",
        ]


async def test_r30_starting_the_agent_is_retried_independently_of_callers(
    store: Store,
) -> None:
    agent = GettingReady()
    agent.failures.append(RuntimeError("not yet"))
    agent.ready.set()
    async with running(store, agent=agent) as node:
        caller = asyncio.create_task(node.coordinator.run("s", Prompt("first")))
        await asyncio.sleep(0)
        caller.cancel()
        await asyncio.wait({caller})
        await agent.started.wait()  # the retry follows after a second
        assert (await node.coordinator.run("s", Prompt("second"))).text == "second"
        assert agent.tries == 2


async def steps(number: int) -> None:
    """Lets the loop take a number of steps."""
    for _ in range(number):
        await asyncio.sleep(0)


async def idle(node: Node, session_id: str) -> None:
    """Waits until the session has no work."""
    async with asyncio.timeout(SECONDS):
        while await node.coordinator.is_session_busy(session_id):
            await asyncio.sleep(0)
