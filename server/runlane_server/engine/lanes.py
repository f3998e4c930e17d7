"""The lanes of this node: a mailbox each, whose commands are applied in batches.

All commands that arrive for a lane while a commit of it is in progress form the next batch. They
are applied one after another, committed together, and only then answered and acted on. A caller may
go away; its command stays.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol, TypeVar

import structlog

from runlane_server.access.quotas import QuotaBook
from runlane_server.cluster.membership import Membership
from runlane_server.core import lane as rules
from runlane_server.core.agents import ONE_AGENT, AgentNames
from runlane_server.core.errors import CorruptRecord, RunlaneError, StoreUnavailable
from runlane_server.core.limits import RETRY_PAUSE
from runlane_server.core.model import Micros, RunKey, RunRequest, RunState, SessionKey
from runlane_server.core.recent import RecentItems
from runlane_server.core.transition import Lane, LaneRun, Transition
from runlane_server.engine.agent_code import create_own_task
from runlane_server.engine.agent_room import AgentRoom
from runlane_server.engine.backoffs import Backoffs
from runlane_server.engine.lane_cache import LaneCache, LaneOrigin
from runlane_server.engine.mailbox import (
    Command,
    Decision,
    Mailbox,
    OnCommit,
    PendingCommand,
    accepts_ended_run,
    newly_cancelled,
)
from runlane_server.engine.slots import Slots, WaitingRuns
from runlane_server.harness.gates import Gates
from runlane_server.store.base import BusySession, RunIdTaken, Stale, Store

log = structlog.get_logger()

Reply = TypeVar("Reply")

MAX_RELOADS = 100
"""Number of times a batch is applied again because others changed the lane meanwhile."""

CANCEL_PATIENCE = 0.005
"""Seconds that a cancel waits for its agent to end, so that the cancel and the end of the run share
one commit."""

CACHED_REQUESTS = 2_000
"""Number of waiting requests whose prompts are cached."""

CACHED_CHARS = 4_096
"""Maximum length of a cached prompt. A longer one, or one with attachments, is read from the store
when its run starts."""


class LaneContended(Exception):
    """Nothing was written: others changed the lane during every try. The command may be repeated,
    unlike one that raised IllegalCommand."""


class LaneActions(Protocol):
    """The actions that follow a transition."""

    def on_committed(self, key: SessionKey, transition: Transition) -> None:
        """A transition was committed; the actions that it requires follow."""

    def start_agent(self, key: SessionKey, run: LaneRun, request: RunRequest | None) -> None:
        """Starts the agent of a run that became active here; `request` is None if not cached."""

    def continue_agent(self, key: SessionKey, run: LaneRun) -> None:
        """Continues an attempt that is active here and was begun by another process."""

    def can_continue(self, run: LaneRun) -> bool:
        """Whether the attempt of an active run can continue after the loss of its node."""

    def stop_agent(self, key: SessionKey, run: LaneRun) -> bool:
        """Stops the agent of a run that a cancel covers; the cancel may not be committed yet.

        Returns whether that agent is at work on this node.
        """

    def follow_run(self, key: SessionKey, run: LaneRun) -> None:
        """Passes the state of a run to its agent, if it is at work on this node: the run waits for
        input, or goes on after it."""

    def end_expired(self, key: SessionKey, run: LaneRun) -> None:
        """Ends a run that nobody answered in time, if its agent is on this node or nowhere. May be
        called again."""

    def has_agent(self, key: SessionKey, run: LaneRun) -> bool:
        """Whether the agent of that attempt is at work on this node."""

    def abandon_agent(self, key: SessionKey, run: LaneRun) -> None:
        """Stops the agent of a run whose lane can no longer be read; `Lanes.drop` follows when it
        has returned."""

    def wake_other_nodes(self) -> None:
        """Wakes the other nodes: a lane has a run to start, and this node has no free slot."""


class Lanes:
    """Applies commands to lanes, commits the transitions, and then acts on them."""

    def __init__(
        self,
        store: Store,
        actions: LaneActions,
        *,
        max_active: int,
        now: Callable[[], Micros],
        membership: Membership | None,
        quotas: QuotaBook,
        gates: Gates,
        agents: AgentNames = ONE_AGENT,
        room: AgentRoom | None = None,
    ) -> None:
        self._agents = agents
        self._membership = membership
        self._store = store
        self._actions = actions
        self._now = now
        self._mailboxes: dict[SessionKey, Mailbox] = {}
        self._cache = LaneCache(store)
        self._requests: RecentItems[RunKey, RunRequest] = RecentItems(CACHED_REQUESTS)
        self.slots = Slots(max_active, self._on_grant, quotas.max_active, room)
        quotas.listen(self.slots.apply_limits)
        self._gates = gates
        self._gates.on_open = self.slots.enqueue
        self.waiting = WaitingRuns()
        self._backoffs = Backoffs(now, self.slots.enqueue)

    @property
    def is_shared(self) -> bool:
        """Whether other nodes share the store."""
        return self._membership is not None

    @property
    def waiting_runs(self) -> int:
        """The number of waiting runs, as far as this node knows."""
        return self.waiting.total

    @property
    def keys(self) -> tuple[SessionKey, ...]:
        """The lanes with pending commands or an active run here, and those that wait for a slot."""
        known = (*self._mailboxes, *self.slots.queue, *self._backoffs.lanes)
        return tuple(dict.fromkeys(known))

    def is_busy(self, key: SessionKey) -> bool:
        """Whether this node knows that a lane has work or pending commands."""
        mailbox = self._mailboxes.get(key)
        if mailbox is None:
            return self._is_waiting(key) and not self.is_shared
        lane = mailbox.lane
        if (
            self.is_shared
            and lane is not None
            and not (self._is_active_here(lane) or lane.reservations)
        ):
            # Another node may have changed the lane since.
            return bool(mailbox.task)
        return bool(mailbox.task) or (lane is not None and lane.is_busy)

    def _is_waiting(self, key: SessionKey) -> bool:
        return self.slots.is_queued(key) or key in self._backoffs.lanes

    def peek(self, key: SessionKey) -> Lane | None:
        """The lane as it was last committed, None if it is not in memory."""
        mailbox = self._mailboxes.get(key)
        return None if mailbox is None else mailbox.lane

    def post(
        self,
        key: SessionKey,
        command: Command[Reply],
        fallback: Command[object] | None = None,
        on_commit: OnCommit[Reply] | None = None,
        *,
        creates: bool = False,
        is_large: bool = False,
    ) -> asyncio.Future[Reply]:
        """Puts a command into a lane's mailbox. The future gets its reply after the commit.

        The future raises what the command raises, RunIdTaken and StoreUnavailable. Cancelling it
        does not withdraw the command. If the command is refused, `fallback` is applied in its
        place, with no other command in between. `creates` and `is_large`: see `PendingCommand`.
        """
        reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        pending: PendingCommand[Reply] = PendingCommand(
            command, reply, fallback, on_commit, creates, is_large
        )
        self._put(key, pending)
        return reply

    def send(self, key: SessionKey, command: Command[object]) -> None:
        """Puts a command into a lane's mailbox without waiting for a reply."""
        self._put(key, PendingCommand(command))

    def release(self, key: SessionKey, token: str) -> None:
        """Ends a reservation, even if the store is away: nothing of it is stored (R6)."""
        released = self.post(key, lambda lane, _: rules.release(lane, token))
        released.add_done_callback(lambda done: self._on_released(key, token, done))

    def _on_released(self, key: SessionKey, token: str, done: asyncio.Future[None]) -> None:
        mailbox = self._mailboxes.get(key)
        failed = done.cancelled() or done.exception() is not None
        if not failed or mailbox is None or mailbox.lane is None:
            return
        mailbox.lane = rules.release(mailbox.lane, token).lane
        if mailbox.task is None:
            self._forget_unused(key, mailbox)

    def refresh(self, key: SessionKey) -> None:
        """Queues a lane for a slot that another node may have changed; it is loaded again."""
        mailbox = self._mailboxes.get(key)
        lane = None if mailbox is None else mailbox.lane
        if mailbox is not None and lane is not None and not self._is_active_here(lane):
            mailbox.is_outdated = True
        self._cache.forget(key)
        self.slots.enqueue(key)

    def invalidate(self, key: SessionKey) -> None:
        """Loads a lane before its next command: its session was changed beside its mailbox."""
        self._cache.forget(key)
        if (mailbox := self._mailboxes.get(key)) is not None:
            mailbox.is_outdated = True

    def look_again(self, key: SessionKey) -> None:
        """Loads a lane that another node may have changed, and goes on with its run if it can."""
        self._cache.forget(key)
        mailbox = self._mailbox(key)
        mailbox.is_outdated = mailbox.lane is None or not self._is_active_here(mailbox.lane)
        self.send(key, lambda lane, _: Transition(lane))

    def reload(self, key: SessionKey) -> None:
        """Loads a lane whose active run has no agent here any more, and continues that run."""
        self._cache.forget(key)
        self._mailbox(key).is_outdated = True
        self.send(key, lambda lane, _: Transition(lane))

    def drop(self, key: SessionKey) -> None:
        """Forgets a lane that cannot be read except for its reservations, and frees its slot:
        deleting the session ends its runs."""
        mailbox = self._mailboxes.get(key)
        if mailbox is not None:
            held = () if mailbox.lane is None else mailbox.lane.reservations
            mailbox.lane = Lane(key, reservations=held) if held else None
            mailbox.is_outdated = True
            if mailbox.task is None and not held:
                del self._mailboxes[key]
        self.slots.release(key)

    def leave(self, key: SessionKey) -> None:
        """Frees the slot of a lane whose run other nodes continue, and forgets the lane unless a
        command or an accept is in progress."""
        mailbox = self._mailboxes.get(key)
        if mailbox is not None:
            mailbox.is_outdated = True
            if mailbox.task is None and not (mailbox.lane and mailbox.lane.reservations):
                del self._mailboxes[key]
        self.slots.release(key)

    def restore(self, session: BusySession) -> None:
        """Counts the waiting runs of a stored lane, and queues the lane unless it is active."""
        self.waiting.add(session.key.tenant, session.waiting_runs)
        if not session.active:
            agent = session.agent
            self.slots.enqueue(
                session.key, None if agent is None else self._agents.full_name(agent)
            )

    async def wait_settled(self) -> None:
        """Waits until no command is pending."""
        while tasks := [box.task for box in self._mailboxes.values() if box.task]:
            await asyncio.wait(tasks)

    # --- The mailboxes ------------------------------------------------------------------------

    def _put(self, key: SessionKey, command: PendingCommand[object]) -> None:
        mailbox = self._mailbox(key)
        mailbox.commands.append(command)
        if mailbox.arrival is not None and not mailbox.arrival.done():
            mailbox.arrival.set_result(None)
        self._ensure_task(key, mailbox)

    def _on_grant(self, key: SessionKey) -> None:
        """A slot was granted to the lane."""
        mailbox = self._mailbox(key)
        mailbox.has_slot = True
        self._ensure_task(key, mailbox)

    def _mailbox(self, key: SessionKey) -> Mailbox:
        mailbox = self._mailboxes.get(key)
        if mailbox is None:
            mailbox = self._mailboxes[key] = Mailbox()
        return mailbox

    def _ensure_task(self, key: SessionKey, mailbox: Mailbox) -> None:
        if mailbox.task is None:
            mailbox.task = create_own_task(self._process(key, mailbox))

    async def _process(self, key: SessionKey, mailbox: Mailbox) -> None:
        while mailbox.commands or mailbox.has_slot:
            mailbox.has_slot = False
            batch = mailbox.take()
            try:
                await self._commit_batch(key, mailbox, batch)
            except Exception as error:
                if not isinstance(error, RunlaneError):
                    log.exception("batch of commands failed", session_id=key.session_id)
                if mailbox.lane is None or not self._is_active_here(mailbox.lane):
                    self.slots.release(key)
                mailbox.is_outdated = True
                for command in batch:
                    command.refuse(error)
                if not isinstance(error, CorruptRecord):
                    self._retry_later(key)
                elif mailbox.lane is not None and mailbox.lane.active is not None:
                    self._actions.abandon_agent(key, mailbox.lane.active)
        mailbox.task = None
        self._forget_unused(key, mailbox)

    def _forget_unused(self, key: SessionKey, mailbox: Mailbox) -> None:
        """Forgets a lane without pending commands that has nothing here."""
        lane = mailbox.lane
        is_here = lane is not None and self._holds_runs and self._is_active_here(lane)
        if lane is None or not (is_here or lane.reservations):
            del self._mailboxes[key]
            if lane is not None and lane.exists and not mailbox.is_outdated:
                self._cache.keep(key, lane)

    @property
    def node_id(self) -> str:
        """The id of this node, which changes when it rejoins; empty if the store is not shared."""
        return "" if self._membership is None else self._membership.node_id

    @property
    def _is_alive(self) -> bool:
        """Whether this node may start runs."""
        return self._membership is None or self._membership.alive

    @property
    def _holds_runs(self) -> bool:
        return self._membership is None or self._membership.holds_runs

    def _is_active_here(self, lane: Lane) -> bool:
        """Whether the active run has a slot of this node. One that waits for input has none."""
        active = lane.active
        if active is None or active.state is RunState.INPUT_REQUIRED:
            return False
        return active.host == self.node_id and not active.asking.parked

    def _retry_later(self, key: SessionKey) -> None:
        """A lane that could not be loaded or committed may have waiting runs."""
        if self._store.failed is None:
            asyncio.get_running_loop().call_later(RETRY_PAUSE, self.slots.enqueue, key)

    # --- A batch ------------------------------------------------------------------------------

    async def _commit_batch(
        self, key: SessionKey, mailbox: Mailbox, batch: list[PendingCommand[object]]
    ) -> None:
        """Decides and commits a batch; decides it again while others change the lane."""
        for _ in range(MAX_RELOADS):
            creates = any(command.creates for command in batch)
            lane, origin = await self._cache.load(key, mailbox, creates=creates)
            if origin is LaneOrigin.LOADED:
                self._restart_own_run(key, lane)
            decision = self._decide(lane, batch, mailbox)
            if newly_cancelled(lane, decision.transition.lane) and not decision.has_new_run:
                decision = await self._await_end_of_run(lane, decision, batch, mailbox)
            if self._needs_load(origin, decision):
                mailbox.is_outdated = True
                continue
            try:
                await self._commit(lane, decision)
            except Stale:
                self._return_slot(key, lane)
                mailbox.is_outdated = True
                continue
            except RunlaneError:
                raise
            except Exception as refusal:  # noqa: BLE001 - the command's caller gets it
                # A run id that is taken, or a value that cannot be written: one command is to
                # blame, and only that one fails.
                self._return_slot(key, lane)
                await self._commit_singly(key, mailbox, batch, refusal)
                return
            if origin is LaneOrigin.ASSUMED:
                self._cache.learn(new=True)
            self._act(key, mailbox, lane, decision)
            return
        raise LaneContended(f"gave up after {MAX_RELOADS} concurrent changes to the lane")

    def _needs_load(self, origin: LaneOrigin, decision: Decision) -> bool:
        """Whether the lane must be loaded because no commit will verify the decision."""
        if origin is LaneOrigin.ASSUMED:
            return not decision.transition.needs_commit
        return self.is_shared and origin is LaneOrigin.CACHED and decision.only_reads

    async def _await_end_of_run(
        self,
        lane: Lane,
        decision: Decision,
        batch: list[PendingCommand[object]],
        mailbox: Mailbox,
    ) -> Decision:
        """Stops the agent that a cancel is about to cover, and waits a moment for its end.

        Even if the commit fails, the run ends cancelled: its end carries the cancel.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + CANCEL_PATIENCE
        while (run := newly_cancelled(lane, decision.transition.lane)) is not None:
            left = until - loop.time()
            was_split = bool(mailbox.commands)
            if (
                left <= 0
                or was_split
                or decision.has_new_run
                or not self._actions.stop_agent(lane.key, run)
            ):
                break
            mailbox.arrival = loop.create_future()
            await asyncio.wait({mailbox.arrival}, timeout=left)
            mailbox.arrival = None
            if any(command.is_large for command in mailbox.commands):
                break
            batch += mailbox.commands
            mailbox.commands.clear()
            decision = self._decide(lane, batch, mailbox)
        return decision

    async def _commit(self, lane: Lane, decision: Decision) -> None:
        transition = decision.transition
        if transition.needs_commit:
            version = await self._store.commit(lane.version, transition)
            if version != transition.lane.version:
                decision.transition = transition.at_version(version)

    def _restart_own_run(self, key: SessionKey, lane: Lane) -> None:
        """Starts the agent of a run that is active here without one: the shared store committed its
        start, and the confirmation was lost; or an earlier process began an attempt that can
        continue."""
        active = lane.active
        if active is None:
            return
        if active.state is RunState.INPUT_REQUIRED and active.host == self.node_id:
            # The commit of its question may not have been confirmed.
            self._actions.follow_run(key, active)
        if not self._is_active_here(lane):
            return
        if not (self.is_shared or self._actions.can_continue(active)):
            return
        if self._actions.has_agent(key, active):
            self._actions.follow_run(key, active)
        elif not self._is_alive and self._holds_runs:
            # After an outage. A heartbeat decides soon whether this node may still start it.
            raise StoreUnavailable("the lease of this node is not renewed yet")
        else:
            self._restart(key, active)

    def _restart(self, key: SessionKey, active: LaneRun) -> None:
        self.slots.occupy(key, self._agents.full_name(active.agent))
        if self._actions.can_continue(active):
            self._actions.continue_agent(key, active)
        else:
            self._actions.start_agent(key, active, None)
        if active.state is RunState.CANCELLING:
            self._actions.stop_agent(key, active)

    async def _commit_singly(
        self,
        key: SessionKey,
        mailbox: Mailbox,
        batch: list[PendingCommand[object]],
        refusal: Exception,
    ) -> None:
        """Finds the command that the store refused, and commits the others, in their order."""
        if not batch:
            raise refusal
        if len(batch) > 1:
            for command in batch:
                await self._commit_batch(key, mailbox, [command])
            return
        if not isinstance(refusal, RunIdTaken):
            log.error("command could not be written", exc_info=refusal, session_id=key.session_id)
        if batch[0].fallback is not None:
            await self._commit_batch(key, mailbox, [PendingCommand(batch[0].fallback)])
        batch[0].refuse(refusal)

    def _return_slot(self, key: SessionKey, lane: Lane) -> None:
        """Releases the slot that was taken for a decision that was not committed."""
        if not self._is_active_here(lane):
            self.slots.release(key)

    # --- The decision -------------------------------------------------------------------------

    def _decide(
        self, lane: Lane, batch: list[PendingCommand[object]], mailbox: Mailbox
    ) -> Decision:
        """Applies the commands in order, and starts a run if the lane and this node allow it.

        Commands that need a batch of their own go back into the mailbox.
        """
        at = self._now()
        decision = Decision(Transition(lane))
        for n, command in enumerate(batch):
            try:
                applied = command.apply(decision.transition.lane, at)
            except Exception as error:  # noqa: BLE001 - its caller gets it; the others go on
                decision.refusals.append((command, error))
                if command.fallback is not None:
                    instead = command.fallback(decision.transition.lane, at)
                    decision.transition = decision.transition.then(instead)
                continue
            if accepts_ended_run(decision.transition, applied.transition):
                # Once this batch is committed the store refuses the run id.
                _put_back(batch, n, mailbox)
                break
            decision.transition = decision.transition.then(applied.transition)
            decision.applied.append(applied)
            if applied.transition.removed:
                # The next command finds another session of this id, or none.
                _put_back(batch, n + 1, mailbox)
        self._start_next(lane, decision, at)
        transition = decision.transition
        if transition.needs_commit and not transition.removed:
            decision.transition = transition.at_version(lane.version + 1)
        return decision

    def _start_next(self, before: Lane, decision: Decision, at: Micros) -> None:
        """Starts the next run if it can start, no gate holds it, and a slot of its agent is free
        (R32)."""
        lane = decision.transition.lane
        if self._can_resume_here(lane):
            if self._is_alive and self._take_to_resume(lane):
                resumed = rules.resume(lane, at=at, host=self.node_id)
                decision.transition = decision.transition.then(resumed)
            return
        if not lane.can_start_at(at):
            decision.backs_off = lane.can_start
            return
        head = lane.waiting[0]
        decision.is_held = not self._gates.can_start(
            lane.key, head.run_id, follows=before.active is not None
        )
        agent = self._agents.full_name(head.agent)
        if not decision.is_held and self._is_alive and self.slots.take(lane.key, agent):
            started = rules.dispatch(lane, at=at, host=self.node_id)
            decision.transition = decision.transition.then(started)

    def _take_to_resume(self, lane: Lane) -> bool:
        """Takes a slot for the active run, which goes on after input."""
        agent = "" if lane.active is None else lane.active.agent
        return self.slots.take(lane.key, self._agents.full_name(agent), resuming=True)

    def _can_resume_here(self, lane: Lane) -> bool:
        """Whether the active run can go on here: its agent waits here, or nowhere."""
        active = lane.active
        if active is None or not lane.can_resume:
            return False
        return active.asking.parked or self._actions.has_agent(lane.key, active)

    # --- The actions after a commit -----------------------------------------------------------

    def _act(self, key: SessionKey, mailbox: Mailbox, before: Lane, decision: Decision) -> None:
        """Adopts the committed lane, answers the callers, and starts or stops agents."""
        transition = decision.transition
        lane = mailbox.lane = transition.lane
        self.waiting.add(key.tenant, len(lane.waiting) - len(before.waiting))
        can_start = lane.can_start and not decision.backs_off
        self.slots.settle(
            key,
            running=self._is_active_here(lane),
            can_start=can_start or self._can_resume_here(lane),
        )
        if transition.needs_commit:
            self._actions.on_committed(key, transition)
        decision.settle()
        self._cache_requests(key, transition)
        if lane.active is not None and lane.active != before.active:
            self._start_or_stop_agent(key, before, lane.active, transition)
        if lane.active is not None and lane.active.asking.expired:
            self._actions.end_expired(key, lane.active)
        if decision.is_held:
            self._hold_start(key, before, lane)
        elif can_start or (lane.can_resume and transition.needs_commit):
            # Nodes that find an answered run again, and have no slot for it, must not wake each
            # other over and over.
            self._actions.wake_other_nodes()
        self._backoffs.follow(lane, is_due=can_start)

    def _hold_start(self, key: SessionKey, before: Lane, lane: Lane) -> None:
        """Holds the next run at its gate, unless the gate was released meanwhile."""
        next_run, follows = lane.waiting[0].run_id, before.active is not None
        if not self._gates.hold_start(key, next_run, follows=follows):
            self.slots.enqueue(key)

    def _cache_requests(self, key: SessionKey, transition: Transition) -> None:
        """Caches the requests of waiting runs, so that starting them needs no read."""
        for change in transition.runs:
            request = change.request
            if (
                request is not None
                and change.run.state in {RunState.ACCEPTED, RunState.QUEUED}
                and not request.prompt.attachments
                and len(request.prompt.text) <= CACHED_CHARS
            ):
                self._requests.put(RunKey(key.tenant, change.run.run_id), request)

    def _start_or_stop_agent(
        self, key: SessionKey, before: Lane, active: LaneRun, transition: Transition
    ) -> None:
        was = before.active
        same = was is not None and (was.run_id, was.attempt) == (active.run_id, active.attempt)
        is_called_again = was is not None and was.asking.parked and active.state is RunState.ACTIVE
        if (not same or is_called_again) and active.state is not RunState.INPUT_REQUIRED:
            changes = transition.runs
            change = next(change for change in changes if change.run.run_id == active.run_id)
            request = change.request or self._requests.take(RunKey(key.tenant, active.run_id))
            # An update is not in the request, and another node may have made it.
            self._actions.start_agent(key, active, None if active.revision else request)
        elif was is not None and was.host != active.host and not active.asking.parked:
            self._restart(key, active)
        elif newly_cancelled(before, transition.lane) is not None:
            self._actions.stop_agent(key, active)
        elif was is not None and (was.state, was.asking) != (active.state, active.asking):
            self._actions.follow_run(key, active)


def _put_back(batch: list[PendingCommand[object]], start: int, mailbox: Mailbox) -> None:
    """Moves the commands from `start` on back to the front of the mailbox."""
    mailbox.commands.extendleft(reversed(batch[start:]))
    del batch[start:]
