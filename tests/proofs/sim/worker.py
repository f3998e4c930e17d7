"""Workers of a simulated world: they lose connections, come back, or stay away for too long.

A worker belongs to no node and survives them all. The acts of its code are drawn from the id of the
run and the number of the attempt; when it loses its connection, from its own generator.
"""

from __future__ import annotations

import asyncio
from functools import partial
from random import Random
from typing import Protocol

from proofs.sim.agent import LONG, agent_of, is_at_work
from proofs.sim.history import Execution, History
from proofs.sim.link import Emit, End, HandBack, Link, Offer, TakeFolded
from proofs.sim.node import Node
from runlane_server.agents.base import AgentError, AgentEvent
from runlane_server.agents.worker.messages import Acked, Assigned, Down, Fenced, Joined, Stopped
from runlane_server.agents.worker.slot import Resumption
from runlane_server.core.model import Folded, RunKey, Started, TextDelta
from runlane_server.engine import outbox

AWAY = (0, 0, 0.01, 0.01, 0.5, 1.0, 9.0)
"""Seconds that a worker stays without a connection; the last one is longer than its lease."""

PATIENCE = 30.0
"""Seconds without a message after which a worker connects again, as a keepalive would."""


class Place(Protocol):
    """The world, as its workers see it."""

    history: History
    over: bool

    async def node_up(self) -> Node:
        """Waits for a node that is up."""


class Lost(Exception):
    """The connection is lost."""


class Attempt:
    """The acts of the code of a worker for a turn, over all the connections that this takes."""

    def __init__(self, given: Assigned, execution: Execution) -> None:
        turn = given.turn
        self.key = RunKey(turn.key.tenant, turn.run_id)
        self.number = turn.attempt
        self.fence = turn.fence
        self.execution = execution
        self.events: list[AgentEvent] = []
        self.sent = 0
        self.folded: dict[str, None] = {}
        self.asked = self.answered = 0
        self.has_asked = False
        self.end: End | HandBack | None = None
        self.has_sent_end = False
        self.is_over = False
        self.progress = asyncio.Event()
        self.code: asyncio.Task[None] | None = None

    @property
    def resumption(self) -> Resumption:
        """How the worker continues it."""
        return Resumption(self.key, self.number, self.fence, tuple(self.folded))

    def say(self, text: str) -> None:
        """Emits a text that no other execution emits, and that is stored as one event."""
        text = f"{self.execution.entered}:{text};"
        assert len(text) <= outbox.DELTA_CHARS
        self.events.append(TextDelta(text))
        self.execution.said.append(text)


