"""The rules that `core.lane` decides, by their numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from proofs.lanecheck.commands import (
    AGENTS,
    AT,
    BOOM,
    DISPATCH,
    ELSEWHERE,
    EMPTY,
    FAIL_OTHER,
    FAIL_WAITING,
    NODE_LOST,
    OTHER,
    REMOVE,
    RESUME,
    Command,
    Verb,
    accept,
    adopt,
    answer,
    ask,
    cancel,
    drain,
    expire,
    finish,
    hand_over,
    reserve,
    stored,
)
from proofs.lanecheck.invariants import check
from proofs.lanecheck.shapes import enter, lane_of, picture
from runlane_server.core import lane as rules
from runlane_server.core.agents import DEFAULT_AGENT
from runlane_server.core.errors import (
    ActiveRunChanged,
    AgentNotFound,
    IllegalCommand,
    PermissionDenied,
    QueueFull,
    SessionBusy,
    SessionNotFound,
)
from runlane_server.core.input import Park
from runlane_server.core.model import (
    Accepted,
    CancelScope,
    FinishReason,
    Folded,
    Message,
    Role,
    RunComplete,
    RunState,
    Started,
    Text,
    TextDelta,
    ToolResult,
    WhenBusy,
)
from runlane_server.core.transition import CoveredRun, Lane, Outcome, Receipt, Transition
from runlane_server.core.turn import DraftMessage

FOLD, REJECT, INTERRUPT = WhenBusy.FOLD, WhenBusy.REJECT, WhenBusy.INTERRUPT
ACTIVE, WAITING, RUN = CancelScope.ACTIVE, CancelScope.WAITING, CancelScope.RUN


def after(commands: Iterable[Command], lane: Lane = EMPTY) -> tuple[Lane, Transition[Any]]:
    """Applies commands and checks each step; returns the lane and the merged transition."""
    whole: Transition[Any] = Transition(lane)
    for command in commands:
        made = command.apply(lane)
        check(lane, command, made)
        lane = stored(lane, made)
        whole = whole.then(made)
    return lane, whole


def spoken(messages: Iterable[Message]) -> list[tuple[str, Role, FinishReason | None]]:
    ordered = sorted(messages, key=lambda message: (message.turn, message.ordinal))
    return [(message.run_id, message.role, message.finish_reason) for message in ordered]


def release(token: str) -> Command:
    return Command(Verb.RELEASE, token)


# --- Accept -------------------------------------------------------------------------------------


def test_r02_an_unknown_session_is_created_only_if_allowed() -> None:
    lane, _ = after([reserve("a")])
    refused = Command(Verb.ACCEPT, "a", "a", allow_missing=False)
    with pytest.raises(SessionNotFound):
        refused.apply(lane)
    assert picture(after([accept("a")], lane)[0]) == "a:accepted"


def test_r03_a_repeated_accept_returns_the_run_in_the_lane() -> None:
    lane, _ = after([*enter("a"), DISPATCH, reserve("again", "a")])
    lane_after, made = after([Command(Verb.ACCEPT, "again", "a", REJECT)], lane)
    assert made.reply == lane.active
    assert not made.needs_commit
    assert picture(lane_after) == "a:active"


def test_r04_accept_seq_increases_in_accept_order_across_idle_times() -> None:
    _, made = after([*enter("a"), DISPATCH, finish("a"), *enter("b"), *enter("c"), cancel()])
    _, more = after([*enter("d")], made.lane)
    seqs = [event.body for event in (*made.events, *more.events) if type(event.body) is Accepted]
    assert seqs == [Accepted(1), Accepted(2), Accepted(3), Accepted(4)]


def test_r04_accepts_are_numbered_in_their_own_order_not_in_that_of_their_reservations() -> None:
    lane, _ = after([reserve("a"), reserve("b"), accept("b"), accept("a")])
    assert [(run.run_id, run.accept_seq) for run in lane.waiting] == [("b", 1), ("a", 2)]


def test_r06_release_ends_a_reservation_any_number_of_times() -> None:
    lane, made = after([reserve("a"), reserve("b"), *[release("a")] * 3])
    assert picture(lane) == "[b]"
    assert not made.needs_commit
    assert not after([release("b"), release("b")], lane)[0].is_busy


def test_r06_a_released_reservation_cannot_be_accepted_nor_one_accepted_twice() -> None:
    lane, _ = after([reserve("a"), release("a")])
    with pytest.raises(IllegalCommand):
        accept("a").apply(lane)
    lane, _ = after(enter("a"))
    with pytest.raises(IllegalCommand):
        accept("a").apply(lane)


@pytest.mark.parametrize(
    ("command", "error"),
    [
        (accept("n", REJECT), SessionBusy),
        (Command(Verb.ACCEPT, "n", "n", expected="other"), ActiveRunChanged),
        (Command(Verb.ACCEPT, "n", "n", max_waiting=0), QueueFull),
    ],
)
def test_r06_a_failed_accept_leaves_nothing_behind(
    command: Command, error: type[Exception]
) -> None:
    lane = lane_of("active")
    held, _ = after([reserve("n")], lane)
    with pytest.raises(error):
        command.apply(held)
    assert after([release("n")], held)[0] == lane


# --- Order --------------------------------------------------------------------------------------


def test_r07_waiting_runs_start_one_at_a_time_in_accept_order() -> None:
    lane, _ = after([*enter("a"), *enter("b"), *enter("c"), DISPATCH, DISPATCH])
    assert picture(lane) == "a:active b:queued c:queued"
    lane, _ = after([finish("a"), DISPATCH], lane)
    assert picture(lane) == "b:active c:queued"


def test_r07_a_retried_run_returns_to_the_head_with_the_runs_folded_into_it() -> None:
    lane = lane_of("active + folded + queued")
    lane, made = after([NODE_LOST], lane)
    assert picture(lane) == "a:accepted f:queued b:queued"
    assert not made.completes
    lane, made = after([DISPATCH], lane)
    assert lane.active is not None
    assert lane.active.attempt == 2
    assert not made.messages, "its prompt is in the transcript already"


def test_r08_a_lane_with_work_never_looks_idle() -> None:
    lane = EMPTY
    for command in [*enter("a"), *enter("b"), DISPATCH, cancel(ACTIVE), finish("a"), DISPATCH]:
        lane, _ = after([command], lane)
        assert lane.is_busy
    assert not after([finish("b")], lane)[0].is_busy


def test_r08_the_next_run_starts_in_the_same_step_as_the_end() -> None:
    lane = lane_of("active + queued")
    finished = finish("a").apply(lane)
    handoff = finished.then(DISPATCH.apply(finished.lane))
    assert picture(handoff.lane) == "b:active c:queued"
    assert {change.run.run_id: change.run.state for change in handoff.runs} == {
        "a": RunState.COMPLETED,
        "b": RunState.ACTIVE,
    }


def test_r09_a_cancelled_run_stays_active_until_its_agent_returns() -> None:
    lane, _ = after([cancel(), *enter("n"), DISPATCH], lane_of("active"))
    assert picture(lane) == "a:cancelling n:queued"
    assert picture(after([finish("a"), DISPATCH], lane)[0]) == "n:active"


def test_r09_commands_of_a_fenced_off_attempt_change_nothing() -> None:
    lane = lane_of("active again")
    for command in (finish("a", 1), drain("a", 1)):
        with pytest.raises(IllegalCommand):
            command.apply(lane)


# --- Cancel -------------------------------------------------------------------------------------


def test_r10_cancel_covers_active_queued_and_accepts_that_have_begun() -> None:
    lane, _ = after([reserve("n"), reserve("m")], lane_of("active + queued"))
    lane, made = after([cancel()], lane)
    assert [run.run_id for run in made.reply.cancelled] == ["a", "b", "c", "n", "m"]
    _, rest = after([accept("m"), accept("n"), finish("a")], lane)
    ends = {complete.run_id: complete.state for complete in (*made.completes, *rest.completes)}
    assert ends == dict.fromkeys("abcmn", RunState.CANCELLED)
    assert not rest.lane.is_busy


def test_r10_a_repeated_accept_of_a_covered_run_is_covered_too() -> None:
    """The receipt listed the run, so no other accept of it may start it."""
    lane, made = after([reserve("t1", "n"), cancel(), reserve("t2", "n")])
    assert made.lane.reservations[1].covered
    lane, made = after([Command(Verb.ACCEPT, "t2", "n")], lane)
    assert [complete.state for complete in made.completes] == [RunState.CANCELLED]


def test_r11_cancel_spares_runs_accepted_later() -> None:
    lane, _ = after([*enter("m"), *enter("o")], lane_of("covered reservation"))
    assert picture(lane) == "m:accepted o:queued [n!]"
    lane, made = after([accept("n")], lane)
    assert picture(lane) == "m:accepted o:queued"
    assert [complete.run_id for complete in made.completes] == ["n"]


@pytest.mark.parametrize("scope", [CancelScope.SESSION, ACTIVE, WAITING])
@pytest.mark.parametrize("shape", ["missing", "idle"])
def test_r12_cancel_of_an_idle_session_records_nothing(shape: str, scope: CancelScope) -> None:
    idle = lane_of(shape)
    lane, made = after([cancel(scope)], idle)
    assert lane == idle
    assert made.reply == Receipt("s", (), idle.accept_seq)
    assert not made.needs_commit
    assert picture(after([*enter("n"), DISPATCH], lane)[0]) == "n:active"


def test_r13_a_repeated_cancel_covers_nothing_twice() -> None:
    lane, _ = after([reserve("n"), cancel()], lane_of("active + folded + queued"))
    again, made = after([cancel()], lane)
    assert again == lane
    assert made.reply.cancelled == ()


@pytest.mark.parametrize("shape", ["waiting for a slot", "retried"])
def test_r14_cancel_on_entry_writes_the_turn(shape: str) -> None:
    lane = lane_of(shape)
    _, made = after([cancel(RUN, "a")], lane)
    prompt = [] if lane.waiting[0].turn else [("a", Role.USER, None)]
    assert spoken(made.messages) == [*prompt, ("a", Role.ASSISTANT, FinishReason.CANCELED)]
    (complete,) = made.completes
    assert complete.message_id == made.messages[-1].message_id
    assert complete.finish_reason is FinishReason.CANCELED


def test_r14_turns_cancelled_on_entry_follow_the_active_turn() -> None:
    lane, made = after([*enter("a"), DISPATCH, *enter("b"), cancel()])
    _, rest = after([finish("a")], lane)
    assert [run_id for run_id, _, _ in spoken((*made.messages, *rest.messages))] == [*"aabb"]


def test_r15_a_run_cancelled_before_any_output_writes_its_prompt_once() -> None:
    _, made = after([*enter("a"), DISPATCH, NODE_LOST, DISPATCH, cancel(), finish("a", 2)])
    prompts = [message for message in made.messages if message.role is Role.USER]
    assert [(message.run_id, message.ordinal) for message in prompts] == [("a", 0)]


def test_r16_the_text_so_far_is_kept_and_open_calls_are_answered() -> None:
    _, made = after([cancel(), finish("a")], lane_of("active + folded"))
    assert spoken(made.messages) == [
        ("a", Role.ASSISTANT, FinishReason.STOP),
        ("f", Role.USER, None),
        ("a", Role.ASSISTANT, FinishReason.CANCELED),
        ("a", Role.TOOL, None),
    ]
    assert made.messages[0].parts == (Text("so far"),)
    (result,) = made.messages[-1].parts
    assert isinstance(result, ToolResult)
    assert result.is_error


def test_r19_a_cancelled_run_is_not_retried_when_its_node_stops() -> None:
    _, made = after([cancel(), hand_over("a")], lane_of("active"))
    assert [complete.state for complete in made.completes] == [RunState.CANCELLED]


@pytest.mark.parametrize(
    ("command", "left", "covered"),
    [
        (cancel(), "a:cancelling(f) [n!]", "afb"),
        (cancel(ACTIVE), "a:cancelling(f) b:queued [n]", "af"),
        (cancel(WAITING), "a:active(f) [n!]", "b"),
        (cancel(RUN, "a"), "a:cancelling(f) b:queued [n]", "af"),
        (cancel(RUN, "b"), "a:active(f) [n]", "b"),
        (cancel(RUN, "f"), "a:active b:queued [n]", "f"),
        (cancel(RUN, "n"), "a:active(f) b:queued [n!]", ""),
        (cancel(RUN, ""), "a:active(f) b:queued [n]", ""),
    ],
    ids=str,
)
def test_r18_each_scope_covers_exactly_its_runs(command: Command, left: str, covered: str) -> None:
    lane, _ = after([reserve("n")], lane_of("active + folded + queued"))
    lane, made = after([command], lane)
    assert picture(lane) == left
    named = [run.run_id for run in made.reply.cancelled]
    assert named == [*covered, *(["n"] if "n!" in left else [])]


@pytest.mark.parametrize("ok", [True, False])
def test_r19_a_cancel_before_the_completion_wins(*, ok: bool) -> None:
    _, made = after([cancel(), finish("a", ok=ok)], lane_of("active"))
    (complete,) = made.completes
    assert complete.cancelled
    assert complete.error is None
    assert complete.finish_reason is FinishReason.CANCELED
    assert complete.cancel_reason == "why not"
    assert made.messages[-1].finish_reason is FinishReason.CANCELED


def test_r19_a_completion_before_the_cancel_wins() -> None:
    _, made = after([finish("a"), cancel()], lane_of("active"))
    assert [complete.state for complete in made.completes] == [RunState.COMPLETED]
    assert made.reply.cancelled == ()


def test_r19_a_confirmed_cancel_survives_the_loss_of_its_node() -> None:
    _, made = after([cancel(), NODE_LOST], lane_of("active"))
    assert [complete.state for complete in made.completes] == [RunState.CANCELLED]


def test_r20_the_receipt_lists_states_before_the_cancel_and_the_fence() -> None:
    lane, _ = after([reserve("n")], lane_of("active + folded + queued"))
    _, made = after([cancel()], lane)
    assert made.reply == Receipt(
        "s",
        (
            CoveredRun("a", 1, RunState.ACTIVE),
            CoveredRun("f", 2, RunState.FOLDED),
            CoveredRun("b", 3, RunState.QUEUED),
            CoveredRun("n", 0, RunState.ACCEPTED),
        ),
        3,
    )


@pytest.mark.parametrize("scope", [CancelScope.SESSION, WAITING])
def test_r20_a_run_with_a_repeated_accept_is_listed_once(scope: CancelScope) -> None:
    lane, _ = after([reserve("t1", "n"), reserve("t2", "n")])
    _, made = after([cancel(scope)], lane)
    assert made.reply.cancelled == (CoveredRun("n", 0, RunState.ACCEPTED),)


def test_r20_a_repeated_accept_does_not_list_a_run_that_is_not_covered() -> None:
    lane, _ = after([reserve("again", "a"), cancel(WAITING)], lane_of("active"))
    assert picture(lane) == "a:active [a]"


# --- Complete -----------------------------------------------------------------------------------


def test_r21_every_way_to_end_emits_one_run_complete() -> None:
    _, made = after(
        [
            *enter("completed"), DISPATCH, finish("completed"),
            *enter("failed"), DISPATCH, finish("failed", ok=False),
            *enter("active"), DISPATCH, *enter("dropped"), cancel(WAITING),
            cancel(), finish("active"),
            reserve("entry"), cancel(), accept("entry"),
            *enter("unready"), FAIL_WAITING,
            *enter("lost"), DISPATCH, NODE_LOST, DISPATCH, NODE_LOST,
        ]
    )  # fmt: skip
    assert [(complete.run_id, complete.state) for complete in made.completes] == [
        ("completed", RunState.COMPLETED),
        ("failed", RunState.FAILED),
        ("dropped", RunState.CANCELLED),
        ("active", RunState.CANCELLED),
        ("entry", RunState.CANCELLED),
        ("unready", RunState.FAILED),
        ("lost", RunState.FAILED),
    ]
    assert made.completes[-1].error is not None
    assert made.completes[-1].error.reason == "INTERRUPTED"


def test_r23_run_complete_carries_the_end_of_the_turn() -> None:
    _, made = after([*enter("a"), DISPATCH, finish("a")])
    (complete,) = made.completes
    assert (complete.session_id, complete.run_id, complete.accept_seq) == ("s", "a", 1)
    assert complete.text == "so far"
    assert complete.message_id == made.messages[-1].message_id
    assert complete.usage.requests == 1
    assert complete.attempt == 1
    assert None not in {complete.accepted_at, complete.started_at, complete.ended_at}


def test_r24_a_failed_run_does_not_affect_other_runs() -> None:
    lane, made = after([finish("a", ok=False)], lane_of("active + queued"))
    assert [complete.run_id for complete in made.completes] == ["a"]
    assert picture(lane) == "b:accepted c:queued"


# --- Fold and queue -----------------------------------------------------------------------------


def test_r26_a_folded_run_joins_the_turn_and_shares_its_end() -> None:
    lane, joined = after([*enter("a"), DISPATCH, *enter("f", FOLD), *enter("g", FOLD), drain("a")])
    assert [run.run_id for run in joined.reply] == ["f", "g"]
    _, made = after([finish("a")], lane)
    host, *folded = made.completes
    for complete in folded:
        assert complete.folded_into == "a"
        assert (complete.message_id, complete.text) == (host.message_id, host.text)
    events = [(event.run_id, event.index, event.body) for event in joined.events]
    assert ("f", 2, Folded("f", "a")) in events
    assert ("a", 4, Folded("f", "a")) in events
    assert ("a", 5, Folded("g", "a")) in events


def test_r26_a_run_covered_by_a_cancel_is_not_folded() -> None:
    lane, _ = after([cancel(ACTIVE), drain("a")], lane_of("active + fold waiting"))
    assert picture(lane) == "a:cancelling b:queued f:queued"
    lane, _ = after([cancel(RUN, "f"), drain("a")], lane_of("active + fold waiting"))
    assert picture(lane) == "a:active b:queued"


def test_r26_a_fold_run_after_the_last_step_gets_its_own_turn() -> None:
    lane, _ = after([*enter("a"), DISPATCH, *enter("f", FOLD), finish("a"), DISPATCH])
    assert picture(lane) == "f:active"


def test_r26_a_run_that_was_attempted_before_is_not_folded() -> None:
    lane, made = after([drain("i")], lane_of("retried behind another"))
    assert made.reply == ()
    assert picture(lane) == "i:active g:queued"


def test_r26_a_folded_run_that_is_cancelled_alone_leaves_its_prompt_in_the_turn() -> None:
    lane, made = after([cancel(RUN, "f")], lane_of("active + folded"))
    assert [(end.run_id, end.folded_into) for end in made.completes] == [("f", "a")]
    assert after([finish("a")], lane)[1].completes[0].state is RunState.COMPLETED


@pytest.mark.parametrize("then", ["finish", "cancel on entry"])
def test_r26_a_retry_keeps_the_prompt_of_a_withdrawn_folded_run(then: str) -> None:
    """The output of the attempt that it joined is dropped; its prompt must not be."""
    lane, _ = after([*enter("a"), DISPATCH, *enter("f", FOLD), *enter("g", FOLD), drain("a")])
    lane, _ = after([cancel(RUN, "f")], lane)
    said = (DraftMessage(Role.USER, run_id="f"), DraftMessage(Role.USER, run_id="g"))
    lost = rules.node_lost(lane, "a", 1, at=AT, content=said, events=9)
    assert spoken(lost.messages) == [("f", Role.USER, None)]
    rest = [DISPATCH, finish("a", 2)] if then == "finish" else [cancel(RUN, "a")]
    _, made = after(rest, stored(lane, lost))
    turn = sorted((m.turn, m.ordinal, m.run_id) for m in (*lost.messages, *made.messages))
    assert [run_id for number, _, run_id in turn if number == 1] == ["f", "a"]
    ids = [message.message_id for message in (*lost.messages, *made.messages)]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("end", [rules.hand_over, rules.finish])
@pytest.mark.parametrize("then", [cancel(RUN, "a"), expire("a")], ids=["cancel", "expiry"])
def test_r44_a_run_that_ends_while_parked_keeps_the_prompt_of_a_withdrawn_folded_run(
    then: Command, end: Callable[..., Transition[Any]]
) -> None:
    """The output that was dropped when it parked must not return; its ordinals are taken."""
    lane, _ = after([*enter("a"), DISPATCH, *enter("f", FOLD), drain("a"), cancel(RUN, "f")])
    lane, _ = after([ask("a", resumable=True)], lane)
    said = (
        DraftMessage(Role.USER, run_id="f"),
        DraftMessage(Role.ASSISTANT, (Text("dropped"),)),
    )
    tail = (TextDelta("lost"),)
    parked = rules.node_lost(lane, "a", 1, at=AT, content=said, events=9)
    lane, _ = after([then], stored(lane, parked))
    outcome = Outcome(FinishReason.STOP, None, said, tail)
    ended = end(lane, "a", 1, outcome, at=AT, events=9)
    messages = (*parked.messages, *ended.messages)
    assert [(run_id, role) for run_id, role, _ in spoken(messages)] == [
        ("f", Role.USER),
        ("a", Role.ASSISTANT),
    ]
    assert [complete.text for complete in ended.completes] == [""]
    assert tail[0] not in [event.body for event in ended.events]
    places = {(message.turn, message.ordinal) for message in messages}
    assert len(places) == len({message.message_id for message in messages}) == len(messages)


@pytest.mark.parametrize("end", [rules.finish, rules.hand_over])
@pytest.mark.parametrize(
    ("then", "state"), [(cancel(), RunState.CANCELLED), (expire("a"), RunState.FAILED)]
)
def test_r42_a_run_that_is_to_end_as_its_agent_leaves_is_ended_by_its_supervisor(
    then: Command, state: RunState, end: Callable[..., Transition[Any]]
) -> None:
    """It has no node any more, so nobody else would look after it."""
    lane, _ = after([*enter("a"), DISPATCH, adopt("a"), ask("a", park=True)])
    outcome = Outcome(FinishReason.STOP, None, (), ())
    with pytest.raises(IllegalCommand):
        end(lane, "a", 1, outcome, at=AT, events=9, host=ELSEWHERE)
    lane, _ = after([then], lane)
    ended = end(lane, "a", 1, outcome, at=AT, events=9, host=ELSEWHERE)
    assert [complete.state for complete in ended.completes] == [state]


@pytest.mark.parametrize("again", [False, True], ids=["once", "repeated"])
def test_r44_an_agent_that_asks_to_restart_gives_back_what_it_folded_in(*, again: bool) -> None:
    """A commit of the question that was not confirmed is repeated."""
    lane, _ = after([*enter("a"), DISPATCH, *enter("f", FOLD), *enter("g", FOLD), drain("a")])
    lane, _ = after([cancel(RUN, "f")], lane)
    said = (DraftMessage(Role.USER, run_id="f"), DraftMessage(Role.USER, run_id="g"))

    def post(lane: Lane) -> Transition[Any]:
        request = ask("a").asked(lane)
        park = Park("", 1)
        return rules.ask(
            lane, "a", 1, (request,), at=AT, events=9, number=1, park=park, content=said
        )

    asked = post(lane)
    lane = stored(lane, asked)
    assert picture(lane) == "a:input_required ?a(k parked restarts) g:queued"
    assert [(run_id, role) for run_id, role, _ in spoken(asked.messages)] == [("f", Role.USER)]
    if again:
        repeated = post(lane)
        lane = stored(lane, repeated)
        assert not repeated.messages
    lane, resumed = after([answer("a"), RESUME], lane)
    assert picture(lane) == "a:active ?a(+1) g:queued"
    assert resumed.events[-1].body == Started(2)


def test_r16_a_cancel_keeps_the_text_of_a_run_that_waits_to_restart() -> None:
    lane, _ = after([ask("a", restart=True), cancel()], lane_of("active"))
    said = (DraftMessage(Role.ASSISTANT, (Text("so far"),)),)
    ended = rules.node_lost(lane, "a", 1, at=AT, content=said, events=9)
    assert [complete.text for complete in ended.completes] == ["so far"]


def test_r27_a_queued_run_is_never_folded() -> None:
    lane, made = after([drain("a")], lane_of("active + queued"))
    assert made.reply == ()
    assert picture(lane) == "a:active b:queued c:queued"


@pytest.mark.parametrize("shape", ["waiting for a slot", "active", "cancelling", "retried"])
def test_r27_reject_is_refused_in_a_busy_session(shape: str) -> None:
    lane, _ = after([reserve("n")], lane_of(shape))
    with pytest.raises(SessionBusy):
        accept("n", REJECT).apply(lane)


@pytest.mark.parametrize("first", ["a", "b"])
def test_r27_a_burst_of_reject_accepts_admits_the_first_one(first: str) -> None:
    """The earliest reservation wins, in either order of the accepts."""
    lane, _ = after([reserve("a"), reserve("b")])
    if first == "b":
        with pytest.raises(SessionBusy):
            accept("b", REJECT).apply(lane)
    lane, _ = after([accept("a", REJECT)], lane)
    with pytest.raises(SessionBusy):
        accept("b", REJECT).apply(lane)
    assert picture(lane) == "a:accepted [b]"


@pytest.mark.parametrize(
    ("shape", "active"),
    [
        ("idle", ""),
        ("waiting for a slot", ""),
        ("active", "a"),
        ("cancelling", "a"),
        ("active + queued", "a"),
    ],
)
def test_accept_that_expects_another_active_run_changes_nothing(shape: str, active: str) -> None:
    lane, _ = after([reserve("n")], lane_of(shape))
    wrong = Command(Verb.ACCEPT, "n", "n", INTERRUPT, expected="other")
    with pytest.raises(ActiveRunChanged) as caught:
        wrong.apply(lane)
    assert caught.value.metadata["active_run_id"] == active
    if active:
        right = Command(Verb.ACCEPT, "n", "n", expected=active)
        assert right.apply(lane).reply.run_id == "n"


def test_repeated_accept_is_answered_whatever_is_active_now() -> None:
    lane, _ = after([*enter("n"), reserve("m")], lane_of("active"))
    again, _ = after([reserve("again")], lane)
    repeated = Command(Verb.ACCEPT, "again", "n", expected="long ago")
    made = repeated.apply(again)
    assert (made.reply.run_id, made.needs_commit) == ("n", False)


def test_run_that_waits_for_its_next_attempt_is_expected_as_the_active_one() -> None:
    lane = lane_of("backing off")
    lane, _ = after([reserve("n")], lane)
    assert lane.backing_off is not None
    made = Command(Verb.ACCEPT, "n", "n", expected=lane.backing_off.run_id).apply(lane)
    assert made.reply.run_id == "n"


def test_r27_interrupt_cancels_the_active_run_and_goes_to_the_head() -> None:
    lane, made = after([*enter("i", INTERRUPT)], lane_of("active + queued"))
    assert picture(lane) == "a:cancelling i:queued b:queued c:queued"
    _, rest = after([finish("a"), DISPATCH], lane)
    assert picture(rest.lane) == "i:active b:queued c:queued"
    assert rest.completes[0].cancel_reason == "interrupted by i"
    assert not made.completes


def test_r27_interrupt_goes_before_a_run_that_waits_for_a_slot() -> None:
    lane, _ = after([*enter("i", INTERRUPT)], lane_of("waiting for a slot"))
    assert picture(lane) == "i:accepted a:queued"


def test_r28_a_completion_leaves_no_state_behind() -> None:
    lane, _ = after(
        [cancel(ACTIVE), finish("a"), *enter("n"), DISPATCH, drain("n")], lane_of("active")
    )
    assert lane.active is not None
    assert lane.active.cancel_reason == ""
    _, made = after([finish("n")], lane)
    assert [complete.state for complete in made.completes] == [RunState.COMPLETED]


def test_r30_cancel_covers_runs_that_wait_for_the_agent() -> None:
    lane, made = after([cancel()], lane_of("waiting for a slot + queued"))
    assert [complete.run_id for complete in made.completes] == ["a", "b"]
    assert not lane.is_busy


def test_r30_runs_whose_agent_never_gets_ready_end_failed() -> None:
    _, made = after([FAIL_WAITING], lane_of("waiting for a slot + queued"))
    assert [(end.run_id, end.state, end.error) for end in made.completes] == [
        ("a", RunState.FAILED, BOOM),
        ("b", RunState.FAILED, BOOM),
    ]
    assert spoken(made.messages) == [
        ("a", Role.USER, None),
        ("a", Role.ASSISTANT, FinishReason.ERROR),
        ("b", Role.USER, None),
        ("b", Role.ASSISTANT, FinishReason.ERROR),
    ]


# --- Transitions --------------------------------------------------------------------------------


def test_merged_transitions_equal_the_sum_of_their_parts() -> None:
    _, made = after([*enter("a"), DISPATCH, *enter("f", FOLD), drain("a"), finish("a")])
    changes = {change.run.run_id: change for change in made.runs}
    assert set(changes) == {"a", "f"}
    for change in changes.values():
        assert change.request is not None, "a run that began and ended at once is still new"
        assert change.complete is not None
    assert [complete.run_id for complete in made.completes] == ["a", "f"]
    told = [type(event.body) for event in made.events if event.run_id == "a"]
    assert told == [Accepted, Started, Folded, TextDelta, RunComplete]
    indices = [event.index for event in made.events if event.run_id == "a"]
    assert indices == [1, 2, 4, 6, 7], "3 and 5 were streamed"


def test_a_removed_idle_session_starts_again_from_version_zero() -> None:
    lane, made = after([REMOVE], lane_of("idle"))
    assert made.removed
    assert made.needs_commit
    assert lane == EMPTY


# --- Agents -------------------------------------------------------------------------------------


def test_r31_a_run_gets_the_agent_it_names_else_that_of_its_session_else_the_default() -> None:
    lane, _ = after([*enter("a"), *enter("b", agent=OTHER)])
    assert [run.agent for run in lane.waiting] == [DEFAULT_AGENT, OTHER]
    of_session = EMPTY._replace(agent=OTHER)
    lane, _ = after([*enter("a"), reserve("b"), accept("b", agent=DEFAULT_AGENT)], of_session)
    assert [run.agent for run in lane.waiting] == [OTHER, DEFAULT_AGENT]
    lane, _ = after([DISPATCH, finish("a"), DISPATCH, NODE_LOST], lane)
    assert (lane.agent, [run.agent for run in lane.waiting]) == (OTHER, [DEFAULT_AGENT])


def test_r31_an_unknown_agent_is_refused_and_changes_nothing() -> None:
    lane, _ = after([*enter("a"), DISPATCH, reserve("b")])
    with pytest.raises(AgentNotFound, match="nobody"):
        accept("b", INTERRUPT, agent="nobody").apply(lane)
    # The agent of the session may be gone.
    with pytest.raises(AgentNotFound, match="gone"):
        accept("b").apply(lane._replace(agent="gone"))


def test_r31_a_caller_is_limited_to_its_agents_also_by_default() -> None:
    names = AGENTS.limited_to(frozenset({OTHER, "gone"}))
    assert names.choose(OTHER) == names.choose("", OTHER) == OTHER
    for requested, of_session in (("", ""), (DEFAULT_AGENT, OTHER), ("nobody", "")):
        with pytest.raises(PermissionDenied):
            names.choose(requested, of_session)
    with pytest.raises(AgentNotFound):
        names.choose("gone")


def test_r26_a_fold_for_another_agent_waits_and_the_one_behind_it_joins() -> None:
    lane, _ = after([*enter("a"), DISPATCH, *enter("b", FOLD, agent=OTHER), *enter("c", FOLD)])
    lane, made = after([drain("a")], lane)
    assert [run.run_id for run in made.reply] == ["c"]
    assert picture(after([finish("a")], lane)[0]) == "b:accepted"


def test_r32_only_the_runs_of_one_agent_fail_and_the_next_one_is_first() -> None:
    lane, _ = after([*enter("a", agent=OTHER), *enter("b"), *enter("c", agent=OTHER)])
    lane, made = after([FAIL_OTHER], lane)
    assert (made.reply, picture(lane)) == (2, "b:accepted")


def test_r36_a_recovery_leaves_a_run_on_the_node_where_its_worker_is_now() -> None:
    """The node that recovers it read that its host is dead, and the worker was faster."""
    lane, _ = after([*enter("a"), DISPATCH])
    moved = rules.adopt(lane, "a", 1, host="two")
    there = stored(lane, moved)
    late = rules.adopt(there, "a", 1, host="three", lost_with="")
    assert (late.needs_commit, late.reply.host) == (False, "two")
    lost = rules.node_lost(there, "a", 1, at=AT, content=(), events=9, lost_with="")
    assert (lost.needs_commit, lost.reply) == (False, False)
    assert rules.adopt(there, "a", 1, host="three", lost_with="two").reply.host == "three"
    assert rules.node_lost(there, "a", 1, at=AT, content=(), events=9, lost_with="two").reply
