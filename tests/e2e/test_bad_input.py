"""Invalid input over the wire: each call refuses it and changes nothing. Large input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message as Request
from grpc import StatusCode

from runlane import Attachment, Client, RunState, Text, TextDelta
from runlane.v1 import (
    run_pb2,
    run_service_pb2_grpc,
    session_pb2,
    session_service_pb2_grpc,
    webhook_service_pb2_grpc,
)
from runlane.v1 import run_service_pb2 as runs_pb
from runlane.v1 import session_service_pb2 as sessions_pb
from runlane.v1 import webhook_service_pb2 as webhooks_pb
from support.rpc_wire import refused
from support.server import ServerProcess
from support.staging import SECONDS, script
from support.wire import Wire

KIB, MIB = 1 << 10, 1 << 20
GRPC_LIMIT = 4 * MIB

Case = tuple[Request, str, list[str]]
"""A request, the reason of its refusal, and the fields that the error names."""

STATUS = {
    "EMPTY_PROMPT": StatusCode.INVALID_ARGUMENT,
    "SESSION_MISSING": StatusCode.INVALID_ARGUMENT,
    "SESSION_NOT_FOUND": StatusCode.NOT_FOUND,
    "SESSION_EXISTS": StatusCode.ALREADY_EXISTS,
    "RUN_MISSING": StatusCode.INVALID_ARGUMENT,
    "RUN_NOT_FOUND": StatusCode.NOT_FOUND,
    "RUN_ID_CONFLICT": StatusCode.ALREADY_EXISTS,
    "PROMPT_TOO_LARGE": StatusCode.INVALID_ARGUMENT,
    "CURSOR_INVALID": StatusCode.INVALID_ARGUMENT,
    "PAGE_TOKEN_INVALID": StatusCode.INVALID_ARGUMENT,
    "INVALID_ARGUMENT": StatusCode.INVALID_ARGUMENT,
    "WEBHOOK_NOT_FOUND": StatusCode.NOT_FOUND,
}
"""The status of each reason, as documented in `error_reason.proto`."""


class Stubs:
    """The calls, by the name of their request."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.runs: Any = run_service_pb2_grpc.RunServiceStub(channel)
        self.sessions: Any = session_service_pb2_grpc.SessionServiceStub(channel)
        self.webhooks: Any = webhook_service_pb2_grpc.WebhookServiceStub(channel)

    def call(self, request: Request) -> Any:
        """The answer to a request, or the first message of its stream."""
        rpc = type(request).__name__.removesuffix("Request")
        stubs = (self.runs, self.sessions, self.webhooks)
        call = getattr(next(stub for stub in stubs if hasattr(stub, rpc)), rpc)(request)
        return call.read() if rpc.startswith("Subscribe") else call

    async def check(self, cases: list[Case]) -> None:
        """Checks that every case is refused with its reason and fields."""
        found, expected = [], []
        for n, (request, reason, fields) in enumerate(cases):
            case = f"{n} {type(request).__name__} {str(request)[:60]}"
            error = await refused(self.call(request))  # checks the domain too
            found.append((case, error.code, error.reason, error.fields))
            expected.append((case, STATUS[reason], reason, fields))
        assert found == expected

    async def stored(self) -> tuple[list[str], list[str]]:
        """The ids of all sessions and runs."""
        sessions = await self.call(sessions_pb.ListSessionsRequest(page_size=2**31 - 1))
        runs = await self.call(runs_pb.ListRunsRequest(page_size=2**31 - 1))
        return [s.session_id for s in sessions.sessions], [r.run_id for r in runs.runs]


# --- The table ----------------------------------------------------------------------------------


def a_run(**fields: Any) -> runs_pb.RunAcceptedRequest:
    """A request that would be accepted, and create its session, without these fields."""
    fields = {"session_id": "s", "prompt": "p", "allow_missing": True, **fields}
    return runs_pb.RunAcceptedRequest(**fields)


PROMPT_ONLY = FieldMask(paths=["prompt"])

BAD_IDS = ("x" * 129, "ä" * 65, "a\nb", "a\0b", "\x7f", " a", "a\t")

