"""ForkSession over a real socket."""

from __future__ import annotations

from typing import Any

from grpc import StatusCode

from rpc.test_quotas import TenantClient, names_quota, tenants
from runlane.v1 import session_service_pb2 as pb
from support.rpc_wire import over_any_store, refused
from support.staging import say, script

pytestmark = over_any_store


async def ran(client: TenantClient, session_id: str, text: str) -> None:
    run = await client.accept(session_id, script(say(text)))
    await client.ended(run.run_id)


async def fork(client: TenantClient, session_id: str, **fields: Any) -> Any:
    request = pb.ForkSessionRequest(session_id=session_id, **fields)
    answer = await client.wire.sessions.ForkSession(request, metadata=client.metadata)
    return answer.session


async def transcript(client: TenantClient, session_id: str) -> list[Any]:
    request = pb.ListMessagesRequest(session_id=session_id)
    listed = await client.wire.sessions.ListMessages(request, metadata=client.metadata)
    return list(listed.messages)


async def test_fork_shows_its_origin_and_has_its_messages() -> None:
    async with tenants() as both:
        client = both.free
        for text in ("one", "two"):
            await ran(client, "s", text)
        made = await fork(client, "s", new_session_id="fork", at_turn=1)
        assert (made.session_id, made.origin.session_id, made.origin.turn) == ("fork", "s", 1)
        get = pb.GetSessionRequest(session_id="fork")
        read = await client.wire.sessions.GetSession(get, metadata=client.metadata)
        assert read.session == made
        assert await transcript(client, "fork") == (await transcript(client, "s"))[:2]
        assert (await fork(client, "s")).origin.turn == 2


async def test_refusals_have_their_reasons() -> None:
    async with tenants() as both:
        client = both.free
        await ran(client, "s", "one")
        await client.start_blocked("busy")
        for fields, code, reason, metadata in (
            ({"session_id": "no"}, StatusCode.NOT_FOUND, "SESSION_NOT_FOUND", {}),
            ({"at_turn": 2}, StatusCode.NOT_FOUND, "TURN_NOT_FOUND", {"last_turn": "1"}),
            (
                {"session_id": "busy", "at_turn": 1},
                StatusCode.FAILED_PRECONDITION,
                "TURN_NOT_FINISHED",
                {"finished_turn": "0"},
            ),
            ({"new_session_id": "busy"}, StatusCode.ALREADY_EXISTS, "SESSION_EXISTS", {}),
            ({"new_session_id": "s"}, StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT", {}),
        ):
            wanted = {"session_id": "s", **fields}
            failure = await refused(fork(client, **wanted))  # type: ignore[arg-type]
            assert (failure.code, failure.reason) == (code, reason), wanted
            assert dict(failure.metadata).items() >= metadata.items(), wanted
        # Sessions of another tenant are as unknown as those that do not exist.
        failure = await refused(fork(both.limited, "s"))
        assert (failure.code, failure.reason) == (StatusCode.NOT_FOUND, "SESSION_NOT_FOUND")
        both.wire.latches.open("busy")


async def test_copied_messages_count_towards_the_quota() -> None:
    async with tenants(max_stored_bytes=55_000) as both:
        client = both.limited
        await ran(client, "s", "x" * 10_000)
        await both.wire.coordinator.stored.measure()
        await fork(client, "s", new_session_id="fork")
        # The prompt is in the transcript too, so that a fork has about 20,000 bytes.
        failure = await refused(fork(client, "s"))
        assert names_quota(failure, "max_stored_bytes is 55000")
        await client.delete("fork")
        await both.wire.coordinator.stored.measure()
        await fork(client, "s")


async def test_fork_takes_a_token_of_the_rate() -> None:
    async with tenants(accepts_per_second=0.001, accepts_burst=2) as both:
        await ran(both.limited, "s", "x")
        await fork(both.limited, "s", new_session_id="fork")
        assert names_quota(await refused(fork(both.limited, "s")), "accepts_per_second is 0.001")
        # A repetition that finds its session needs none.
        await fork(both.limited, "s", new_session_id="fork")


async def test_the_latest_turns_of_a_transcript_are_listed_page_by_page() -> None:
    async with tenants() as both:
        client = both.free
        for text in ("one", "two", "three"):
            await ran(client, "s", text)
        await fork(client, "s", new_session_id="fork")
        whole = await transcript(client, "s")
        for session_id in ("s", "fork"):
            for turns, count in ((1, 2), (2, 4), (3, 6), (9, 6), (0, 6), ((1 << 31) - 1, 6)):
                request = pb.ListMessagesRequest(
                    session_id=session_id, latest_turns=turns, page_size=3
                )
                got: list[Any] = []
                while not got or request.page_token:
                    listed = await client.wire.sessions.ListMessages(
                        request, metadata=client.metadata
                    )
                    got += listed.messages
                    request.page_token = listed.next_page_token
                assert got == whole[-count:], (session_id, turns)
        negative = pb.ListMessagesRequest(session_id="s", latest_turns=-1)
        error = await refused(client.wire.sessions.ListMessages(negative, metadata=client.metadata))
        assert (error.reason, error.fields) == ("INVALID_ARGUMENT", ["latest_turns"])
