"""Validation: every field of every request, with every violation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from runlane.v1 import run_pb2, run_service_pb2, session_service_pb2
from runlane_server.core.errors import (
    EmptyPrompt,
    InvalidArgument,
    PageTokenInvalid,
    PromptTooLarge,
    RunMissing,
    SessionMissing,
)
from runlane_server.core.limits import Limits
from runlane_server.core.model import CancelScope, RunState, WhenBusy
from runlane_server.core.retry import RetryPolicy
from runlane_server.engine.editing import SessionChange
from runlane_server.rpc import lists, validate
from runlane_server.store.base import EventFilter
from runlane_server.store.lookup import RunFilter, RunOrder, SessionFilter, Span

LIMITS = Limits(max_prompt_bytes=100, max_attachment_bytes=50)
WEEK = 7 * 24 * 3600


def a_run(**fields: Any) -> run_service_pb2.RunAcceptedRequest:
    return run_service_pb2.RunAcceptedRequest(**({"session_id": "s", "prompt": "p"} | fields))


def check_run(request: Message) -> object:
    assert isinstance(request, run_service_pb2.RunAcceptedRequest)
    return validate.run_accepted(request, LIMITS)


def check_cancel_page(request: run_service_pb2.CancelAllRequest) -> None:
    validate.cancel_page(request, lambda: "")


def check_subscribe_run_complete(
    request: run_service_pb2.SubscribeRunCompleteRequest,
) -> EventFilter:
    return validate.subscribe_run_complete(request, lambda: None)[0]


TOKENS = lists.Tokens(bytes(8), "tenant")


def check_list_runs(request: run_service_pb2.ListRunsRequest) -> lists.ListRequest[RunFilter]:
    return lists.list_runs(request, TOKENS)


def check_list_sessions(
    request: session_service_pb2.ListSessionsRequest,
) -> lists.ListRequest[SessionFilter]:
    return lists.list_sessions(request, TOKENS)


def check_list_messages(request: session_service_pb2.ListMessagesRequest) -> int:
    return validate.list_messages(request, lambda: None)[0]


def text(content: str, **fields: str) -> run_pb2.Attachment:
    return run_pb2.Attachment(text=content, **fields)  # type: ignore[arg-type]


BAD_IDS = {
    "too long": "x" * 129,
    "too long in UTF-8": "ä" * 65,
    "a newline": "a\nb",
    "a NUL": "a\0b",
    "a C1 control": "a\x85b",
    "leading whitespace": " a",
    "trailing whitespace": "a\u2003",
    "whitespace only": "  ",
}

GOOD_IDS = ["x", "x" * 128, "ä" * 64, "a b", "日本", "a/b:c"]

Check = Callable[[Any], object]

ID_FIELDS: list[tuple[str, Check, Callable[[str], Message]]] = [
    ("session_id", check_run, lambda i: a_run(session_id=i)),
    ("run_id", check_run, lambda i: a_run(run_id=i)),
    ("session_id", validate.cancel, lambda i: run_service_pb2.CancelRequest(session_id=i)),
    ("run_id", validate.cancel, lambda i: run_service_pb2.CancelRequest(run_id=i)),
    (
        "session_ids[1]",
        check_subscribe_run_complete,
        lambda i: run_service_pb2.SubscribeRunCompleteRequest(session_ids=["a", i]),
    ),
    (
        "run_ids[1]",
        check_subscribe_run_complete,
        lambda i: run_service_pb2.SubscribeRunCompleteRequest(run_ids=["a", i]),
    ),
    ("run_id", validate.subscribe_run, lambda i: run_service_pb2.SubscribeRunRequest(run_id=i)),
    ("run_id", validate.wait_run, lambda i: run_service_pb2.WaitRunRequest(run_id=i)),
    ("run_id", validate.get_run, lambda i: run_service_pb2.GetRunRequest(run_id=i)),
    ("session_id", check_list_runs, lambda i: run_service_pb2.ListRunsRequest(session_id=i)),
    (
        "session_id",
        validate.create_session,
        lambda i: session_service_pb2.CreateSessionRequest(session_id=i),
    ),
    (
        "session_id",
        validate.session_id,
        lambda i: session_service_pb2.GetSessionRequest(session_id=i),
    ),
    (
        "session_id",
        validate.session_id,
        lambda i: session_service_pb2.DeleteSessionRequest(session_id=i),
    ),
    (
        "session_id",
        check_list_messages,
        lambda i: session_service_pb2.ListMessagesRequest(session_id=i),
    ),
]


@pytest.mark.parametrize("bad", BAD_IDS.values(), ids=BAD_IDS.keys())
@pytest.mark.parametrize(("field", "check", "request_with"), ID_FIELDS)
def test_an_invalid_id_is_refused(
    field: str, check: Check, request_with: Callable[[str], Message], bad: str
) -> None:
    with pytest.raises(InvalidArgument) as refused:
        check(request_with(bad))
    assert {wrong.field for wrong in refused.value.violations} == {field}
    assert refused.value.reason == "INVALID_ARGUMENT"


@pytest.mark.parametrize("good", GOOD_IDS)
@pytest.mark.parametrize(("field", "check", "request_with"), ID_FIELDS)
def test_a_valid_id_is_accepted(
    field: str, check: Check, request_with: Callable[[str], Message], good: str
) -> None:
    check(request_with(good))


TABLE: list[tuple[str, Check, Message, type[InvalidArgument], str]] = [
    ("no session", check_run, a_run(session_id=""), SessionMissing, "session_id"),
    ("no prompt", check_run, a_run(prompt=""), EmptyPrompt, "prompt"),
    ("blank prompt", check_run, a_run(prompt=" \n\u2003"), EmptyPrompt, "prompt"),
    ("blank text", check_run, a_run(prompt="", attachments=[text(" ")]), EmptyPrompt, "prompt"),
    (
        "data only",
        check_run,
        a_run(prompt="", attachments=[run_pb2.Attachment(data=b"x")]),
        EmptyPrompt,
        "prompt",
    ),
    ("long prompt", check_run, a_run(prompt="ä" * 51), PromptTooLarge, "prompt"),
    (
        "large attachments",
        check_run,
        a_run(attachments=[text("ä" * 13), run_pb2.Attachment(data=b"x" * 25)]),
        PromptTooLarge,
        "attachments",
    ),
    (
        "attachment without content",
        check_run,
        a_run(attachments=[text("a"), run_pb2.Attachment(name="b")]),
        InvalidArgument,
        "attachments[1]",
    ),
    (
        "attachment name",
        check_run,
        a_run(attachments=[text("a", name="x" * 256)]),
        InvalidArgument,
        "attachments[0].name",
    ),
    *(
        (
            f"media type {bad[:20]!r}",
            check_run,
            a_run(attachments=[text("a"), text("b"), text("c", mime_type=bad)]),
            InvalidArgument,
            "attachments[2].mime_type",
        )
        for bad in ("text", "text/", "/plain", "te xt/plain", "text/plain\n", "a/b; \n", "a/b/c")
    ),
    (
        "long media type",
        check_run,
        a_run(attachments=[text("a", mime_type="text/" + "x" * 251)]),
        InvalidArgument,
        "attachments[0].mime_type",
    ),
    (
        "many attachments",
        check_run,
        a_run(attachments=[text("")] * 1001),
        InvalidArgument,
        "attachments",
    ),
    ("when_busy", check_run, a_run(when_busy=5), InvalidArgument, "when_busy"),
    ("negative when_busy", check_run, a_run(when_busy=-1), InvalidArgument, "when_busy"),
    *(
        (f"timeout {name}", check_run, a_run(timeout=bad), InvalidArgument, "timeout")
        for name, bad in {
            "zero": Duration(),
            "negative": Duration(seconds=-1),
            "negative nanos": Duration(nanos=-1),
            "over a week": Duration(seconds=WEEK, nanos=1),
            "huge": Duration(seconds=2**63 - 1, nanos=999_999_999),
            "nanos too large": Duration(seconds=1, nanos=10**9),
            "nanos too small": Duration(seconds=-1, nanos=-(10**9)),
            "mixed signs": Duration(seconds=1, nanos=-1),
        }.items()
    ),
    ("max_attempts", check_run, a_run(max_attempts=101), InvalidArgument, "max_attempts"),
    ("negative attempts", check_run, a_run(max_attempts=-1), InvalidArgument, "max_attempts"),
    (
        "many labels",
        check_run,
        a_run(metadata={str(n): "" for n in range(65)}),
        InvalidArgument,
        "metadata",
    ),
    (
        "label key",
        check_run,
        a_run(metadata={"k" * 129: ""}),
        InvalidArgument,
        'metadata["' + "k" * 32 + '..."] (key)',
    ),
    (
        "label value",
        check_run,
        a_run(metadata={"k": "v" * 4097}),
        InvalidArgument,
        'metadata["k"]',
    ),
    ("nobody", validate.cancel, run_service_pb2.CancelRequest(), SessionMissing, "session_id"),
    *(
        (
            f"run and scope {scope}",
            validate.cancel,
            run_service_pb2.CancelRequest(run_id="r", scope=scope),  # type: ignore[arg-type]
            InvalidArgument,
            "scope",
        )
        for scope in (2, 3)
    ),
    (
        "scope",
        validate.cancel,
        run_service_pb2.CancelRequest(session_id="s", scope=4),  # type: ignore[arg-type]
        InvalidArgument,
        "scope",
    ),
    (
        "cancel reason",
        validate.cancel,
        run_service_pb2.CancelRequest(session_id="s", reason="x" * 1025),
        InvalidArgument,
        "reason",
    ),
    (
        "cancel all reason",
        validate.cancel_all,
        run_service_pb2.CancelAllRequest(reason="ä" * 513),
        InvalidArgument,
        "reason",
    ),
    (
        "cancel page reason",
        check_cancel_page,
        run_service_pb2.CancelAllRequest(page_size=1, reason="ä" * 513),
        InvalidArgument,
        "reason",
    ),
    *(
        (
            f"many {field}",
            check_subscribe_run_complete,
            run_service_pb2.SubscribeRunCompleteRequest(**{field: ["x"] * 1001}),  # type: ignore[arg-type]
            InvalidArgument,
            field,
        )
        for field in ("session_ids", "run_ids")
    ),
    *(
        (
            f"empty entry of {field}",
            check_subscribe_run_complete,
            run_service_pb2.SubscribeRunCompleteRequest(**{field: ["x", ""]}),  # type: ignore[arg-type]
            InvalidArgument,
            f"{field}[1]",
        )
        for field in ("session_ids", "run_ids")
    ),
    *(
        (f"no run, {check.__name__}", check, request, RunMissing, "run_id")
        for check, request in (
            (validate.subscribe_run, run_service_pb2.SubscribeRunRequest()),
            (validate.wait_run, run_service_pb2.WaitRunRequest()),
            (validate.get_run, run_service_pb2.GetRunRequest()),
        )
    ),
    (
        "after_index",
        validate.subscribe_run,
        run_service_pb2.SubscribeRunRequest(run_id="r", after_index=-1),
        InvalidArgument,
        "after_index",
    ),
    *(
        (
            f"wait {name}",
            validate.wait_run,
            run_service_pb2.WaitRunRequest(run_id="r", timeout=bad),
            InvalidArgument,
            "timeout",
        )
        for name, bad in {
            "negative": Duration(nanos=-1),
            "over a week": Duration(seconds=WEEK + 1),
            "mixed signs": Duration(seconds=-1, nanos=1),
        }.items()
    ),
    (
        "unspecified state",
        check_list_runs,
        run_service_pb2.ListRunsRequest(states=[1, 0]),  # type: ignore[list-item]
        InvalidArgument,
        "states[1]",
    ),
    (
        "unknown state",
        check_list_runs,
        run_service_pb2.ListRunsRequest(states=[99]),  # type: ignore[list-item]
        InvalidArgument,
        "states[0]",
    ),
    *(
        (f"list of runs, {field}", check_list_runs, request, InvalidArgument, field)
        for field, request in {
            "agent": run_service_pb2.ListRunsRequest(agent="a b"),
            "metadata": run_service_pb2.ListRunsRequest(metadata={str(n): "" for n in range(9)}),
            "accepted_from": run_service_pb2.ListRunsRequest(accepted_from=Timestamp(seconds=-1)),
            "ended_before": run_service_pb2.ListRunsRequest(
                ended_before=Timestamp(nanos=1_000_000_000)
            ),
            "order": run_service_pb2.ListRunsRequest(order=9),  # type: ignore[arg-type]
        }.items()
    ),
    *(
        (f"page size, {check.__name__}", check, request, InvalidArgument, "page_size")
        for check, request in (
            (check_list_runs, run_service_pb2.ListRunsRequest(page_size=-1)),
            (check_list_sessions, session_service_pb2.ListSessionsRequest(page_size=-1)),
            (
                check_list_messages,
                session_service_pb2.ListMessagesRequest(session_id="s", page_size=-1),
            ),
        )
    ),
    (
        "title",
        validate.create_session,
        session_service_pb2.CreateSessionRequest(title="x" * 1025),
        InvalidArgument,
        "title",
    ),
    (
        "labels of a session",
        validate.create_session,
        session_service_pb2.CreateSessionRequest(metadata={"k": "v" * 4097}),
        InvalidArgument,
        'metadata["k"]',
    ),
    *(
        (f"no session, {type(request).__name__}", check, request, SessionMissing, "session_id")
        for check, request in (
            (validate.session_id, session_service_pb2.GetSessionRequest()),
            (validate.session_id, session_service_pb2.DeleteSessionRequest()),
            (check_list_messages, session_service_pb2.ListMessagesRequest()),
        )
    ),
]


@pytest.mark.parametrize(
    ("check", "request_", "error", "field"),
    [row[1:] for row in TABLE],
    ids=[row[0] for row in TABLE],
)
def test_an_invalid_field_is_reported(
    check: Check, request_: Message, error: type[InvalidArgument], field: str
) -> None:
    with pytest.raises(InvalidArgument) as refused:
        check(request_)
    assert type(refused.value) is error
    assert [wrong.field for wrong in refused.value.violations] == [field]


def test_one_error_reports_all_violations() -> None:
    request = a_run(
        session_id=" a",
        prompt="",
        attachments=[run_pb2.Attachment(data=b"x" * 51, mime_type="?")],
        when_busy=9,
        max_attempts=-1,
        metadata={"k": "v" * 5000},
        timeout=Duration(seconds=-1),
    )
    with pytest.raises(EmptyPrompt) as refused:
        check_run(request)
    assert {wrong.field for wrong in refused.value.violations} == {
        "session_id",
        "prompt",
        "attachments[0].mime_type",
        "attachments",
        "when_busy",
        "timeout",
        "max_attempts",
        'metadata["k"]',
    }


def test_omitted_fields_have_defaults() -> None:
    wanted = validate.run_accepted(a_run(), LIMITS)
    assert (wanted.run_id, wanted.when_busy, wanted.timeout) == ("", WhenBusy.QUEUE, None)
    assert (wanted.max_attempts, dict(wanted.metadata)) == (1, {})
    assert validate.wait_run(run_service_pb2.WaitRunRequest(run_id="r")) is None
    nothing = check_subscribe_run_complete(run_service_pb2.SubscribeRunCompleteRequest())
    assert nothing == EventFilter()
    assert nothing.matches_all


def test_values_at_the_limits_are_accepted() -> None:
    wanted = validate.run_accepted(
        a_run(
            prompt="x" * 100,
            attachments=[text("x" * 25, name="x" * 255), run_pb2.Attachment(data=b"x" * 25)],
            timeout=Duration(seconds=WEEK),
            max_attempts=100,
            metadata={f"{n:0128}": "v" * 4096 for n in range(64)},
        ),
        LIMITS,
    )
    assert wanted.timeout == WEEK * 10**6
    assert wanted.max_attempts == 100
    assert len(wanted.metadata) == 64


def test_a_text_attachment_replaces_the_prompt() -> None:
    wanted = validate.run_accepted(a_run(prompt="", attachments=[text("do it")]), LIMITS)
    assert wanted.prompt.attachments[0].content == "do it"


@pytest.mark.parametrize(
    "good", ["", "text/plain", "text/plain; charset=utf-8", "application/vnd.api+json"]
)
def test_media_types_are_validated(good: str) -> None:
    check_run(a_run(attachments=[text("a", mime_type=good)]))


def test_a_nanosecond_is_a_positive_duration() -> None:
    wanted = validate.run_accepted(a_run(timeout=Duration(nanos=1)), LIMITS)
    assert wanted.timeout == 1


@pytest.mark.parametrize(
    ("asked", "given"), [(0, 50), (1, 1), (1000, 1000), (1001, 1000), (2**31 - 1, 1000)]
)
def test_page_sizes_are_clamped(asked: int, given: int) -> None:
    request = run_service_pb2.ListRunsRequest(page_size=asked)
    assert check_list_runs(request).page_size == given


@pytest.mark.parametrize(
    ("fields", "scope"),
    [
        ({"session_id": "s"}, CancelScope.SESSION),
        ({"session_id": "s", "scope": 1}, CancelScope.SESSION),
        ({"session_id": "s", "scope": 2}, CancelScope.ACTIVE),
        ({"session_id": "s", "scope": 3}, CancelScope.WAITING),
        ({"session_id": "s", "run_id": "r"}, CancelScope.RUN),
        ({"run_id": "r", "scope": 1}, CancelScope.RUN),
    ],
)
def test_the_scope_of_a_cancel_is_read(fields: dict[str, Any], scope: CancelScope) -> None:
    assert validate.cancel(run_service_pb2.CancelRequest(**fields)) is scope


def test_the_filters_of_a_list_are_read() -> None:
    request = run_service_pb2.ListRunsRequest(states=[1, 8, 8])  # type: ignore[list-item]
    wanted = check_list_runs(request).wanted
    assert wanted.states == {RunState.ACCEPTED, RunState.FAILED}
    assert wanted.session_id is None


def test_all_filters_of_runs_are_read() -> None:
    request = run_service_pb2.ListRunsRequest(
        session_id="s",
        agent="a",
        metadata={"k": "v"},
        accepted_from=Timestamp(seconds=1, nanos=1),
        accepted_before=Timestamp(seconds=2),
        ended_from=Timestamp(seconds=3),
    )
    page = check_list_runs(request)
    assert page.wanted == RunFilter(
        session_id="s",
        agent="a",
        labels={"k": "v"},
        accepted=Span(1_000_001, 2_000_000),
        ended=Span(since=3_000_000),
        order=RunOrder.LATEST_ENDED,
    )
    token = page.next_token((5, 7))
    request.page_token = token
    assert check_list_runs(request).after == (5, 7)
    for field, value in (("agent", "b"), ("order", 1), ("session_id", "t")):
        other = run_service_pb2.ListRunsRequest()
        other.CopyFrom(request)
        setattr(other, field, value)
        with pytest.raises(PageTokenInvalid):
            check_list_runs(other)
    request.metadata["k"] = "w"
    with pytest.raises(PageTokenInvalid):
        check_list_runs(request)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, "update_mask"),
        ({"update_mask": ["title", "busy"]}, "update_mask"),
        ({"update_mask": ["title"], "agent": "a"}, "agent"),
        ({"update_mask": ["title"], "title": "x" * 1025}, "title"),
        ({"update_mask": ["agent"], "agent": "a b"}, "agent"),
        ({"update_mask": ["metadata"], "metadata": {"": "v" * 5000}}, 'metadata[""]'),
        ({"update_mask": ["title"], "etag": "x" * 129}, "etag"),
    ],
)
def test_bad_change_of_a_session_names_the_field(fields: dict[str, Any], named: str) -> None:
    paths = fields.pop("update_mask", [])
    request = session_service_pb2.UpdateSessionRequest(session_id="s", **fields)
    request.update_mask.paths.extend(paths)
    with pytest.raises(InvalidArgument) as caught:
        lists.update_session(request)
    assert named in {wrong.field for wrong in caught.value.violations}


def test_change_of_a_session_is_read() -> None:
    request = session_service_pb2.UpdateSessionRequest(session_id="s", title="new")
    request.update_mask.paths.extend(["title", "metadata"])
    assert lists.update_session(request) == SessionChange(title="new", metadata={})


def test_a_wait_may_have_a_timeout_of_zero() -> None:
    request = run_service_pb2.WaitRunRequest(run_id="r", timeout=Duration())
    assert validate.wait_run(request) == 0
    half = run_service_pb2.WaitRunRequest(run_id="r", timeout=Duration(nanos=500_000_000))
    assert validate.wait_run(half) == 0.5


def test_defaults_and_limits_match_the_interface() -> None:
    limits = {limit.name: limit.default for limit in dataclasses.fields(Limits)}
    assert limits["max_prompt_bytes"] == 1 << 20
    assert limits["max_attachment_bytes"] == 2 << 20


def policy(**fields: Any) -> run_service_pb2.RunAcceptedRequest:
    return a_run(retry_policy=run_pb2.RetryPolicy(**({"max_attempts": 2} | fields)))


@pytest.mark.parametrize(
    ("fields", "field", "problem"),
    [
        ({"max_attempts": 0}, "max_attempts", "is 0; the minimum is 2"),
        ({"max_attempts": 1}, "max_attempts", "is 1; the minimum is 2"),
        ({"max_attempts": 101}, "max_attempts", "is 101; the maximum is 100"),
        ({"reasons": ["A"] * 21}, "reasons", "has 21 entries; the limit is 20"),
        ({"reasons": ["A", ""]}, "reasons[1]", "is empty"),
        ({"reasons": ["A" * 129]}, "reasons[0]", "129 bytes"),
        ({"initial_backoff": Duration(seconds=-1)}, "initial_backoff", "is negative"),
        ({"initial_backoff": Duration(seconds=WEEK + 1)}, "initial_backoff", "more than 7 days"),
        ({"max_backoff": Duration(seconds=WEEK + 1)}, "max_backoff", "more than 7 days"),
        ({"max_backoff": Duration(nanos=1000)}, "max_backoff", "less than initial_backoff"),
    ],
)
def test_a_bad_retry_policy_is_refused(fields: dict[str, Any], field: str, problem: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        check_run(policy(**fields))
    (violation,) = refused.value.violations
    assert violation.field == f"retry_policy.{field}"
    assert problem in violation.description


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, RetryPolicy((), 2, 1_000_000, 60_000_000)),
        ({"reasons": ["B", "A", "B"]}, RetryPolicy(("A", "B"), 2, 1_000_000, 60_000_000)),
        ({"initial_backoff": Duration()}, RetryPolicy((), 2, 0, 60_000_000)),
        ({"initial_backoff": Duration(seconds=90)}, RetryPolicy((), 2, 90_000_000, 90_000_000)),
        ({"max_backoff": Duration(seconds=2)}, RetryPolicy((), 2, 1_000_000, 2_000_000)),
        ({"after_output": True}, RetryPolicy((), 2, after_output=True)),
    ],
)
def test_a_retry_policy_has_defaults(fields: dict[str, Any], expected: RetryPolicy) -> None:
    assert validate.run_accepted(policy(**fields), LIMITS).retry == expected
    assert validate.run_accepted(a_run(), LIMITS).retry is None