WITH_AN_ID: list[tuple[type[Request], str, Mapping[str, Any]]] = [
    (runs_pb.RunAcceptedRequest, "session_id", {"prompt": "p", "allow_missing": True}),
    (
        runs_pb.RunAcceptedRequest,
        "run_id",
        {"session_id": "s", "prompt": "p", "allow_missing": True},
    ),
    (runs_pb.UpdateRunRequest, "run_id", {"prompt": "p", "update_mask": PROMPT_ONLY}),
    (runs_pb.CancelRequest, "session_id", {}),
    (runs_pb.CancelRequest, "run_id", {}),
    (runs_pb.SubscribeRunRequest, "run_id", {}),
    (runs_pb.WaitRunRequest, "run_id", {}),
    (runs_pb.GetRunRequest, "run_id", {}),
    (runs_pb.ListRunsRequest, "session_id", {}),
    (sessions_pb.CreateSessionRequest, "session_id", {}),
    (sessions_pb.GetSessionRequest, "session_id", {}),
    (sessions_pb.DeleteSessionRequest, "session_id", {}),
    (
        sessions_pb.UpdateSessionRequest,
        "session_id",
        {"title": "t", "update_mask": FieldMask(paths=["title"])},
    ),
    (sessions_pb.ForkSessionRequest, "session_id", {}),
    (sessions_pb.ForkSessionRequest, "new_session_id", {"session_id": "s"}),
    (sessions_pb.ListMessagesRequest, "session_id", {}),
]

UNSET: list[Case] = [
    (a_run(session_id=""), "SESSION_MISSING", ["session_id"]),
    (
        runs_pb.UpdateRunRequest(prompt="p", update_mask=PROMPT_ONLY),
        "RUN_MISSING",
        ["run_id"],
    ),
    (runs_pb.UpdateRunRequest(run_id="r"), "INVALID_ARGUMENT", ["update_mask"]),
    (
        runs_pb.UpdateRunRequest(run_id="r", update_mask=FieldMask(paths=["agent"])),
        "INVALID_ARGUMENT",
        ["update_mask"],
    ),
    (
        runs_pb.UpdateRunRequest(
            run_id="r",
            position=runs_pb.QueuePosition(before_run_id="r"),
            update_mask=FieldMask(paths=["position"]),
        ),
        "INVALID_ARGUMENT",
        ["position.before_run_id"],
    ),
    (runs_pb.CancelRequest(), "SESSION_MISSING", ["session_id"]),
    (runs_pb.SubscribeRunRequest(), "RUN_MISSING", ["run_id"]),
    (runs_pb.WaitRunRequest(), "RUN_MISSING", ["run_id"]),
    (runs_pb.GetRunRequest(), "RUN_MISSING", ["run_id"]),
    (runs_pb.AnswerInputRequest(text="x"), "INVALID_ARGUMENT", ["input_request_id"]),
    (sessions_pb.GetSessionRequest(), "SESSION_MISSING", ["session_id"]),
    (sessions_pb.DeleteSessionRequest(), "SESSION_MISSING", ["session_id"]),
    (sessions_pb.ForkSessionRequest(), "SESSION_MISSING", ["session_id"]),
    (sessions_pb.ListMessagesRequest(), "SESSION_MISSING", ["session_id"]),
    (sessions_pb.SubscribeSessionRequest(), "SESSION_MISSING", ["session_ids"]),
    (
        sessions_pb.SubscribeSessionRequest(session_ids=["s", ""]),
        "INVALID_ARGUMENT",
        ["session_ids[1]"],
    ),
    (a_run(session_id="", prompt=""), "SESSION_MISSING", ["session_id", "prompt"]),
]

UNKNOWN: list[Case] = [
    (runs_pb.RunAcceptedRequest(session_id="no", prompt="p"), "SESSION_NOT_FOUND", []),
    (runs_pb.CancelRequest(session_id="no"), "SESSION_NOT_FOUND", []),
    (runs_pb.CancelRequest(run_id="no"), "RUN_NOT_FOUND", []),
    (
        runs_pb.UpdateRunRequest(run_id="no", prompt="p", update_mask=PROMPT_ONLY),
        "RUN_NOT_FOUND",
        [],
    ),
    (runs_pb.SubscribeRunRequest(run_id="no"), "RUN_NOT_FOUND", []),
    (runs_pb.WaitRunRequest(run_id="no"), "RUN_NOT_FOUND", []),
    (runs_pb.GetRunRequest(run_id="no"), "RUN_NOT_FOUND", []),
    (sessions_pb.GetSessionRequest(session_id="no"), "SESSION_NOT_FOUND", []),
    (sessions_pb.DeleteSessionRequest(session_id="no"), "SESSION_NOT_FOUND", []),
    (sessions_pb.ForkSessionRequest(session_id="no"), "SESSION_NOT_FOUND", []),
    (
        sessions_pb.ForkSessionRequest(session_id="no", new_session_id="no"),
        "INVALID_ARGUMENT",
        ["new_session_id"],
    ),
    (
        sessions_pb.UpdateSessionRequest(
            session_id="no", title="t", update_mask=FieldMask(paths=["title"])
        ),
        "SESSION_NOT_FOUND",
        [],
    ),
    (sessions_pb.ListMessagesRequest(session_id="no"), "SESSION_NOT_FOUND", []),
]

