"""SessionService, health and reflection over a real socket."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import (  # type: ignore[import-untyped]
    reflection_pb2,
    reflection_pb2_grpc,
)
from structlog.testing import capture_logs

from runlane.v1 import run_pb2, run_service_pb2, session_pb2
from runlane.v1 import session_service_pb2 as pb
from runlane_server.core.limits import Limits
from support.rpc_wire import Wire, over_any_store, refused, serving

pytestmark = over_any_store

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def ran(wire: Wire, session_id: str, prompt: str, **fields: Any) -> run_pb2.Run:
    request = run_service_pb2.RunAcceptedRequest(
        session_id=session_id, prompt=prompt, allow_missing=True, **fields
    )
    run = (await wire.runs.RunAccepted(request)).run
    return (await wire.runs.WaitRun(run_service_pb2.WaitRunRequest(run_id=run.run_id))).run


async def transcript(wire: Wire, session_id: str, page_size: int) -> list[pb.ListMessagesResponse]:
    request = pb.ListMessagesRequest(session_id=session_id, page_size=page_size)
    pages: list[pb.ListMessagesResponse] = []
    while True:
        pages.append(await wire.sessions.ListMessages(request))
        if not pages[-1].next_page_token:
            return pages
        request.page_token = pages[-1].next_page_token


async def test_a_session_is_created_and_read() -> None:
    async with serving() as wire:
        created = await wire.sessions.CreateSession(
            pb.CreateSessionRequest(session_id="s", title="t", metadata={"k": "v"})
        )
        got = await wire.sessions.GetSession(pb.GetSessionRequest(session_id="s"))
        assert got.session == created.session
        assert (got.session.title, dict(got.session.metadata)) == ("t", {"k": "v"})
        assert not got.session.busy
        minted = await wire.sessions.CreateSession(pb.CreateSessionRequest())
        assert len(minted.session.session_id) == 36


async def test_a_session_with_work_is_busy() -> None:
    async with serving() as wire:
        prompt = json.dumps([{"wait": "go"}])
        request = run_service_pb2.RunAcceptedRequest(
            session_id="s", prompt=prompt, allow_missing=True
        )
        active = (await wire.runs.RunAccepted(request)).run
        await wire.latches.reached("go")
        waiting = (await wire.runs.RunAccepted(request)).run
        got = (await wire.sessions.GetSession(pb.GetSessionRequest(session_id="s"))).session
        assert (got.busy, got.active_run_id, got.waiting_runs) == (True, active.run_id, 1)
        error = await refused(wire.sessions.DeleteSession(pb.DeleteSessionRequest(session_id="s")))
        assert (error.reason, error.code) == ("SESSION_BUSY", StatusCode.FAILED_PRECONDITION)
        wire.latches.open("go")
        await wire.runs.WaitRun(run_service_pb2.WaitRunRequest(run_id=waiting.run_id))


async def test_sessions_are_listed_in_pages_newest_first() -> None:
    async with serving() as wire:
        for n in range(5):
            await wire.sessions.CreateSession(pb.CreateSessionRequest(session_id=f"s{n}"))
        request = pb.ListSessionsRequest(page_size=2)
        found: list[str] = []
        while True:
            answer = await wire.sessions.ListSessions(request)
            found += [session.session_id for session in answer.sessions]
            if not answer.next_page_token:
                break
            request.page_token = answer.next_page_token
        assert found == ["s4", "s3", "s2", "s1", "s0"]


async def test_deleting_a_session_keeps_its_terminal_events() -> None:
    async with serving() as wire:
        run = await ran(wire, "s", "hello")
        await wire.sessions.DeleteSession(pb.DeleteSessionRequest(session_id="s"))
        for call in (
            wire.sessions.GetSession(pb.GetSessionRequest(session_id="s")),
            wire.sessions.ListMessages(pb.ListMessagesRequest(session_id="s")),
            wire.sessions.DeleteSession(pb.DeleteSessionRequest(session_id="s")),
        ):
            error = await refused(call)
            assert (error.reason, error.code) == ("SESSION_NOT_FOUND", StatusCode.NOT_FOUND)
        request = run_service_pb2.GetRunRequest(run_id=run.run_id)
        assert (await refused(wire.runs.GetRun(request))).reason == "RUN_NOT_FOUND"
        events = wire.runs.SubscribeRunComplete(
            run_service_pb2.SubscribeRunCompleteRequest(from_beginning=True)
        )
        await events.read()
        event = await events.read()
        assert isinstance(event, run_service_pb2.SubscribeRunCompleteResponse)
        assert event.run_complete.run_id == run.run_id
        events.cancel()


async def test_invalid_session_requests_are_refused_with_their_reason() -> None:
    async with serving() as wire:
        await wire.sessions.CreateSession(pb.CreateSessionRequest(session_id="s"))
        error = await refused(wire.sessions.CreateSession(pb.CreateSessionRequest(session_id="s")))
        assert (error.reason, error.code) == ("SESSION_EXISTS", StatusCode.ALREADY_EXISTS)
        for call in (
            wire.sessions.GetSession(pb.GetSessionRequest()),
            wire.sessions.DeleteSession(pb.DeleteSessionRequest()),
            wire.sessions.ListMessages(pb.ListMessagesRequest()),
        ):
            error = await refused(call)
            assert (error.reason, error.code) == ("SESSION_MISSING", StatusCode.INVALID_ARGUMENT)


async def test_a_transcript_is_listed_oldest_first() -> None:
    async with serving() as wire:
        attachment = run_pb2.Attachment(name="n", mime_type="image/png", data=b"\x00")
        await ran(wire, "s", "one", attachments=[attachment])
        await ran(wire, "s", json.dumps([{"reasoning": "hm"}, {"text": "two"}, {"model": "m"}]))
        (page,) = await transcript(wire, "s", 50)
        assert [(m.role, m.turn) for m in page.messages] == [
            (session_pb2.ROLE_USER, 1),
            (session_pb2.ROLE_ASSISTANT, 1),
            (session_pb2.ROLE_USER, 2),
            (session_pb2.ROLE_ASSISTANT, 2),
        ]
        question, answer, _, last = page.messages
        assert [part.WhichOneof("part") for part in question.parts] == ["text", "attachment"]
        assert question.parts[1].attachment == attachment
        assert (answer.parts[0].text, answer.finish_reason) == ("one", run_pb2.FINISH_REASON_STOP)
        assert [part.WhichOneof("part") for part in last.parts] == ["reasoning", "text"]
        assert last.model == "m"
        by_ones = await transcript(wire, "s", 1)
        assert [m for page in by_ones for m in page.messages] == list(page.messages)


async def test_messages_too_large_for_one_response_are_continued() -> None:
    """The largest prompt with the largest attachment, and an answer larger than a message."""
    async with serving() as wire:
        question = "q" * (1 << 20)
        image = run_pb2.Attachment(name="n", mime_type="image/png", data=bytes(2 << 20))
        await ran(wire, "s", question, attachments=[image])
        steps = [{"text": "ä" * (1 << 16), "repeat": 40}]
        await ran(wire, "s", json.dumps(steps))
        pages = await transcript(wire, "s", 50)
        assert len(pages) > 3
        parts: dict[str, list[session_pb2.Part]] = {}
        for message in (message for page in pages for message in page.messages):
            parts.setdefault(message.message_id, []).extend(message.parts)
        first, _, _, answer = parts.values()
        assert (first[0].text, first[1].attachment.data) == (question, bytes(2 << 20))
        assert "".join(part.text for part in answer) == "ä" * (1 << 16) * 40
        assert [m.continues for page in pages for m in page.messages].count(True) >= 2


async def test_a_terminal_event_marks_its_truncated_text() -> None:
    async with serving() as wire:
        run = await ran(wire, "s", json.dumps([{"text": "x" * (1 << 16), "repeat": 20}]))
        assert run.run_complete.text_truncated
        assert len(run.run_complete.text) == 1 << 20


async def test_runs_with_large_metadata_are_listed_in_smaller_pages() -> None:
    async with serving(Limits(max_active_runs=0)) as wire:
        labels = {f"{n}": "v" * 4096 for n in range(64)}
        for n in range(20):
            request = run_service_pb2.RunAcceptedRequest(
                session_id=f"s{n}", prompt="p", allow_missing=True, metadata=labels
            )
            await wire.runs.RunAccepted(request)
        listing = run_service_pb2.ListRunsRequest()
        found: list[str] = []
        while True:
            answer = await wire.runs.ListRuns(listing)
            found += [run.session_id for run in answer.runs]
            if not answer.next_page_token:
                break
            listing.page_token = answer.next_page_token
        assert found == [f"s{n}" for n in reversed(range(20))]


# --- Health and reflection ----------------------------------------------------------------------


async def test_health_probes_are_not_logged_at_level_info() -> None:
    async with serving() as wire:
        health = health_pb2_grpc.HealthStub(wire.channel)
        garbled: Any = wire.channel.unary_unary("/grpc.health.v1.Health/Check")
        with capture_logs() as logs:
            for call in (
                health.Check(health_pb2.HealthCheckRequest(service="nobody")),
                garbled(b"\xff"),
            ):
                with pytest.raises(grpc.aio.AioRpcError):
                    await call
            # The line of a refused call is written after its answer.
            async with asyncio.timeout(10):
                while len(logs) < 2:
                    await asyncio.sleep(0)
        assert {line["log_level"] for line in logs} == {"debug"}


async def test_health_covers_every_service() -> None:
    async with serving() as wire:
        health = health_pb2_grpc.HealthStub(wire.channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service="runlane.v1.RunService"))
        assert (await watch.read()).status == SERVING
        names = (
            "",
            "runlane.v1.RunService",
            "runlane.v1.SessionService",
            "runlane.v1.AgentService",
            "runlane.v1.WebhookService",
        )

        async def states() -> set[int]:
            checks = [health_pb2.HealthCheckRequest(service=name) for name in names]
            listed = await health.List(health_pb2.HealthListRequest())
            assert set(names) == set(listed.statuses)
            found = [*listed.statuses.values(), *[await health.Check(check) for check in checks]]
            return {each.status for each in found}

        assert await states() == {SERVING}
        await wire.endpoint.mark_not_serving()
        assert await states() == {NOT_SERVING}
        assert (await watch.read()).status == NOT_SERVING
        watch.cancel()


async def test_reflection_lists_every_service() -> None:
    async with serving() as wire:
        stub = reflection_pb2_grpc.ServerReflectionStub(wire.channel)
        call = stub.ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        listed = (await call.read()).list_services_response.service
        assert {service.name for service in listed} == {
            "runlane.v1.RunService",
            "runlane.v1.SessionService",
            "runlane.v1.AgentService",
            "runlane.v1.WebhookService",
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        }
        await call.write(
            reflection_pb2.ServerReflectionRequest(file_containing_symbol="runlane.v1.RunService")
        )
        files = (await call.read()).file_descriptor_response.file_descriptor_proto
        names = {descriptor_pb2.FileDescriptorProto.FromString(file).name for file in files}
        assert "runlane/v1/run_service.proto" in names
        await call.done_writing()
        assert await call.code() is StatusCode.OK
