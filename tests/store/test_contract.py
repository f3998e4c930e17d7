"""The contract of every store."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from runlane_server.core import lane as rules
from runlane_server.core.model import (
    MAX_COMPLETE_TEXT_BYTES,
    MAX_COUNT,
    Accepted,
    Attachment,
    CancelScope,
    FinishReason,
    Message,
    Reasoning,
    ReasoningDelta,
    Role,
    RunComplete,
    RunError,
    RunEvent,
    RunKey,
    RunState,
    SessionKey,
    Started,
    Text,
    TextDelta,
    ToolCall,
    ToolResult,
    Usage,
    WhenBusy,
)
from runlane_server.core.transition import Lane, Outcome, describe
from runlane_server.core.turn import DraftMessage
from runlane_server.store.base import (
    BusySession,
    DeletedRun,
    EventFilter,
    LoggedComplete,
    NewSession,
    RunIdTaken,
    SessionTaken,
    Stale,
    Store,
)
from runlane_server.store.lookup import RunFilter
from runlane_server.store.sqlite.store import SqliteStore
from support.staging import SECONDS
from support.story import MANY, PLENTY, START, TENANT, Story, Witness, answer, request

EVERYTHING = EventFilter()

FAR = 1 << 52
"""A time far in the future, in microseconds."""


async def transcript(story: Story) -> list[Message]:
    page = await story.store.list_messages(story.key, limit=MANY, max_bytes=PLENTY)
    assert page.next is None
    return list(page.items)


async def events(story: Story, run_id: str) -> list[RunEvent]:
    return list(
        await story.store.run_events(story.run_key(run_id), after=0, limit=MANY, max_bytes=PLENTY)
    )


async def logged(store: Store, after: int = 0) -> list[LoggedComplete]:
    page = await store.completes(TENANT, EVERYTHING, after=after, limit=MANY, max_bytes=PLENTY)
    assert page.scanned == max(after, store.position)
    return list(page.events)


# --- Lanes --------------------------------------------------------------------------------------


async def test_unknown_is_empty(store: Store) -> None:
    key = SessionKey(TENANT, "nobody")
    run = RunKey(TENANT, "nothing")
    assert await store.load_lane(key) == Lane(key)
    assert await store.get_session(key) is None
    assert await store.get_run(run) is None
    assert await store.get_prompt(run) is None
    assert await store.position_of(run) is None
    assert await store.busy_sessions() == []
    assert list(await store.run_events(run, after=0, limit=1, max_bytes=1)) == []
    assert (await store.list_messages(key, limit=1, max_bytes=1)).items == ()
    assert (await store.list_runs(TENANT, limit=1)).items == ()
    assert (await store.list_runs(TENANT, RunFilter("nobody"), limit=1)).items == ()
    assert (await store.list_sessions(TENANT, limit=1)).items == ()
    assert (store.position, store.compacted, store.failed) == (0, 0, None)
    assert len(store.store_id) == 8


async def test_lane_is_read_back_after_each_step(store: Store, story: Story) -> None:
    async def same() -> None:
        assert await store.load_lane(story.key) == story.lane

    traced = request("f", when_busy=WhenBusy.FOLD)._replace(trace=f"00-{'a' * 32}-{'b' * 16}-01")
    await story.accept("a", traced, "b", "c")
    await same()
    assert story.lane.waiting[1].trace == traced.trace
    await story.start()
    await same()
    await story.append(TextDelta("x"), TextDelta("y"))
    await same()
    await story.fold()
    await same()
    await story.accept(request("i", when_busy=WhenBusy.INTERRUPT))
    await same()
    assert [run.run_id for run in story.lane.waiting] == ["i", "b", "c"]
    await story.finish()
    await same()
    await story.start()
    await story.lose_node()
    await same()
    await story.start()
    await story.lose_node()
    await same()
    await story.cancel(CancelScope.RUN, "c")
    await same()
    await story.fail_waiting("AGENT_UNAVAILABLE")
    await same()
    assert not story.lane.is_busy


async def test_reservations_are_not_stored(store: Store, story: Story) -> None:
    await story.accept("a")
    story.lane = rules.reserve(story.lane, "other", "b").lane
    await story.start()
    assert story.lane.reservations
    assert await store.load_lane(story.key) == story.lane._replace(reservations=())


async def test_stale_writes_nothing(store: Store, story: Story, witness: Witness) -> None:
    await story.accept("a")
    late = replace(story)
    late.lane = story.lane
    await story.start()
    told = {key: list(events) for key, events in witness.runs.items()}
    with pytest.raises(Stale):
        await late.accept("b")
    with pytest.raises(Stale):
        await Story(store).accept("c")  # takes the session for a new one
    ahead = rules.dispatch(story.lane, at=1).at_version(99)
    with pytest.raises(Stale):
        await store.commit(98, ahead)
    assert await store.load_lane(story.key) == story.lane
    assert await store.get_run(story.run_key("b")) is None
    assert len(await transcript(story)) == 1
    assert witness.runs == told


async def test_stale_end_is_not_logged(store: Store, story: Story, witness: Witness) -> None:
    await story.accept("a")
    await story.start()
    end = story.finishing(answer("late")).at_version(3)
    await story.cancel()
    with pytest.raises(Stale):
        await store.commit(2, end)
    assert await logged(store) == witness.log == []
    assert store.position == 0
    await story.finish()
    assert [event.position for event in witness.log] == [1]


async def test_run_id_is_taken_in_all_sessions_of_the_tenant(
    store: Store, story: Story, witness: Witness
) -> None:
    await story.accept("a")
    other = Story(store, "other")
    with pytest.raises(RunIdTaken):
        await other.accept(request("a", "another prompt"))
    assert await store.get_session(other.key) is None
    await other.accept("b")
    with pytest.raises(RunIdTaken):
        await other.commit(other.accepting(request("a")))
    assert await store.load_lane(other.key) == other.lane
    assert (await store.get_prompt(story.run_key("a"))) == request("a").prompt
    assert set(witness.runs) == {story.run_key("a"), story.run_key("b")}
    elsewhere = Story(store, tenant="another")
    await elsewhere.play("a")
    assert (await store.get_run(elsewhere.run_key("a"))) is not None
    assert await logged(store) == []


async def test_removed_session_leaves_only_its_log(store: Store, story: Story) -> None:
    big = request("a", "x" * 1_000, Attachment("n", "text/plain", "t"))
    complete = await story.play(big, "the end")
    other = Story(store, "other")
    await other.play("b")
    with pytest.raises(Stale):
        await store.commit(2, rules.remove(story.lane).at_version(0))
    await story.remove()
    assert await store.load_lane(story.key) == Lane(story.key)
    assert await store.get_session(story.key) is None
    assert await store.get_run(story.run_key("a")) is None
    assert await store.get_prompt(story.run_key("a")) is None
    assert await events(story, "a") == []
    assert await transcript(story) == []
    assert [run.run_id for run in (await store.list_runs(TENANT, limit=9)).items] == ["b"]
    assert (await logged(store))[0].complete == complete
    assert len(await transcript(other)) == 2
    assert await store.forget_deleted(FAR, 9) == 1
    await story.play(big, "again")  # nothing of the first one is in the way
    assert (await store.get_prompt(story.run_key("a"))) == big.prompt


async def test_r03_id_of_a_deleted_run_is_refused_until_it_is_forgotten(
    store: Store, story: Story
) -> None:
    first = request("a", "first")
    await story.play(first)
    assert await store.get_deleted_run(story.run_key("a")) is None
    await story.remove()
    deleted = await store.get_deleted_run(story.run_key("a"))
    assert deleted == DeletedRun(story.session_id, first.prompt.fingerprint, events=3)
    for again in (story, Story(store, "another")):
        lane = again.lane = await store.load_lane(again.key)
        with pytest.raises(RunIdTaken):
            await again.accept("a")
        assert await store.load_lane(again.key) == lane
        again.lane = lane
    # One refused run of a batch refuses no other.
    outcomes = await asyncio.gather(
        Story(store, "x").accept("a"), Story(store, "y").accept("b"), return_exceptions=True
    )
    assert [type(it) for it in outcomes] == [RunIdTaken, type(None)]
    elsewhere = Story(store, tenant="another")
    await elsewhere.play("a")

    assert await store.forget_deleted(0, 9) == 0
    assert await store.forget_deleted(FAR, 0) == 0
    assert await store.forget_deleted(FAR, 9) == 1
    assert await store.get_deleted_run(story.run_key("a")) is None
    story.lane = await store.load_lane(story.key)
    await story.play("a")


async def test_deleted_runs_are_forgotten_oldest_first(store: Store) -> None:
    stories = {name: Story(store, name) for name in ("a", "b", "c")}
    for name, story in stories.items():
        await story.play(name)
        await story.remove()
    assert await store.forget_deleted(FAR, 2) == 2
    left = [await store.get_deleted_run(it.run_key(name)) for name, it in stories.items()]
    assert [it is None for it in left] == [True, True, False]


async def test_r21_discarded_session_ends_its_open_runs(store: Store, story: Story) -> None:
    await story.play("ended")
    await story.accept("active", request("folded", when_busy=WhenBusy.FOLD), "waiting")
    await story.start()
    await story.fold()
    await store.discard(story.key, story.tick())
    assert await store.load_lane(story.key) == Lane(story.key)
    assert await store.get_run(story.run_key("active")) is None
    ends = [event.complete for event in await logged(store)]
    assert sorted(it.run_id for it in ends) == ["active", "ended", "folded", "waiting"]
    reasons = {it.run_id: it.error and it.error.reason for it in ends}
    assert reasons.pop("ended") is None
    assert set(reasons.values()) == {"CORRUPT_RECORD"}
    await store.discard(story.key, story.tick())  # there is no session
    assert len(await logged(store)) == 4
    with pytest.raises(RunIdTaken):
        await Story(store).accept("active")


# --- The active run -----------------------------------------------------------------------------


async def test_append_is_fenced(store: Store, story: Story) -> None:
    await story.accept("a", request("f", when_busy=WhenBusy.FOLD), "b")
    key = story.run_key("a")
    first = [RunEvent("a", 9, 1, TextDelta("never"))]
    with pytest.raises(Stale):
        await store.append(key, 0, first)  # has not started
    await story.start()
    with pytest.raises(Stale):
        await store.append(key, 2, first)  # another attempt
    with pytest.raises(Stale):
        await store.append(story.run_key("b"), 0, first)  # waits
    with pytest.raises(Stale):
        await store.append(story.run_key("nothing"), 1, first)
    with pytest.raises(Stale):
        await store.append(RunKey("another", "a"), 1, first)
    await story.fold()
    await story.cancel()
    with pytest.raises(Stale):
        await store.append(story.run_key("f"), 0, first)  # is cancelling, in the turn of another
    await story.append(TextDelta("while cancelling"))
    await story.finish()
    with pytest.raises(Stale):
        await store.append(key, 1, first)
    bodies = [event.body for event in await events(story, "a")]
    assert TextDelta("never") not in bodies
    assert TextDelta("while cancelling") in bodies


async def test_r33_append_from_a_node_that_the_attempt_has_left_is_refused(
    store: Store, story: Story
) -> None:
    if isinstance(store, SqliteStore):
        pytest.skip("a file has one node")
    await story.accept("a")
    key = await story.start("n1")
    await story.append(TextDelta("first"))
    await story.commit(rules.adopt(story.lane, "a", 1, host="n2"))
    late = story.events(TextDelta("late"))
    for host in ("n1", "", "n"):
        with pytest.raises(Stale):
            await store.append(key, 1, late, host=host)
        with pytest.raises(Stale):
            await store.keep_part(key, 1, 0, Text("late"), host=host)
    await story.append(TextDelta("second"))
    await store.keep_part(key, 1, 0, Text("kept"), host="n2")
    await story.finish()
    with pytest.raises(Stale):
        await store.append(key, 1, late, host="n2")
    bodies = [event.body for event in await events(story, "a")]
    assert TextDelta("late") not in bodies


async def test_append_to_a_lost_attempt_is_refused(store: Store, story: Story) -> None:
    await story.accept("a")
    await story.start()
    await story.lose_node()
    await story.start()
    with pytest.raises(Stale):
        await store.append(story.run_key("a"), 1, [RunEvent("a", 9, 1, TextDelta("late"))])
    await story.append(TextDelta("second"))
    assert [event.index for event in await events(story, "a")] == [1, 2, 3, 4]


async def test_event_that_is_there_is_not_written_again(store: Store, story: Story) -> None:
    await story.accept("a")
    await story.start()
    late = replace(story)
    late.lane = story.lane
    await story.append(TextDelta("x"))
    with pytest.raises(Stale):
        await store.append(story.run_key("a"), 1, [RunEvent("a", 3, 1, TextDelta("again"))])
    with pytest.raises(Stale):
        await late.finish()  # does not know of the append
    assert await store.load_lane(story.key) == story.lane
    assert (await events(story, "a"))[-1].body == TextDelta("x")
    assert await logged(store) == []


async def test_appending_nothing_is_nothing(store: Store, witness: Witness) -> None:
    await store.append(RunKey(TENANT, "a"), 1, [])
    assert witness.runs == {}


async def test_run_events_are_read_back_whole_and_by_pages(store: Store, story: Story) -> None:
    await story.accept("a")
    await story.start()
    said = (
        TextDelta("Grüße \0 🙂"),
        ReasoningDelta("hm"),
        ToolCall("1", "look", '{"a": "\\u0000"}'),
        ToolResult("1", "look", "seen", is_error=True),
        TextDelta("z" * 1_000),
    )
    await story.append(*said)
    complete = await story.finish("the text")
    found = await events(story, "a")
    assert [event.index for event in found] == list(range(1, 9))
    assert [event.body for event in found] == [Accepted(1), Started(1), *said, complete]
    assert [event.at for event in found] == sorted(event.at for event in found)

    async def page(after: int, limit: int, max_bytes: int) -> list[int]:
        read = await store.run_events(
            story.run_key("a"), after=after, limit=limit, max_bytes=max_bytes
        )
        return [event.index for event in read]

    assert await page(2, 3, PLENTY) == [3, 4, 5]
    assert await page(7, 9, PLENTY) == [8]
    assert await page(8, 9, PLENTY) == []
    assert await page(6, 9, 1) == [7]
    assert await page(5, 9, 1_500) == [6]
    assert await page(5, 9, 2_000) == [6, 7]


async def test_folded_runs_share_the_turn_and_the_end(store: Store, story: Story) -> None:
    await story.accept("a", request("f", "and", when_busy=WhenBusy.FOLD))
    await story.accept(request("w", "or", when_busy=WhenBusy.FOLD))
    await story.start()
    await story.fold()
    await story.cancel(CancelScope.RUN, "w")
    folded = [
        DraftMessage(Role.ASSISTANT, (Text("first"),)),
        DraftMessage(Role.USER, run_id="f"),
        DraftMessage(Role.USER, run_id="w"),
    ]
    await story.finish(answer("both", Usage(1, 2, 3, 4, 5), *folded))
    ends = {}
    for run_id in ("a", "f", "w"):
        run = await store.get_run(story.run_key(run_id))
        assert run is not None
        assert run.complete == (await events(story, run_id))[-1].body
        ends[run_id] = run.complete
    assert {event.complete.run_id: event.complete for event in await logged(store)} == ends
    assert ends["a"] is not None
    assert ends["a"].usage == Usage(1, 2, 3, 4, 5)
    assert ends["f"] is not None
    assert (ends["f"].text, ends["f"].folded_into) == ("both", "a")
    assert ends["w"] is not None
    assert (ends["w"].text, ends["w"].state) == ("", RunState.CANCELLED)
    said = [(message.run_id, message.role, message.parts) for message in await transcript(story)]
    assert said == [
        ("a", Role.USER, (Text("hello"),)),
        ("a", Role.ASSISTANT, (Text("first"),)),
        ("f", Role.USER, (Text("and"),)),
        ("w", Role.USER, (Text("or"),)),
        ("a", Role.ASSISTANT, (Text("both"),)),
    ]


# --- Runs ---------------------------------------------------------------------------------------


async def test_run_is_read_back_in_every_state(store: Store, story: Story) -> None:
    wanted = request("a", "p" * 300, when_busy=WhenBusy.FOLD, colour="blue")._replace(
        timeout=5_000_000
    )
    transition = story.accepting(wanted)
    await story.commit(transition)
    key = story.run_key("a")
    accepted = transition.runs[0].run
    assert await store.get_run(key) == describe(story.key, accepted, wanted)
    await story.start()
    assert story.lane.active is not None
    assert await store.get_run(key) == describe(story.key, story.lane.active, wanted)
    end = story.finishing(Outcome(FinishReason.ERROR, RunError("AGENT_ERROR", "it broke")))
    await story.commit(end)
    found = await store.get_run(key)
    assert found == describe(story.key, end.runs[0].run, wanted, end.completes[0])
    assert found.prompt_excerpt == "p" * 256
    assert found.metadata == {"colour": "blue"}


async def test_long_text_is_cut_in_the_complete_only(store: Store, story: Story) -> None:
    parts = ("é" * 400_000, "è" * 400_000)
    said = DraftMessage(Role.ASSISTANT, (Text(parts[0]), Reasoning("hm"), Text(parts[1])))
    complete = await story.play("a", Outcome(FinishReason.STOP, content=(said,)))
    assert complete.text_truncated
    assert len(complete.text.encode()) == MAX_COMPLETE_TEXT_BYTES
    run = await store.get_run(story.run_key("a"))
    assert run is not None
    assert run.complete == complete
    assert (await events(story, "a"))[-1].body == complete
    assert (await logged(store))[0].complete == complete
    assert (await transcript(story))[1].parts == said.parts


@pytest.mark.parametrize(
    "text",
    ["", " \n", "plain", "a\0b", "\0", "Grüße 🙂 مرحبا", "x" * 256, "x" * 257, "🙂" * (1 << 18)],
    ids=["empty", "blank", "plain", "nul", "only-nul", "unicode", "head", "head+1", "MiB"],
)
async def test_prompt_is_read_back_as_it_was(store: Store, story: Story, text: str) -> None:
    attachments = (
        Attachment("a\0.bin", "application/octet-stream", bytes(range(256)) * 100),
        Attachment("", "text/plain", "naïve\0"),
        Attachment("empty", "text/plain", ""),
        Attachment("nothing", "application/octet-stream", b""),
    )
    wanted = request("a", text, *attachments)
    await story.play(wanted, "\0 and more")
    assert await store.get_prompt(story.run_key("a")) == wanted.prompt
    run = await store.get_run(story.run_key("a"))
    assert run is not None
    assert (run.prompt_excerpt, run.prompt_fingerprint) == (
        wanted.prompt.excerpt,
        wanted.prompt.fingerprint,
    )
    asked, said = await transcript(story)
    text_part = (Text(text),) if text.strip() else ()
    assert asked.parts == (*text_part, *attachments)
    assert said.parts == (Text("\0 and more"),)


async def test_runs_are_listed_latest_first_by_pages(store: Store, story: Story) -> None:
    other = Story(store, "other")
    for n in range(3):
        await story.play(f"a{n}", "some text")
        await other.play(f"b{n}", "some text")
    await story.accept("a3", "a4")
    await story.start()
    await other.accept("b3")
    await other.cancel()
    await Story(store, tenant="another").play("c")

    async def listed(
        session_id: str | None = None, states: tuple[RunState, ...] = (), limit: int = 2
    ) -> str:
        found: list[str] = []
        after = None
        while True:
            page = await store.list_runs(
                TENANT, RunFilter(session_id, frozenset(states)), after=after, limit=limit
            )
            assert len(page.items) == limit or page.next is None
            for run in page.items:
                assert not states or run.state in states
                assert (run.complete is not None) == run.state.is_terminal
                assert run.complete is None or run.complete.text == ""
            found += [run.run_id for run in page.items]
            if page.next is None:
                return " ".join(found)
            after = page.next

    every = "b3 a4 a3 b2 a2 b1 a1 b0 a0"
    assert await listed() == every
    assert await listed(limit=3) == every  # ends exactly at the end of a page
    assert await listed(limit=100) == every
    assert await listed("session") == "a4 a3 a2 a1 a0"
    assert await listed("nobody") == ""
    assert await listed(states=(RunState.ACTIVE,)) == "a3"
    assert await listed(states=(RunState.ACTIVE, RunState.QUEUED, RunState.CANCELLED)) == "b3 a4 a3"
    assert await listed(states=(RunState.COMPLETED,)) == "b2 a2 b1 a1 b0 a0"
    assert await listed("session", (RunState.COMPLETED, RunState.QUEUED)) == "a4 a2 a1 a0"
    assert await listed("session", (RunState.FAILED,)) == ""


# --- Sessions and transcripts -------------------------------------------------------------------


async def test_session_is_created_once(store: Store, story: Story) -> None:
    new = NewSession(story.key, START, "title", {"k": "v"})
    await store.create_session(new)
    assert await store.load_lane(story.key) == Lane(story.key, version=1)
    with pytest.raises(SessionTaken):
        await store.create_session(replace(new, title="again"))
    with pytest.raises(Stale):
        await story.accept("a")  # takes it for a new one
    story.lane = await store.load_lane(story.key)
    await story.accept("a", "b")
    await story.start()
    session = await store.get_session(story.key)
    assert session is not None
    assert (session.title, session.metadata) == ("title", {"k": "v"})
    assert (session.active_run_id, session.waiting_runs, session.busy) == ("a", 1, True)
    assert (session.created_at, session.updated_at) == (START, story.now)
    with pytest.raises(SessionTaken):
        await store.create_session(new)
    await store.create_session(replace(new, key=SessionKey("another", "session")))


async def test_r31_agents_of_sessions_and_runs_are_kept(store: Store, story: Story) -> None:
    await store.create_session(NewSession(story.key, START, agent="a"))
    story.lane = await store.load_lane(story.key)
    assert story.lane.agent == "a"
    await story.accept("own", request("named")._replace(agent="b"))
    await story.start()
    await story.finish()
    lane = await store.load_lane(story.key)
    assert (lane.agent, [run.agent for run in lane.waiting]) == ("a", ["b"])
    session = await store.get_session(story.key)
    assert session is not None
    assert session.agent == "a"
    assert [it.agent for it in (await store.list_sessions(TENANT, limit=9)).items] == ["a"]
    listed = [run.agent for run in (await store.list_runs(TENANT, limit=9)).items]
    in_session = await store.list_runs(TENANT, RunFilter(story.session_id), limit=9)
    assert listed == [run.agent for run in in_session.items] == ["b", "a"]
    run = await store.get_run(story.run_key("own"))
    assert run is not None
    assert run.agent == "a"


async def test_an_edit_leads_the_lane_to_its_next_version(store: Store, story: Story) -> None:
    await store.create_session(NewSession(story.key, START))
    before = await store.get_session(story.key)
    lane = await store.load_lane(story.key)
    assert before is not None
    after = replace(before, title="new")
    assert await store.edit_session(story.key, before, after)
    edited = await store.load_lane(story.key)
    assert edited == lane._replace(version=lane.version + 1)
    assert not await store.edit_session(story.key, before, after)
    assert (await store.load_lane(story.key)).version == edited.version
    # A commit that was decided before it is refused.
    story.lane = lane
    with pytest.raises(Stale):
        await story.accept("a")
    story.lane = edited
    await story.accept("a")


async def test_session_adds_up_usage(store: Store, story: Story) -> None:
    await story.play("a", answer("x", Usage(1, 2, 3, 4, 5)))
    await story.play("b", answer("x", Usage(10, 20, 30, 40, 50)))
    await story.accept("c")
    await story.start()
    last = story.now
    await story.cancel()  # no event announces it
    session = await store.get_session(story.key)
    assert session is not None
    assert session.usage == Usage(11, 22, 33, 44, 55)
    assert session.created_at == START + 1
    assert session.updated_at == last


async def test_r21_usage_of_a_session_stays_at_the_largest_number(
    store: Store, story: Story
) -> None:
    """Otherwise the run could not be ended, or the session not be read."""
    nearly = MAX_COUNT - 1
    await story.play("a", answer("x", Usage(*[nearly] * 5)))
    await story.play("b", answer("x", Usage(1, 2, 3, nearly, MAX_COUNT)))
    await story.play("c", answer("x", Usage(0, 5, 0, nearly, 1)))
    session = await store.get_session(story.key)
    assert session is not None
    assert session.usage == Usage(*[MAX_COUNT] * 5)


async def test_stored_bytes_are_what_stays_until_the_session_is_deleted(store: Store) -> None:
    assert await store.stored_bytes(TENANT) == 0
    story, other = Story(store), Story(store, "other")
    await other.play("o")
    rest = await store.stored_bytes(TENANT)
    attached = (Attachment("a", "", "é" * 1_000), Attachment("b", "", b"1" * 3_000))
    await story.accept(request("a", "é" * 5_000, *attached))
    accepted = await store.stored_bytes(TENANT) - rest
    assert 15_000 <= accepted < 17_000
    await story.start()
    await story.append(TextDelta("x" * 50_000))  # is not there for long
    assert await store.stored_bytes(TENANT) - rest < accepted + 1_000
    await story.commit(story.finishing(answer("x" * 50_000)))
    assert 65_000 <= await store.stored_bytes(TENANT) - rest < 68_000
    assert await store.stored_bytes("another") == 0
    await Story(store, tenant="another").play("a")
    assert await store.stored_bytes("another") < 3_000
    await story.commit(rules.remove(story.lane))
    assert await store.stored_bytes(TENANT) == rest


async def test_sessions_are_listed_latest_first_by_pages(store: Store) -> None:
    stories = [Story(store, f"s{n}") for n in range(4)]
    for story in stories:
        await story.play(story.session_id)
    await Story(store, tenant="another").play("x")
    await stories[0].play("again")  # does not change the order
    first = await store.list_sessions(TENANT, limit=3)
    assert [session.session_id for session in first.items] == ["s3", "s2", "s1"]
    assert first.items[0] == await store.get_session(stories[3].key)
    rest = await store.list_sessions(TENANT, after=first.next, limit=3)
    assert [session.session_id for session in rest.items] == ["s0"]
    assert rest.next is None
    assert (await store.list_sessions(TENANT, limit=4)).next is None


async def test_transcript_by_pages(store: Store, story: Story) -> None:
    for n in range(3):
        await story.play(request(f"r{n}", str(n) * 1_000), "y" * 1_000)
    whole = await transcript(story)
    assert [(message.turn, message.ordinal) for message in whole] == [
        (turn, ordinal) for turn in (1, 2, 3) for ordinal in (0, 1)
    ]
    assert len({message.message_id for message in whole}) == 6
    for limit, max_bytes, size in [(1, PLENTY, 1), (4, PLENTY, 4), (9, 1, 1), (9, 3_000, 2)]:
        found: list[Message] = []
        after = None
        while True:
            page = await store.list_messages(
                story.key, after=after, limit=limit, max_bytes=max_bytes
            )
            assert len(page.items) == size or page.next is None
            found += page.items
            after = page.next
            if after is None:
                break
        assert found == whole


async def test_transcript_keeps_every_kind_of_part(store: Store, story: Story) -> None:
    call = ToolCall("1", "look", '{"where": "\\u0000 Grüße"}')
    steps = (
        DraftMessage(Role.ASSISTANT, (Reasoning("hm\0"), Text("let me see"), call)),
        DraftMessage(Role.TOOL, (ToolResult("1", "look", "🙂\0", is_error=False),)),
    )
    await story.play("a", answer("seen", Usage(), *steps))
    _, first, tool, last = await transcript(story)
    assert (first.parts, tool.parts) == (steps[0].parts, steps[1].parts)
    assert (first.finish_reason, tool.finish_reason) == (FinishReason.TOOL_CALLS, None)
    assert (last.finish_reason, last.model, tool.model) == (FinishReason.STOP, "m", "")


async def test_busy_sessions_the_longest_waiting_first(store: Store) -> None:
    late, early, idle, other = (
        Story(store, "late"),
        Story(store, "early"),
        Story(store, "idle"),
        Story(store, "other", tenant="another"),
    )
    early.now, other.now, late.now = START + 100, START + 200, START + 300
    await late.accept("l0", "l1")
    await early.accept("e0", "e1", request("e2", when_busy=WhenBusy.FOLD))
    await early.start()
    await early.fold()
    await other.accept("o0")
    await other.start()
    await idle.play("i0")
    assert await store.busy_sessions() == [
        BusySession(early.key, True, 1, "default"),
        BusySession(other.key, True, 0, "default"),
        BusySession(late.key, False, 2, "default"),
    ]


# --- The event log ------------------------------------------------------------------------------


async def test_positions_have_no_gap_and_follow_the_commits(
    store: Store, story: Story, witness: Witness
) -> None:
    ends = [await story.play(f"r{n}") for n in range(3)]
    await story.accept("x", "y")
    await story.cancel()
    found = await logged(store)
    assert [event.position for event in found] == [1, 2, 3, 4, 5]
    assert [event.complete for event in found[:3]] == ends
    assert found == witness.log
    assert store.position == 5
    assert await store.position_of(story.run_key("r1")) == 2
    assert await store.position_of(RunKey("another", "r1")) is None


async def test_listener_is_called_before_the_commit_returns(
    store: Store, story: Story, witness: Witness
) -> None:
    await story.accept("a")
    assert [event.index for event in witness.runs[story.run_key("a")]] == [1]
    await story.start()
    await story.append(TextDelta("x"))
    assert [event.index for event in witness.runs[story.run_key("a")]] == [1, 2, 3]
    complete = await story.finish()
    assert [event.complete for event in witness.log] == [complete]
    assert witness.runs[story.run_key("a")] == await events(story, "a")


async def test_listener_can_read_what_it_receives(store: Store, story: Story) -> None:
    seen: list[int] = []

    class Reader(Witness):
        def on_completes(self, events: object) -> None:
            seen.append(store.position)

    store.listener = Reader()
    await story.play("a")
    await story.play("b")
    assert seen == [1, 2]


async def test_log_by_pages_and_filters(store: Store) -> None:
    stories = [Story(store, f"s{n}") for n in range(3)]
    for n in range(4):
        for story in stories:
            await story.play(f"{story.session_id}-{n}", "z" * 1_000)
    await Story(store, "s0", tenant="another").play("x")

    async def read(
        after: int,
        limit: int,
        max_bytes: int = PLENTY,
        session_ids: tuple[str, ...] = (),
        run_ids: tuple[str, ...] = (),
    ) -> tuple[list[int], int]:
        wanted = EventFilter(frozenset(session_ids), frozenset(run_ids))
        page = await store.completes(TENANT, wanted, after=after, limit=limit, max_bytes=max_bytes)
        assert all(wanted.matches(event.complete) for event in page.events)
        assert all(event.tenant == TENANT for event in page.events)
        return [event.position for event in page.events], page.scanned

    assert await read(0, 5) == ([1, 2, 3, 4, 5], 5)
    assert await read(10, 5) == ([11, 12], 13)
    assert await read(10, 2) == ([11, 12], 13)
    assert await read(12, 5) == ([], 13)
    assert await read(13, 5) == ([], 13)
    assert await read(0, 9, 1) == ([1], 1)
    assert await read(0, 9, 3_500) == ([1, 2], 2)
    assert await read(0, 9, session_ids=("s1",)) == ([2, 5, 8, 11], 13)
    assert await read(2, 2, session_ids=("s1",)) == ([5, 8], 8)
    assert await read(8, 2, session_ids=("s1",)) == ([11], 13)
    assert await read(0, 9, run_ids=("s2-0", "s0-3", "x")) == ([3, 10], 13)
    sessions, runs = ("s1", "nobody"), ("s1-0", "s0-1")
    assert await read(0, 9, PLENTY, sessions, runs) == ([2, 4, 5, 8, 11], 13)
    assert await read(0, 3, PLENTY, sessions, runs) == ([2, 4, 5], 5)
    assert await read(0, 3, 1, sessions, runs) == ([2], 2)
    assert await read(5, 9, session_ids=("nobody",)) == ([], 13)


async def test_compaction_removes_a_prefix(store: Store) -> None:
    old, young = Story(store, "old"), Story(store, "young")
    young.now = START + 1_000
    for n in range(3):
        await old.play(f"o{n}")
    end = await young.play("y")
    await old.play("after")  # older than the one before it
    assert await store.compact(START, 9) == 0
    assert store.compacted == 0
    assert await store.compact(end.ended_at, 2) == 2
    assert (store.compacted, store.position) == (2, 5)
    assert await store.compact(end.ended_at, 9) == 1
    assert await store.compact(end.ended_at, 9) == 0  # the young one is in the way
    assert store.compacted == 3
    assert [event.position for event in await logged(store, 3)] == [4, 5]
    assert await store.position_of(old.run_key("o2")) is None
    assert await store.position_of(young.run_key("y")) == 4
    run = await store.get_run(old.run_key("o2"))
    assert run is not None
    assert run.complete is not None
    assert await store.compact(end.ended_at + 1, 9) == 2
    assert (store.compacted, store.position) == (5, 5)
    assert await logged(store, 5) == []
    await old.play("next")
    assert [event.position for event in await logged(store, 5)] == [6]


async def test_removal_of_the_log_does_not_touch_run_ids(store: Store, story: Story) -> None:
    await story.play("a")
    await story.remove()
    await store.forget_deleted(FAR, 9)
    again = await story.play("a", "again")
    assert [event.position for event in await logged(store)] == [1, 2]
    assert await store.position_of(story.run_key("a")) == 2
    run = await store.get_run(story.run_key("a"))
    assert run is not None
    assert run.complete == again


# --- Many at once -------------------------------------------------------------------------------


async def test_a_hundred_sessions_at_once(store: Store, witness: Witness) -> None:
    stories = [Story(store, f"s{n:03}") for n in range(100)]

    async def live(story: Story) -> list[RunComplete]:
        return [await story.play(f"{story.session_id}-{n}") for n in range(3)]

    ends = await asyncio.gather(*(live(story) for story in stories))
    found = await logged(store)
    assert [event.position for event in found] == list(range(1, 301))
    assert found == witness.log
    assert {event.complete for event in found} == {end for own in ends for end in own}
    for story in stories:
        assert await store.load_lane(story.key) == story.lane
        own = [e.complete.run_id for e in found if e.complete.session_id == story.session_id]
        assert own == [f"{story.session_id}-{n}" for n in range(3)]
        key = story.run_key(f"{story.session_id}-0")
        assert [event.index for event in witness.runs[key]] == [1, 2, 3]


async def test_of_many_that_race_for_a_lane_one_wins(store: Store, story: Story) -> None:
    await story.accept("a")
    rivals = [replace(story) for _ in range(20)]
    for rival in rivals:
        rival.lane = story.lane
    results = await asyncio.gather(
        *(rival.accept(f"r{n}") for n, rival in enumerate(rivals)), return_exceptions=True
    )
    assert sum(isinstance(result, Stale) for result in results) == 19
    assert results.count(None) == 1
    winner = rivals[results.index(None)]
    assert await store.load_lane(story.key) == winner.lane
    assert len((await store.list_runs(TENANT, limit=MANY)).items) == 2


async def test_of_many_that_race_for_a_run_id_one_wins(store: Store) -> None:
    stories = [Story(store, f"s{n}") for n in range(20)]
    results = await asyncio.gather(
        *(story.accept("same") for story in stories), return_exceptions=True
    )
    assert results.count(None) == 1
    assert sum(isinstance(result, RunIdTaken) for result in results) == 19
    assert len((await store.list_sessions(TENANT, limit=MANY)).items) == 1


async def test_append_and_the_end_of_its_run_at_once(store: Store, story: Story) -> None:
    await story.accept("a")
    key = await story.start()
    said = story.events(TextDelta("x"))
    appended = asyncio.create_task(store.append(key, 1, said))
    assert story.lane.active is not None
    story.lane = story.lane._replace(active=story.lane.active._replace(events=said[-1].index))
    ended = asyncio.create_task(story.finish())
    late = asyncio.create_task(store.append(key, 1, [RunEvent("a", 9, 1, TextDelta("late"))]))
    results = await asyncio.gather(appended, ended, late, return_exceptions=True)
    assert results[0] is None
    assert isinstance(results[1], RunComplete)
    assert isinstance(results[2], Stale)
    assert [event.index for event in await events(story, "a")] == [1, 2, 3, 4]


async def test_write_of_a_cancelled_caller_goes_on(
    store: Store, story: Story, witness: Witness
) -> None:
    await story.accept("a")
    before = story.lane
    # One write is under way, so that the next one has to wait for its turn.
    first = asyncio.create_task(Story(store, "first").accept("f"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task = asyncio.create_task(story.start())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([first, task])
    async with asyncio.timeout(SECONDS):
        while (lane := await store.load_lane(story.key)) == before:
            await asyncio.sleep(0)
    assert (before.active, lane.version) == (None, 2)
    assert lane.active is not None
    assert [event.index for event in witness.runs[story.run_key("a")]] == [1, 2]


async def test_reads_see_the_log_while_it_grows(store: Store) -> None:
    """A reader that goes on from `scanned` misses nothing, however the commits fall."""
    stories = [Story(store, f"s{n}") for n in range(20)]
    wanted = EventFilter(session_ids=frozenset({"s3", "s7"}))

    async def live(story: Story) -> None:
        for n in range(5):
            await story.play(f"{story.session_id}-{n}")

    async def follow(wanted: EventFilter, enough: int) -> list[LoggedComplete]:
        found: list[LoggedComplete] = []
        after = 0
        while len(found) < enough:
            page = await store.completes(TENANT, wanted, after=after, limit=7, max_bytes=PLENTY)
            assert page.scanned >= after
            found += page.events
            after = page.scanned
            await asyncio.sleep(0)
        return found

    readers = [asyncio.create_task(follow(EVERYTHING, 100))]
    readers += [asyncio.create_task(follow(wanted, 10))]
    await asyncio.gather(*(live(story) for story in stories))
    every, some = await asyncio.gather(*readers)
    assert [event.position for event in every] == list(range(1, 101))
    assert some == [event for event in every if wanted.matches(event.complete)]


async def test_titles_and_labels_are_stored_bytes(store: Store) -> None:
    labels = {"k" * 100: "é" * 1_000}
    key = SessionKey(TENANT, "labelled")
    await store.create_session(NewSession(key, START, "t" * 500, labels))
    created = await store.stored_bytes(TENANT)
    assert 2_600 <= created < 3_000
    story = Story(store)
    await story.accept(request("a", "x")._replace(metadata=labels))
    assert 2_600 <= await store.stored_bytes(TENANT) - created < 3_000
    # An empty session counts as well.
    before = await store.stored_bytes(TENANT)
    await store.create_session(NewSession(SessionKey(TENANT, "empty"), START))
    assert await store.stored_bytes(TENANT) > before
