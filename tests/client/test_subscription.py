"""Subscriptions: each terminal event once and in order, despite faults of peer and network."""

from __future__ import annotations

import asyncio

import pytest
from grpc import StatusCode

import runlane
from runlane import Client, Progress, RunComplete, RunlaneError, Subscription
from support.peer import HANG, LOST, Peer, Refuse, Script, ended, mark

RPC = "SubscribeRunComplete"


async def take(subscription: Subscription, count: int) -> list[str]:
    """The ids of the next runs that end."""
    return [(await anext(subscription)).run_id for _ in range(count)]


def asked(peer: Peer) -> list[str | None]:
    """The cursor of each request, None where it had none."""
    return [
        request.cursor if request.WhichOneof("start") == "cursor" else None
        for request in peer.requests[RPC]
    ]


@pytest.mark.parametrize(
    "break_",
    [
        pytest.param((LOST,), id="lost"),
        pytest.param((), id="ended"),
        pytest.param((Refuse(StatusCode.CANCELLED),), id="cancelled by the peer"),
        pytest.param((Refuse(StatusCode.ABORTED, "INTERNAL"),), id="lost track of"),
        pytest.param((Refuse(StatusCode.INTERNAL),), id="stream reset"),
        pytest.param((Refuse(StatusCode.UNAVAILABLE, "DRAINING"),), id="draining"),
        pytest.param((Refuse(StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED"),), id="overloaded"),
    ],
)
async def test_it_goes_on_after_the_last_cursor(peer: Peer, client: Client, break_: Script) -> None:
    peer.scripts[RPC] = [
        (mark("c0"), ended("c1", "r1"), *break_),
        (mark("c1"), ended("c2", "r2"), mark("c3"), *break_),
        (mark("c3"), ended("c4", "r4"), HANG),
    ]
    async with client.subscribe_run_complete() as subscription:
        assert await take(subscription, 3) == ["r1", "r2", "r4"]
        assert subscription.cursor == "c4"
    assert asked(peer) == [None, "c1", "c3"]


async def test_it_goes_on_after_a_restart_on_the_same_port(peer: Peer, client: Client) -> None:
    lost = asyncio.Event()
    peer.scripts[RPC] = [(mark("c0"), ended("c1", "r1"), HANG)]
    subscription = client.subscribe_run_complete(on_lost=lambda _: lost.set())
    async with subscription:
        assert await take(subscription, 1) == ["r1"]
        step = asyncio.create_task(take(subscription, 1))
        await peer.stop()
        await lost.wait()
        peer.scripts[RPC] = [(mark("c1"), ended("c2", "r2"), HANG)]
        await peer.start()
        assert await step == ["r2"]
    assert asked(peer)[-1] == "c1"


async def test_a_silent_stream_is_given_up_and_resumed(peer: Peer, client: Client) -> None:
    losses: list[RunlaneError] = []
    peer.scripts[RPC] = [
        (mark("c0"), ended("c1", "r1"), HANG),
        (mark("c1"), ended("c2", "r2"), HANG),
    ]
    subscription = client.subscribe_run_complete(silence=0.1, on_lost=losses.append)
    async with subscription:
        assert await take(subscription, 2) == ["r1", "r2"]
    assert asked(peer) == [None, "c1"]
    assert [type(loss) for loss in losses] == [runlane.Unavailable]
    await peer.left.wait()


async def test_duplicates_are_dropped_and_move_the_cursor(peer: Peer, client: Client) -> None:
    peer.scripts[RPC] = [
        (mark("c0"), ended("c1", "r1"), ended("c1", "r1"), LOST),
        (ended("c1", "r1"), ended("c2", "r2"), HANG),
    ]
    async with client.subscribe_run_complete() as subscription:
        assert await take(subscription, 2) == ["r1", "r2"]


async def test_a_run_id_that_is_used_again_is_no_duplicate(peer: Peer, client: Client) -> None:
    peer.scripts[RPC] = [(mark("c0"), ended("c1", "r1", 5), ended("c2", "r1", 6), HANG)]
    async with client.subscribe_run_complete() as subscription:
        assert await take(subscription, 2) == ["r1", "r1"]


async def test_compaction_is_told_and_never_skipped(peer: Peer, client: Client) -> None:
    refuse = Refuse(StatusCode.OUT_OF_RANGE, "CURSOR_COMPACTED", metadata={"oldest_cursor": "c7"})
    peer.scripts[RPC] = [(mark("c0"), ended("c1", "r1"), LOST), (refuse,)]
    async with client.subscribe_run_complete() as subscription:
        assert await take(subscription, 1) == ["r1"]
        with pytest.raises(runlane.CursorCompacted) as caught:
            await anext(subscription)
        assert caught.value.oldest_cursor == "c7"
        # The cursor still says what was received.
        assert subscription.cursor == "c1"


@pytest.mark.parametrize(
    "refuse",
    [
        Refuse(StatusCode.INVALID_ARGUMENT, "CURSOR_INVALID"),
        Refuse(StatusCode.INTERNAL, "INTERNAL"),
        Refuse(StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED"),
        Refuse(StatusCode.UNIMPLEMENTED),
    ],
    ids=lambda refuse: refuse.code.name,
)
async def test_what_does_not_pass_is_raised_at_once(
    peer: Peer, client: Client, refuse: Refuse
) -> None:
    peer.scripts[RPC] = [(refuse,)]
    with pytest.raises(RunlaneError) as caught:
        await client.subscribe_run_complete(cursor="c").start()
    assert caught.value.status is refuse.code
    assert len(peer.requests[RPC]) == 1


async def test_progress_moves_the_cursor_and_is_kept_back(peer: Peer, client: Client) -> None:
    script: Script = (mark("c0"), mark("c1"), ended("c2", "r2"), mark("c3"), HANG)
    peer.scripts[RPC] = [script]
    async with client.subscribe_run_complete() as subscription:
        assert subscription.cursor == "c0"
        assert await take(subscription, 1) == ["r2"]
        assert subscription.cursor == "c2"


async def test_progress_can_be_had(peer: Peer, client: Client) -> None:
    peer.scripts[RPC] = [(mark("c0"), mark("c1"), ended("c2", "r2"), mark("c3"), HANG)]
    items = client.subscribe_run_complete().with_progress()
    seen = [await anext(items) for _ in range(4)]
    assert [type(item) for item in seen] == [Progress, Progress, RunComplete, Progress]
    assert [item.cursor for item in seen if isinstance(item, Progress)] == ["c0", "c1", "c3"]


async def test_where_it_begins(peer: Peer, client: Client) -> None:
    peer.scripts[RPC] = [(mark("c"), HANG)] * 3
    await client.subscribe_run_complete(session_ids=["s"], run_ids=["r"]).start()
    await client.subscribe_run_complete(cursor="x").start()
    await client.subscribe_run_complete(from_beginning=True).start()
    now, after, beginning = peer.requests[RPC]
    assert (list(now.session_ids), list(now.run_ids), now.WhichOneof("start")) == (
        ["s"],
        ["r"],
        None,
    )
    assert after.cursor == "x"
    assert beginning.from_beginning
    with pytest.raises(ValueError, match="cannot be combined with from_beginning"):
        client.subscribe_run_complete(cursor="x", from_beginning=True)


async def test_a_beginning_that_was_never_reached_is_asked_for_again(
    peer: Peer, client: Client
) -> None:
    peer.scripts[RPC] = [
        (Refuse(StatusCode.UNAVAILABLE, "DRAINING", metadata={"cursor": "c5"}),),
        (mark("c0"), HANG),
    ]
    await client.subscribe_run_complete(from_beginning=True).start()
    assert peer.requests[RPC][1].from_beginning


async def test_drained_before_the_first_mark_it_begins_where_the_server_says(
    peer: Peer, client: Client
) -> None:
    peer.scripts[RPC] = [
        (Refuse(StatusCode.UNAVAILABLE, "DRAINING", metadata={"cursor": "c5"}),),
        (mark("c5"), HANG),
    ]
    await client.subscribe_run_complete().start()
    assert asked(peer) == [None, "c5"]


async def test_a_step_that_times_out_loses_nothing(peer: Peer, client: Client) -> None:
    peer.scripts[RPC] = [
        (mark("c0"), ended("c1", "r1"), HANG),
        (mark("c1"), ended("c2", "r2"), HANG),
    ]
    async with client.subscribe_run_complete() as subscription:
        assert await take(subscription, 1) == ["r1"]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await anext(subscription)
        await peer.left.wait()
        assert await take(subscription, 1) == ["r2"]
    assert asked(peer) == [None, "c1"]


async def test_cancelling_a_step_cancels_the_call(peer: Peer, client: Client) -> None:
    peer.scripts[RPC] = [(mark("c0"), HANG)]
    subscription = client.subscribe_run_complete()
    task = asyncio.create_task(take(subscription, 1))
    await peer.hanging.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await peer.left.wait()


async def test_closing_cancels_the_call_and_ends_the_iteration(peer: Peer, client: Client) -> None:
    peer.scripts[RPC] = [(mark("c0"), HANG)]
    async with client.subscribe_run_complete() as subscription:
        await peer.hanging.wait()
    await peer.left.wait()
    assert [item async for item in subscription] == []


async def test_closing_the_client_ends_a_step_with_a_clear_error(peer: Peer) -> None:
    peer.scripts[RPC] = [(mark("c0"), HANG)]
    client = peer.client()
    step = asyncio.create_task(take(client.subscribe_run_complete(), 1))
    await peer.hanging.wait()
    await client.close()
    with pytest.raises(runlane.ClientClosed):
        await step


async def test_max_silence_bounds_the_attempts(peer: Peer, client: Client) -> None:
    await peer.stop()
    with pytest.raises(runlane.Unavailable):
        await client.subscribe_run_complete(max_silence=0.1).start()


async def test_max_silence_bounds_a_silent_stream(peer: Peer, client: Client) -> None:
    peer.scripts[RPC] = [(mark("c0"), HANG)]
    async with client.subscribe_run_complete(max_silence=0.1) as subscription:
        with pytest.raises(runlane.Unavailable, match="timed out waiting for a message"):
            await anext(subscription)


async def test_a_text_is_not_taken_for_its_letters() -> None:
    async with Client("127.0.0.1:1") as client:
        with pytest.raises(TypeError, match="session_ids: expected a list"):
            client.subscribe_run_complete(session_ids="demo")
        with pytest.raises(TypeError, match="run_ids: expected a list"):
            client.subscribe_run_complete(run_ids="r1")
