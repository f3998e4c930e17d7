"""What a case has in hand: a server, sessions of its own, and the moves that stage a race."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from runlane.client import Client
from runlane.conformance.rules import broken, expect, hold
from runlane.errors import Draining, RunlaneError, is_transient
from runlane.harness.client import Gate, GatePoint, Harness, Server
from runlane.run_handle import RunHandle
from runlane.types import (
    CancelReceipt,
    FinishReason,
    Message,
    Role,
    Run,
    RunComplete,
    RunState,
    Started,
    Text,
    TextDelta,
)
from runlane.wire import RetryPolicy

RESTART = 60.0
"""Seconds that a server has to come back."""

Step = Mapping[str, Any]

STEP: Step = {"step": True}
"""The agent takes the prompts that wait to be folded in."""


def say(text: str) -> Step:
    """The agent says something."""
    return {"text": text}


def script(*steps: Step) -> str:
    """A prompt for the scripted agent."""
    return json.dumps(steps)


@dataclass(frozen=True, slots=True)
class World:
    """One for each case: `session` is its own, and so are the names of its gates.

    `patience` is how many seconds it waits for what has to happen; `connect` makes another client
    of the same caller.
    """

    client: Client
    harness: Harness
    server: Server
    session: str
    patience: float
    closing: AsyncExitStack
    connect: Callable[..., Client]

    # --- Runs -----------------------------------------------------------------------------------

    async def accept(self, *steps: Step, session: str = "", **options: Any) -> RunHandle:
        """Accepts a run in the session of the case; creates that if need be."""
        options.setdefault("allow_missing", True)
        return await self.client.run_accepted(session or self.session, script(*steps), **options)

    async def blocked(
        self, gate: str = "g", *, session: str = "", ignore_cancel: bool = False, **options: Any
    ) -> RunHandle:
        """Accepts a run; returns once its agent has said `<gate>` and waits there."""
        steps = self.at_gate(gate, ignore_cancel=ignore_cancel)
        handle = await self.accept(*steps, session=session, **options)
        await self.heard(handle, f"<{gate}>")
        return handle

    def at_gate(self, gate: str, *, ignore_cancel: bool = False) -> tuple[Step, Step]:
        """Steps that say where the agent is, and wait there, also through a cancel if so wished."""
        wait = {"wait": f"{self.session} {gate}", "ignore_cancel": ignore_cancel}
        return say(f"<{gate}>"), wait

    async def open(self, gate: str = "g") -> None:
        """Lets go what waits at a gate of the agent."""
        opener = f"{self.session} opens"
        await self.end(await self.accept({"open": f"{self.session} {gate}"}, session=opener))

    async def heard(self, handle: RunHandle, text: str, *, attempt: int = 1) -> None:
        """Returns once a run has said this in an attempt."""
        said, at = "", 0
        async with self.limit(f"run {handle.run_id} says {text!r}"):
            async for event in handle.events():
                match event.body:
                    case Started(now):
                        said, at = "", now
                    case TextDelta(piece):
                        said += piece
                if at == attempt and text in said:
                    return
        broken(f"run {handle.run_id} ended without saying {text!r}")

    async def end(self, handle: RunHandle) -> RunComplete:
        """The end of a run."""
        return await handle.completed(self.patience)

    async def ended(self, handle: RunHandle, state: RunState, text: str | None = None) -> None:
        """Waits for the end of a run, which has to be this, with a transcript that agrees."""
        complete = await self.end(handle)
        expect(f"the state that run {handle.run_id} ended in", complete.state, state)
        if text is not None:
            expect(f"what run {handle.run_id} said", complete.text, text)
        await self.check_turn(complete)

    async def state(self, handle: RunHandle) -> RunState:
        """Where a run is."""
        return (await self.client.get_run(handle.run_id)).state

    async def is_now(self, handle: RunHandle, *states: RunState) -> None:
        """The run has to be in one of these states at this moment."""
        found = await self.state(handle)
        if found not in states:
            expect(f"the state of run {handle.run_id}", found, states[0])

    async def runs(self, session: str = "") -> Sequence[Run]:
        """The runs of a session, in accept order."""
        found = [run async for run in self.client.list_runs(session or self.session)]
        return found[::-1]

    # --- Transcripts ----------------------------------------------------------------------------

    async def messages(self, session: str = "") -> Sequence[Message]:
        """The transcript of a session."""
        return [message async for message in self.client.list_messages(session or self.session)]

    async def turn(self, run_id: str, session: str = "") -> Sequence[Message]:
        """What the transcript has of a run."""
        return [m for m in await self.messages(session) if m.run_id == run_id]

    async def check_turn(self, complete: RunComplete) -> None:
        """The transcript has the turn of a run that had one of its own, and agrees with its end."""
        turn = await self.turn(complete.run_id, complete.session_id)
        prompts = [message for message in turn if message.role is Role.USER]
        expect(f"how often the prompt of run {complete.run_id} was written", len(prompts), 1)
        if complete.folded_into:
            return
        said = [message for message in turn if message.role is Role.ASSISTANT]
        hold(f"the turn of run {complete.run_id} has an assistant message", true=bool(said))
        last = said[-1]
        expect("the message that RunComplete names", complete.message_id, last.message_id)
        expect("the finish reason in the transcript", last.finish_reason, complete.finish_reason)
        expect("the text in the transcript", text_of(last), complete.text)
        cancelled = complete.state is RunState.CANCELLED
        expect("whether it was cancelled", complete.cancelled, cancelled)
        canceled = complete.finish_reason is FinishReason.CANCELED
        expect("whether its finish reason is `canceled`", canceled, cancelled)

    # --- The server -----------------------------------------------------------------------------

    async def arm(self, point: GatePoint, *, session: str = "", run_id: str = "") -> Gate:
        """Closes a gate for the session of the case, until the end of the case at the latest."""
        meant = "" if point is GatePoint.BEFORE_AGENT_READY else session or self.session
        gate = await self.harness.arm(point, session_id=meant, run_id=run_id)
        return await self.closing.enter_async_context(gate)

    async def at(self, gate: Gate, *handles: RunHandle) -> None:
        """Returns once these runs have come to a gate, and no others."""
        arrivals = await gate.reached(len(handles) or 1, timeout=self.patience)
        if handles:
            came = sorted(arrival.run_id for arrival in arrivals)
            expect(f"who came to {gate.point}", came, sorted(h.run_id for h in handles))

    def hasty(self, timeout: float = 5.0) -> Client:
        """A client of the same caller that makes each call once, to be closed by the case."""
        return self.connect(timeout=timeout, retry=RetryPolicy(attempts=1))

    async def crash(self) -> None:
        """Has the server crash; returns when it serves again."""
        before = await self.harness.server()
        await self.harness.crash()
        await self.harness.until_restarted(before, timeout=RESTART)

    async def drain(self) -> None:
        """Has the server go down in good order while something is active; returns when it serves
        again. Its clock is moved, so that nobody waits for what does not end."""
        before = await self.harness.server()
        await self.harness.drain()
        await self._refused_as_draining()
        async with self.limit("the server goes down and comes back"):
            while True:
                try:
                    if (await self.harness.server()).instance != before.instance:
                        return
                    await self.harness.advance_clock(self.server.drain_timeout)
                    await self.harness.advance_clock(self.server.cancel_grace)
                except RunlaneError as error:
                    if not is_transient(error):
                        raise

    async def _refused_as_draining(self) -> None:
        """Returns once a call is told so; what is accepted until then waits for the next start."""
        hasty = self.connect(timeout=self.patience, retry=RetryPolicy(attempts=1))
        async with self.limit("new runs are refused as DRAINING"), hasty:
            with suppress(Draining):
                while True:
                    await hasty.run_accepted(f"{self.session} more", "x", allow_missing=True)

    async def busy(self, *, expected: bool) -> None:
        """Whether the session has work, as the server says."""
        session = await self.client.get_session(self.session)
        expect("whether the session is busy", session.busy, expected)

    @asynccontextmanager
    async def limit(self, what: str) -> AsyncIterator[None]:
        """Bounds a wait by the patience of the case."""
        limit = asyncio.timeout(self.patience)
        try:
            async with limit:
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            broken(f"not within {self.patience:g} s: {what}")


def text_of(message: Message) -> str:
    """The text of a message."""
    return "".join(part.text for part in message.parts if isinstance(part, Text))


def covered(receipt: CancelReceipt) -> list[tuple[str, RunState]]:
    """What a receipt names: the runs, each with the state it was in."""
    return [(run.run_id, run.state_when_cancelled) for run in receipt.cancelled]


def reason_of(error: RunlaneError) -> str:
    """The stable word for what is wrong."""
    return error.reason or type(error).__name__
