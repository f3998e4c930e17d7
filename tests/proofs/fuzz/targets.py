"""The parsers under test, each with its input and its documented errors; others are crashes.

The tests, the random runner and atheris use this one table.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import ssl
import tempfile
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import click
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc import StatusCode
from grpc.aio import AioRpcError, Metadata

from runlane import rpc_errors
from runlane.cli import exposition
from runlane.targets import is_local
from runlane.v1 import run_pb2, run_service_pb2, session_service_pb2
from runlane_server.access import entries, tokens
from runlane_server.access.caller import AuthenticationFailed, Role
from runlane_server.access.certificate import certificate_names
from runlane_server.access.jwts import JwtSettings, JwtVerifier
from runlane_server.access.quotas import read_quotas
from runlane_server.agents.base import AgentError
from runlane_server.agents.command.environment import parse_variables
from runlane_server.agents.scripted.script import BadScript, parse_script
from runlane_server.config import Config
from runlane_server.config.sources import server_options
from runlane_server.core.errors import (
    CursorInvalid,
    InvalidArgument,
    PageTokenInvalid,
    StartError,
)
from runlane_server.core.limits import Limits
from runlane_server.core.model import (
    FinishReason,
    RunComplete,
    RunError,
    RunState,
    Text,
    TextDelta,
    ToolCall,
    Usage,
)
from runlane_server.net.addresses import Address
from runlane_server.rpc import lists, updates, validate
from runlane_server.rpc.cursor import Cursors
from runlane_server.rpc.page import PageTokens
from runlane_server.store import codec
from runlane_server.store.postgres.database import Database
from support.certificates import Authority


@dataclass(frozen=True, slots=True)
class Target:
    """A parser: `parse` takes an input, and `promised` are the errors that it may raise."""

    name: str
    parse: Callable[[bytes], object]
    promised: tuple[type[BaseException], ...]
    seeds: Sequence[bytes]

    def __call__(self, data: bytes) -> None:
        """Tries an input. Raises only errors that are not promised."""
        with contextlib.suppress(*self.promised):
            self.parse(data)


def _text(data: bytes) -> str:
    return data.decode(errors="replace")


_STORE = bytes(range(8))
_CURSORS = Cursors(_STORE)
_PAGES = PageTokens(_STORE, "ListRuns", "s")
_TOKENS = lists.Tokens(_STORE, "s")


def _cursor(data: bytes) -> None:
    position = _CURSORS.decode("acme", _text(data))
    assert _CURSORS.encode("acme", position) == _text(data)


def _page(data: bytes) -> None:
    place = _PAGES.decode(_text(data), 2)
    assert (_PAGES.encode(*place) if place else "") == _text(data)


_SCRIPTS = (
    b'["x"]',
    b'[{"text": "a", "repeat": 2}, {"reasoning": "r"}, {"usage": {"input_tokens": 3}}]',
    b'[{"tool_call": {"id": "1", "name": "n", "arguments": {"a": [1, {"b": null}]}}}]',
    b'[{"tool_result": {"id": "1", "name": "n", "content": "c", "is_error": true}}]',
    b'[{"fail": "no", "reason": "WHY"}, {"finish": "stop"}, {"say": "history"}, {"step": true}]',
    b'[{"model": "m"}, {"wait": "g", "ignore_cancel": true}, {"open": "g"}, {"crash": "x"}]',
)


_TOML_ACCESS = b"""[[token]]
name = "ci"
id = "abcdefghijklmnop"
sha256 = "0000000000000000000000000000000000000000000000000000000000000000"
tenant = "acme"
role = "run"
expires = 2030-01-01T00:00:00Z
[[certificate]]
subject = "dns=a.example"
tenant = "acme"
role = "read"
[jwt]
key = "k.pem"
algorithms = ["ES256"]
issuer = "i"
audience = "a"
tenant_claim = "t"
role_claim = "r"
leeway = 10
[jwt.tenants]
x = "acme"
[tenants.acme]
max_active_runs = 2
accepts_per_second = 1.5
accepts_burst = 3
"""


def _quotas(data: bytes) -> object:
    try:
        table = tomllib.loads(_text(data))
    except RecursionError:
        return None
    return read_quotas(table)


@click.command()
@server_options
def _configure(**settings: Any) -> Config:
    return Config.from_options(**settings)


def _arguments(arguments: list[str]) -> object:
    with contextlib.redirect_stdout(io.StringIO()):
        return _configure.main(arguments, prog_name="runlane-server", standalone_mode=False)


@cache
def _file() -> Path:
    return Path(tempfile.mkdtemp(prefix="runlane-fuzz-")) / f"{os.getpid()}.toml"


def _config_file(data: bytes) -> object:
    _file().write_bytes(data)
    return _arguments(["--config", str(_file())])


def _command_line(data: bytes) -> object:
    return _arguments([part for part in _text(data).split("\n") if part != "--config"])


@cache
def _signer() -> tuple[Any, JwtVerifier]:
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415 - an extra
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415

    key = ec.generate_private_key(ec.SECP256R1())
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    with tempfile.TemporaryDirectory(prefix="runlane-fuzz-") as folder:
        path = Path(folder) / "key.pem"
        path.write_bytes(public)
        settings = JwtSettings(
            path, False, ["ES256"], "i", "a", tenant_claim="t", role=None, role_claim="r",
            roles={"x": Role.RUN},
        )  # fmt: skip
        return key, JwtVerifier(settings, lambda: 0.0)


def _jwt(data: bytes) -> object:
    # A header has bytes as characters; Bearer accepts the printable ones.
    return _signer()[1].verify(data.decode("latin-1"))


def _jwt_header(data: bytes) -> object:
    from base64 import urlsafe_b64encode  # noqa: PLC0415

    header = urlsafe_b64encode(data).rstrip(b"=").decode()
    return _signer()[1].verify(f"{header}.e30.AAAA")


def _jwt_claims(data: bytes) -> object:
    import jwt  # noqa: PLC0415

    key, jwts = _signer()
    return jwts.verify(jwt.api_jws.encode(data, key, algorithm="ES256"))


def _address(data: bytes) -> object:
    address = Address.parse(_text(data))
    assert Address.parse(str(address)) == address
    return address


def _postgres_url(data: bytes) -> object:
    database = Database.parse(_text(data))
    return database.dsns, database.channel


_LIMITS = Limits(max_prompt_bytes=1000, max_attachment_bytes=1000)
_CHECKS: Sequence[tuple[type[Message], Callable[[Any], object]]] = (
    (run_service_pb2.RunAcceptedRequest, lambda sent: validate.run_accepted(sent, _LIMITS)),
    (run_service_pb2.UpdateRunRequest, updates.update_run),
    (run_service_pb2.CancelRequest, validate.cancel),
    (run_service_pb2.CancelAllRequest, validate.cancel_all),
    (
        run_service_pb2.SubscribeRunCompleteRequest,
        lambda sent: validate.subscribe_run_complete(
            sent, lambda: _CURSORS.decode("acme", sent.cursor)
        ),
    ),
    (run_service_pb2.SubscribeRunRequest, validate.subscribe_run),
    (run_service_pb2.WaitRunRequest, validate.wait_run),
    (run_service_pb2.GetRunRequest, validate.get_run),
    (
        run_service_pb2.ListRunsRequest,
        lambda sent: lists.list_runs(sent, _TOKENS),
    ),
    (session_service_pb2.CreateSessionRequest, validate.create_session),
    (session_service_pb2.GetSessionRequest, validate.session_id),
    (session_service_pb2.UpdateSessionRequest, lists.update_session),
    (session_service_pb2.ForkSessionRequest, validate.fork_session),
    (
        session_service_pb2.ListSessionsRequest,
        lambda sent: lists.list_sessions(sent, _TOKENS),
    ),
    (session_service_pb2.DeleteSessionRequest, validate.session_id),
    (
        session_service_pb2.ListMessagesRequest,
        lambda sent: validate.list_messages(sent, lambda: _PAGES.decode(sent.page_token, 2)),
    ),
)


def _request(data: bytes) -> None:
    """The first byte selects the request type, the others are the request."""
    kind, check = _CHECKS[data[0] % len(_CHECKS)] if data else _CHECKS[0]
    check(kind.FromString(data[1:]))


_RUN = run_service_pb2.RunAcceptedRequest(
    session_id="s",
    run_id="r",
    prompt="p",
    attachments=[run_pb2.Attachment(name="n", mime_type="text/plain", text="t")],
    timeout=duration_pb2.Duration(seconds=5, nanos=7),
    max_attempts=2,
    metadata={"k": "v"},
)
_WAIT = run_service_pb2.WaitRunRequest(run_id="r", timeout=duration_pb2.Duration(nanos=-1))


def _codec(data: bytes) -> None:
    """Any record equals its decoded encoding."""
    text, number = _text(data), int.from_bytes(data[:8], "big")
    usage = Usage(number, 1, 2, 3, 4)
    parts = (Text(text), ToolCall(text, text, text))
    metadata = {text: text[::-1]}
    complete = RunComplete(
        session_id=text,
        run_id=text[::2],
        accept_seq=number,
        state=RunState.FAILED,
        finish_reason=FinishReason.ERROR,
        message_id=text,
        text=text,
        text_truncated=number % 2 == 0,
        error=RunError("R", text),
        folded_into=text,
        usage=usage,
        attempt=1,
        cancel_reason=text,
        accepted_at=number,
        started_at=None,
        ended_at=number,
    )
    assert codec.decode_complete(codec.encode_complete(complete)) == complete
    assert codec.decode_parts(codec.encode_parts(parts)) == parts
    assert codec.decode_usage(codec.encode_usage(usage)) == usage
    assert codec.decode_metadata(codec.encode_metadata(metadata)) == metadata
    kind, body = codec.encode_body(TextDelta(text))
    assert body is not None
    assert codec.decode_body(kind, body) == TextDelta(text)


def _rich_error(data: bytes) -> None:
    """Trailing metadata of a hostile server still becomes an error of the client."""
    trailing = Metadata((rpc_errors.STATUS_DETAILS, data))
    raised = rpc_errors.from_rpc(AioRpcError(StatusCode.ABORTED, Metadata(), trailing, "no"))
    assert raised.status is StatusCode.ABORTED
    str(raised)


def _packed(*details: Message) -> bytes:
    status = status_pb2.Status(code=10, message="no")
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    data: bytes = status.SerializeToString()
    return data


_RETRY = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=1 << 40, nanos=5))
_INFO = error_details_pb2.ErrorInfo(domain="runlane", reason="DRAINING", metadata={"k": "v"})
_BAD = error_details_pb2.BadRequest(
    field_violations=[error_details_pb2.BadRequest.FieldViolation(field="f", description="d")]
)


def _exposition(data: bytes) -> None:
    page, before = exposition.parse(_text(data), 2.0), exposition.parse("h_count 1\n", 1.0)
    for name in list(page.samples):
        base = name.removesuffix("_bucket")
        page.total(name)
        page.label(name, "le")
        exposition.rate(before, page, name)
        exposition.quantile(before, page, base, 0.5)


def _certificate() -> bytes:
    """A certificate as DER."""
    issued = Authority().issue("me", ["spiffe://acme/job", "a.example"])
    return ssl.PEM_cert_to_DER_cert(issued.certificate.decode())


def _tokens(data: bytes) -> object:
    return tokens.TokenVerifier(()).verify(data.decode("latin-1"), 0.0)


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


_CLAIMS = {"exp": 4_000_000_000, "iss": "i", "aud": "a", "t": "acme", "r": "x", "sub": "me"}

TARGETS: Sequence[Target] = (
    Target("cursor", _cursor, (CursorInvalid,), (_CURSORS.encode("acme", 9).encode(), b"")),
    Target("page-token", _page, (PageTokenInvalid,), (_PAGES.encode(1, 2).encode(),)),
    Target("script", lambda data: parse_script(_text(data)), (BadScript, AgentError), _SCRIPTS),
    Target(
        "config-file",
        _config_file,
        (click.ClickException,),
        (
            b'listen = "h:1"\nprocesses = 2\ncancel-grace = "5s"\nlog_content = true\n',
            b'command_env = "A=B"\ncommand-memory = "1GiB"\ntrace-ratio = 0.5\nstore = "memory:"\n',
        ),
    ),
    Target(
        "command-line",
        _command_line,
        (click.ClickException,),
        (
            b"--listen\nh:1\n--processes\n2\n--drain-timeout\n5s\n--metrics-listen\n9464",
            b"--command-env\nA=B\n--command-memory\n2GiB\n--otlp-endpoint\nhttp://h:1\n--log-content",
        ),
    ),
    Target(
        "access-file", lambda data: entries.parse(_text(data)), (entries.BadEntry,), (_TOML_ACCESS,)
    ),
    Target(
        "quotas",
        _quotas,
        (ValueError,),
        (b"[acme]\nmax_active_runs = 2\naccepts_per_second = 1.5\naccepts_burst = 3\n",),
    ),
    Target(
        "certificate",
        lambda data: certificate_names(ssl.DER_cert_to_PEM_cert(data).encode()),
        (),
        (_certificate(),),
    ),
    Target("token", _tokens, (AuthenticationFailed,), (b"rl_" + b"a" * 16 + b"_" + b"b" * 52,)),
    Target("jwt", _jwt, (AuthenticationFailed,), (b"eyJhbGciOiJFUzI1NiJ9.e30.AAAA", b"a.b.c")),
    Target(
        "jwt-header",
        _jwt_header,
        (AuthenticationFailed,),
        (b'{"alg":"ES256","kid":"1"}', b'{"alg":[[1]]}'),
    ),
    Target(
        "jwt-claims",
        _jwt_claims,
        (AuthenticationFailed,),
        (_json(_CLAIMS), _json(_CLAIMS | {"r": ["x"]})),
    ),
    Target(
        "address",
        _address,
        (ValueError, StartError),
        (b"127.0.0.1:50051", b"[::1]:7000", b"unix:/tmp/x", b"h:65535"),
    ),
    Target(
        "postgres-url",
        _postgres_url,
        (StartError,),
        (
            b"postgresql://u:p@h1:5432,h2:5433/db?schema=x&sslmode=require",
            b"postgresql:///db?host=a,b&port=1,2",
        ),
    ),
    Target("variables", lambda data: parse_variables(_text(data)), (ValueError,), (b"A,B", b"A=B")),
    Target(
        "request",
        _request,
        (InvalidArgument, DecodeError),
        (
            b"\0" + _RUN.SerializeToString(),
            b"\5" + _WAIT.SerializeToString(),
            *(bytes([n]) + b"\x0a\x01s\x12\x01x" for n in range(len(_CHECKS))),
        ),
    ),
    Target("codec", _codec, (), (b"plain", '\u2028 \N{GRINNING FACE} \x00\x1f"\\'.encode())),
    Target(
        "rich-error",
        _rich_error,
        (),
        (_packed(_INFO, _BAD), _packed(_RETRY), _packed(_INFO, error_details_pb2.QuotaFailure())),
    ),
    Target(
        "exposition",
        _exposition,
        (),
        (
            b'# HELP h x\nh_bucket{le="0.5"} 1\nh_bucket{le="+Inf"} 3\nh_count 3\n',
            b'c_total{a="b\\n\\"",c="d"} 5 1700000000\ng NaN\n',
        ),
    ),
    Target(
        "target-place", lambda data: is_local(_text(data)), (), (b"dns://h/a:1", b"ipv6:[::1]:1")
    ),
)

BY_NAME = {target.name: target for target in TARGETS}
