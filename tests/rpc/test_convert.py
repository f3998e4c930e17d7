"""Conversion: every field of a record is sent, and every enum is mapped completely."""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum
from typing import Protocol

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from runlane.v1 import run_pb2, run_service_pb2, session_pb2
from runlane_server.core import model
from runlane_server.core.artifact import ArtifactKind, ArtifactPiece
from runlane_server.core.model import (
    CancelScope,
    FinishReason,
    Role,
    RunState,
    WhenBusy,
)
from runlane_server.core.retry import RetryPolicy
from runlane_server.core.transition import CoveredRun, Receipt
from runlane_server.rpc import convert


class ProtoEnum(Protocol):
    def values(self) -> Collection[int]: ...


@pytest.mark.parametrize(
    ("table", "members", "wire"),
    [
        (convert.RUN_STATES, RunState, run_pb2.RunState),
        (convert.WHEN_BUSY, WhenBusy, run_pb2.WhenBusy),
        (convert.FINISH_REASONS, FinishReason, run_pb2.FinishReason),
        (convert.ROLES, Role, session_pb2.Role),
        (
            convert.CANCEL_SCOPES,
            set(CancelScope) - {CancelScope.RUN},
            run_service_pb2.CancelScope,
        ),
    ],
)
def test_enums_are_mapped_completely_and_by_name(
    table: dict[StrEnum, int], members: Collection[StrEnum], wire: ProtoEnum
) -> None:
    assert set(table) == set(members)
    assert set(table.values()) == set(wire.values()) - {0}
    names = {value.number: value.name for value in wire.DESCRIPTOR.values}  # type: ignore[attr-defined]
    for member, number in table.items():
        assert names[number].endswith(f"_{member.name}")


def test_every_enum_value_of_a_request_is_read() -> None:
    assert set(convert.RUN_STATES_FROM) == set(run_pb2.RunState.values()) - {0}
    assert set(convert.WHEN_BUSY_FROM) == set(run_pb2.WhenBusy.values())
    assert set(convert.CANCEL_SCOPES_FROM) == set(run_service_pb2.CancelScope.values())
    assert convert.WHEN_BUSY_FROM[0] is WhenBusy.QUEUE
    assert convert.CANCEL_SCOPES_FROM[0] is CancelScope.SESSION


@given(st.integers(min_value=-62_135_596_800_000_000, max_value=253_402_300_799_999_999))
def test_times_are_exact_to_the_microsecond(at: int) -> None:
    assert convert.timestamp(at).ToMicroseconds() == at


@given(st.integers(min_value=0, max_value=7 * 86_400 * 10**6))
def test_durations_survive_the_round_trip(length: int) -> None:
    assert convert.micros(convert.duration(length)) == length


@given(st.integers(min_value=0, max_value=100), st.integers(min_value=0, max_value=999_999_999))
def test_a_duration_is_rounded_up(seconds: int, nanos: int) -> None:
    micros = convert.micros(Duration(seconds=seconds, nanos=nanos))
    assert 0 <= micros * 1000 - (seconds * 10**9 + nanos) < 1000


texts = st.text(st.characters(codec="utf-8"))
attachments = st.builds(
    model.Attachment, texts, st.just("image/png"), st.one_of(texts, st.binary())
)


@given(attachments)
def test_attachments_survive_the_round_trip(held: model.Attachment) -> None:
    assert convert.attachment_from(convert.attachment(held)) == held


def test_a_missing_media_type_depends_on_the_content() -> None:
    assert convert.attachment_from(run_pb2.Attachment(text="")).mime_type == "text/plain"
    data = convert.attachment_from(run_pb2.Attachment(data=b""))
    assert (data.mime_type, data.content) == ("application/octet-stream", b"")


COMPLETE = model.RunComplete(
    session_id="s",
    run_id="r",
    accept_seq=3,
    state=RunState.CANCELLED,
    finish_reason=FinishReason.CANCELED,
    message_id="r-m1",
    text="half",
    text_truncated=True,
    error=model.RunError("AGENT_ERROR", "broke"),
    folded_into="",
    usage=model.Usage(1, 2, 3, 4, 5),
    attempt=2,
    cancel_reason="enough",
    accepted_at=1_000_001,
    started_at=2_000_002,
    ended_at=3_000_003,
    result="1",
)

RUN = model.Run(
    session_id="s",
    run_id="r",
    accept_seq=3,
    state=RunState.CANCELLED,
    when_busy=WhenBusy.FOLD,
    prompt_excerpt="do",
    prompt_fingerprint="f",
    metadata={"a": "b"},
    timeout=1_500_000,
    max_attempts=4,
    attempt=2,
    accepted_at=1_000_001,
    started_at=2_000_002,
    ended_at=3_000_003,
    folded_into="other",
    complete=COMPLETE,
    agent="coder",
    retry=RetryPolicy(("BUSY",), 3, 1_000_001, 2_000_002, after_output=True),
    last_event_index=7,
    revision=2,
)

SESSION = model.Session(
    session_id="s",
    title="t",
    metadata={"a": "b"},
    active_run_id="r",
    waiting_runs=2,
    usage=model.Usage(1, 2, 3, 4, 5),
    created_at=1_000_001,
    updated_at=2_000_002,
    agent="coder",
    origin=model.Origin("before", 7),
)

MESSAGE = model.Message(
    message_id="m",
    run_id="r",
    turn=2,
    ordinal=1,
    role=Role.ASSISTANT,
    parts=(),
    finish_reason=FinishReason.STOP,
    model="gpt",
    created_at=5_000_005,
)


