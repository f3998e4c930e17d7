"""A worker that asks again and again and reads no answer: the server stops reading it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from runlane.worker.v1 import worker_service_pb2 as pb
from runlane_server.agents.base import AgentError, FoldedPrompt, Report
from runlane_server.agents.questions import Asked
from runlane_server.agents.worker.execution import Execution
from runlane_server.agents.worker.messages import (
    MAX_WAITING,
    MAX_WAITING_BYTES,
    Assigned,
    Downstream,
    Fenced,
    Joined,
    Transcript,
)
from runlane_server.agents.worker.quarantine import WORKER_FAULTS
from runlane_server.agents.worker.slot import Slot
from runlane_server.agents.worker.turn import AttemptEnd, AttemptLost, HandedBack, KeptStep
from runlane_server.agents.worker.workers import Workers
from runlane_server.core.errors import InvalidArgument
from runlane_server.core.input import InputRequest
from runlane_server.core.model import FinishReason, Message, Role, SessionKey, Text, TextDelta
from runlane_server.rpc.worker import serve_slot
from support.turns import LocalTurn

STEPS = 1000
"""Turns of the event loop in which everything that can go on has gone on."""


async def settle() -> None:
    """Lets the event loop do all that it can do."""
    for _ in range(STEPS):
        await asyncio.sleep(0)


def transcript(size: int) -> Transcript:
    text = Text("x" * size)
    return Transcript([Message("m", "r", 1, 0, Role.USER, (text,), FinishReason.STOP, "", 0)])


@dataclass
class LocalDurableTurn(LocalTurn):
    """A turn in memory whose events are not acknowledged."""

    key: SessionKey = field(default_factory=lambda: SessionKey("default", "s1"))
    fence: str = "f"
    deadline: int | None = None
    is_resumed: bool = False
    stored: int = 0
    folded: Sequence[FoldedPrompt] = ()
    end: AttemptEnd = field(default_factory=AttemptEnd)

    def follow_stored(self, on_stored: Callable[[int], None]) -> None:
        """Does nothing."""

    async def keep(self, step: KeptStep) -> None:
        """Does nothing."""

    async def find_durable_step(self, key: str) -> str | None:
        """A large result."""
        return "1" * (1 << 20)

    async def park(self, questions: Sequence[Asked], checkpoint: str = "") -> bool:
        """Nothing is answered."""
        return True

    async def answered(self, key: str) -> InputRequest:
        """Nothing is."""
        raise AgentError("nothing was asked")


QUESTIONS: Mapping[str, Callable[[Slot], Awaitable[None]]] = {
    "get_history": lambda slot: slot.send_history(),
    "take_folded": lambda slot: slot.take_folded(1),
}


@pytest.mark.parametrize("name", QUESTIONS)
async def test_a_second_question_before_the_answer_is_refused(name: str) -> None:
    ask, down = QUESTIONS[name], Downstream()
    slot, messages = Slot(None, down), down.messages()
    Execution(LocalDurableTurn(), "default", lease=60).assign(slot)
    await anext(messages)
    for _ in range(3):
        await ask(slot)
        await anext(messages)
    await ask(slot)
    with pytest.raises(InvalidArgument, match=f"{name}: came before the answer"):
        await ask(slot)


async def test_results_of_steps_wait_until_the_worker_reads() -> None:
    down = Downstream()
    slot, messages = Slot(None, down), down.messages()
    Execution(LocalDurableTurn(), "default", lease=60).assign(slot)
    await anext(messages)
    for _ in range(2):
        await slot.find_step("k")
    assert down.is_full
    await anext(messages)
    await anext(messages)
    assert not down.is_full


async def test_offers_that_are_taken_back_wait_until_the_worker_reads() -> None:
    sent = 0

    async def requests() -> AsyncIterator[pb.WorkRequest]:
        nonlocal sent
        for _ in range(10 * MAX_WAITING):
            sent += 1
            yield pb.WorkRequest(offer=pb.WorkRequest.Offer(agents=["default"]))
            yield pb.WorkRequest(hand_back=pb.WorkRequest.HandBack())

    async def take(slot: Slot, offer: pb.WorkRequest.Offer) -> None:
        slot.begin_offer(offer.agents, offer.worker_id)
        workers.offer(slot)

    workers, down = Workers(), Downstream()
    workers.serve("default", lambda _: None, lambda: None)
    stream = serve_slot(requests(), Slot(None, down), down, take, workers)
    await anext(stream)
    await settle()
    assert sent <= MAX_WAITING + 2
    answers = 1 + len([response async for response in stream])
    assert answers == sent == 10 * MAX_WAITING


async def test_a_large_answer_counts_until_it_is_written() -> None:
    down = Downstream()
    down.put(transcript(MAX_WAITING_BYTES + 1))
    down.put(transcript(0))
    messages = down.messages()
    await anext(messages)
    waiting = asyncio.create_task(down.until_room())
    await settle()
    assert not waiting.done()
    await anext(messages)
    async with asyncio.timeout(1):
        await waiting


async def test_small_answers_hold_nobody_back() -> None:
    down = Downstream()
    down.put(transcript(MAX_WAITING_BYTES))
    async with asyncio.timeout(1):
        await down.until_room()


# --- A worker that returns ------------------------------------------------------------------------


def connected(execution: Execution) -> tuple[Slot, Downstream]:
    """Connects the worker of an execution again."""
    down = Downstream()
    slot = Slot(None, down)
    execution.resume(slot, ())
    return slot, down


def waiting(down: Downstream) -> list[Any]:
    """The messages that wait for a worker."""
    return [message for message, _ in down._waiting]


async def test_r33_a_worker_that_returns_after_its_turn_was_given_elsewhere_is_fenced() -> None:
    """Its loss is decided, and is still being committed."""
    slot, execution = Slot(None, Downstream()), Execution(LocalDurableTurn(), "default", lease=60)
    execution.assign(slot)
    execution.detach(slot)
    slot, down = connected(execution)
    assert [type(message) for message in waiting(down)] == [Fenced]
    assert slot.execution is None
    execution.end()
    execution.turn.end.commit()
    await settle()
    assert [type(message) for message in waiting(down)] == [Fenced]


async def test_r33_an_end_that_comes_after_the_loss_is_decided_does_not_count() -> None:
    down = Downstream()
    slot, execution = Slot(None, down), Execution(LocalDurableTurn(), "default", lease=60)
    execution.assign(slot)
    execution.lose("its worker was lost")
    await slot.finish(0, Report())
    assert not execution.is_finished
    execution.end()
    execution.turn.end.commit()
    await settle()
    assert [type(message) for message in waiting(down)] == [Assigned, Fenced]


@dataclass
class SlowTurn(LocalDurableTurn):
    """A turn whose answers wait for `may_answer`."""

    may_answer: asyncio.Event = field(default_factory=asyncio.Event)

    async def take_folded(self) -> Sequence[FoldedPrompt]:
        """Waits, as for a commit."""
        await self.may_answer.wait()
        return await super().take_folded()

    async def history(self) -> Sequence[Message]:
        """Waits, as for a read."""
        await self.may_answer.wait()
        return await super().history()


@pytest.mark.parametrize("name", QUESTIONS)
@pytest.mark.parametrize("prompts", [[], ["joins"]])
async def test_r34_the_answer_to_a_lost_connection_does_not_answer_the_next_one(
    name: str, prompts: list[str]
) -> None:
    """The worker asks again, as W9 wants it, and must not be refused for that."""
    ask, turn = QUESTIONS[name], SlowTurn(waiting=prompts)
    slot, execution = Slot(None, Downstream()), Execution(turn, "default", lease=60)
    execution.assign(slot)
    asking = asyncio.ensure_future(ask(slot))
    await settle()
    execution.detach(slot)
    slot, down = connected(execution)
    turn.may_answer.set()
    await asking
    await ask(slot)
    answers = [message for message in waiting(down) if isinstance(message, Joined | Transcript)]
    joined = [message for message in answers if isinstance(message, Joined)]
    if name == "get_history":
        assert len(answers) == 1
    else:
        assert [message.number for message in joined] == [0] * len(prompts) + [1]
        assert [one.prompt.text for message in joined for one in message.prompts] == prompts


async def test_r34_a_worker_that_returns_after_its_end_may_repeat_its_output() -> None:
    """Its end was received and its last events were not acknowledged, so it repeats them (W8)."""
    slot, execution = Slot(None, Downstream()), Execution(LocalDurableTurn(), "default", lease=60)
    execution.assign(slot)
    await slot.emit(1, [TextDelta("a"), TextDelta("b")])
    await slot.finish(2, Report())
    execution.detach(slot)
    slot, _ = connected(execution)
    await slot.emit(1, [TextDelta("a"), TextDelta("b")])
    await slot.finish(2, Report())
    assert execution.turn.emitted == [TextDelta("a"), TextDelta("b")]  # type: ignore[attr-defined]
    with pytest.raises(InvalidArgument, match="after the end of the turn"):
        await slot.emit(2, [TextDelta("b"), TextDelta("c")])


@dataclass
class RefusingTurn(LocalDurableTurn):
    """A turn that refuses what its agent does."""

    async def emit(self, event: Any) -> None:
        """Refuses an event."""
        raise AgentError("Custom.json is no JSON value")

    async def take_folded(self) -> Sequence[FoldedPrompt]:
        """The run has failed, and takes no more prompts."""
        raise AssertionError("a prompt joined a failed run")


UNDER_WAY: dict[str, Callable[[Slot], Awaitable[None]]] = {
    "emit": lambda slot: slot.emit(2, [TextDelta("b")]),
    "take_folded": lambda slot: slot.take_folded(1),
    "get_history": lambda slot: slot.send_history(),
    "find_step": lambda slot: slot.find_step("k"),
    "ask": lambda slot: slot.ask([]),
    "finish": lambda slot: slot.finish(2, Report()),
}


@pytest.mark.parametrize("is_unreadable", [False, True])
@pytest.mark.parametrize("name", UNDER_WAY)
async def test_r33_what_is_under_way_when_the_run_fails_is_no_mistake(
    name: str, *, is_unreadable: bool
) -> None:
    """An error would end the worker with all of its slots (W11)."""
    down = Downstream()
    slot, execution = Slot(None, down), Execution(RefusingTurn(), "default", lease=60)
    execution.assign(slot)
    if is_unreadable:
        slot.refuse("emit", AgentError("emit.events[0] is no event"))
    else:
        await slot.emit(1, [TextDelta("a")])
    await UNDER_WAY[name](slot)
    execution.end()
    execution.turn.end.commit()
    await settle()
    assert [type(message) for message in waiting(down)] == [Assigned, Fenced]
    assert (await execution.wait()).error is not None


# --- Faults ---------------------------------------------------------------------------------------

ENDS: dict[str, tuple[AgentError | None, int]] = {
    "the agent rejects the prompt": (AgentError("no", reason="REJECTED"), WORKER_FAULTS - 1),
    "the content is refused": (AgentError("Custom.json is no JSON value"), WORKER_FAULTS - 1),
    "the attempt is lost": (AttemptLost("lost"), WORKER_FAULTS),
    "the turn is lost on its way": (HandedBack("lost"), WORKER_FAULTS),
    "it completes": (None, 0),
}
"""How a turn ends, and the faults of a worker that had all but one before."""


@pytest.mark.parametrize("has_output", [False, True])
async def test_r37_a_worker_that_hands_a_run_back_is_not_at_fault(*, has_output: bool) -> None:
    workers, slot = Workers(), Slot("default", Downstream(), "token")
    slot.worker_id = "w"
    execution = Execution(LocalDurableTurn(), "default", lease=60)
    execution.assign(slot)
    if has_output:
        await slot.emit(1, [TextDelta("a")])
    await slot.hand_back()
    for _ in range(WORKER_FAULTS - 1):
        workers.quarantine.add("default", "token", "w")
    workers.judge(execution, (await execution.wait()).error)
    assert not workers.quarantine.barred


@pytest.mark.parametrize("name", ENDS)
async def test_r32_only_a_loss_counts_as_a_fault_and_only_a_completed_run_clears_them(
    name: str,
) -> None:
    error, faults = ENDS[name]
    workers, slot = Workers(), Slot("default", Downstream(), "token")
    slot.worker_id = "w"
    execution = Execution(LocalDurableTurn(), "default", lease=60)
    execution.assign(slot)
    for _ in range(WORKER_FAULTS - 1):
        workers.quarantine.add("default", "token", "w")
    workers.judge(execution, error)
    assert workers.quarantine.barred == (faults == WORKER_FAULTS)
    if faults < WORKER_FAULTS:
        workers.quarantine.add("default", "token", "w")
        assert workers.quarantine.barred == (faults == WORKER_FAULTS - 1)
