"""What waits for a lane, and what is made of it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from runlane_server.core.model import Micros, RunState
from runlane_server.core.transition import Lane, LaneRun, Transition

Command: TypeAlias = Callable[[Lane, Micros], Transition]
"""A command of `core.lane`, waiting for the lane and the time."""


OnDone: TypeAlias = Callable[[Transition, Any], None]
"""Is told of the commit that a command was carried out with, and of its reply."""


@dataclass(slots=True)
class Order:
    """A command in a mailbox, who waits for its reply, what is done where it is refused, and who is
    told of it once it is committed, also where nobody waits for the reply any more. `creates`: it
    makes the session if there is none."""

    command: Command
    reply: asyncio.Future[Any] | None
    otherwise: Command | None = None
    on_done: OnDone | None = None
    creates: bool = False

    def answer(self, reply: object) -> None:
        """Tells whoever waits what came of it."""
        if self.reply is not None and not self.reply.done():
            self.reply.set_result(reply)

    def refuse(self, error: BaseException) -> None:
        """Tells whoever waits why nothing came of it."""
        if self.reply is not None and not self.reply.done():
            self.reply.set_exception(error)


@dataclass(slots=True)
class Mailbox:
    """The commands for one lane, and the lane as it was last committed (None: not loaded).

    `outdated`: what is stored may differ from `lane`, which has only its reservations to give.
    """

    orders: deque[Order] = field(default_factory=deque)
    lane: Lane | None = None
    outdated: bool = False
    driver: asyncio.Task[None] | None = None
    called: bool = False
    arrival: asyncio.Future[None] | None = None


@dataclass(slots=True)
class Decision:
    """What a batch amounts to: one transition, and an answer to each order. It is `held` where a
    harness keeps the next run from being started with it."""

    transition: Transition
    held: bool = False
    replies: list[tuple[Order, object]] = field(default_factory=list)
    refusals: list[tuple[Order, Exception]] = field(default_factory=list)

    @property
    def rests_on_reading(self) -> bool:
        """Whether somebody is answered, and nothing is written."""
        orders = (order for order, _ in (*self.replies, *self.refusals))
        return not self.transition.needs_commit and any(order.reply for order in orders)

    @property
    def accepts(self) -> bool:
        """Whether it has a new run, which the store may refuse."""
        return any(change.request is not None for change in self.transition.runs)

    def settle(self) -> None:
        """Tells everybody who waits."""
        for order, reply in self.replies:
            order.answer(reply)
            if order.on_done is not None:
                order.on_done(self.transition, reply)
        for order, error in self.refusals:
            order.refuse(error)


def stops(before: Lane, after: Lane) -> LaneRun | None:
    """The active run, where a cancel covers it that did not before."""
    was, run = before.active, after.active
    if was is None or run is None or was.state is not RunState.ACTIVE:
        return None
    same = (was.run_id, was.attempt) == (run.run_id, run.attempt)
    return run if same and run.state is RunState.CANCELLING else None


def accepts_again(before: Transition, after: Transition) -> bool:
    """Whether a run is accepted anew that was ended a moment ago, and is not in its lane by now."""
    if not before.runs:
        return False
    new = {change.run.run_id for change in after.runs if change.request is not None}
    return any(change.run.run_id in new for change in before.runs)
