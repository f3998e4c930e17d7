"""Workers over the wire: offers, output, cancel, fold, lost connections, and mistakes (R32 to R37).

Most tests drive a stream message by message, as a worker in any language does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from runlane import AgentNotFound, Client, RunComplete, RunState, WhenBusy
from runlane.types import Message, Text
from runlane.v1 import run_pb2
from runlane.worker import AgentError, BlockingTurn, Report, Turn, Usage, Worker
from runlane.worker.v1 import worker_service_pb2 as pb
from runlane_server.access import editing
from runlane_server.access.caller import Role
from runlane_server.agents.worker.quarantine import CALLER_FAULTS
from support.server import ServerProcess, clean_environment, serving
from support.staging import SECONDS
from support.workers import RawWorker, accept, be_refused, resume_of, working

AGENTS = ("--agent", "worker", "--agent", "coder=worker", "--agent", "own=echo")


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[ServerProcess]:
    flags = (*AGENTS, "--worker-lease", "20s", "--cancel-grace", "2s", "--store", "memory:")
    async with serving(tmp_path, *flags, base=clean_environment()) as started:
        yield started


@pytest.fixture
async def hasty(tmp_path: Path) -> AsyncIterator[ServerProcess]:
    """A server whose worker lease is over at once."""
    flags = (*AGENTS, "--worker-lease", "300ms", "--store", "memory:")
    async with serving(tmp_path, *flags, base=clean_environment()) as started:
        yield started


@pytest.fixture
async def client(request: pytest.FixtureRequest) -> AsyncIterator[Client]:
    name = "hasty" if "hasty" in request.fixturenames else "server"
    async with Client(request.getfixturevalue(name).address) as connected:
        yield connected


async def until_active(client: Client, run_id: str) -> None:
    """Waits until a run is active."""
    async with asyncio.timeout(SECONDS):
        async for event in client.subscribe_run(run_id):
            if type(event.body).__name__ == "Started":
                return


# --- Offers ---------------------------------------------------------------------------------------


async def test_r32_a_run_waits_for_an_offer_of_its_agent(
    server: ServerProcess, client: Client
) -> None:
    waiting = await accept(client, "s", "hello", agent="coder")
    other = await accept(client, "t", "not delayed", agent="own")
    assert (await other.completed(SECONDS)).text == "not delayed"
    assert (await client.get_run(waiting.run_id)).state == RunState.ACCEPTED
    async with RawWorker(server.address) as worker:
        turn = await worker.turn("default", "coder")
        assert (turn.agent, turn.prompt, turn.attempt) == ("coder", "hello", 1)
        await worker.emit(1, "done")
        await worker.finish(1)
        assert (await worker.expect("acked")).number == 1
    assert (await waiting.completed(SECONDS)).text == "done"


async def test_r32_the_next_run_of_a_session_waits_for_the_next_offer(
    server: ServerProcess, client: Client
) -> None:
    first, second = await accept(client, "s", "1"), await accept(client, "s", "2")
    async with RawWorker(server.address) as worker:
        await worker.turn()
        await worker.finish(0)
        assert (await worker.expect("acked")).ended
        await first.completed(SECONDS)
        assert (await client.get_run(second.run_id)).state == RunState.ACCEPTED
        assert (await worker.turn()).prompt == "2"


async def test_r32_a_slot_for_several_agents_starts_one_run(
    server: ServerProcess, client: Client
) -> None:
    runs = [await accept(client, agent, agent, agent=agent) for agent in ("coder", "default")]
    seen: set[str] = set()
    async with RawWorker(server.address) as worker:
        for left in (1, 0):
            turn = await worker.turn("default", "coder")
            seen.add(turn.prompt)
            states = [(await client.get_run(run.run_id)).state for run in runs]
            assert states.count(RunState.ACCEPTED) == left
            assert states.count(RunState.ACTIVE) == 1
            await worker.finish(0)
            assert (await worker.expect("acked")).ended
    assert seen == {"coder", "default"}
    for run in runs:
        assert (await run.completed(SECONDS)).attempt == 1


async def test_r32_a_withdrawn_offer_starts_no_run(server: ServerProcess, client: Client) -> None:
    async with RawWorker(server.address) as worker:
        await worker.offer()
        # An answered call afterwards shows that the server has the offer.
        await worker.send(take_folded=pb.WorkRequest.TakeFolded(number=1))
        assert await worker.end() is grpc.StatusCode.INVALID_ARGUMENT
    handle = await accept(client, "s", "hello")
    assert (await client.get_run(handle.run_id)).state == RunState.ACCEPTED
    receipt = await client.cancel("s")
    assert [run.state_when_cancelled for run in receipt.cancelled] == [RunState.ACCEPTED]


# --- Output ---------------------------------------------------------------------------------------


async def test_a_worker_reports_everything_that_an_agent_can(
    server: ServerProcess, client: Client
) -> None:
    handle = await accept(client, "s", "hello", metadata={"k": "v"}, timeout=60)
    call = run_pb2.ToolCall(tool_call_id="c", name="look", arguments_json="{}")
    result = run_pb2.ToolResult(tool_call_id="c", name="look", content="found")
    async with RawWorker(server.address) as worker:
        turn = await worker.turn()
        assert dict(turn.metadata) == {"k": "v"}
        assert turn.HasField("deadline")
        events = [
            pb.Event(reasoning_delta="hm"),
            pb.Event(tool_call=call),
            pb.Event(tool_result=result),
            pb.Event(text_delta="found it"),
        ]
        await worker.send(emit=pb.WorkRequest.Emit(number=1, events=events))
        await worker.acked(4)
        usage = run_pb2.Usage(input_tokens=3, output_tokens=2, requests=1)
        finish = pb.WorkRequest.Finish(number=4, usage=usage, model="m")
        await worker.send(finish=finish)
        assert (await worker.expect("acked")).ended
    end = await handle.completed(SECONDS)
    assert end.text == "found it"
    assert end.usage is not None
    assert (end.usage.input_tokens, end.usage.output_tokens) == (3, 2)
    messages = [message async for message in client.list_messages("s")]
    assert [message.role for message in messages] == ["user", "assistant", "tool", "assistant"]
    assert messages[-1].model == "m"


async def test_r34_what_is_acknowledged_is_in_the_store(
    server: ServerProcess, client: Client
) -> None:
    handle = await accept(client, "s", "hello")
    async with RawWorker(server.address) as worker:
        await worker.turn()
        await worker.emit(1, "a", "b")
        await worker.acked(2)
        texts: list[str] = []
        async for event in client.subscribe_run(handle.run_id):
            texts.append(getattr(event.body, "text", ""))
            if len("".join(texts)) == 2:
                break
        assert texts[-2:] == ["a", "b"]


async def test_r34_a_repeated_event_is_stored_once(server: ServerProcess, client: Client) -> None:
    handle = await accept(client, "s", "hello")
    async with RawWorker(server.address) as worker:
        await worker.turn()
        await worker.emit(1, "a", "b")
        await worker.emit(2, "b", "c")
        await worker.acked(3)
        await worker.finish(3)
        assert (await worker.expect("acked")).ended
    assert (await handle.completed(SECONDS)).text == "abc"


async def test_r34_after_a_lost_connection_the_worker_continues(
    server: ServerProcess, client: Client
) -> None:
    handle = await accept(client, "s", "hello")
    async with RawWorker(server.address) as worker:
        turn = await worker.turn()
        await worker.emit(1, "a", "b")
        await worker.acked(2)
        worker.drop()
    async with RawWorker(server.address) as worker:
        await worker.offer(resume=resume_of(turn))
        assert (await worker.expect("acked")).number == 2
        await worker.emit(2, "b", "c")
        await worker.acked(3)
        await worker.finish(3)
        assert (await worker.expect("acked")).ended
    end = await handle.completed(SECONDS)
    assert (end.text, end.attempt) == ("abc", 1)


# --- One executor ---------------------------------------------------------------------------------


async def test_r33_a_wrong_token_is_fenced(server: ServerProcess, client: Client) -> None:
    await accept(client, "s", "hello")
    async with RawWorker(server.address) as worker, RawWorker(server.address) as thief:
        turn = await worker.turn()
        for wrong in ({"fence": "0" * 64}, {"attempt": 2}, {"run_id": "another"}):
            await thief.offer(resume=resume_of(turn, **wrong))
            await thief.expect("fenced")
        await worker.emit(1, "mine")
        await worker.acked(1)


async def test_r33_the_old_connection_is_fenced_when_the_worker_returns(
    server: ServerProcess, client: Client
) -> None:
    handle = await accept(client, "s", "hello")
    async with RawWorker(server.address) as old, RawWorker(server.address) as new:
        turn = await old.turn()
        await new.offer(resume=resume_of(turn))
        await new.expect("acked")
        await old.expect("fenced")
        await old.emit(1, "old")
        await new.emit(1, "new")
        await new.acked(1)
        await new.finish(1)
        assert (await new.expect("acked")).ended
    assert (await handle.completed(SECONDS)).text == "new"


async def test_r33_output_after_the_end_of_the_lease_is_fenced(
    hasty: ServerProcess, client: Client
) -> None:
    handle = await accept(client, "s", "hello")
    async with RawWorker(hasty.address) as worker:
        turn = await worker.turn()
        await worker.emit(1, "half")
        await worker.acked(1)
        worker.drop()
    end = await handle.completed(SECONDS)
    assert end.error is not None
    assert (end.state, end.error.reason, end.text) == (RunState.FAILED, "INTERRUPTED", "half")
    async with RawWorker(hasty.address) as late:
        await late.offer(resume=resume_of(turn))
        await late.expect("fenced")


async def test_r35_a_lost_attempt_is_repeated_while_attempts_are_left(
    hasty: ServerProcess, client: Client
) -> None:
    handle = await accept(client, "s", "hello", max_attempts=2)
    async with RawWorker(hasty.address) as worker:
        lost = await worker.turn()
        # The answer shows that the server knows that the worker has the turn.
        await worker.send(get_history=pb.WorkRequest.GetHistory())
        await worker.expect("history")
        worker.drop()
    async with RawWorker(hasty.address) as worker:
        turn = await worker.turn()
        assert (lost.attempt, turn.attempt) == (1, 2)
        assert lost.fence != turn.fence
        await worker.emit(1, "second")
        await worker.finish(1)
        await worker.acked(1)
    assert (await handle.completed(SECONDS)).attempt == 2


@pytest.mark.parametrize("offers_before", [True, False])
async def test_r35_a_turn_that_is_lost_on_its_way_starts_elsewhere_at_once(
    server: ServerProcess, client: Client, offers_before: bool
) -> None:
    handle = await accept(client, "s", "hello")
    async with RawWorker(server.address) as worker, RawWorker(server.address) as other:
        await worker.offer()
        await worker.expect("turn")
        if offers_before:
            # It starts again in the commit that gives it back.
            await other.offer()
            worker.drop()
            assert (await other.expect("turn")).attempt == 2
        else:
            worker.drop()
            assert (await other.turn()).attempt == 2
        await other.finish(0)
        assert (await other.expect("acked")).ended
    end = await handle.completed(SECONDS)
    assert (end.state, end.attempt) == (RunState.COMPLETED, 2)


async def test_r35_a_turn_that_its_worker_does_not_begin_starts_elsewhere(
    hasty: ServerProcess, client: Client
) -> None:
    handle = await accept(client, "s", "hello")
    async with RawWorker(hasty.address) as mute, RawWorker(hasty.address) as other:
        await mute.offer(worker_id="mute")
        assert (await mute.expect("turn")).attempt == 1
        assert (await other.turn()).run_id == handle.run_id
        await mute.expect("fenced")
        await mute.send(begun=pb.WorkRequest.Begun())  # too late, and no mistake
        await mute.offer(worker_id="mute")
        await other.emit(1, "done")
        await other.finish(1)
        await other.acked(1)
        again = await accept(client, "t", "hello")
        assert (await mute.expect("turn")).run_id == again.run_id
    end = await handle.completed(SECONDS)
    assert (end.state, end.text) == (RunState.COMPLETED, "done")


async def test_r35_a_turn_that_has_begun_may_take_longer_than_the_lease(
    hasty: ServerProcess, client: Client
) -> None:
    slow = await accept(client, "s", "slow")
    async with RawWorker(hasty.address) as worker, RawWorker(hasty.address) as mute:
        await worker.turn()
        # The lease of a turn that was given later is over.
        await accept(client, "t", "hello")
        await mute.offer()
        await mute.expect("turn")
        await mute.expect("fenced")
        await worker.finish(0)
        assert (await worker.expect("acked")).ended
    assert (await slow.completed(SECONDS)).state == RunState.COMPLETED


# --- Cancel and fold ------------------------------------------------------------------------------


async def test_r37_a_cancel_reaches_the_worker_and_waits_for_it(
    server: ServerProcess, client: Client
) -> None:
    handle = await accept(client, "s", "hello")
    async with RawWorker(server.address) as worker:
        await worker.turn()
        await worker.emit(1, "so far")
        await worker.acked(1)
        await client.cancel("s")
        await worker.expect("cancel")
        # The session is busy until the worker has stopped (R9).
        assert (await client.get_run(handle.run_id)).state == RunState.CANCELLING
        await worker.finish(1)
        assert (await worker.expect("acked")).ended
    end = await handle.completed(SECONDS)
    assert (end.state, end.text) == (RunState.CANCELLED, "so far")


async def test_r33_a_worker_that_ignores_a_cancel_is_fenced_after_the_grace(
    server: ServerProcess, client: Client
) -> None:
    handle = await accept(client, "s", "hello")
    async with RawWorker(server.address) as worker:
        await worker.turn()
        await client.cancel("s")
        await worker.expect("cancel")
        await worker.expect("fenced")
        assert (await handle.completed(SECONDS)).state == RunState.CANCELLED
        # Its slot is of use again.
        again = await accept(client, "t", "next")
        assert (await worker.turn()).run_id == again.run_id


async def test_r26_a_worker_takes_folded_prompts_between_two_steps(
    server: ServerProcess, client: Client
) -> None:
    handle = await accept(client, "s", "first")
    async with RawWorker(server.address) as worker:
        turn = await worker.turn()
        joins = await accept(client, "s", "second", when_busy=WhenBusy.FOLD)
        await worker.send(take_folded=pb.WorkRequest.TakeFolded(number=1))
        folded = await worker.expect("folded")
        assert [(one.run_id, one.prompt) for one in folded.prompts] == [(joins.run_id, "second")]
        worker.drop()
    async with RawWorker(server.address) as worker:
        # A connection that was lost with the answer on its way.
        await worker.offer(resume=resume_of(turn))
        await worker.expect("acked")
        assert [one.prompt for one in (await worker.expect("folded")).prompts] == ["second"]
        await worker.send(take_folded=pb.WorkRequest.TakeFolded(number=1))
        assert not (await worker.expect("folded")).prompts
        await worker.emit(1, "both")
        await worker.finish(1)
        await worker.acked(1)
    assert (await handle.completed(SECONDS)).text == "both"
    assert (await joins.completed(SECONDS)).folded_into == handle.run_id


async def test_r37_a_run_that_is_handed_back_starts_elsewhere_and_has_lost_no_attempt(
    server: ServerProcess, client: Client
) -> None:
    handle = await accept(client, "s", "hello")
    async with RawWorker(server.address) as worker:
        first = await worker.turn()
        await worker.send(hand_back=pb.WorkRequest.HandBack())
        assert (await worker.expect("acked")).ended
    async with RawWorker(server.address) as worker, RawWorker(server.address) as late:
        turn = await worker.turn()
        assert (turn.run_id, turn.attempt) == (first.run_id, 2)
        await late.offer(resume=resume_of(first))
        await late.expect("fenced")
        await worker.finish(0)
        assert (await worker.expect("acked")).ended
    end = await handle.completed(SECONDS)
    assert (end.state, end.attempt) == (RunState.COMPLETED, 2)


async def test_r37_a_run_with_output_that_is_handed_back_has_lost_its_attempt(
    server: ServerProcess, client: Client
) -> None:
    handle = await accept(client, "s", "hello")
    async with RawWorker(server.address) as worker:
        await worker.turn()
        await worker.emit(1, "half")
        await worker.acked(1)
        await worker.send(hand_back=pb.WorkRequest.HandBack())
        assert (await worker.expect("acked")).ended
    end = await handle.completed(SECONDS)
    assert end.error is not None
    assert (end.error.reason, end.text) == ("INTERRUPTED", "half")


async def give_back(server: ServerProcess, worker_id: str | None) -> int:
    """Takes a turn and hands it back, or loses it on its way; returns its attempt."""
    async with RawWorker(server.address) as worker:
        await worker.offer(worker_id=worker_id or "lost")
        attempt = (await worker.expect("turn")).attempt
        if worker_id is not None:
            await worker.send(hand_back=pb.WorkRequest.HandBack())
            assert (await worker.expect("acked")).ended
    return int(attempt)


RETURNS: dict[str, tuple[list[str | None], bool]] = {
    "lost on its way": ([None] * 3, True),
    "by one worker": (["w"] * 4, True),
    "mixed": (["w", None, "w", None], True),
    "by one worker after another": ([f"w{n}" for n in range(8)], False),
}
"""The workers that give a run back, in order; and whether its attempt is lost with the last one."""


@pytest.mark.parametrize("name", RETURNS)
async def test_r37_a_run_that_is_given_back_again_and_again_has_lost_its_attempt(
    server: ServerProcess, client: Client, name: str
) -> None:
    workers, is_lost = RETURNS[name]
    handle = await accept(client, "s", "deadly")
    attempts = [await give_back(server, worker_id) for worker_id in workers]
    assert attempts == list(range(1, len(workers) + 1))
    if not is_lost:
        await client.cancel("s")
    end = await handle.completed(SECONDS)
    assert end.state == (RunState.FAILED if is_lost else RunState.CANCELLED)


async def test_r37_a_run_that_no_worker_keeps_ends(server: ServerProcess, client: Client) -> None:
    handle = await accept(client, "s", "deadly")
    for _ in range(3):
        await give_back(server, None)
    end = await handle.completed(SECONDS)
    assert end.error is not None
    assert end.error.reason == "INTERRUPTED"
    assert "workers gave it back 3 times in a row" in end.error.message


# --- Mistakes -------------------------------------------------------------------------------------

OFFER = pb.WorkRequest.Offer(agents=["default"], worker_id="w", protocol_version=1)


def _offer(**changes: Any) -> pb.WorkRequest:
    offer = pb.WorkRequest.Offer()
    offer.CopyFrom(OFFER)
    for name, value in changes.items():
        if name == "agents":
            del offer.agents[:]
            offer.agents.extend(value)
        else:
            setattr(offer, name, value)
    return pb.WorkRequest(offer=offer)


MISTAKES: dict[str, tuple[list[pb.WorkRequest], grpc.StatusCode, str]] = {
    "unknown agent": ([_offer(agents=["nobody"])], grpc.StatusCode.NOT_FOUND, "'nobody'"),
    "agent of the server": ([_offer(agents=["own"])], grpc.StatusCode.NOT_FOUND, "'own'"),
    "no agents": ([_offer(agents=[])], grpc.StatusCode.INVALID_ARGUMENT, "offer.agents"),
    "other version": ([_offer(protocol_version=2)], grpc.StatusCode.UNIMPLEMENTED, "version 1"),
    "two offers": ([_offer(), _offer()], grpc.StatusCode.INVALID_ARGUMENT, "offer"),
    "finish without a turn": (
        [_offer(), pb.WorkRequest(finish=pb.WorkRequest.Finish())],
        grpc.StatusCode.INVALID_ARGUMENT,
        "finish: came without a turn",
    ),
    "emit before an offer": (
        [pb.WorkRequest(emit=pb.WorkRequest.Emit(number=1, events=[pb.Event(text_delta="x")]))],
        grpc.StatusCode.INVALID_ARGUMENT,
        "emit: came without a turn",
    ),
    "nothing": ([pb.WorkRequest()], grpc.StatusCode.INVALID_ARGUMENT, "message"),
}


@pytest.mark.parametrize("name", MISTAKES)
async def test_a_stream_with_a_mistake_ends_with_an_error_that_names_it(
    server: ServerProcess, name: str
) -> None:
    messages, status, text = MISTAKES[name]
    async with RawWorker(server.address) as worker:
        for message in messages:
            kind = str(message.WhichOneof("message"))
            await worker.send(**({} if kind == "None" else {kind: getattr(message, kind)}))
        assert await worker.end() is status
        assert text in await worker.details()


EMITS: dict[str, tuple[pb.WorkRequest, str]] = {
    "a gap": (
        pb.WorkRequest(emit=pb.WorkRequest.Emit(number=3, events=[pb.Event(text_delta="x")])),
        "emit.number: is 3; the next number is 1",
    ),
    "no event": (pb.WorkRequest(emit=pb.WorkRequest.Emit(number=1)), "emit.events: is empty"),
    "an empty text": (
        pb.WorkRequest(emit=pb.WorkRequest.Emit(number=1, events=[pb.Event(text_delta="")])),
        "emit.events[0].text_delta: is empty",
    ),
    "an oversized text": (
        pb.WorkRequest(
            emit=pb.WorkRequest.Emit(number=1, events=[pb.Event(text_delta="x" * 65_537)])
        ),
        "the limit is 65536",
    ),
    "too many events": (
        pb.WorkRequest(
            emit=pb.WorkRequest.Emit(number=1, events=[pb.Event(text_delta="x")] * 1_001)
        ),
        "the limit is 1000",
    ),
    "a wrong last number": (
        pb.WorkRequest(finish=pb.WorkRequest.Finish(number=7)),
        "finish.number: is 7; the last number is 0",
    ),
}


async def test_a_request_for_folded_prompts_has_a_number(
    server: ServerProcess, client: Client
) -> None:
    await accept(client, "s", "hello")
    async with RawWorker(server.address) as worker:
        await worker.turn()
        await worker.send(take_folded=pb.WorkRequest.TakeFolded())
        assert await worker.end() is grpc.StatusCode.INVALID_ARGUMENT
        assert "take_folded.number: is 0; the minimum is 1" in await worker.details()


@pytest.mark.parametrize("name", EMITS)
async def test_r34_wrong_output_ends_the_stream_and_the_worker_may_resume(
    server: ServerProcess, client: Client, name: str
) -> None:
    message, text = EMITS[name]
    handle = await accept(client, "s", "hello")
    async with RawWorker(server.address) as worker:
        turn = await worker.turn()
        kind = str(message.WhichOneof("message"))
        await worker.send(**{kind: getattr(message, kind)})
        assert await worker.end() is grpc.StatusCode.INVALID_ARGUMENT
        assert text in await worker.details()
    async with RawWorker(server.address) as worker:
        await worker.offer(resume=resume_of(turn))
        assert (await worker.expect("acked")).number == 0
        await worker.finish(0)
        assert (await worker.expect("acked")).ended
    assert (await handle.completed(SECONDS)).state == RunState.COMPLETED


async def test_an_event_after_the_end_of_the_turn_is_refused(
    server: ServerProcess, client: Client
) -> None:
    handle = await accept(client, "s", "hello")
    async with RawWorker(server.address) as worker:
        await worker.turn()
        await worker.finish(0)
        assert (await worker.expect("acked")).ended
        # What was on its way before the answer is passed over; after the next offer it is wrong.
        await worker.emit(1, "late")
        await worker.offer()
        await worker.emit(1, "late")
        assert await worker.end() is grpc.StatusCode.INVALID_ARGUMENT
    assert (await handle.completed(SECONDS)).text == ""


async def test_output_that_no_agent_may_emit_fails_the_run(
    server: ServerProcess, client: Client
) -> None:
    handle = await accept(client, "s", "hello")
    result = run_pb2.ToolResult(tool_call_id="c", name="look", content="found")
    async with RawWorker(server.address) as worker:
        await worker.turn()
        events = [pb.Event(tool_result=result)]
        await worker.send(emit=pb.WorkRequest.Emit(number=1, events=events))
        assert "no open tool call" in (await worker.expect("fenced")).message
    end = await handle.completed(SECONDS)
    assert end.error is not None
    assert end.error.reason == "AGENT_ERROR"


# --- Faults of workers ------------------------------------------------------------------------


async def test_r32_a_worker_whose_agent_rejects_prompts_keeps_getting_turns(
    server: ServerProcess, client: Client
) -> None:
    async with RawWorker(server.address) as worker:
        for n in range(CALLER_FAULTS):
            run = await accept(client, f"s {n}", "rejected")
            await worker.turn()
            await worker.send(fail=pb.WorkRequest.Fail(reason="REJECTED", message="no"))
            assert (await worker.expect("acked")).ended
            assert (await run.completed(SECONDS)).state == RunState.FAILED
        assert "worker gets no turns" not in server.log


async def test_a_worker_that_is_at_fault_again_and_again_gets_turns_after_a_backoff(
    server: ServerProcess, client: Client
) -> None:
    await be_refused(server.address, client)
    async with RawWorker(server.address) as bad, RawWorker(server.address) as good:
        loop = asyncio.get_running_loop()
        since = loop.time()
        await bad.offer()  # first, but it has to wait
        run = await accept(client, "s", "hello")
        await good.offer(worker_id="good")
        assert (await good.expect("turn")).run_id == run.run_id
        await good.send(begun=pb.WorkRequest.Begun())
        await good.finish(0)
        assert (await run.completed(SECONDS)).state == RunState.COMPLETED
        assert loop.time() - since < 2.0, "the backoff was over"
        # The backoff ends by itself.
        again = await accept(client, "s", "hello")
        assert (await bad.expect("turn")).run_id == again.run_id
        assert loop.time() - since > 1.5
        assert server.log.count("worker gets no turns") == 1


async def test_a_worker_that_waits_can_stop(server: ServerProcess, client: Client) -> None:
    await be_refused(server.address, client)
    async with RawWorker(server.address) as bad:
        await bad.offer()
        await bad.send(hand_back=pb.WorkRequest.HandBack())
        assert (await bad.expect("acked")).ended
        # It has no offer any more, so it may make one, but not two.
        await bad.offer()
        await bad.offer()
        assert await bad.end() is grpc.StatusCode.INVALID_ARGUMENT


async def test_an_attempt_whose_messages_are_refused_again_and_again_is_lost(
    server: ServerProcess, client: Client
) -> None:
    handle = await be_refused(server.address, client)
    end = await handle.completed(SECONDS)
    assert end.error is not None
    assert end.error.reason == "INTERRUPTED"
    assert "refused what the worker sent" in end.error.message
    # All workers that send such things wait too.
    next_run = await accept(client, "s", "hello")
    async with RawWorker(server.address) as worker, RawWorker(server.address) as good:
        await worker.offer()
        await good.offer(worker_id="good")
        assert (await good.expect("turn")).run_id == next_run.run_id


async def test_workers_that_lose_their_runs_get_turns_after_a_backoff(
    hasty: ServerProcess, client: Client
) -> None:
    for n in range(5):
        handle = await accept(client, f"bad {n}", "hello")
        async with RawWorker(hasty.address) as worker:
            await worker.turn()
        assert (await handle.completed(SECONDS)).error is not None
    run = await accept(client, "s", "hello")
    async with RawWorker(hasty.address) as worker, RawWorker(hasty.address) as good:
        await worker.offer()
        await good.offer(worker_id="good")
        assert (await good.expect("turn")).run_id == run.run_id


# --- The SDK --------------------------------------------------------------------------------------


async def by_steps(turn: Turn) -> AsyncIterator[Any]:
    history = await turn.history()
    yield f"{len(history)} before; "
    yield Report(usage=Usage(output_tokens=2), model="m")
    yield turn.prompt.text


def in_a_thread(turn: BlockingTurn) -> Iterator[str]:
    yield f"{len(turn.history())} before; "
    yield turn.prompt.text


async def returned(turn: Turn) -> str:
    return turn.prompt.text


async def fails(turn: Turn) -> str:
    raise AgentError("no model", reason="MODEL_UNAVAILABLE")


async def breaks(turn: Turn) -> str:
    raise ValueError("oops")


@pytest.mark.parametrize(
    ("agent", "text", "reason"),
    [
        (by_steps, "0 before; hello", ""),
        (in_a_thread, "0 before; hello", ""),
        (returned, "hello", ""),
        (fails, "", "MODEL_UNAVAILABLE"),
        (breaks, "", "AGENT_ERROR"),
    ],
)
async def test_a_worker_takes_the_functions_that_a_server_takes(
    server: ServerProcess, client: Client, agent: Any, text: str, reason: str
) -> None:
    async with working(server.address, {"coder": agent}):
        handle = await accept(client, "s", "hello", agent="coder")
        end = await handle.completed(SECONDS)
    assert end.text == text
    assert (end.error.reason if end.error else "") == reason


async def test_a_long_history_comes_in_several_messages(
    server: ServerProcess, client: Client
) -> None:
    seen: list[Message] = []

    async def looks(turn: Turn) -> str:
        seen[:] = await turn.history()
        return "x" * 900_000

    async with working(server.address, {"default": looks}):
        for n in range(6):
            end = await (await accept(client, "s", f"{n}" * 800_000)).completed(SECONDS)
            assert end.state == RunState.COMPLETED
    texts = [part.text for message in seen for part in message.parts if isinstance(part, Text)]
    assert [message.role for message in seen] == ["user", "assistant"] * 5
    assert sum(map(len, texts)) == 5 * (800_000 + 900_000)


async def test_r37_a_cancel_stops_the_code_of_an_agent_in_a_worker(
    server: ServerProcess, client: Client
) -> None:
    stopped = asyncio.Event()

    async def waits(turn: Turn) -> AsyncIterator[str]:
        try:
            yield "so far"
            await asyncio.Event().wait()
        finally:
            stopped.set()

    async with working(server.address, {"default": waits}):
        handle = await accept(client, "s", "hello")
        async for event in client.subscribe_run(handle.run_id):
            if type(event.body).__name__ == "TextDelta":
                break
        await client.cancel("s")
        end = await handle.completed(SECONDS)
        assert stopped.is_set()
    assert (end.state, end.text) == (RunState.CANCELLED, "so far")


async def test_r37_a_worker_that_stops_hands_its_runs_back(
    server: ServerProcess, client: Client
) -> None:
    has_begun = asyncio.Event()

    async def waits(turn: Turn) -> str:
        has_begun.set()
        await asyncio.Event().wait()
        return ""

    handle = await accept(client, "s", "hello")
    async with working(server.address, {"default": waits}, drain_timeout=0):
        async with asyncio.timeout(SECONDS):
            await has_begun.wait()
    async with working(server.address, {"default": returned}):
        end = await handle.completed(SECONDS)
    assert (end.state, end.text, end.attempt) == (RunState.COMPLETED, "hello", 2)


async def test_a_worker_for_an_agent_that_is_not_declared_ends_with_an_error(
    server: ServerProcess,
) -> None:
    with pytest.raises(AgentNotFound, match="nobody"):
        await Worker(server.address, {"nobody": returned}).serve()


# --- Access ---------------------------------------------------------------------------------------


async def test_a_worker_needs_the_role_work_and_only_serves_its_tenant(tmp_path: Path) -> None:
    access = tmp_path / "access.toml"
    tokens = {
        name: editing.add(access, name, tenant=tenant, role=role)
        for name, tenant, role in (
            ("worker", "acme", Role.WORK),
            ("caller", "acme", Role.RUN),
            ("other", "globex", Role.RUN),
        )
    }
    flags = ("--agent", "worker", "--store", "memory:", "--access", str(access))
    async with (
        serving(tmp_path, *flags, base=clean_environment()) as server,
        Client(server.address, token=tokens["caller"]) as caller,
        Client(server.address, token=tokens["other"]) as other,
    ):
        async with RawWorker(server.address, token=tokens["caller"]) as wrong:
            assert await wrong.end() is grpc.StatusCode.PERMISSION_DENIED
        async with Client(server.address, token=tokens["worker"]) as nosy:
            with pytest.raises(Exception, match="may not call"):
                await nosy.get_run("any")
        strange = await accept(other, "s", "not for acme")
        handle = await accept(caller, "s", "hello")
        async with RawWorker(server.address, token=tokens["worker"]) as worker:
            turn = await worker.turn()
            assert (turn.tenant, turn.run_id) == ("acme", handle.run_id)
            assert (await other.get_run(strange.run_id)).state == RunState.ACCEPTED
            # A token that is revoked ends the stream, and the run is lost at once.
            editing.remove(access, "worker")
            assert await worker.end() is grpc.StatusCode.UNAUTHENTICATED
        end: RunComplete = await handle.completed(SECONDS)
        assert end.error is not None
        assert end.error.reason == "INTERRUPTED"


@pytest.mark.parametrize("thief", ["other agent", "other tenant"])
async def test_r33_a_token_resumes_only_runs_that_it_may_execute(
    tmp_path: Path, thief: str
) -> None:
    access = tmp_path / "access.toml"

    def token(name: str, tenant: str, role: Role, *agents: str) -> str:
        text = editing.add(access, name, tenant=tenant, role=role)
        if agents:
            named = f'name = "{name}"'
            entries = access.read_text().replace(named, f"{named}\nagents = {list(agents)}")
            access.write_text(entries)
        return text

    caller = token("caller", "acme", Role.RUN)
    owner = token("owner", "acme", Role.WORK, "coder")
    thieves = {
        "other agent": token("agent", "acme", Role.WORK, "default"),
        "other tenant": token("tenant", "globex", Role.WORK),
    }
    flags = (*AGENTS, "--store", "memory:", "--access", str(access))
    async with (
        serving(tmp_path, *flags, base=clean_environment()) as server,
        Client(server.address, token=caller) as client,
        RawWorker(server.address, token=owner) as worker,
        RawWorker(server.address, token=thieves[thief]) as stranger,
    ):
        handle = await accept(client, "s", "hello", agent="coder")
        turn = await worker.turn("coder")
        await stranger.offer(resume=resume_of(turn, tenant="acme"))
        await stranger.expect("fenced")
        await worker.emit(1, "mine")
        await worker.finish(1)
        await worker.acked(1)
        assert (await handle.completed(SECONDS)).text == "mine"