SIZES: list[Case] = [
    (a_run(prompt="x" * (MIB + 1)), "PROMPT_TOO_LARGE", ["prompt"]),
    (a_run(prompt="ä" * (MIB // 2 + 1)), "PROMPT_TOO_LARGE", ["prompt"]),
    (
        a_run(attachments=[{"text": "x" * MIB}, {"data": b"x" * MIB}, {"text": "x"}]),
        "PROMPT_TOO_LARGE",
        ["attachments"],
    ),
    (
        a_run(attachments=[{"name": "x" * 256, "text": "x"}]),
        "INVALID_ARGUMENT",
        ["attachments[0].name"],
    ),
    (a_run(attachments=[{"text": "x"}] * 1001), "INVALID_ARGUMENT", ["attachments"]),
    (a_run(metadata={str(n): "" for n in range(65)}), "INVALID_ARGUMENT", ["metadata"]),
    (a_run(metadata={"k": "x" * (4 * KIB + 1)}), "INVALID_ARGUMENT", ['metadata["k"]']),
    (runs_pb.CancelRequest(session_id="s", reason="x" * 1025), "INVALID_ARGUMENT", ["reason"]),
    (runs_pb.CancelAllRequest(reason="x" * 1025), "INVALID_ARGUMENT", ["reason"]),
    (
        runs_pb.SubscribeRunCompleteRequest(session_ids=["s"] * 1001),
        "INVALID_ARGUMENT",
        ["session_ids"],
    ),
    (runs_pb.SubscribeRunCompleteRequest(run_ids=["r"] * 1001), "INVALID_ARGUMENT", ["run_ids"]),
    (runs_pb.ListInputRequestsRequest(page_size=-1), "INVALID_ARGUMENT", ["page_size"]),
    (sessions_pb.CreateSessionRequest(title="x" * 1025), "INVALID_ARGUMENT", ["title"]),
    (sessions_pb.UpdateSessionRequest(session_id="s"), "INVALID_ARGUMENT", ["update_mask"]),
    (
        sessions_pb.CreateSessionRequest(metadata={str(n): "" for n in range(65)}),
        "INVALID_ARGUMENT",
        ["metadata"],
    ),
]

A_WEEK_AND_MORE = Duration(seconds=7 * 86400, nanos=1)

NUMBERS: list[Case] = [
    (sessions_pb.ForkSessionRequest(session_id="s", at_turn=-1), "INVALID_ARGUMENT", ["at_turn"]),
    (a_run(timeout=Duration()), "INVALID_ARGUMENT", ["timeout"]),
    (a_run(timeout=Duration(seconds=-1)), "INVALID_ARGUMENT", ["timeout"]),
    (a_run(timeout=Duration(seconds=1, nanos=-1)), "INVALID_ARGUMENT", ["timeout"]),
    (a_run(timeout=A_WEEK_AND_MORE), "INVALID_ARGUMENT", ["timeout"]),
    (a_run(timeout=Duration(seconds=2**63 - 1)), "INVALID_ARGUMENT", ["timeout"]),
    (a_run(max_attempts=-1), "INVALID_ARGUMENT", ["max_attempts"]),
    (a_run(max_attempts=2**31 - 1), "INVALID_ARGUMENT", ["max_attempts"]),
    (
        runs_pb.WaitRunRequest(run_id="r", timeout=Duration(seconds=-1)),
        "INVALID_ARGUMENT",
        ["timeout"],
    ),
    (
        runs_pb.WaitRunRequest(run_id="r", timeout=A_WEEK_AND_MORE),
        "INVALID_ARGUMENT",
        ["timeout"],
    ),
    (runs_pb.SubscribeRunRequest(run_id="r", after_index=-1), "INVALID_ARGUMENT", ["after_index"]),
    (runs_pb.ListRunsRequest(page_size=-1), "INVALID_ARGUMENT", ["page_size"]),
    (sessions_pb.ListSessionsRequest(page_size=-(2**31)), "INVALID_ARGUMENT", ["page_size"]),
    (
        sessions_pb.ListMessagesRequest(session_id="s", page_size=-1),
        "INVALID_ARGUMENT",
        ["page_size"],
    ),
]


def numbered(request: Any, field: str, number: int) -> Any:
    """A request with an unknown enum value."""
    value = getattr(request, field)
    if hasattr(value, "append"):
        value.append(number)
    else:
        setattr(request, field, number)
    return request


CHOICES: list[Case] = [
    (numbered(a_run(), "when_busy", 99), "INVALID_ARGUMENT", ["when_busy"]),
    (numbered(a_run(), "when_busy", -1), "INVALID_ARGUMENT", ["when_busy"]),
    (
        numbered(runs_pb.CancelRequest(session_id="s"), "scope", 99),
        "INVALID_ARGUMENT",
        ["scope"],
    ),
    (
        runs_pb.CancelRequest(run_id="r", scope=runs_pb.CANCEL_SCOPE_WAITING),
        "INVALID_ARGUMENT",
        ["scope"],
    ),
    (numbered(runs_pb.ListRunsRequest(), "states", 99), "INVALID_ARGUMENT", ["states[0]"]),
    (numbered(runs_pb.ListRunsRequest(), "states", 0), "INVALID_ARGUMENT", ["states[0]"]),
]

CONTENT: list[Case] = [
    (a_run(prompt=""), "EMPTY_PROMPT", ["prompt"]),
    (a_run(prompt=" \n\t"), "EMPTY_PROMPT", ["prompt"]),
    (a_run(prompt="", attachments=[{"data": b"x"}]), "EMPTY_PROMPT", ["prompt"]),
    (a_run(prompt="", attachments=[{"text": " "}]), "EMPTY_PROMPT", ["prompt"]),
    (a_run(attachments=[{"name": "empty"}]), "INVALID_ARGUMENT", ["attachments[0]"]),
    (
        a_run(attachments=[{"text": "x", "mime_type": "text"}]),
        "INVALID_ARGUMENT",
        ["attachments[0].mime_type"],
    ),
    *(
        (runs_pb.SubscribeRunCompleteRequest(cursor=cursor), "CURSOR_INVALID", ["cursor"])
        for cursor in ("", "garbage", "ä", "A" * 10_000)
    ),
    (runs_pb.ListRunsRequest(page_token="garbage"), "PAGE_TOKEN_INVALID", ["page_token"]),  # noqa: S106
    (sessions_pb.ListSessionsRequest(page_token="ä"), "PAGE_TOKEN_INVALID", ["page_token"]),  # noqa: S106
    (
        sessions_pb.ListMessagesRequest(session_id="s", page_token="garbage"),  # noqa: S106
        "PAGE_TOKEN_INVALID",
        ["page_token"],
    ),
    *(
        (
            sessions_pb.SubscribeSessionRequest(session_ids=["s"], cursors=[cursor]),
            "CURSOR_INVALID",
            ["cursors[0]"],
        )
        for cursor in ("", "garbage", "ä", "A" * 10_000)
    ),
    (
        sessions_pb.SubscribeSessionRequest(session_ids=["a\n"], cursors=["garbage"]),
        "CURSOR_INVALID",
        ["session_ids[0]", "cursors[0]"],
    ),
    # One error names every invalid field, an opaque one included.
    (
        runs_pb.SubscribeRunCompleteRequest(session_ids=["a\n"], run_ids=[""], cursor="garbage"),
        "CURSOR_INVALID",
        ["session_ids[0]", "run_ids[0]", "cursor"],
    ),
    (
        numbered(
            runs_pb.ListRunsRequest(session_id=" ", page_size=-1, page_token="garbage"),  # noqa: S106
            "states",
            99,
        ),
        "PAGE_TOKEN_INVALID",
        ["session_id", "states[0]", "page_size", "page_token"],
    ),
    (
        sessions_pb.ListSessionsRequest(page_size=-1, page_token="garbage"),  # noqa: S106
        "PAGE_TOKEN_INVALID",
        ["page_size", "page_token"],
    ),
    (
        sessions_pb.ListMessagesRequest(page_size=-1, page_token="garbage"),  # noqa: S106
        "SESSION_MISSING",
        ["session_id", "page_size", "page_token"],
    ),
    (
        a_run(
            session_id="\t",
            prompt="",
            attachments=[{"name": "n" * 256, "mime_type": "text"}, {"data": b"x"}, {}],
            max_attempts=101,
            metadata={"k" * 129: "v"},
            timeout=Duration(seconds=-1),
        ),
        "EMPTY_PROMPT",
        [
            "session_id",
            "prompt",
            "attachments[0].name",
            "attachments[0].mime_type",
            "attachments[0]",
            "attachments[2]",
            "timeout",
            "max_attempts",
            f'metadata["{"k" * 32}..."] (key)',
        ],
    ),
]


GOOD_URL = "https://example.org/"


def a_webhook(**fields: Any) -> webhooks_pb.CreateWebhookRequest:
    """A request that would be accepted without these fields."""
    wanted = fields.pop("wanted", {})
    chosen = webhooks_pb.WebhookFilter(**wanted)
    return webhooks_pb.CreateWebhookRequest(**{"url": GOOD_URL, **fields}, filter=chosen)


BAD_URLS = (
    *(
        "",
        "x",
        "ftp://example.org/",
        "https://",
        "https://example.org:0/",
        "https://a@example.org/",
    ),
    *("https://example.org/#a", "https://example.org/\r\nA: b", "https://127.0.0.1/"),
    *("https://[::1]/", "https://169.254.169.254/", "https://[::ffff:10.0.0.1]/"),
    *("http://example.org/", "http://8.8.8.8/", "https://example.org/" + "x" * 2048),
)

BAD_FILTERS: list[tuple[dict[str, Any], str]] = [
    ({"session_ids": [" a"]}, "filter.session_ids[0]"),
    ({"session_ids": ["a"] * 101}, "filter.session_ids"),
    ({"session_id_prefixes": [""]}, "filter.session_id_prefixes[0]"),
    ({"session_id_prefixes": ["a"] * 21}, "filter.session_id_prefixes"),
    ({"labels": {"k": "v" * 4097}}, 'filter.labels["k"]'),
    ({"agents": ["No Name"]}, "filter.agents[0]"),
    ({"states": [run_pb2.RUN_STATE_ACTIVE]}, "filter.states[0]"),
    ({"states": [77]}, "filter.states[0]"),
    ({"kinds": [77]}, "filter.kinds[0]"),
]

WITH_A_WEBHOOK: list[tuple[type[Request], Mapping[str, Any]]] = [
    (webhooks_pb.GetWebhookRequest, {}),
    (webhooks_pb.UpdateWebhookRequest, {"update_mask": FieldMask(paths=["full"])}),
    (webhooks_pb.DeleteWebhookRequest, {}),
    (webhooks_pb.RedeliverWebhookRequest, {"from_beginning": True}),
    (webhooks_pb.RotateWebhookSecretRequest, {}),
]

WEBHOOKS: list[Case] = [
    *((a_webhook(url=url), "INVALID_ARGUMENT", ["url"]) for url in BAD_URLS),
    *((a_webhook(wanted=bad), "INVALID_ARGUMENT", [field]) for bad, field in BAD_FILTERS),
    (a_webhook(secret="whsec_c2hvcnQ="), "INVALID_ARGUMENT", ["secret"]),  # noqa: S106
    *((kind(**more), "INVALID_ARGUMENT", ["webhook_id"]) for kind, more in WITH_A_WEBHOOK),
    *(
        (kind(webhook_id=bad, **more), "INVALID_ARGUMENT", ["webhook_id"])
        for kind, more in WITH_A_WEBHOOK
        for bad in BAD_IDS
    ),
    *((kind(webhook_id="no", **more), "WEBHOOK_NOT_FOUND", []) for kind, more in WITH_A_WEBHOOK),
    (webhooks_pb.ListWebhooksRequest(page_size=-1), "INVALID_ARGUMENT", ["page_size"]),
    (webhooks_pb.ListWebhooksRequest(page_token="x"), "PAGE_TOKEN_INVALID", ["page_token"]),  # noqa: S106
    (webhooks_pb.UpdateWebhookRequest(webhook_id="no"), "INVALID_ARGUMENT", ["update_mask"]),
    (
        webhooks_pb.UpdateWebhookRequest(
            webhook_id="no", update_mask=FieldMask(paths=["secret", "health"])
        ),
        "INVALID_ARGUMENT",
        ["update_mask", "update_mask"],
    ),
    (webhooks_pb.RedeliverWebhookRequest(webhook_id="no"), "INVALID_ARGUMENT", ["cursor"]),
    (
        webhooks_pb.RedeliverWebhookRequest(webhook_id="no", cursor="x"),
        "CURSOR_INVALID",
        ["cursor"],
    ),
]


def bad_ids() -> Iterator[Case]:
    for kind, field, more in WITH_AN_ID:
        for bad in BAD_IDS:
            yield kind(**{field: bad, **more}), "INVALID_ARGUMENT", [field]
    for field in ("session_ids", "run_ids"):
        for bad in ("", *BAD_IDS):
            wanted: dict[str, Any] = {field: ["good", bad]}
            request = runs_pb.SubscribeRunCompleteRequest(**wanted)
            yield request, "INVALID_ARGUMENT", [f"{field}[1]"]


NOT_UTF8 = b"\x0a\x02\xff\xfe"
"""Field 1 as a text of two bytes that are not UTF-8."""


METHODS = [
    (f"/{service.full_name}/{method.name}", method.name)
    for file in (runs_pb, sessions_pb, webhooks_pb)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]


async def test_invalid_requests_are_refused_by_field_and_change_nothing(
    server: ServerProcess,
) -> None:
    async with grpc.aio.insecure_channel(server.address) as channel:
        stubs = Stubs(channel)
        cases = [*UNSET, *UNKNOWN, *SIZES, *NUMBERS, *CHOICES, *CONTENT, *WEBHOOKS, *bad_ids()]
        await stubs.check(cases)
        # The table has every call that can be invalid.
        assert {type(request).__name__ for request, _, _ in cases} == {
            f"{name}Request" for _, name in METHODS
        }
        for path, name in METHODS:
            has_number = name in {"ListSessions", "ListWebhooks"}
            data = NOT_UTF8.replace(b"\x0a", b"\x12") if has_number else NOT_UTF8
            raw: Any
            if name.startswith("Subscribe"):
                raw = channel.unary_stream(path)
                error = await refused(raw(data).read())
            else:
                raw = channel.unary_unary(path)
                error = await refused(raw(data))
            assert (name, error.code) == (name, StatusCode.INVALID_ARGUMENT)
            assert (name, error.reason) == (name, "INVALID_ARGUMENT")
        with pytest.raises(grpc.aio.AioRpcError) as too_large:
            await stubs.call(a_run(prompt="x" * GRPC_LIMIT))
        assert too_large.value.code() is StatusCode.RESOURCE_EXHAUSTED

        assert await stubs.stored() == ([], [])
        accepted = await stubs.call(a_run())
        assert accepted.run.accept_seq == 1
    # No refusal was an internal error.
    assert "INTERNAL" not in server.log
    assert "Traceback" not in server.log


async def test_cursors_and_page_tokens_are_refused_in_any_other_call(server: ServerProcess) -> None:
    async with grpc.aio.insecure_channel(server.address) as channel:
        stubs = Stubs(channel)
        accepted = await stubs.call(a_run(run_id="mine"))
        await stubs.call(runs_pb.WaitRunRequest(run_id="mine"))
        await stubs.call(sessions_pb.CreateSessionRequest(session_id="t"))
        await stubs.call(a_run(session_id="t", run_id="other"))
        await stubs.call(runs_pb.WaitRunRequest(run_id="other"))
        before = await stubs.stored()
        runs = await stubs.call(runs_pb.ListRunsRequest(page_size=1))
        sessions = await stubs.call(sessions_pb.ListSessionsRequest(page_size=1))
        messages = await stubs.call(sessions_pb.ListMessagesRequest(session_id="s", page_size=1))
        tokens = [page.next_page_token for page in (runs, sessions, messages)]
        assert all(tokens)
        foreign: list[tuple[Request, str]] = [
            *(
                (runs_pb.ListRunsRequest(page_token=token), "page_token")
                for token in (tokens[1], tokens[2], accepted.cursor)
            ),
            (runs_pb.ListRunsRequest(page_token=tokens[0], session_id="s"), "page_token"),
            (sessions_pb.ListSessionsRequest(page_token=tokens[0]), "page_token"),
            (
                sessions_pb.ListMessagesRequest(session_id="t", page_token=tokens[2]),
                "page_token",
            ),
        ]
        await stubs.check(
            [
                *((request, "PAGE_TOKEN_INVALID", [field]) for request, field in foreign),
                *(
                    (
                        runs_pb.SubscribeRunCompleteRequest(cursor=token),
                        "CURSOR_INVALID",
                        ["cursor"],
                    )
                    for token in tokens
                ),
                (a_run(run_id="mine", prompt="other"), "RUN_ID_CONFLICT", []),
                (a_run(run_id="mine", session_id="t"), "RUN_ID_CONFLICT", []),
                (a_run(run_id="mine", session_id="new"), "RUN_ID_CONFLICT", []),
                (
                    a_run(run_id="mine", attachments=[{"text": "more"}]),
                    "RUN_ID_CONFLICT",
                    [],
                ),
                (sessions_pb.CreateSessionRequest(session_id="s"), "SESSION_EXISTS", []),
                (
                    runs_pb.SubscribeRunRequest(run_id="mine", after_index=2**63 - 1),
                    "INVALID_ARGUMENT",
                    ["after_index"],
                ),
            ]
        )
        assert await stubs.stored() == before
        again = await stubs.call(a_run(run_id="mine"))
        assert again.run.state == run_pb2.RUN_STATE_COMPLETED


# --- Large --------------------------------------------------------------------------------------


async def pages(stubs: Stubs, session_id: str) -> list[sessions_pb.ListMessagesResponse]:
    """A whole transcript, in the messages of the wire."""
    found: list[sessions_pb.ListMessagesResponse] = []
    token = ""
    while not found or token:
        request = sessions_pb.ListMessagesRequest(session_id=session_id, page_token=token)
        found.append(await stubs.call(request))
        token = found[-1].next_page_token
    return found


async def test_an_answer_of_many_pieces_is_stored_whole(server: ServerProcess, wire: Wire) -> None:
    piece = "ä" * 511 + "x"  # so that the cut at 1 MiB is within a letter
    whole = piece * 10_240
    handle = await wire.accept("s", {"text": piece, "repeat": 10_240})
    complete = await wire.end(handle)
    assert complete.state is RunState.COMPLETED
    assert complete.text_truncated
    assert MIB - 1 <= len(complete.text.encode()) <= MIB
    assert whole.startswith(complete.text)
    said = [e.body.text async for e in handle.events() if isinstance(e.body, TextDelta)]
    assert "".join(said) == whole
    async with grpc.aio.insecure_channel(server.address) as channel:
        responses = await pages(Stubs(channel), "s")
    assert all(response.ByteSize() < GRPC_LIMIT for response in responses)
    answers = [m for r in responses for m in r.messages if m.role == session_pb2.ROLE_ASSISTANT]
    assert len(answers) > 2
    assert len({message.message_id for message in answers}) == 1
    assert [message.continues for message in answers] == [True] * (len(answers) - 1) + [False]
    assert "".join(part.text for message in answers for part in message.parts) == whole
    prompt, answer = await wire.messages("s")
    assert prompt.text == script({"text": piece, "repeat": 10_240})
    assert answer.text == whole


async def test_the_largest_prompt_is_echoed_whole(server: ServerProcess, client: Client) -> None:
    prompt = "ä" * (MIB // 2)
    attachments = (
        Attachment("notes", "ö" * (MIB // 2), "text/plain"),
        Attachment("picture", bytes(range(256)) * (4 * KIB), "image/png"),
    )
    handle = await client.run_accepted("s", prompt, attachments=attachments, allow_missing=True)
    complete = await handle.completed(SECONDS)
    assert (complete.state, complete.text_truncated) == (RunState.COMPLETED, True)
    assert complete.text == prompt
    asked, answered = [message async for message in client.list_messages("s")]
    assert asked.text == prompt
    assert [part for part in asked.parts if not isinstance(part, Text)] == list(attachments)
    assert answered.text == f"{prompt}\n\n{attachments[0].content!s}"
    async with grpc.aio.insecure_channel(server.address) as channel:
        stubs = Stubs(channel)
        assert all(page.ByteSize() < GRPC_LIMIT for page in await pages(stubs, "s"))
        # Lists of runs contain excerpts only.
        listed = await stubs.call(runs_pb.ListRunsRequest())
        assert listed.ByteSize() < 4 * KIB
