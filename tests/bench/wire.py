"""Messages of the benchmarks: request templates, and answers of typical size."""

from __future__ import annotations

from google.protobuf.timestamp_pb2 import Timestamp

from runlane.v1 import run_pb2, run_service_pb2

PREFIX = "bench-"
DIGITS = 12
"""Digits of a session number: session ids are `bench-` and a number, set by load generators."""

PROMPT = "Summarise what has changed since yesterday."

SERVICE = "/runlane.v1.RunService/"
BARE = "/bench.Bare/"

_NOW = Timestamp(seconds=1_760_000_000, nanos=123_456_000)
_CURSOR = "AbCdEfGhIjKlMnOpQrStUvWx"
_UUID = "0198c5a6-3f6e-7cc1-9b42-3d5f8e2a7b10"


def name(number: int) -> str:
    """The id of the session with a number."""
    return f"{PREFIX}{number:0{DIGITS}}"


def accept(prompt: str = PROMPT, *, named: bool = False) -> run_service_pb2.RunAcceptedRequest:
    """An accept in the session with a number; with `named`, run id and session id are equal."""
    return run_service_pb2.RunAcceptedRequest(
        session_id=name(0), run_id=name(0) if named else "", prompt=prompt, allow_missing=True
    )


def accepted(
    request: run_service_pb2.RunAcceptedRequest,
) -> run_service_pb2.RunAcceptedResponse:
    """The answer of a server, with all fields that it sets."""
    run = run_pb2.Run(
        session_id=request.session_id,
        run_id=request.run_id or _UUID,
        accept_seq=1,
        state=run_pb2.RUN_STATE_ACCEPTED,
        when_busy=run_pb2.WHEN_BUSY_QUEUE,
        prompt_excerpt=request.prompt,
        max_attempts=1,
        accepted_at=_NOW,
    )
    return run_service_pb2.RunAcceptedResponse(run=run, cursor=_CURSOR)


def terminal() -> run_service_pb2.SubscribeRunCompleteResponse:
    """The terminal event of an echo."""
    complete = run_pb2.RunComplete(
        session_id=name(0),
        run_id=_UUID,
        accept_seq=1,
        state=run_pb2.RUN_STATE_COMPLETED,
        finish_reason=run_pb2.FINISH_REASON_STOP,
        message_id=_UUID + ".2",
        text=PROMPT,
        usage=run_pb2.Usage(),
        attempt=1,
        accepted_at=_NOW,
        started_at=_NOW,
        ended_at=_NOW,
    )
    return run_service_pb2.SubscribeRunCompleteResponse(cursor=_CURSOR, run_complete=complete)


def delta() -> run_service_pb2.SubscribeRunResponse:
    """One word of an echo."""
    event = run_pb2.RunEvent(
        index=1000, time=_NOW, text_delta=run_pb2.RunEvent.TextDelta(text="word ")
    )
    return run_service_pb2.SubscribeRunResponse(event=event)
