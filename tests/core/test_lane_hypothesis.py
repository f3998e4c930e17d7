"""Random histories, longer and with more runs than the exhaustive search covers."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from proofs.lanecheck.commands import (
    DISPATCH,
    ELSEWHERE,
    EMPTY,
    FAIL_WAITING,
    NODE_LOST,
    RESUME,
    Command,
    Verb,
    adopt,
    answer,
    ask,
    cancel,
    drain,
    expire,
    finish,
    hand_back,
    hand_over,
    live_ids,
    reserve,
    stored,
    update,
)
from proofs.lanecheck.invariants import check_lane
from proofs.sim.explore import step
from runlane_server.core.model import CancelScope, Message, Role, WhenBusy
from runlane_server.core.transition import Lane, Transition
from runlane_server.core.update import Place


class LaneHistory(RuleBasedStateMachine):
    """A lane, and everything that was ever committed for it."""

    def __init__(self) -> None:
        super().__init__()
        self.lane: Lane = EMPTY
        self.names = 0
        self.accepted: list[str] = []
        self.ended: Counter[str] = Counter()
        self.named: set[str] = set()
        self.transcript: dict[tuple[int, int], Message] = {}

    def take(self, command: Command) -> Transition[Any] | None:
        made = step(self.lane, command)
        if made is None:
            return None
        for change in made.runs:
            if change.request is not None:
                self.accepted.append(change.run.run_id)
        for complete in made.completes:
            self.ended[complete.run_id] += 1
            assert complete.cancelled or complete.run_id not in self.named
        if command.verb is Verb.CANCEL:
            self.named |= {covered.run_id for covered in made.reply.cancelled}
        for message in made.messages:
            place = (message.turn, message.ordinal)
            assert place not in self.transcript
            self.transcript[place] = message
        self.lane = stored(self.lane, made)
        return made

    @rule(data=st.data(), again=st.booleans())
    def reserve(self, data: st.DataObject, *, again: bool) -> None:
        self.names += 1
        known = sorted(live_ids(self.lane) | {held.run_id for held in self.lane.reservations})
        repeat = again and known
        run_id = data.draw(st.sampled_from(known)) if repeat else f"r{self.names}"
        self.take(reserve(f"t{self.names}", run_id))

    @precondition(lambda self: self.lane.reservations)
    @rule(
        data=st.data(),
        when_busy=st.sampled_from(WhenBusy),
        max_waiting=st.integers(0, 8),
        max_attempts=st.integers(1, 3),
    )
    def accept(
        self, data: st.DataObject, when_busy: WhenBusy, max_waiting: int, max_attempts: int
    ) -> None:
        held = data.draw(st.sampled_from(self.lane.reservations))
        if held.run_id in self.ended:  # the store refuses it
            self.take(Command(Verb.RELEASE, token=held.token))
            return
        command = Command(
            Verb.ACCEPT,
            held.token,
            held.run_id,
            when_busy,
            max_waiting=max_waiting,
            max_attempts=max_attempts,
        )
        if self.take(command) is None:
            self.take(Command(Verb.RELEASE, token=held.token))

    @precondition(lambda self: self.lane.reservations)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        held = data.draw(st.sampled_from(self.lane.reservations))
        self.take(Command(Verb.RELEASE, token=held.token))

    @rule()
    def dispatch(self) -> None:
        self.take(DISPATCH)

    @rule(scope=st.sampled_from([CancelScope.SESSION, CancelScope.ACTIVE, CancelScope.WAITING]))
    def cancel(self, scope: CancelScope) -> None:
        self.take(cancel(scope))

    @rule(data=st.data())
    def cancel_run(self, data: st.DataObject) -> None:
        known = live_ids(self.lane) | {held.run_id for held in self.lane.reservations} | {"nobody"}
        self.take(cancel(CancelScope.RUN, data.draw(st.sampled_from(sorted(known)))))

    @precondition(lambda self: self.lane.active is not None)
    @rule(late=st.sampled_from([0, 0, 0, -1, 1]))
    def drain(self, late: int) -> None:
        assert self.lane.active is not None
        self.take(drain(self.lane.active.run_id, self.lane.active.attempt + late))

    @precondition(lambda self: self.lane.active is not None)
    @rule(
        late=st.sampled_from([0, 0, 0, -1, 1]),
        key=st.sampled_from("kl"),
        kind=st.sampled_from(["", "resumable", "park"]),
        has_default=st.booleans(),
    )
    def ask(self, late: int, key: str, kind: str, *, has_default: bool) -> None:
        assert self.lane.active is not None
        run_id, attempt = self.lane.active.run_id, self.lane.active.attempt + late
        resumable, park = kind == "resumable", kind == "park"
        self.take(
            ask(run_id, attempt, key, has_default=has_default, resumable=resumable, park=park)
        )

    @precondition(lambda self: self.lane.runs)
    @rule(data=st.data(), key=st.sampled_from("kl"))
    def answer(self, data: st.DataObject, key: str) -> None:
        self.take(answer(data.draw(st.sampled_from(sorted(live_ids(self.lane)))), key))

    @precondition(lambda self: self.lane.runs)
    @rule(data=st.data(), key=st.sampled_from("kl"))
    def expire(self, data: st.DataObject, key: str) -> None:
        self.take(expire(data.draw(st.sampled_from(sorted(live_ids(self.lane)))), key))

    @precondition(lambda self: self.lane.runs)
    @rule(
        data=st.data(),
        edits=st.booleans(),
        sends=st.sampled_from([None, WhenBusy.QUEUE, WhenBusy.FOLD, WhenBusy.INTERRUPT]),
        place=st.sampled_from([None, *Place]),
        late=st.sampled_from([None, 0, 0, -1]),
        repeated=st.booleans(),
    )
    def update(
        self,
        data: st.DataObject,
        sends: WhenBusy | None,
        place: Place | None,
        late: int | None,
        *,
        edits: bool,
        repeated: bool,
    ) -> None:
        run = data.draw(st.sampled_from(self.lane.runs))
        anchor = data.draw(st.sampled_from(sorted(live_ids(self.lane))))
        if sends is WhenBusy.INTERRUPT:
            place = None
        revision = None if late is None else run.revision + late - (repeated and late == 0)
        self.take(
            update(
                run.run_id,
                edits=edits,
                sends=sends,
                place=place,
                anchor=anchor,
                revision=revision,
                repeated=repeated and bool(run.last_update),
            )
        )

    @rule()
    def resume(self) -> None:
        self.take(RESUME)

    @precondition(lambda self: self.lane.active is not None)
    @rule(late=st.sampled_from([0, 0, 0, -1, 1]), ok=st.booleans())
    def finish(self, late: int, *, ok: bool) -> None:
        assert self.lane.active is not None
        self.take(finish(self.lane.active.run_id, self.lane.active.attempt + late, ok=ok))

    @precondition(lambda self: self.lane.active is not None)
    @rule(late=st.sampled_from([0, 0, 0, -1, 1]))
    def hand_over(self, late: int) -> None:
        assert self.lane.active is not None
        self.take(hand_over(self.lane.active.run_id, self.lane.active.attempt + late))

    @precondition(lambda self: self.lane.active is not None)
    @rule(late=st.sampled_from([0, 0, 0, -1, 1]))
    def hand_back(self, late: int) -> None:
        assert self.lane.active is not None
        self.take(hand_back(self.lane.active.run_id, self.lane.active.attempt + late))

    @precondition(lambda self: self.lane.active is not None)
    @rule(late=st.sampled_from([0, 0, 0, -1, 1]), host=st.sampled_from(["", ELSEWHERE]))
    def adopt(self, late: int, host: str) -> None:
        assert self.lane.active is not None
        self.take(adopt(self.lane.active.run_id, self.lane.active.attempt + late, host=host))

    @rule()
    def node_lost(self) -> None:
        self.take(NODE_LOST)

    @rule()
    def fail_waiting(self) -> None:
        self.take(FAIL_WAITING)

    @invariant()
    def lane_is_sound(self) -> None:
        check_lane(self.lane)

    @invariant()
    def each_run_is_in_the_lane_or_has_ended_once(self) -> None:
        assert sorted(self.accepted) == sorted({*live_ids(self.lane), *self.ended})
        assert set(self.ended.values()) <= {1}
        assert not live_ids(self.lane) & set(self.ended)
        assert len(set(self.accepted)) == len(self.accepted) == self.lane.accept_seq

    @invariant()
    def the_turns_are_whole(self) -> None:
        """Every turn has its prompt; every turn of an ended run has a final message."""
        live_turns = {run.turn for run in self.lane.runs}
        begun = {turn for turn, ordinal in self.transcript if ordinal == 0}
        assert begun == set(range(1, self.lane.turn + 1))
        ends = {
            turn
            for (turn, _), message in self.transcript.items()
            if message.role is Role.ASSISTANT and message.finish_reason is not None
        }
        assert begun - ends == live_turns - {0}
        ids = [message.message_id for message in self.transcript.values()]
        assert len(set(ids)) == len(ids)

    def teardown(self) -> None:
        """A cancel of everything and the end of the active run leave nothing (R10, R21)."""
        self.take(cancel())
        for held in self.lane.reservations:
            self.take(Command(Verb.RELEASE, token=held.token))
        if self.lane.active is not None:
            self.take(finish(self.lane.active.run_id, self.lane.active.attempt))
        assert not self.lane.is_busy
        assert set(self.accepted) == set(self.ended)
        if self.lane.exists:
            self.take(Command(Verb.REMOVE))


TestLaneHistory = LaneHistory.TestCase
TestLaneHistory.settings = settings(
    max_examples=100,
    stateful_step_count=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
