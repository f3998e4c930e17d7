"""Accepts that depend on the active run, over a real socket."""

from __future__ import annotations

from grpc import StatusCode

from runlane.v1 import run_pb2, run_service_pb2, session_service_pb2
from support.rpc_wire import over_any_store, refused, serving

pytestmark = over_any_store


def prompt(run_id: str, expected: str = "", **fields: object) -> run_service_pb2.RunAcceptedRequest:
    return run_service_pb2.RunAcceptedRequest(
        session_id="s",
        run_id=run_id,
        prompt="hello",
        allow_missing=True,
        expected_active_run_id=expected,
        **fields,  # type: ignore[arg-type]
    )


async def test_run_for_another_active_run_is_refused_with_the_one_that_is() -> None:
    async with serving() as wire:
        error = await refused(wire.runs.RunAccepted(prompt("a", "b")))
        assert (error.code, error.reason) == (StatusCode.FAILED_PRECONDITION, "ACTIVE_RUN_CHANGED")
        assert error.metadata == {"session_id": "s", "active_run_id": ""}
        error = await refused(
            wire.sessions.GetSession(session_service_pb2.GetSessionRequest(session_id="s"))
        )
        assert error.reason == "SESSION_NOT_FOUND"
        error = await refused(wire.runs.RunAccepted(prompt("a", " b")))
        assert error.reason == "INVALID_ARGUMENT"


async def test_repeated_accept_is_answered_though_the_active_run_is_gone() -> None:
    async with serving() as wire:
        first = (await wire.runs.RunAccepted(prompt("a"))).run
        await wire.runs.WaitRun(run_service_pb2.WaitRunRequest(run_id="a"))
        again = (await wire.runs.RunAccepted(prompt("a", "never"))).run
        assert (again.run_id, again.accept_seq) == (first.run_id, first.accept_seq)
        assert again.state == run_pb2.RUN_STATE_COMPLETED
