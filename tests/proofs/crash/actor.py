"""A client that sends random calls, loses answers, and retries."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import TypeVar

from proofs.crash.history import AcceptCall, CancelCall, Outcome
from proofs.crash.listeners import follow, listen
from proofs.crash.prompts import prompt
from proofs.crash.shared import SharedState
from runlane import (
    CancelReceipt,
    CancelScope,
    Client,
    ClientClosed,
    DeadlineExceeded,
    Internal,
    RetryPolicy,
    RunHandle,
    RunlaneError,
    WhenBusy,
)
from runlane.errors import is_refused, is_transient

T = TypeVar("T")

MODES = (WhenBusy.QUEUE, WhenBusy.QUEUE, WhenBusy.FOLD, WhenBusy.REJECT, WhenBusy.INTERRUPT)
SCOPES = ("session", "active", "waiting", "run", "run", "all")
TRIES = 4
ONCE = RetryPolicy(attempts=1)
"""No retries by the client: the actor records each lost answer itself."""


class Actor:
    """One client. It sends one call after another, and some in bursts."""

    def __init__(self, shared: SharedState, name: str, *, scripted: bool) -> None:
        self._shared = shared
        self._name = name
        self._scripted = scripted
        self._rng = random.Random(shared.rng.random())  # noqa: S311 - it is to repeat itself
        self._client = Client(shared.pick(), timeout=shared.timeout, retry=ONCE)
        self._count = 0
        self._own: list[Accept] = []

    async def work(self) -> None:
        """Works until the load is over."""
        things: list[Callable[[], Awaitable[None]]] = [self._accept] * 8
        things += [self._burst, self._cancel, self._again, self._vanish]
        things += [self._read, self._wait, self._list, self._reconnect]
        self._listen(at_start=True)
        try:
            while not self._shared.over.is_set():
                await self._rng.choice(things)()
        finally:
            await self._client.close()

    # Accepts

    async def _accept(self) -> None:
        await self._insist(self._new())

    async def _burst(self) -> None:
        session_id = self._rng.choice(self._shared.sessions)
        await asyncio.gather(*(self._insist(self._new(session_id)) for _ in range(4)))

    async def _again(self) -> None:
        """Repeats an earlier accept, also one that failed."""
        if self._own:
            await self._try(self._rng.choice(self._own))

    async def _vanish(self) -> None:
        """Disconnects while its accept is in progress."""
        accept = self._new()
        trying = asyncio.create_task(self._try(accept))
        for _ in range(self._rng.randrange(6)):
            await asyncio.sleep(0)
        trying.cancel()
        with suppress(asyncio.CancelledError):
            await trying

    def _new(self, session_id: str = "") -> Accept:
        self._count += 1
        run_id = f"{self._name}-{self._count}"
        accept = Accept(self._rng, run_id, scripted=self._scripted, agents=self._shared.agents)
        accept.session_id = session_id or self._rng.choice(self._shared.sessions)
        self._own.append(accept)
        return accept

    async def _insist(self, accept: Accept) -> None:
        """Repeats until the outcome is known, or gives up."""
        for _ in range(TRIES):
            if await self._try(accept) is not Outcome.UNKNOWN or self._rng.random() < 0.2:
                return

    async def _try(self, accept: Accept) -> Outcome:
        shared, sent = self._shared, self._shared.tick()
        outcome, error, handle = Outcome.UNKNOWN, "", None
        try:
            handle = await self._lost_or(accept.send(self._client))
            outcome = Outcome.OK
        except RunlaneError as refusal:
            outcome, error = _outcome(refusal), refusal.reason
        finally:
            shared.history.accepts.append(
                AcceptCall(
                    session_id=accept.session_id,
                    run_id=accept.run_id,
                    when_busy=accept.when_busy,
                    max_attempts=accept.max_attempts,
                    sent=sent,
                    done=shared.tick(),
                    outcome=outcome,
                    error=error,
                    run=None if handle is None else handle.run,
                    cursor=None if handle is None else handle.cursor,
                )
            )
        if handle is not None:
            self._attend(handle)
        return outcome

    def _attend(self, handle: RunHandle) -> None:
        """Follows some of the runs, and resumes from some of the cursors."""
        chance = self._rng.random()
        if chance < 0.25:
            self._add(follow(self._shared, handle.run_id, self._rng))
        elif chance < 0.29:
            self._listen(handle=handle)

    def _listen(self, *, at_start: bool = False, handle: RunHandle | None = None) -> None:
        session_id = self._rng.choice(("", "", *self._shared.sessions[:2]))
        if handle is not None:
            session_id = handle.session_id if session_id else ""
        self._add(
            listen(
                self._shared,
                f"subscription {len(self._shared.listening)} of {self._name}",
                self._rng,
                session_id=session_id,
                from_beginning=at_start and self._rng.random() < 0.7,
                handle=handle,
            )
        )

    def _add(self, listening: Awaitable[None]) -> None:
        self._shared.listening.append(asyncio.ensure_future(listening))

    # Cancels

    async def _cancel(self) -> None:
        shared, rng = self._shared, self._rng
        if shared.cancels < 1 and rng.random() > shared.cancels:
            return
        self._count += 1
        scope = rng.choice(SCOPES)
        if scope == "all" and rng.random() < 0.7:
            scope = "session"
        reason = f"cancel {self._name}-{self._count}"
        session_id = "" if scope == "all" else rng.choice(shared.sessions)
        run_id = ""
        if scope == "run":
            if not self._own:
                return
            chosen = rng.choice(self._own[-5:])
            session_id, run_id = chosen.session_id, chosen.run_id
        sent = shared.tick()
        outcome, error = Outcome.UNKNOWN, ""
        receipts: tuple[CancelReceipt, ...] = ()
        try:
            receipts = await self._lost_or(self._send_cancel(scope, session_id, run_id, reason))
            outcome = Outcome.OK
        except RunlaneError as refusal:
            outcome, error = _outcome(refusal), refusal.reason
        shared.history.cancels.append(
            CancelCall(
                scope=scope,
                session_id=session_id,
                run_id=run_id,
                reason=reason,
                sent=sent,
                done=shared.tick(),
                answered_at=datetime.now(UTC),
                outcome=outcome,
                error=error,
                receipts=receipts,
            )
        )

    async def _send_cancel(
        self, scope: str, session_id: str, run_id: str, reason: str
    ) -> tuple[CancelReceipt, ...]:
        if scope == "all":
            return await self._client.cancel_all(reason)
        if scope == "run":
            return (await self._client.cancel(session_id, run_id=run_id, reason=reason),)
        wanted = CancelScope(scope)
        return (await self._client.cancel(session_id, scope=wanted, reason=reason),)

    # Reads

    async def _read(self) -> None:
        await self._record_read(self._client.get_run)

    async def _wait(self) -> None:
        await self._record_read(lambda run_id: self._client.wait_run(run_id, timeout=0.05))

    async def _record_read(self, call: Callable[[str], Awaitable[object]]) -> None:
        acknowledged = self._shared.history.acknowledged
        if not acknowledged:
            return
        run_id = self._rng.choice(list(acknowledged))
        with suppress(RunlaneError):
            await self._lost_or(call(run_id))
            self._shared.history.reads.append(await self._client.get_run(run_id))

    async def _list(self) -> None:
        async def listed() -> None:
            session_id = self._rng.choice(self._shared.sessions)
            async for run in self._client.list_runs(session_id, page_size=20):
                self._shared.history.reads.append(run)

        with suppress(RunlaneError):
            await self._lost_or(listed())

    async def _reconnect(self) -> None:
        """Drops its connection, and opens another one."""
        await self._client.close()
        shared = self._shared
        self._client = Client(shared.pick(), timeout=shared.timeout, retry=ONCE)

    async def _lost_or(self, call: Awaitable[T]) -> T:
        """The answer of a call. After a lost connection it opens a new one."""
        try:
            return await call
        except RunlaneError as error:
            if self._shared.is_lost(error):
                await self._shared.serving()
                await self._reconnect()
            raise


class Accept:
    """The request of a run: the same each time it is sent."""

    def __init__(
        self, rng: random.Random, run_id: str, *, scripted: bool, agents: tuple[str, ...]
    ) -> None:
        self.run_id = run_id
        self.session_id = ""
        self.when_busy = rng.choice(MODES)
        self.max_attempts = rng.randint(1, 3)
        self._prompt, self._timeout = prompt(rng, run_id, scripted=scripted)
        self._agent = rng.choice(agents) if len(agents) > 1 else agents[0]
        if self._agent:
            self._timeout = None

    async def send(self, client: Client) -> RunHandle:
        """Sends the request."""
        return await client.run_accepted(
            self.session_id,
            self._prompt,
            run_id=self.run_id,
            when_busy=self.when_busy,
            timeout=self._timeout,
            agent=self._agent,
            max_attempts=self.max_attempts,
            allow_missing=True,
        )


def _outcome(error: RunlaneError) -> Outcome:
    if is_refused(error):
        return Outcome.REFUSED
    lost = is_transient(error) or isinstance(error, ClientClosed | DeadlineExceeded | Internal)
    return Outcome.UNKNOWN if lost else Outcome.REFUSED
