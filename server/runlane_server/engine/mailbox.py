"""The mailbox of a lane: its pending commands, and the decision on a batch of them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Generic, NamedTuple, TypeAlias, TypeVar

from runlane_server.core.model import Micros, RunState
from runlane_server.core.transition import Lane, LaneRun, Transition

Reply = TypeVar("Reply")
Reply_co = TypeVar("Reply_co", covariant=True)

Command: TypeAlias = Callable[[Lane, Micros], Transition[Reply]]
"""A command of `core.lane` that lacks only the lane and the time."""

OnCommit: TypeAlias = Callable[[Transition, Reply], None]
"""Called with the transition that a command was committed with, and the reply of the command."""


@dataclass(slots=True)
class PendingCommand(Generic[Reply_co]):
    """A command in a mailbox.

    `reply` is the future of its caller, None if nobody waits. `fallback` is applied instead if the
    command is refused. `on_commit` is called also if the caller has gone away. `creates`: the
    command creates the session if it does not exist. `is_large`: it writes so much that no caller
    of another command should wait for its commit.
    """

    command: Command[Reply_co]
    reply: asyncio.Future[Reply_co] | None = None
    fallback: Command[object] | None = None
    on_commit: OnCommit[Reply_co] | None = None
    creates: bool = False
    is_large: bool = False

    def apply(self, lane: Lane, at: Micros) -> AppliedCommand[Reply_co]:
        """Applies the command to a lane; raises what the command raises."""
        return AppliedCommand(self, self.command(lane, at))

    def refuse(self, error: BaseException) -> None:
        """Answers the caller with an error."""
        if self.reply is not None and not self.reply.done():
            self.reply.set_exception(error)


class AppliedCommand(NamedTuple, Generic[Reply_co]):
    """A command of a batch and the transition that it makes."""

    pending: PendingCommand[Reply_co]
    transition: Transition[Reply_co]

    def settle(self, committed: Transition) -> None:
        """Answers the caller. `committed` is the transition of the whole batch."""
        reply, future = self.transition.reply, self.pending.reply
        if future is not None and not future.done():
            future.set_result(reply)
        if self.pending.on_commit is not None:
            self.pending.on_commit(committed, reply)


@dataclass(slots=True)
class Mailbox:
    """The pending commands of a lane, and the lane as it was last committed (None: not loaded).

    `is_outdated`: the stored lane may differ from `lane`, of which only the reservations count.
    `task` applies the commands; `has_slot` asks it to start a run even if no
    command is pending. `arrival` is set when a command arrives, if the task waits for one.
    """

    commands: deque[PendingCommand[object]] = field(default_factory=deque)
    lane: Lane | None = None
    is_outdated: bool = False
    task: asyncio.Task[None] | None = None
    has_slot: bool = False
    arrival: asyncio.Future[None] | None = None

    def take(self) -> list[PendingCommand[object]]:
        """Removes the commands of the next batch.

        A large one lets the others go first, once: a cancel that comes with the end of a long turn
        is answered before that end is written.
        """
        commands = list(self.commands)
        small = [command for command in commands if not command.is_large]
        if not small or len(small) == len(commands):
            self.commands.clear()
            return commands
        self.commands = deque(
            replace(command, is_large=False) for command in commands if command.is_large
        )
        return small


@dataclass(slots=True)
class Decision:
    """The decision on a batch: one transition, and an answer to each command.

    `is_held`: a harness gate keeps the next run from starting with it. `backs_off`: the next run
    waits for its next attempt (R38).
    """

    transition: Transition
    is_held: bool = False
    backs_off: bool = False
    applied: list[AppliedCommand[object]] = field(default_factory=list)
    refusals: list[tuple[PendingCommand[object], Exception]] = field(default_factory=list)

    @property
    def only_reads(self) -> bool:
        """Whether a caller waits for an answer although nothing is written."""
        pending = (*(it.pending for it in self.applied), *(it for it, _ in self.refusals))
        return not self.transition.needs_commit and any(it.reply for it in pending)

    @property
    def has_new_run(self) -> bool:
        """Whether it accepts a new run, which the store may refuse."""
        return any(change.request is not None for change in self.transition.runs)

    def settle(self) -> None:
        """Answers all callers."""
        for applied in self.applied:
            applied.settle(self.transition)
        for pending, error in self.refusals:
            pending.refuse(error)


def newly_cancelled(before: Lane, after: Lane) -> LaneRun | None:
    """The active run if it is CANCELLING now and was ACTIVE or INPUT_REQUIRED before."""
    was, run = before.active, after.active
    if was is None or run is None or was.state is RunState.CANCELLING:
        return None
    same = (was.run_id, was.attempt) == (run.run_id, run.attempt)
    return run if same and run.state is RunState.CANCELLING else None


def accepts_ended_run(before: Transition, after: Transition) -> bool:
    """Whether `after` accepts a run id that `before`, not committed yet, has already ended."""
    if not before.runs:
        return False
    new = {change.run.run_id for change in after.runs if change.request is not None}
    return any(change.run.run_id in new for change in before.runs)
