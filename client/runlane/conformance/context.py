"""The context of a case: clients, its own session, and operations that force a race."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from dataclasses import dataclass
from typing import Any

from runlane.client import Client
from runlane.conformance.rules import expect, expect_that, fail, time_limit
from runlane.conformance.worker_stream import WorkerAgent, WorkerStream
from runlane.errors import RunlaneError, Unavailable, is_transient
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
    TextDelta,
)
from runlane.wire import RetryPolicy

RESTART_SECONDS = 60.0
"""Timeout of a server restart."""

Step = Mapping[str, Any]

STEP: Step = {"step": True}
"""A step of the agent, at which waiting runs are folded."""


def say(text: str) -> Step:
    """Returns a step that outputs text."""
    return {"text": text}


def script(*steps: Step) -> str:
    """Returns the prompt with these steps for the scripted agent."""
    return json.dumps(steps)


@dataclass(frozen=True, slots=True)
class CaseContext:
    """The context of one case.

    Attributes:
        client: A client of the server.
        harness: The harness of the server.
        server: The settings of the server.
        session: The session id of the case; prefix of its other session ids and agent gates.
        timeout: Maximum seconds to wait for an expected event.
        exit_stack: Closes resources at the end of the case.
        connect: Creates another client for the same caller; takes the options of `Client`.
        worker_agent: The agent whose runs the cases execute as a worker, if the server has one.
    """

    client: Client
    harness: Harness
    server: Server
    session: str
    timeout: float
    exit_stack: AsyncExitStack
    connect: Callable[..., Client]
    worker_agent: WorkerAgent | None = None

    # --- Runs -----------------------------------------------------------------------------------

    async def accept(self, *steps: Step, session: str = "", **options: Any) -> RunHandle:
        """Accepts a run, by default in the session of the case; creates the session."""
        options.setdefault("allow_missing", True)
        return await self.client.run_accepted(session or self.session, script(*steps), **options)

    async def accept_blocked(
        self, gate: str = "g", *, session: str = "", ignore_cancel: bool = False, **options: Any
    ) -> RunHandle:
        """Accepts a run; returns when its agent has output `<gate>` and waits at the gate."""
        steps = self.gate_steps(gate, ignore_cancel=ignore_cancel)
        handle = await self.accept(*steps, session=session, **options)
        await self.wait_for_text(handle, f"<{gate}>")
        return handle

    def gate_steps(self, gate: str, *, ignore_cancel: bool = False) -> tuple[Step, Step]:
        """Returns steps that output `<gate>` and wait at the gate, optionally despite a cancel."""
        wait = {"wait": f"{self.session} {gate}", "ignore_cancel": ignore_cancel}
        return say(f"<{gate}>"), wait

    async def open_gate(self, gate: str = "g") -> None:
        """Opens a gate of the agent."""
        step = {"open": f"{self.session} {gate}"}
        await self.wait_for_end(await self.accept(step, session=f"{self.session} opens"))

    async def wait_for_text(self, handle: RunHandle, text: str, *, attempt: int = 1) -> None:
        """Waits until a run has output a text in an attempt."""
        output, current_attempt = "", 0
        async with self.time_limit(f"run {handle.run_id} to output {text!r}"):
            async for event in handle.events():
                match event.body:
                    case Started(number):
                        output, current_attempt = "", number
                    case TextDelta(piece):
                        output += piece
                if current_attempt == attempt and text in output:
                    return
        fail(f"run {handle.run_id} ended without the output {text!r}")

    async def wait_for_end(self, handle: RunHandle) -> RunComplete:
        """Waits for the end of a run."""
        return await handle.completed(self.timeout)

    async def expect_end(self, handle: RunHandle, state: RunState, text: str | None = None) -> None:
        """Waits for the end of a run; checks its state, its text and its transcript."""
        complete = await self.wait_for_end(handle)
        expect(f"final state of run {handle.run_id}", complete.state, state)
        if text is not None:
            expect(f"text of run {handle.run_id}", complete.text, text)
        await self.expect_turn(complete)

    async def state(self, handle: RunHandle) -> RunState:
        """Returns the state of a run."""
        return (await self.client.get_run(handle.run_id)).state

    async def expect_state(self, handle: RunHandle, *states: RunState) -> None:
        """Checks that a run is in one of these states now."""
        current = await self.state(handle)
        if current not in states:
            expect(f"state of run {handle.run_id}", current, states[0])

    async def list_runs(self, session: str = "") -> Sequence[Run]:
        """Lists the runs of a session, in accept order."""
        latest_first = [run async for run in self.client.list_runs(session or self.session)]
        return latest_first[::-1]

    # --- Transcripts ----------------------------------------------------------------------------

    async def list_messages(self, session: str = "") -> Sequence[Message]:
        """Lists the messages of a session."""
        return [message async for message in self.client.list_messages(session or self.session)]

    async def turn(self, run_id: str, session: str = "") -> Sequence[Message]:
        """Lists the messages of a run."""
        return [m for m in await self.list_messages(session) if m.run_id == run_id]

    async def expect_turn(self, complete: RunComplete) -> None:
        """Checks that the transcript has the turn of a run and agrees with its RunComplete."""
        turn = await self.turn(complete.run_id, complete.session_id)
        prompts = [message for message in turn if message.role is Role.USER]
        expect(f"number of prompts of run {complete.run_id}", len(prompts), 1)
        if complete.folded_into:
            return
        answers = [message for message in turn if message.role is Role.ASSISTANT]
        expect_that(f"the turn of run {complete.run_id} has an answer", true=bool(answers))
        last = answers[-1]
        expect("message_id of the RunComplete", complete.message_id, last.message_id)
        expect("finish reason in the transcript", last.finish_reason, complete.finish_reason)
        expect("text in the transcript", last.text, complete.text)
        is_cancelled = complete.state is RunState.CANCELLED
        expect("field `cancelled` of the RunComplete", complete.cancelled, is_cancelled)
        has_reason = complete.finish_reason is FinishReason.CANCELED
        expect("finish reason is cancelled", has_reason, is_cancelled)

    # --- The server -----------------------------------------------------------------------------

    async def arm(self, point: GatePoint, *, session: str = "", run_id: str = "") -> Gate:
        """Arms a gate for the session of the case; released at the end of the case."""
        session_id = "" if point is GatePoint.BEFORE_AGENT_READY else session or self.session
        gate = await self.harness.arm(point, session_id=session_id, run_id=run_id)
        return await self.exit_stack.enter_async_context(gate)

    async def expect_arrivals(self, gate: Gate, *handles: RunHandle) -> None:
        """Waits until exactly these runs have arrived at a gate; without runs, for any arrival."""
        arrivals = await gate.reached(len(handles) or 1, timeout=self.timeout)
        if handles:
            arrived = sorted(arrival.run_id for arrival in arrivals)
            expected = sorted(handle.run_id for handle in handles)
            expect(f"runs at gate {gate.point}", arrived, expected)

    def no_retry_client(self, timeout: float = 5.0) -> Client:
        """Creates a client of the same caller without retries; the case closes it."""
        return self.connect(timeout=timeout, retry=RetryPolicy(attempts=1))

    @property
    def served_agent(self) -> WorkerAgent:
        """The agent whose runs the case executes as a worker; for cases with Need.WORKER."""
        return self.worker_agent or fail("no agent is declared for workers")

    async def open_worker(self) -> WorkerStream:
        """Connects as a worker; the connection is closed at the end of the case."""
        stream = WorkerStream(self.served_agent, self.timeout)
        return await self.exit_stack.enter_async_context(stream)

    async def crash(self) -> None:
        """Crashes the server; returns after its restart."""
        before = await self.harness.server()
        await self.harness.crash()
        await self.harness.until_restarted(before, timeout=RESTART_SECONDS)

    async def drain(self) -> None:
        """Shuts the server down gracefully while a run is active; returns after its restart.

        Advances the clock, so that the server does not wait for runs that do not end.
        """
        before = await self.harness.server()
        await self.harness.drain()
        await self._wait_until_draining(before)
        async with self.time_limit("the server to restart"):
            while True:
                try:
                    if (await self.harness.server()).instance != before.instance:
                        return
                    await self.harness.advance_clock(self.server.drain_timeout)
                    await self.harness.advance_clock(self.server.cancel_grace)
                except RunlaneError as error:
                    if not is_transient(error):
                        raise

    async def _wait_until_draining(self, before: Server) -> None:
        """Waits until a run is rejected, or the server is gone; runs accepted before that wait for
        the restart."""
        client = self.no_retry_client(self.timeout)
        async with self.time_limit("new runs to be rejected as DRAINING"), client:
            with suppress(Unavailable):
                while (await self.harness.server()).instance == before.instance:
                    await client.run_accepted(f"{self.session} more", "x", allow_missing=True)

    async def expect_busy(self, *, busy: bool) -> None:
        """Checks whether the session of the case is busy."""
        session = await self.client.get_session(self.session)
        expect("field `busy` of the session", session.busy, busy)

    def time_limit(self, what: str) -> AbstractAsyncContextManager[None]:
        """Fails the case if a wait exceeds its timeout; `what` completes "waiting for"."""
        return time_limit(what, self.timeout)


def covered_runs(receipt: CancelReceipt) -> list[tuple[str, RunState]]:
    """Returns the run ids of a receipt, each with its state before the cancel."""
    return [(run.run_id, run.state_when_cancelled) for run in receipt.cancelled]


def reason_of(error: RunlaneError) -> str:
    """Returns the reason of an error, or its class name."""
    return error.reason or type(error).__name__