class SimWorker:
    """A worker with one slot."""

    def __init__(self, name: str, world: Place, rng: Random) -> None:
        self.name = name
        self._world = world
        self._history = world.history
        self._rng = rng
        self._attempt: Attempt | None = None
        self._link: Link | None = None
        self._wake = asyncio.Event()

    async def serve(self) -> None:
        """Works until the world is over."""
        while not self._world.over:
            node = await self._world.node_up()
            self._link = Link(node, self._wake)
            try:
                await self._talk(self._link)
            except Lost:
                self._history.note(self.name, "has lost its connection")
                self._history.lost_links += 1
            self._link.drop()
            self._note_away()
            await asyncio.sleep(self._rng.choice(AWAY))
        if self._attempt is not None:
            self._note_back(self._attempt.execution)

    def on_paused(self, node: Node, notices_after: float) -> None:
        """Its node is paused, which it notices after some seconds."""
        link = self._link
        if link is not None and link.node is node and not link.is_closed:
            self._note_away()
            asyncio.get_running_loop().call_later(notices_after, link.fail)

    def on_resumed(self, node: Node) -> None:
        """Its node continues."""
        link, attempt = self._link, self._attempt
        is_here = link is not None and link.node is node and not link.is_closed
        if is_here and attempt is not None and link is not None and link.is_attached:
            self._note_back(attempt.execution)

    def _note_away(self) -> None:
        attempt = self._attempt
        if attempt is not None and attempt.execution.away_since is None:
            attempt.execution.away_since = self._history.now

    def _note_back(self, execution: Execution) -> None:
        if execution.away_since is not None:
            away = self._history.now - execution.away_since
            execution.longest_away = max(execution.longest_away, away)
            execution.away_since = None
            self._history.returns += 1

    # --- Up -------------------------------------------------------------------------------------

    async def _talk(self, link: Link) -> None:
        attempt = self._attempt
        if attempt is not None:
            attempt.has_sent_end = attempt.has_asked = False
        link.send(Offer(self.name, None if attempt is None else attempt.resumption))
        while True:
            self._wake.clear()
            for message in link.take():
                self._take(link, message)
            if link.is_closed:
                raise Lost
            await self._send_due(link)
            attempt = self._attempt
            # Most interesting while an answer is on its way.
            is_asking = attempt is not None and attempt.has_asked
            if self._rng.random() < (0.2 if is_asking else 0.04):
                raise Lost
            await self._wait(link)

    async def _wait(self, link: Link) -> None:
        try:
            async with asyncio.timeout(PATIENCE):
                while not (self._wake.is_set() or link.has_news):
                    await self._wake.wait()
        except TimeoutError:
            raise Lost from None

    async def _send_due(self, link: Link) -> None:
        attempt = self._attempt
        if attempt is None or not link.is_attached:
            return
        if attempt.is_over:
            await self._finish(attempt)
            link.is_attached = False
            link.send(Offer(self.name, None))
            return
        if attempt.sent < len(attempt.events):
            # What was sent already may be sent again.
            first = max(attempt.sent - self._rng.choice([0, 0, 0, 1, 2]), 0)
            link.send(Emit(first + 1, tuple(attempt.events[first:])))
            attempt.sent = len(attempt.events)
        is_asking = attempt.end is None and attempt.asked > attempt.answered
        if is_asking and not attempt.has_asked:
            attempt.has_asked = True
            link.send(TakeFolded(attempt.asked))
        if attempt.end is not None and not attempt.has_sent_end:
            attempt.has_sent_end = True
            link.send(attempt.end)

    async def _finish(self, attempt: Attempt) -> None:
        """Waits until the code has returned."""
        assert attempt.code is not None
        attempt.code.cancel()
        await asyncio.wait({attempt.code})
        self._attempt = None

    # --- Down -----------------------------------------------------------------------------------

    def _take(self, link: Link, message: Down) -> None:
        attempt = self._attempt
        if isinstance(message, Assigned):
            self._begin(link, message)
            return
        if attempt is None or attempt.is_over:
            return
        match message:
            case Acked(number, ended):
                self._on_acked(link, attempt, number, ended=ended)
            case Fenced():
                self._history.note(self.name, f"is fenced off {attempt.key.run_id}")
                link.is_attached = attempt.is_over = True
                # Another one may begin before its code has returned, if it could before this.
                attempt.execution.is_fenced = not is_at_work(self._history, attempt.execution)
                self._note_back(attempt.execution)
            case Joined(number, prompts):
                for one in prompts:
                    attempt.folded[one.run_id] = None
                if number:
                    attempt.answered, attempt.has_asked = number, False
                    attempt.progress.set()
            case Stopped():
                self._history.note(self.name, f"is to stop {attempt.key.run_id}")
                assert attempt.code is not None
                attempt.execution.cancelled_at = self._history.now
                attempt.code.cancel()

    def _on_acked(self, link: Link, attempt: Attempt, number: int, *, ended: bool) -> None:
        stored = self._count_stored(attempt)
        # A turn that was stopped, or timed out, ends without the output that came too late.
        self._history.require(
            number <= stored or ended,
            f"R34: {number} events are acknowledged, {stored} are stored",
        )
        if not link.is_attached:
            # The answer to a resume: go on after the last stored event.
            link.is_attached = True
            self._note_back(attempt.execution)
            attempt.sent = number
        if ended:
            attempt.is_over = True
            self._check_folded(attempt)

    def _count_stored(self, attempt: Attempt) -> int:
        count = now = 0
        for _, event in self._history.events.get(attempt.key, []):
            if isinstance(event.body, Started):
                now = event.body.attempt
            elif now == attempt.number and isinstance(event.body, TextDelta):
                count += 1
        return count

    def _check_folded(self, attempt: Attempt) -> None:
        bodies = [event.body for _, event in self._history.events.get(attempt.key, [])]
        last = max((n for n, body in enumerate(bodies) if isinstance(body, Started)), default=0)
        joined = {body.run_id for body in bodies[last:] if isinstance(body, Folded)}
        is_whole = isinstance(attempt.end, End) and not attempt.end.was_stopped
        self._history.require(
            not is_whole or joined <= set(attempt.folded),
            f"R26: {joined - set(attempt.folded)} joined the turn, and the worker never got them",
        )

    # --- The code -------------------------------------------------------------------------------

    def _begin(self, link: Link, given: Assigned) -> None:
        history, turn = self._history, given.turn
        wanted = agent_of(turn.run_id)
        history.require(
            wanted == given.agent, f"R31: a worker executes {turn.run_id} of {wanted or 'default'}"
        )
        for other in history.executions:
            history.require(
                other.session_id != turn.session_id or not is_at_work(history, other),
                f"R7, R33: {other.run_id} and {turn.run_id} are active together",
            )
        tick = history.note(self.name, f"enters {turn.run_id} #{turn.attempt}")
        execution = Execution(
            turn.session_id, turn.run_id, turn.attempt, 0, tick, agent=given.agent, has_begun=False
        )
        history.executions.append(execution)
        attempt = self._attempt = Attempt(given, execution)
        link.begin(execution)
        link.is_attached = True
        attempt.code = asyncio.get_running_loop().create_task(self._execute(attempt))
        attempt.code.add_done_callback(partial(self._on_returned, attempt))

    async def _execute(self, attempt: Attempt) -> None:
        plan = Random(f"worker {attempt.key.run_id}/{attempt.number}")  # noqa: S311
        for step in range(plan.randrange(1, 9)):
            await self._step(step, attempt, plan)

    def _on_returned(self, attempt: Attempt, code: asyncio.Task[None]) -> None:
        # Also if the code was cancelled before its first step.
        was_stopped = code.cancelled()
        error = None if was_stopped else code.exception()
        attempt.execution.has_ended = True
        self._history.note(self.name, f"leaves {attempt.key.run_id}")
        if attempt.end is None:
            failed = error if isinstance(error, AgentError) else None
            attempt.end = End(len(attempt.events), failed, was_stopped)
        self._wake.set()

    async def _step(self, step: int, attempt: Attempt, plan: Random) -> None:
        kinds = ["text", "fold", "rest", "nap", "long", "fail", "hand back"]
        kind = plan.choices(kinds, [8, 8, 6, 4, 1, 1, 1])[0]
        match kind:
            case "text":
                for n in range(plan.randrange(1, 6)):
                    attempt.say(f"{step}.{n}")
                    self._wake.set()
                    await asyncio.sleep(plan.choice([0, 0, 0.01, 0.2]))
            case "fold":
                await self._fold(attempt)
            case "fail":
                raise AgentError("no", reason="NO")
            case "hand back":
                # The next one to execute the attempt must not do the same for ever.
                if self._rng.random() < 0.5:
                    attempt.execution.is_given_up = True
                    attempt.end = HandBack(0)
                    raise asyncio.CancelledError
            case _:
                seconds = {"rest": 0.01, "nap": 1.0, "long": LONG / 4}[kind]
                await asyncio.sleep(seconds * plan.random())

    async def _fold(self, attempt: Attempt) -> None:
        attempt.asked += 1
        self._wake.set()
        while attempt.answered < attempt.asked:
            attempt.progress.clear()
            await attempt.progress.wait()
        attempt.say(f"j{len(attempt.folded)}")
        self._wake.set()
