"""The lanes of this node: a mailbox each, worked off one batch at a time.

All commands that came for a lane while its last commit was under way are decided one after another
on the lane, committed together, and only then answered and acted on. Whoever posts a command may
go away; the command does not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import structlog

from runlane_server.access.quotas import QuotaBook
from runlane_server.core import lane as rules
from runlane_server.core.errors import IllegalCommand, RunlaneError
from runlane_server.core.limits import RETRY_PAUSE
from runlane_server.core.model import Micros, RunKey, RunRequest, RunState, SessionKey
from runlane_server.core.recent import RecentItems
from runlane_server.core.transition import Lane, Transition
from runlane_server.engine.actions import Actions, Alone, Host
from runlane_server.engine.lane_cache import LaneSource, Sight
from runlane_server.engine.mailbox import (
    Command,
    Decision,
    Mailbox,
    OnDone,
    Order,
    accepts_again,
    stops,
)
from runlane_server.engine.slots import Slots
from runlane_server.engine.waiting import WaitingRuns
from runlane_server.harness.gates import Stage
from runlane_server.store.base import BusySession, RunIdTaken, Stale, Store

log = structlog.get_logger()

MAX_RELOADS = 100
"""How often a batch is decided anew when others keep changing the lane, before it is given up."""


CANCEL_PATIENCE = 0.005
"""Seconds that a cancel waits for the agent it stops, so that one commit does for both: the cancel,
and the end of the run."""

RECENT = 2_000
"""How many prompts that wait are kept at hand."""

RECENT_CHARS = 4_096
"""A prompt that is longer is read from the store when its turn comes, and so is one with
attachments."""


class Lanes:
    """Applies commands to lanes, commits what comes of them, and then acts on it."""

    def __init__(
        self,
        store: Store,
        actions: Actions,
        *,
        max_active: int,
        now: Callable[[], Micros],
        host: Host | None = None,
        quotas: QuotaBook | None = None,
        stage: Stage | None = None,
    ) -> None:
        self._shared = host is not None
        self._host: Host = host or Alone()
        self._store = store
        self._actions = actions
        self._now = now
        self._mailboxes: dict[SessionKey, Mailbox] = {}
        self._source = LaneSource(store)
        self._requests: RecentItems[RunKey, RunRequest] = RecentItems(RECENT)
        quotas = quotas or QuotaBook()
        self.slots = Slots(max_active, self._call, quotas.max_active)
        quotas.listen(self.slots.look_again)
        self._stage = stage or Stage()
        self._stage.on_open = self.slots.line_up
        self.waiting = WaitingRuns()

    @property
    def waiting_runs(self) -> int:
        """How many runs wait, as far as this node knows."""
        return self.waiting.total

    @property
    def keys(self) -> tuple[SessionKey, ...]:
        """The lanes with something under way here, and those that wait for a slot."""
        return tuple(dict.fromkeys((*self._mailboxes, *self.slots.line)))

    def is_busy(self, key: SessionKey) -> bool:
        """Whether a lane is known to have work, or a command on its way to it."""
        mailbox = self._mailboxes.get(key)
        if mailbox is None:
            return self.slots.lined_up(key) and not self._shared
        lane = mailbox.lane
        if self._shared and lane is not None and not (self._active_here(lane) or lane.reservations):
            return bool(mailbox.driver)  # what it was when another node changed it last
        return bool(mailbox.driver) or (lane is not None and lane.is_busy)

    def peek(self, key: SessionKey) -> Lane | None:
        """The lane as it was last committed, if it is at hand."""
        mailbox = self._mailboxes.get(key)
        return None if mailbox is None else mailbox.lane

    def post(
        self,
        key: SessionKey,
        command: Command,
        otherwise: Command | None = None,
        on_done: OnDone | None = None,
        *,
        creates: bool = False,
    ) -> asyncio.Future[Any]:
        """Puts a command into a lane's mailbox. The future has its reply once it is committed.

        It raises what the command raises, RunIdTaken and StoreUnavailable. Cancelling it changes
        nothing. Where the command is refused, `otherwise` takes its place: no other command comes
        in between. `creates`: the command makes the session if there is none.
        """
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._put(key, Order(command, reply, otherwise, on_done, creates))
        return reply

    def send(self, key: SessionKey, command: Command) -> None:
        """Puts a command into a lane's mailbox whose reply nobody waits for."""
        self._put(key, Order(command, None))

    def look_at(self, key: SessionKey) -> None:
        """Has a lane line up that another node may have changed."""
        mailbox = self._mailboxes.get(key)
        if mailbox is not None and mailbox.lane is not None and not self._active_here(mailbox.lane):
            mailbox.outdated = True
        self._source.forget(key)
        self.slots.line_up(key)

    def take_up(self, session: BusySession) -> None:
        """Takes up a lane that was found in the store: one with waiting runs gets its turn."""
        self.waiting.add(session.key.tenant, session.waiting_runs)
        if not session.active:
            self.slots.line_up(session.key)

    async def settled(self) -> None:
        """Returns when no command is under way."""
        while drivers := [box.driver for box in self._mailboxes.values() if box.driver]:
            await asyncio.wait(drivers)

    # The mailbox

    def _put(self, key: SessionKey, order: Order) -> None:
        mailbox = self._mailbox(key)
        mailbox.orders.append(order)
        if mailbox.arrival is not None and not mailbox.arrival.done():
            mailbox.arrival.set_result(None)
        self._drive(key, mailbox)

    def _call(self, key: SessionKey) -> None:
        """It is the lane's turn to have a slot."""
        mailbox = self._mailbox(key)
        mailbox.called = True
        self._drive(key, mailbox)

    def _mailbox(self, key: SessionKey) -> Mailbox:
        mailbox = self._mailboxes.get(key)
        if mailbox is None:
            mailbox = self._mailboxes[key] = Mailbox()
        return mailbox

    def _drive(self, key: SessionKey, mailbox: Mailbox) -> None:
        if mailbox.driver is None:
            mailbox.driver = asyncio.create_task(self._work_off(key, mailbox))

    async def _work_off(self, key: SessionKey, mailbox: Mailbox) -> None:
        while mailbox.orders or mailbox.called:
            mailbox.called = False
            orders = list(mailbox.orders)
            mailbox.orders.clear()
            try:
                await self._carry_out(key, mailbox, orders)
            except Exception as error:
                if not isinstance(error, RunlaneError):
                    log.exception("a batch of commands failed", session_id=key.session_id)
                if mailbox.lane is None or not self._active_here(mailbox.lane):
                    self.slots.give_back(key)
                mailbox.outdated = True
                for order in orders:
                    order.refuse(error)
                self._look_again(key)
        mailbox.driver = None
        lane = mailbox.lane
        if lane is None or not (self._active_here(lane) or lane.reservations):
            del self._mailboxes[key]
            if lane is not None and lane.exists and not mailbox.outdated:
                self._source.keep(key, lane)

    def _active_here(self, lane: Lane) -> bool:
        return lane.active is not None and lane.active.host == self._host.node_id

    def _look_again(self, key: SessionKey) -> None:
        """A lane that could not be read or written may have runs that wait for their turn."""
        if self._store.failed is None:
            asyncio.get_running_loop().call_later(RETRY_PAUSE, self.slots.line_up, key)

    async def _carry_out(self, key: SessionKey, mailbox: Mailbox, orders: list[Order]) -> None:
        """Decides a batch and commits it, anew for as long as others change the lane meanwhile."""
        for _ in range(MAX_RELOADS):
            creates = any(order.creates for order in orders)
            lane, sight = await self._source.load(key, mailbox, creates=creates)
            if sight is Sight.READ:
                self._take_up_own(key, lane)
            decision = self._decide(lane, orders, mailbox)
            if stops(lane, decision.transition.lane) and not decision.accepts:
                decision = await self._with_its_end(lane, decision, orders, mailbox)
            if self._has_to_be_read(sight, decision):
                mailbox.outdated = True
                continue
            try:
                await self._commit(lane, decision)
            except Stale:
                self._undo(key, lane)
                mailbox.outdated = True
                continue
            except RunIdTaken as taken:
                self._undo(key, lane)
                await self._one_by_one(key, mailbox, orders, taken)
                return
            if sight is Sight.GUESSED:
                self._source.learn(new=True)
            self._adopt(key, mailbox, lane, decision)
            return
        raise IllegalCommand("the lane does not hold still")

    def _has_to_be_read(self, sight: Sight, decision: Decision) -> bool:
        """Whether no commit will tell if the lane is, or is still, what it was taken for."""
        if sight is Sight.GUESSED:
            return not decision.transition.needs_commit
        return self._shared and sight is Sight.AT_HAND and decision.rests_on_reading

    async def _with_its_end(
        self, lane: Lane, decision: Decision, orders: list[Order], mailbox: Mailbox
    ) -> Decision:
        """Has the agent stopped that a cancel is about to cover, and waits a moment for its end.

        Whatever becomes of the commit, the run ends as cancelled: its end carries the cancel.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + CANCEL_PATIENCE
        while (run := stops(lane, decision.transition.lane)) is not None:
            left = until - loop.time()
            put_back = bool(mailbox.orders)
            if (
                left <= 0
                or put_back
                or decision.accepts
                or not self._actions.cancelling(lane.key, run)
            ):
                break
            mailbox.arrival = loop.create_future()
            await asyncio.wait({mailbox.arrival}, timeout=left)
            mailbox.arrival = None
            orders += mailbox.orders
            mailbox.orders.clear()
            decision = self._decide(lane, orders, mailbox)
        return decision

    async def _commit(self, lane: Lane, decision: Decision) -> None:
        made = decision.transition
        if made.needs_commit:
            version = await self._store.commit(lane.version, made)
            if version != made.lane.version:
                decision.transition = made.at_version(version)

    def _take_up_own(self, key: SessionKey, lane: Lane) -> None:
        """Starts a run that is active here and has no agent: its start was committed, and the
        answer of the shared store was lost."""
        active = lane.active
        if active is None or not self._shared or not self._active_here(lane):
            return
        if not self._actions.runs_here(key, active):
            self.slots.occupy(key)
            self._actions.started(key, active, None)
            if active.state is RunState.CANCELLING:
                self._actions.cancelling(key, active)

    async def _one_by_one(
        self, key: SessionKey, mailbox: Mailbox, orders: list[Order], taken: RunIdTaken
    ) -> None:
        """Finds out which order brought the run id that is taken; the others are carried out."""
        if len(orders) <= 1:
            for order in orders:
                if order.otherwise is not None:
                    await self._carry_out(key, mailbox, [Order(order.otherwise, None)])
                order.refuse(taken)
            return
        for order in orders:
            await self._carry_out(key, mailbox, [order])

    # Deciding

    def _decide(self, lane: Lane, orders: list[Order], mailbox: Mailbox) -> Decision:
        """Applies the commands in order, and starts a run if the lane and the node allow it."""
        at = self._now()
        decision = Decision(Transition(lane))
        for n, order in enumerate(orders):
            try:
                after = order.command(decision.transition.lane, at)
            except (RunlaneError, IllegalCommand) as error:
                decision.refusals.append((order, error))
                if order.otherwise is not None:
                    instead = order.otherwise(decision.transition.lane, at)
                    decision.transition = decision.transition.then(instead)
                continue
            if accepts_again(decision.transition, after):
                # The store knows it by then, and says so: a batch of its own.
                mailbox.orders.extendleft(reversed(orders[n:]))
                del orders[n:]
                break
            decision.transition = decision.transition.then(after)
            decision.replies.append((order, after.reply))
            if after.removed:
                # What comes after the removal finds another session, or none: a batch of its own.
                mailbox.orders.extendleft(reversed(orders[n + 1 :]))
                del orders[n + 1 :]
        transition = decision.transition
        decision.held = transition.lane.can_start and not self._lets_start(lane, transition.lane)
        may_start = transition.lane.can_start and not decision.held and self._host.alive
        if may_start and self.slots.take(lane.key):
            started = rules.dispatch(transition.lane, at=at, host=self._host.node_id)
            transition = transition.then(started)
        if transition.needs_commit and not transition.removed:
            transition = transition.at_version(lane.version + 1)
        decision.transition = transition
        return decision

    def _lets_start(self, before: Lane, lane: Lane) -> bool:
        next_run = lane.waiting[0].run_id
        return self._stage.lets_start(lane.key, next_run, follows=before.active is not None)

    def _undo(self, key: SessionKey, lane: Lane) -> None:
        """Gives back the slot that was taken for a decision that did not come true."""
        if not self._active_here(lane):
            self.slots.give_back(key)

    # Acting

    def _adopt(self, key: SessionKey, mailbox: Mailbox, before: Lane, made: Decision) -> None:
        """Takes over what was committed, answers, and acts."""
        lane = made.transition.lane
        mailbox.lane = lane
        self.waiting.add(key.tenant, len(lane.waiting) - len(before.waiting))
        self.slots.settle(key, running=self._active_here(lane), startable=lane.can_start)
        if made.transition.needs_commit:
            self._actions.committed(key, made.transition)
        made.settle()
        self._remember(key, made.transition)
        if lane.active is not None and lane.active != before.active:
            self._act_on_active(key, before, made.transition)
        if made.held:
            self._keep(key, before, lane)
        elif lane.can_start:
            self._actions.left_waiting()

    def _keep(self, key: SessionKey, before: Lane, lane: Lane) -> None:
        """Keeps a lane from starting its run, unless it was let go meanwhile."""
        next_run, follows = lane.waiting[0].run_id, before.active is not None
        if not self._stage.keep_from_starting(key, next_run, follows=follows):
            self.slots.line_up(key)

    def _remember(self, key: SessionKey, made: Transition) -> None:
        """Keeps the prompts at hand that are to run soon, so that they need not be read again."""
        for change in made.runs:
            request = change.request
            if (
                request is not None
                and change.run.state in {RunState.ACCEPTED, RunState.QUEUED}
                and not request.prompt.attachments
                and len(request.prompt.text) <= RECENT_CHARS
            ):
                self._requests.put(RunKey(key.tenant, change.run.run_id), request)

    def _act_on_active(self, key: SessionKey, before: Lane, made: Transition) -> None:
        active = made.lane.active
        assert active is not None  # noqa: S101 - the caller asked
        was = before.active
        if was is None or (was.run_id, was.attempt) != (active.run_id, active.attempt):
            change = next(change for change in made.runs if change.run.run_id == active.run_id)
            request = change.request or self._requests.take(RunKey(key.tenant, active.run_id))
            self._actions.started(key, active, request)
        elif stops(before, made.lane) is not None:
            self._actions.cancelling(key, active)
