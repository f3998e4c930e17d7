"""UpdateRun over a real socket (R46, R47)."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from grpc import StatusCode

from runlane.v1 import run_pb2, session_service_pb2
from runlane.v1 import run_service_pb2 as pb
from support.rpc_wire import Wire, over_any_store, refused, serving
from support.staging import say, script, wait

pytestmark = over_any_store

FIRST = pb.QueuePosition(first=True)


async def update(wire: Wire, run_id: str, **fields: Any) -> run_pb2.Run:
    mask = FieldMask(paths=[name for name in fields if name not in {"revision", "update_id"}])
    request = pb.UpdateRunRequest(run_id=run_id, update_mask=mask, **fields)
    return (await wire.runs.UpdateRun(request)).run


async def queued(wire: Wire, *run_ids: str) -> None:
    """A session whose active run waits at a latch, and runs behind it."""
    for run_id, prompt in (("a", script(wait("l"))), *((it, script(say(it))) for it in run_ids)):
        await wire.runs.RunAccepted(
            pb.RunAcceptedRequest(session_id="s", run_id=run_id, prompt=prompt, allow_missing=True)
        )
    await wire.latches.reached("l")


async def test_r46_an_update_answers_with_the_run_and_its_followers_see_it() -> None:
    async with serving() as wire:
        await queued(wire, "b", "c")
        run = await update(wire, "b", prompt=script(say("new")), metadata={"k": "v"}, revision=0)
        assert (run.revision, run.state) == (1, run_pb2.RUN_STATE_QUEUED)
        assert (run.prompt_excerpt, dict(run.metadata)) == (script(say("new")), {"k": "v"})
        events: Any = wire.runs.SubscribeRun(pb.SubscribeRunRequest(run_id="b", after_index=1))
        updated = (await events.read()).event.updated
        assert (updated.revision, updated.prompt_excerpt) == (1, script(say("new")))
        assert updated.when_busy == run_pb2.WHEN_BUSY_QUEUE
        events.cancel()
        wire.latches.open("l")


async def test_r47_followers_of_a_session_see_edits_and_moves() -> None:
    async with serving() as wire:
        await queued(wire, "b", "c")
        stream: Any = wire.sessions.SubscribeSession(
            session_service_pb2.SubscribeSessionRequest(session_ids=["s"])
        )
        while (await stream.read()).snapshot.continues:
            pass

        async def next_queue() -> Any:
            while True:
                message = await stream.read()
                if message.HasField("queue_changed"):
                    return message.queue_changed

        await update(wire, "c", position=FIRST)
        changed = await next_queue()
        assert list(changed.run_ids) == ["c", "b"]
        assert [(run.run_id, run.revision) for run in changed.runs] == [("c", 1)]
        await update(wire, "b", prompt="new", when_busy=run_pb2.WHEN_BUSY_FOLD)
        changed = await next_queue()
        assert list(changed.run_ids) == ["c", "b"]
        (run,) = changed.runs
        assert (run.prompt_excerpt, run.when_busy) == ("new", run_pb2.WHEN_BUSY_FOLD)
        stream.cancel()
        wire.latches.open("l")


async def test_r46_the_whole_prompt_of_a_waiting_run_can_be_read() -> None:
    async with serving() as wire:
        await queued(wire, "b")
        files = [
            run_pb2.Attachment(name="n", mime_type="text/plain", text="note"),
            run_pb2.Attachment(name="p", mime_type="image/png", data=b"\0\xff"),
        ]
        await update(wire, "b", prompt="y" * 300 + "é", attachments=files)
        got = await wire.runs.GetRun(pb.GetRunRequest(run_id="b", with_prompt=True))
        assert got.prompt == run_pb2.RunPrompt(text="y" * 300 + "é", attachments=files)
        assert (got.run.revision, got.run.prompt_excerpt) == (1, "y" * 256)
        bare = await wire.runs.GetRun(pb.GetRunRequest(run_id="b"))
        assert (bare.run, bare.HasField("prompt")) == (got.run, False)
        missing = wire.runs.GetRun(pb.GetRunRequest(run_id="no", with_prompt=True))
        assert (await refused(missing)).reason == "RUN_NOT_FOUND"
        wire.latches.open("l")


async def test_a_run_that_ended_is_returned_with_its_prompt_and_without_its_text() -> None:
    async with serving() as wire:
        prompt = script(say("x" * 1_000))
        accepted = pb.RunAcceptedRequest(
            session_id="s", run_id="a", prompt=prompt, allow_missing=True
        )
        await wire.runs.RunAccepted(accepted)
        await wire.runs.WaitRun(pb.WaitRunRequest(run_id="a"))
        got = await wire.runs.GetRun(pb.GetRunRequest(run_id="a", with_prompt=True))
        assert (got.prompt.text, got.run.run_complete.text) == (prompt, "")
        assert got.run.state == run_pb2.RUN_STATE_COMPLETED


async def test_r46_a_run_that_started_is_refused_with_the_active_run() -> None:
    async with serving() as wire:
        await queued(wire, "b")
        error = await refused(update(wire, "a", prompt="late"))
        assert (error.code, error.reason) == (StatusCode.FAILED_PRECONDITION, "ALREADY_STARTED")
        assert error.metadata == {"run_id": "a", "state": "active", "active_run_id": "a"}
        wire.latches.open("l")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"prompt": "x", "revision": 9}, "EDIT_CONFLICT"),
        ({"position": pb.QueuePosition(after_run_id="no")}, "ANCHOR_NOT_WAITING"),
        ({"position": pb.QueuePosition(before_run_id="b")}, "INVALID_ARGUMENT"),
        ({"position": pb.QueuePosition(first=False)}, "INVALID_ARGUMENT"),
        ({"position": pb.QueuePosition()}, "INVALID_ARGUMENT"),
        ({"prompt": ""}, "EMPTY_PROMPT"),
        ({"prompt": "x" * ((1 << 20) + 1)}, "PROMPT_TOO_LARGE"),
        ({"when_busy": run_pb2.WHEN_BUSY_REJECT}, "INVALID_ARGUMENT"),
        ({"when_busy": 99}, "INVALID_ARGUMENT"),
        ({"metadata": {"k": "x" * 5_000}}, "INVALID_ARGUMENT"),
        ({"attachments": [run_pb2.Attachment(name="f")]}, "INVALID_ARGUMENT"),
        ({"revision": -1, "prompt": "x"}, "INVALID_ARGUMENT"),
        ({"update_id": " u", "prompt": "x"}, "INVALID_ARGUMENT"),
        ({"update_id": "u" * 129, "prompt": "x"}, "INVALID_ARGUMENT"),
        ({}, "INVALID_ARGUMENT"),
    ],
)
async def test_r46_a_bad_update_gets_its_reason(fields: dict[str, Any], reason: str) -> None:
    async with serving() as wire:
        await queued(wire, "b")
        assert (await refused(update(wire, "b", **fields))).reason == reason
        wire.latches.open("l")


async def test_r46_an_update_repeated_with_its_id_keeps_later_ones() -> None:
    async with serving() as wire:
        await queued(wire, "b", "c")
        await update(wire, "c", position=FIRST, update_id="u")
        await update(wire, "b", position=FIRST)
        again = await update(wire, "c", position=FIRST, update_id="u")
        moved = await update(wire, "b", position=FIRST, update_id="v")
        assert (again.revision, moved.revision) == (1, 1)
        error = await refused(update(wire, "c", prompt="x", update_id="u"))
        assert (error.reason, error.fields) == ("INVALID_ARGUMENT", ["update_id"])
        wire.latches.open("l")


async def test_r46_a_field_that_the_mask_does_not_name_is_refused() -> None:
    async with serving() as wire:
        request = pb.UpdateRunRequest(
            run_id="b", prompt="x", position=FIRST, update_mask=FieldMask(paths=["position"])
        )
        assert (await refused(wire.runs.UpdateRun(request))).fields == ["prompt"]
