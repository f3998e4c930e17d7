"""Calls: what is sent, what is repeated and what is not, and how long it may take."""

from __future__ import annotations

import asyncio
import uuid
from datetime import UTC, datetime, timedelta

import pytest
from grpc import StatusCode

import runlane
from runlane import Attachment, Client, RetryPolicy, RunState, WhenBusy
from runlane.harness import Harness
from runlane.ids import new_id
from runlane.v1 import (
    run_pb2,
    run_service_pb2,
    session_pb2,
    session_service_pb2,
)
from runlane.wire import Backoff
from support.peer import (
    HANG,
    LOST,
    Peer,
    Refuse,
    accepted,
    deleted,
    run,
    waited,
)

DRAINING = Refuse(StatusCode.UNAVAILABLE, "DRAINING")
UNKNOWN_OUTCOME = [LOST, Refuse(StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE")]
ACTIVE = run_pb2.RUN_STATE_ACTIVE


# --- RunAccepted ---------------------------------------------------------------------------------


async def test_r03_an_accept_is_repeated_under_the_same_run_id(peer: Peer, client: Client) -> None:
    peer.scripts["RunAccepted"] = [*((step,) for step in UNKNOWN_OUTCOME), (accepted("r"),)]
    handle = await client.run_accepted("s", "p")
    assert (handle.run_id, handle.session_id, handle.cursor) == ("r", "s", "before")
    first, second, third = peer.requests["RunAccepted"]
    assert uuid.UUID(first.run_id).version == 7
    assert first == second == third


async def test_what_is_asked_for_goes_over_the_wire(peer: Peer, client: Client) -> None:
    peer.scripts["RunAccepted"] = [(accepted(),)]
    await client.run_accepted(
        "s",
        "p",
        run_id="mine",
        attachments=[Attachment("a", "text"), Attachment("b", b"\0", "image/png")],
        when_busy=WhenBusy.INTERRUPT,
        timeout=timedelta(minutes=1.5),
        max_attempts=3,
        metadata={"k": "v"},
        allow_missing=True,
    )
    wanted = run_service_pb2.RunAcceptedRequest(
        session_id="s",
        run_id="mine",
        prompt="p",
        attachments=[
            run_pb2.Attachment(name="a", text="text"),
            run_pb2.Attachment(name="b", mime_type="image/png", data=b"\0"),
        ],
        when_busy=run_pb2.WHEN_BUSY_INTERRUPT,
        max_attempts=3,
        metadata={"k": "v"},
        allow_missing=True,
    )
    wanted.timeout.FromSeconds(90)
    assert peer.requests["RunAccepted"] == [wanted]


async def test_a_choice_may_be_given_by_its_text(peer: Peer, client: Client) -> None:
    peer.scripts["RunAccepted"] = [(accepted(),)]
    await client.run_accepted("s", "p", when_busy="fold")  # type: ignore[arg-type]
    assert peer.requests["RunAccepted"][0].when_busy == run_pb2.WHEN_BUSY_FOLD
    peer.scripts["Cancel"] = [(run_service_pb2.CancelResponse(),)]
    await client.cancel("s", scope="waiting")  # type: ignore[arg-type]
    assert peer.requests["Cancel"][0].scope == run_service_pb2.CANCEL_SCOPE_WAITING
    peer.scripts["ListRuns"] = [(run_service_pb2.ListRunsResponse(),)]
    await client.list_runs(states=["active"]).page()  # type: ignore[list-item]
    assert list(peer.requests["ListRuns"][0].states) == [ACTIVE]


async def test_a_choice_that_there_is_not_is_told_with_those_that_there_are(client: Client) -> None:
    with pytest.raises(ValueError, match="when_busy: 'wait' is not one of queue, fold, reject, "):
        await client.run_accepted("s", "p", when_busy="wait")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scope: 'all' is not one of session, active, waiting"):
        await client.cancel("s", scope="all")  # type: ignore[arg-type]
    for state in ("busy", RunState.UNKNOWN):
        with pytest.raises(ValueError, match=f"states: '{state}' is not one of accepted, queued"):
            client.list_runs(states=[state])  # type: ignore[list-item]
    async with Harness("127.0.0.1:1") as harness:
        with pytest.raises(ValueError, match="point: 'here' is not one of before_agent_ready, "):
            await harness.arm("here")  # type: ignore[arg-type]


@pytest.mark.parametrize("state", ["active", RunState.ACTIVE])
async def test_one_state_is_not_taken_for_its_letters(client: Client, state: str) -> None:
    with pytest.raises(TypeError, match="states: expected a list"):
        client.list_runs(states=state)  # type: ignore[arg-type]


async def test_an_accept_of_unknown_outcome_tells_its_run_id(peer: Peer, client: Client) -> None:
    peer.scripts["RunAccepted"] = [(LOST,)] * 4
    with pytest.raises(runlane.Unavailable) as caught:
        await client.run_accepted("s", "p")
    assert caught.value.attempts == len(peer.requests["RunAccepted"]) == 4
    assert caught.value.metadata["run_id"] == peer.requests["RunAccepted"][0].run_id


@pytest.mark.parametrize(
    "refuse",
    [
        Refuse(StatusCode.INVALID_ARGUMENT, "EMPTY_PROMPT"),
        Refuse(StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
        Refuse(StatusCode.FAILED_PRECONDITION, "SESSION_BUSY"),
        Refuse(StatusCode.ALREADY_EXISTS, "RUN_ID_CONFLICT"),
        Refuse(StatusCode.INTERNAL, "INTERNAL"),
    ],
    ids=lambda refuse: refuse.reason,
)
async def test_what_would_fail_again_is_not_repeated(
    peer: Peer, client: Client, refuse: Refuse
) -> None:
    peer.scripts["RunAccepted"] = [(refuse,)]
    with pytest.raises(runlane.RunlaneError) as caught:
        await client.run_accepted("s", "p")
    assert caught.value.reason == refuse.reason
    assert len(peer.requests["RunAccepted"]) == 1


# --- Cancel --------------------------------------------------------------------------------------


@pytest.mark.parametrize("refuse", UNKNOWN_OUTCOME, ids=["lost", "store"])
async def test_r11_a_cancel_of_a_session_is_never_sent_twice(
    peer: Peer, client: Client, refuse: Refuse
) -> None:
    peer.scripts["Cancel"] = [(refuse,)]
    peer.scripts["CancelAll"] = [(refuse,)]
    with pytest.raises(runlane.Unavailable):
        await client.cancel("s")
    with pytest.raises(runlane.Unavailable):
        await client.cancel_all()
    assert len(peer.requests["Cancel"]) == len(peer.requests["CancelAll"]) == 1


async def test_cancel_all_asks_for_all_pages(peer: Peer, client: Client) -> None:
    def page(session_id: str, token: str) -> run_service_pb2.CancelAllResponse:
        receipt = run_service_pb2.SessionCancellation(session_id=session_id, fence_accept_seq=1)
        return run_service_pb2.CancelAllResponse(sessions=[receipt], next_page_token=token)

    peer.scripts["CancelAll"] = [(page("a", "t1"),), (page("b", "t2"),), (page("c", ""),)]
    receipts = await client.cancel_all("why")
    assert [receipt.session_id for receipt in receipts] == ["a", "b", "c"]
    requests = peer.requests["CancelAll"]
    assert [request.page_token for request in requests] == ["", "t1", "t2"]
    assert {(request.reason, request.page_size) for request in requests} == {("why", 4000)}


async def test_a_cancel_that_was_surely_refused_is_repeated(peer: Peer, client: Client) -> None:
    receipt = run_service_pb2.CancelResponse(
        cancelled=[
            run_pb2.CancelledRun(
                session_id="s", run_id="r", accept_seq=4, state_when_cancelled=ACTIVE
            )
        ],
        fence_accept_seq=9,
    )
    peer.scripts["Cancel"] = [(DRAINING,), (receipt,)]
    assert await client.cancel("s") == runlane.CancelReceipt(
        "s", (runlane.CancelledRun("s", "r", 4, RunState.ACTIVE),), 9
    )


async def test_a_cancel_of_one_run_is_repeated(peer: Peer, client: Client) -> None:
    peer.scripts["RunAccepted"] = [(accepted("r"),)]
    peer.scripts["Cancel"] = [(LOST,), (run_service_pb2.CancelResponse(fence_accept_seq=1),)]
    handle = await client.run_accepted("s", "p")
    receipt = await handle.cancel("enough")
    assert not receipt.cancelled
    first, second = peer.requests["Cancel"]
    assert first == second
    assert (first.session_id, first.run_id, first.reason) == ("s", "r", "enough")


# --- How long, and how often ---------------------------------------------------------------------


async def test_the_pause_that_the_server_asks_for_is_kept(peer: Peer, client: Client) -> None:
    pause = timedelta(seconds=0.3)
    busy = Refuse(StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", retry_after=pause)
    peer.scripts["GetRun"] = [(busy,), (run_service_pb2.GetRunResponse(run=run("r")),)]
    clock = asyncio.get_running_loop().time
    begun = clock()
    await client.get_run("r")
    assert clock() - begun >= 0.3


async def test_a_pause_beyond_the_deadline_is_not_begun(peer: Peer) -> None:
    busy = Refuse(StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", retry_after=timedelta(seconds=3600))
    peer.scripts["GetRun"] = [(busy,)]
    async with peer.client() as client:
        with pytest.raises(runlane.Overloaded) as caught:
            await client.get_run("r")
    assert caught.value.retry_after == timedelta(hours=1)


def test_pauses_grow_to_their_bound_and_begin_again() -> None:
    backoff = Backoff(RetryPolicy(initial=1, multiplier=2, maximum=5))
    for most in (1, 2, 4, 5, 5):
        assert most / 2 <= backoff.next() <= most
    assert backoff.next(runlane.Overloaded("", retry_after=timedelta(seconds=60))) == 60
    backoff.reset()
    assert backoff.next() <= 1


async def test_a_cancel_by_the_peer_is_an_error_and_not_a_cancel_of_the_task(
    peer: Peer, client: Client
) -> None:
    peer.scripts["GetRun"] = [(Refuse(StatusCode.CANCELLED),)] * 4
    with pytest.raises(runlane.UnexpectedStatus):
        await client.get_run("r")


async def test_a_closed_client_says_so(peer: Peer) -> None:
    client = peer.client()
    peer.scripts["GetRun"] = [(HANG,)]
    call = asyncio.create_task(client.get_run("r"))
    await peer.hanging.wait()
    await client.close()
    await client.close()
    with pytest.raises(runlane.ClientClosed):
        await call
    with pytest.raises(runlane.ClientClosed):
        await client.get_run("r")


# --- Waiting -------------------------------------------------------------------------------------


async def test_r24_a_wait_lasts_over_errors_and_restarts(peer: Peer, client: Client) -> None:
    peer.scripts["RunAccepted"] = [(accepted("r"),)]
    peer.scripts["WaitRun"] = [(LOST,), (DRAINING,), (waited("r", ACTIVE),), (HANG,)]
    handle = await client.run_accepted("s", "p")
    waiting = asyncio.create_task(handle.completed())
    await peer.hanging.wait()
    await peer.stop()
    peer.scripts["WaitRun"] = [(waited("r", run_pb2.RUN_STATE_FAILED),)]
    await peer.start()
    complete = await waiting
    assert (complete.state, complete.cancelled) == (RunState.FAILED, False)
    assert complete.error == runlane.RunError("AGENT_ERROR", "it broke")
    assert complete.ended_at == datetime(1970, 1, 1, 0, 0, 2, tzinfo=UTC)


async def test_a_wait_that_is_over_returns_the_run_and_completed_raises(
    peer: Peer, client: Client
) -> None:
    peer.scripts["RunAccepted"] = [(accepted("r"),)]
    peer.scripts["WaitRun"] = [(waited("r", ACTIVE),)] * 2
    handle = await client.run_accepted("s", "p")
    assert (await client.wait_run("r", timeout=0)).state is RunState.ACTIVE
    with pytest.raises(runlane.DeadlineExceeded, match="run r is still active after 0 s"):
        await handle.completed(timeout=0)
    assert [request.timeout.ToTimedelta() for request in peer.requests["WaitRun"]] == [
        timedelta()
    ] * 2


async def test_a_wait_without_a_server_ends_in_time(peer: Peer, client: Client) -> None:
    await peer.stop()
    with pytest.raises(runlane.Unavailable):
        await client.wait_run("r", timeout=0.1)


async def test_a_wait_for_an_unknown_run_ends_at_once(peer: Peer, client: Client) -> None:
    peer.scripts["WaitRun"] = [(Refuse(StatusCode.NOT_FOUND, "RUN_NOT_FOUND"),)]
    with pytest.raises(runlane.RunNotFound):
        await client.wait_run("r")


# --- Sessions and listings -----------------------------------------------------------------------


async def test_a_session_of_our_own_naming_is_created_once(peer: Peer, client: Client) -> None:
    exists = Refuse(StatusCode.ALREADY_EXISTS, "SESSION_EXISTS")
    session = session_pb2.Session(session_id="made", busy=True, active_run_id="r")
    peer.scripts["CreateSession"] = [(LOST,), (exists,)]
    peer.scripts["GetSession"] = [(session_service_pb2.GetSessionResponse(session=session),)]
    assert (await client.create_session(title="t")).active_run_id == "r"
    asked = {request.session_id for request in peer.requests["CreateSession"]}
    assert asked == {peer.requests["GetSession"][0].session_id}
    peer.scripts["CreateSession"] = [(LOST,), (exists,)]
    with pytest.raises(runlane.SessionExists):
        await client.create_session("mine")


async def test_a_deletion_that_is_repeated_may_find_nothing(peer: Peer, client: Client) -> None:
    gone = Refuse(StatusCode.NOT_FOUND, "SESSION_NOT_FOUND")
    peer.scripts["DeleteSession"] = [(LOST,), (gone,), (gone,), (deleted(),)]
    await client.delete_session("s")
    with pytest.raises(runlane.SessionNotFound):
        await client.delete_session("s")
    await client.delete_session("s")


async def test_a_listing_goes_over_all_pages(peer: Peer, client: Client) -> None:
    def page(run_id: str, token: str) -> run_service_pb2.ListRunsResponse:
        return run_service_pb2.ListRunsResponse(runs=[run(run_id)], next_page_token=token)

    peer.scripts["ListRuns"] = [(page("a", "t1"),), (LOST,), (page("b", ""),), (page("c", "t9"),)]
    pager = client.list_runs("s", states=[RunState.QUEUED], page_size=1)
    assert [each.run_id async for each in pager] == ["a", "b"]
    only = await pager.page("t8")
    assert ([each.run_id for each in only.items], only.next_page_token) == (["c"], "t9")
    asked = peer.requests["ListRuns"]
    assert [request.page_token for request in asked] == ["", "t1", "t1", "t8"]
    assert all(list(request.states) == [run_pb2.RUN_STATE_QUEUED] for request in asked)


async def test_messages_that_were_cut_are_joined(peer: Peer, client: Client) -> None:
    def said(message_id: str, text: str, *, continues: bool = False) -> session_pb2.Message:
        parts = [session_pb2.Part(text=text)]
        return session_pb2.Message(
            message_id=message_id, role=session_pb2.ROLE_USER, parts=parts, continues=continues
        )

    def page(
        token: str, *messages: session_pb2.Message
    ) -> session_service_pb2.ListMessagesResponse:
        return session_service_pb2.ListMessagesResponse(messages=messages, next_page_token=token)

    peer.scripts["ListMessages"] = [
        (page("1", said("a", "1"), said("b", "2", continues=True)),),
        (page("2", said("b", "3", continues=True)),),
        (page("", said("b", "4"), said("c", "5")),),
    ]
    messages = [each async for each in client.list_messages("s")]
    assert [(each.message_id, each.text) for each in messages] == [
        ("a", "1"),
        ("b", "234"),
        ("c", "5"),
    ]


# --- Ids -----------------------------------------------------------------------------------------


def test_ids_are_uuids_of_version_7_and_differ() -> None:
    made = [uuid.UUID(new_id()) for _ in range(100)]
    assert {each.version for each in made} == {7}
    assert {each.variant for each in made} == {uuid.RFC_4122}
    assert len(set(made)) == 100
    now = datetime.now(UTC).timestamp() * 1000
    assert abs((made[-1].int >> 80) - now) < 60_000


async def test_filters_of_a_list_are_sent(peer: Peer, client: Client) -> None:
    peer.scripts["ListRuns"] = [
        (run_service_pb2.ListRunsResponse(runs=[run("a")], total_size=7),),
    ]
    noon = datetime(2026, 1, 1, 12, tzinfo=UTC)
    pager = client.list_runs(
        agent="a",
        metadata={"k": "v"},
        accepted_from=noon,
        ended_before=noon,
        order=runlane.RunOrder.EARLIEST_ENDED,
        with_total_size=True,
    )
    page = await pager.page()
    assert (page.total_size, page.total_size_is_minimum) == (7, False)
    (sent,) = peer.requests["ListRuns"]
    assert (sent.agent, dict(sent.metadata)) == ("a", {"k": "v"})
    assert sent.accepted_from.ToDatetime(UTC) == sent.ended_before.ToDatetime(UTC) == noon
    assert sent.order == run_service_pb2.RUN_ORDER_EARLIEST_ENDED
    assert not sent.HasField("accepted_before")
    with pytest.raises(ValueError, match="ended_from: has no time zone"):
        client.list_runs(ended_from=datetime(2026, 1, 1))  # noqa: DTZ001 - it has none


async def test_only_what_is_given_of_a_session_is_changed(peer: Peer, client: Client) -> None:
    session = session_pb2.Session(session_id="s", title="new", etag="e2")
    peer.scripts["UpdateSession"] = [
        (session_service_pb2.UpdateSessionResponse(session=session),),
        (Refuse(StatusCode.FAILED_PRECONDITION, "EDIT_CONFLICT"),),
    ]
    changed = await client.update_session("s", title="new", metadata={}, etag="e1")
    assert (changed.title, changed.etag) == ("new", "e2")
    (sent,) = peer.requests["UpdateSession"]
    assert (list(sent.update_mask.paths), sent.etag) == (["title", "metadata"], "e1")
    with pytest.raises(runlane.EditConflict):
        await client.update_session("s", agent="")
    assert len(peer.requests["UpdateSession"]) == 2
    with pytest.raises(ValueError, match="nothing to change"):
        await client.update_session("s")