def unset(message: Message) -> set[str]:
    """Returns the paths of empty fields, nested ones included."""
    missing = set()
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if isinstance(value, Message):
            inner = unset(value) if message.HasField(field.name) else {""}
            missing |= {f"{field.name}.{name}".rstrip(".") for name in inner}
        elif not value:
            missing.add(field.name)
    return missing


@pytest.mark.parametrize(
    ("wire", "empty"),
    [
        (convert.run_complete(COMPLETE), {"folded_into"}),
        (convert.run(RUN), {"run_complete.folded_into"}),
        (convert.session(SESSION), set()),
        (convert.message_head(MESSAGE), {"parts", "continues"}),
        (convert.tool_call(model.ToolCall("1", "look", "{}")), set()),
        (convert.tool_result(model.ToolResult("1", "look", "found", is_error=True)), set()),
        (convert.cancelled_runs(Receipt("s", (CoveredRun("r", 1, RunState.QUEUED),)))[0], set()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_field_of_a_message_is_filled(wire: Message, empty: set[str]) -> None:
    assert unset(wire) == empty


def test_absent_values_are_not_set() -> None:
    run = convert.run(
        model.Run(
            session_id="s",
            run_id="r",
            accept_seq=1,
            state=RunState.ACCEPTED,
            when_busy=WhenBusy.QUEUE,
            prompt_excerpt="",
            prompt_fingerprint="",
            metadata={},
            timeout=None,
            max_attempts=1,
            attempt=0,
            accepted_at=1,
            started_at=None,
            ended_at=None,
            folded_into="",
            complete=None,
        )
    )
    for field in ("timeout", "started_at", "ended_at", "run_complete", "retry_policy"):
        assert not run.HasField(field)


def test_a_folded_run_has_no_usage_of_its_own() -> None:
    held = convert.run_complete(
        model.RunComplete(
            session_id="s",
            run_id="r",
            accept_seq=1,
            state=RunState.COMPLETED,
            finish_reason=FinishReason.STOP,
            message_id="m",
            text="",
            text_truncated=False,
            error=None,
            folded_into="host",
            usage=model.NO_USAGE,
            attempt=0,
            cancel_reason="",
            accepted_at=1,
            started_at=None,
            ended_at=2,
        )
    )
    assert not held.HasField("usage")
    assert not held.HasField("error")
    assert not held.cancelled


@pytest.mark.parametrize(
    ("body", "field", "content"),
    [
        (model.Accepted(3), "accepted", "accept_seq: 3\n"),
        (model.Started(2), "started", "attempt: 2\n"),
        (model.TextDelta("a"), "text_delta", 'text: "a"\n'),
        (model.ReasoningDelta("a"), "reasoning_delta", 'text: "a"\n'),
        (model.Folded("a", "b"), "folded", 'run_id: "a"\ninto_run_id: "b"\n'),
        (
            model.ToolCall("1", "n", "{}"),
            "tool_call",
            'tool_call_id: "1"\nname: "n"\narguments_json: "{}"\n',
        ),
        (
            model.ToolResult("1", "n", "c"),
            "tool_result",
            'tool_call_id: "1"\nname: "n"\ncontent: "c"\n',
        ),
        (
            ArtifactPiece("a", "n", "m", ArtifactKind.JSON, "1", append=True),
            "artifact",
            'artifact_id: "a"\nname: "n"\nmime_type: "m"\njson: "1"\nappend: true\nlast: true\n',
        ),
        (model.StepResult("k", "1"), "step", 'key: "k"\nresult: "1"\n'),
        (model.CustomEvent("t", "1"), "custom", 'type: "t"\njson: "1"\n'),
        (COMPLETE, "run_complete", str(convert.run_complete(COMPLETE))),
    ],
)
def test_every_event_of_a_run_is_converted(body: model.EventBody, field: str, content: str) -> None:
    event = convert.run_event(model.RunEvent("r", 7, 1_000_001, body))
    assert (event.index, event.time.ToMicroseconds()) == (7, 1_000_001)
    assert event.WhichOneof("event") == field
    assert str(getattr(event, field)) == content


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (model.Started(0), "started"),
        (model.TextDelta(""), "text_delta"),
        (model.Folded("", ""), "folded"),
        (model.CustomEvent("", ""), "custom"),
    ],
)
def test_an_event_without_content_keeps_its_kind(body: model.EventBody, field: str) -> None:
    assert convert.run_event(model.RunEvent("r", 1, 1, body)).WhichOneof("event") == field


@pytest.mark.parametrize(
    ("part", "field"),
    [
        (model.Text(""), "text"),
        (model.Reasoning(""), "reasoning"),
        (model.ToolCall("", "", ""), "tool_call"),
        (model.ToolResult("", "", ""), "tool_result"),
        (model.Attachment("", "", b""), "attachment"),
        (ArtifactPiece("", "", "", ArtifactKind.TEXT, "", last=False), "artifact"),
        (model.ResultPart(""), "result"),
    ],
)
def test_every_part_of_a_message_is_converted(part: model.Part, field: str) -> None:
    assert convert.part(part).WhichOneof("part") == field


@pytest.mark.parametrize("kind", ArtifactKind)
def test_every_kind_of_artifact_is_converted(kind: ArtifactKind) -> None:
    empty = b"" if kind is ArtifactKind.DATA else ""
    wire = convert.artifact(ArtifactPiece("", "", "", kind, empty))
    assert wire.WhichOneof("content") == kind
