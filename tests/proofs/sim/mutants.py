"""Mutants of the engine and the feed, each of which the simulation must find.

Each replaces a piece of the source of one method.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from runlane_server.agents.worker.execution import Execution
from runlane_server.agents.worker.workers import Workers
from runlane_server.cluster.failover import Failover
from runlane_server.cluster.membership import Membership
from runlane_server.engine.agent_room import AgentRoom
from runlane_server.engine.agent_table import AgentTable
from runlane_server.engine.executor import Executor
from runlane_server.engine.folds import Folds
from runlane_server.engine.forking import Forks
from runlane_server.engine.lane_cache import LaneCache
from runlane_server.engine.lanes import Lanes
from runlane_server.engine.outbox import Outbox
from runlane_server.engine.reservation import AcceptedRun
from runlane_server.engine.runner import Runner
from runlane_server.engine.sessions import Sessions
from runlane_server.engine.slots import Slots
from runlane_server.engine.updates import Updates
from runlane_server.feed.feed import Feed, RunFollower, Subscription
from runlane_server.feed.tail import Tail
from runlane_server.store.memory.tables import Tables


@dataclass(frozen=True, slots=True)
class Mutant:
    """A fault: in a method of a class, `old` is replaced with `new`. It shows in worlds with a
    number of live nodes."""

    name: str
    owner: type
    method: str
    old: str
    new: str
    live: int = 1


MUTANTS = (
    Mutant(
        "an edit that is answered and not decided",
        Updates,
        "_decidable",
        "after = patch.applied_to(before)",
        "after = before",
    ),
    Mutant(
        "events that are counted by the lane and by their writer",
        Outbox,
        "_append",
        "self.events = max(self.events, batch[-1].index)",
        "self.events += len(batch)",
        live=2,
    ),
    Mutant(
        "an answer before the commit",
        Lanes,
        "_commit_batch",
        "decision = self._decide(lane, batch, mailbox)\n            if",
        "decision = self._decide(lane, batch, mailbox)\n"
        "            decision.settle()\n            if",
    ),
    Mutant(
        "an agent that is started before the commit",
        Lanes,
        "_commit_batch",
        "                await self._commit(lane, decision)",
        "                self._act(key, mailbox, lane, decision)\n"
        "                await self._commit(lane, decision)",
    ),
    Mutant(
        "a session that is created while the last one is removed, and exists",
        Sessions,
        "create",
        "if not await self.exists(key):",
        "if (await self._store.load_lane(key)).is_being_removed:",
    ),
    Mutant(
        "a deleted run that is answered until its row is removed",
        Tables,
        "shown",
        "row is None or self.is_removed(key.tenant, row.run.session_id)",
        "row is None",
    ),
    Mutant(
        "a lane that is called and does not wake",
        Lanes,
        "_on_grant",
        "self._ensure_task(key, mailbox)",
        "pass",
    ),
    Mutant(
        "a reload that forgets the reservations",
        LaneCache,
        "load",
        "reservations = mailbox.lane.reservations if mailbox.lane is not None else ()",
        "reservations = ()",
    ),
    Mutant(
        "a wrong guess that is made again",
        LaneCache,
        "load",
        "if is_first_sight and not mailbox.is_outdated and",
        "if is_first_sight and",
    ),
    Mutant(
        "a run that waits for its next attempt and is forgotten",
        Lanes,
        "_act",
        "        self._backoffs.follow(lane, is_due=can_start)\n",
        "",
    ),
    Mutant(
        "a slot that is kept while others wait for it",
        Slots,
        "settle",
        "if not running:",
        "if not running and not can_start:",
    ),
    Mutant(
        "a queue that ignores the limit of an agent",
        Slots,
        "_head",
        "if self._left(agent, name) > 0",
        "if agent is None or self.agents.is_ready(agent)",
    ),
    Mutant(
        "a slot that is kept for an agent without room",
        Slots,
        "_can_keep",
        "min(self._allowance(lane.tenant, tenant), self._left(agent, lane.tenant))",
        "self._allowance(lane.tenant, tenant)",
    ),
    Mutant(
        "an agent that gets runs before it is ready",
        AgentRoom,
        "left",
        "if agent not in self._ready:",
        "if agent not in self._limits:",
    ),
    Mutant(
        "a slot that is not returned to its agent",
        Slots,
        "_put_back",
        "self.agents.put_back(agent)",
        "pass",
    ),
    Mutant(
        "a run that the default agent executes",
        AgentTable,
        "agent_of",
        "self.names.full_name(stored)",
        "self.names.default",
    ),
    Mutant(
        "a reservation that is not given up",
        AcceptedRun,
        "close",
        "self._end(used=False)",
        "pass",
    ),
    Mutant(
        "an ended run that takes the next one's cancel along",
        Executor,
        "_on_ended",
        "if self._runners.get(runner.job.key) is runner:",
        "if runner.job.key in self._runners:",
    ),
    Mutant(
        "a stop that forgets a run",
        Executor,
        "hand_over_all",
        "for runner in list(self._runners.values()):",
        "for runner in list(self._runners.values())[1:]:",
    ),
    Mutant(
        "a stop that forgets the run that is about to start",
        Executor,
        "stop",
        "none comes.\n        await self.lanes.wait_settled()",
        "none comes.",
    ),
    Mutant(
        "a grace that is not granted",
        Runner,
        "_stop_agent",
        "until = loop.time() + self._cancel_grace",
        "until = loop.time()",
    ),
    Mutant(
        "a run that was stopped and counts as completed",
        Runner,
        "_commit_end",
        "if self._handing_over and self._cancelled is None:",
        "if self._handing_over and self._working and self._working.cancelled():",
    ),
    Mutant(
        "an event that is stored twice",
        Outbox,
        "_batch",
        "self._waiting.clear()",
        "self._waiting[:] = self._waiting[1:2]",
    ),
    Mutant(
        "a folded run that is not counted",
        Folds,
        "_fold_in",
        "before + len(folded)",
        "before",
    ),
    Mutant(
        "an event skipped by who is woken",
        Subscription,
        "wake",
        "max(self._after, place - 1)",
        "max(self._after, place)",
    ),
    Mutant(
        "a subscriber who parks an event too early",
        Subscription,
        "_is_caught_up",
        "self._after >= self._feed.head",
        "self._after >= self._feed.head - 1",
    ),
    Mutant(
        "a tail that claims an event it has forgotten",
        Tail,
        "covers",
        "after >= self.start",
        "after >= self.start - 1",
    ),
    Mutant(
        "a wake-up lost while a page is read",
        RunFollower,
        "next",
        "            if not self._is_due:\n                await self._wakeup.wait(until)",
        "            await self._wakeup.wait(until)",
    ),
    Mutant(
        "a worker that has its lease no longer than its connection",
        Execution,
        "detach",
        "                self.wait_for_worker()",
        "                self.lose(self._why_lost)",
    ),
    Mutant(
        "a worker whose lost run is never given up",
        Execution,
        "wait_for_worker",
        "self._start_timer(AttemptLost(self._why_lost))",
        "pass",
    ),
    Mutant(
        "an event that is acknowledged before it is durable",
        Execution,
        "_emit",
        "            self.received += 1",
        "            self.received += 1\n            self._send(Acked(self.received))",
    ),
    Mutant(
        "a repeated event that is stored again",
        Execution,
        "_emit",
        "events[self.received + 1 - number :]",
        "events",
    ),
    Mutant(
        "a worker that learns of no cancel",
        Execution,
        "stop",
        "        self._send(Stopped())\n",
        "",
    ),
    Mutant(
        "a worker that learns of no cancel from before its return",
        Execution,
        "resume",
        "if self._is_stopped:",
        "if False:",
    ),
    Mutant(
        "a prompt that joined the turn and is forgotten",
        Execution,
        "resume",
        "if one.run_id not in received]",
        "if False]",
    ),
    Mutant(
        "a restart that loses the runs of workers",
        Executor,
        "can_continue",
        "return self._agents.is_of_workers(run.agent)",
        "return False",
    ),
    Mutant(
        "a stop that ends the runs of workers",
        Runner,
        "hand_over",
        "if self._end is not None and self._can_leave:",
        "if False:",
    ),
    Mutant(
        "a run that continues without the output it had",
        Runner,
        "_run_attempt",
        "            await self._restore_output()",
        "            pass",
    ),
    Mutant(
        "an offer that is not withdrawn when its worker leaves",
        Workers,
        "disconnect",
        "        self.withdraw(slot)\n",
        "",
    ),
    Mutant(
        "a slot of a worker that is given to its agent twice",
        Workers,
        "withdraw",
        "                self._agents[agent].add_slots(-1)",
        "                pass",
    ),
    Mutant(
        "a fork with a turn that has not finished",
        Forks,
        "_make",
        "turn = fork_turn(await self._store.load_lane(request.source), request.at_turn)",
        "turn = (await self._store.load_lane(request.source)).turn",
        live=2,
    ),
    Mutant(
        "a fork that another node has made for the same call",
        Forks,
        "_make",
        "            if (earlier := await self._earlier(request)) is not None:\n"
        "                return earlier\n"
        "            raise",
        "            raise",
        live=2,
    ),
    Mutant(
        "a lane that is granted a second slot",
        Slots,
        "enqueue",
        "if lane in self._granted or (lane in self._in_use and not self._is_closed):",
        "if False:",
        live=2,
    ),
    Mutant(
        "an attempt that came back and is ended by what its node knew before",
        Executor,
        "continue_agent",
        "self._runners[key].supersede()",
        "self._runners[key].hand_over()",
        live=3,
    ),
    Mutant(
        "a lane that is kept although another node has its run",
        Executor,
        "_on_left",
        "self.lanes.leave(job.key)",
        "self.lanes.slots.release(job.key)",
        live=2,
    ),
    Mutant(
        "a receipt from a lane that another node has changed",
        Lanes,
        "_needs_load",
        "return self.is_shared and",
        "return False and",
        live=2,
    ),
    Mutant(
        "a cancel that the node of the run never learns of",
        Membership,
        "_poll",
        "self._work.cancelled_elsewhere(run)",
        "pass",
        live=2,
    ),
    Mutant(
        "a lost run that nobody recovers",
        Failover,
        "_recover_now",
        "await self._recover(due)",
        "pass",
        live=2,
    ),
    Mutant(
        "a subscriber who does not learn of events that other nodes removed",
        Feed,
        "on_completes",
        "            self._handle_gap(self.head)",
        "            pass",
        live=2,
    ),
)


@contextmanager
def planted(mutant: Mutant) -> Iterator[None]:
    """Applies the mutant for the duration of the context."""
    before = getattr(mutant.owner, mutant.method)
    setattr(mutant.owner, mutant.method, _mutated(before, mutant))
    try:
        yield
    finally:
        setattr(mutant.owner, mutant.method, before)


def _mutated(function: Callable[..., Any], mutant: Mutant) -> Callable[..., Any]:
    source = inspect.getsource(function)
    assert source.count(mutant.old) == 1, "the mutant no longer fits the source"
    source = textwrap.dedent(source.replace(mutant.old, mutant.new))
    made: dict[str, Any] = {}
    exec(compile(source, "mutant", "exec"), function.__globals__, made)  # noqa: S102 - our own
    changed: Callable[..., Any] = made[mutant.method]
    return changed
