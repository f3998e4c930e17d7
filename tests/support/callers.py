"""A server with access control, and calls of every rpc as any kind of caller."""

from __future__ import annotations

import json
import pkgutil
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc import StatusCode

import runlane.harness.v1
import runlane.v1
from runlane.harness.v1 import harness_service_pb2 as harness_pb
from runlane.v1 import agent_service_pb2 as agents_pb
from runlane.v1 import run_service_pb2 as runs_pb
from runlane.v1 import session_service_pb2 as sessions_pb
from runlane.v1 import webhook_service_pb2 as webhooks_pb
from runlane_server.access import tokens
from runlane_server.access.caller import Role
from runlane_server.access.control import AccessControl
from runlane_server.access.node_keys import NodeKeys
from runlane_server.config import Config
from runlane_server.harness.harness import Harness
from runlane_server.process.security import Security
from runlane_server.rpc.errors import DETAILS_KEY
from runlane_server.store.memory.store import MemoryStore
from runlane_server.store.webhooks import Most, Webhook, WebhookFilter, WebhookKey
from runlane_server.webhooks.signature import new_secret
from support.certificates import private_pem, public_pem
from support.rpc_wire import Wire, serving

SECONDS = 20.0

NODE_KEY = "what only nodes know"
ISSUER, AUDIENCE = "https://issuer.example", "runlane"
LIFETIME = 100.0
"""Seconds until the token `expiring` expires."""

ROLES = tuple(role.value for role in Role)

Metadata = tuple[tuple[str, str], ...]


def all_methods() -> dict[str, MethodDescriptor]:
    """Returns every defined rpc by its full name."""
    found: dict[str, MethodDescriptor] = {}
    for package in (runlane.v1, runlane.harness.v1):
        for module in pkgutil.iter_modules(package.__path__):
            if module.name.endswith("_pb2"):
                file = import_module(f"{package.__name__}.{module.name}").DESCRIPTOR
                for service in file.services_by_name.values():
                    found |= {f"/{service.full_name}/{one.name}": one for one in service.methods}
    return found


METHODS = all_methods()

OF_TENANTS = [method for method in METHODS if method.startswith("/runlane.v1.")]
"""The rpcs on data of a tenant; those of the harness control the whole server."""


def request(method: str, session: str = "s-theirs", run: str = "r-theirs") -> Message:
    """Returns a request of a method for a session and a run."""
    wanted: Mapping[str, Message] = {
        "RunAccepted": runs_pb.RunAcceptedRequest(
            session_id=session, run_id=f"new {run}", prompt="[]"
        ),
        "UpdateRun": runs_pb.UpdateRunRequest(
            run_id=run, prompt="[]", update_mask=FieldMask(paths=["prompt"])
        ),
        "Cancel": runs_pb.CancelRequest(session_id=session),
        "CancelAll": runs_pb.CancelAllRequest(),
        "SubscribeRunComplete": runs_pb.SubscribeRunCompleteRequest(session_ids=[session]),
        "SubscribeRun": runs_pb.SubscribeRunRequest(run_id=run),
        "WaitRun": runs_pb.WaitRunRequest(run_id=run, timeout=Duration(nanos=1_000_000)),
        "GetRun": runs_pb.GetRunRequest(run_id=run),
        "ListRuns": runs_pb.ListRunsRequest(session_id=session),
        "ListInputRequests": runs_pb.ListInputRequestsRequest(session_id=session, run_id=run),
        "AnswerInput": runs_pb.AnswerInputRequest(input_request_id=f"i-{run}", text="x"),
        "UpdateSession": sessions_pb.UpdateSessionRequest(
            session_id=session, title="t", update_mask=FieldMask(paths=["title"])
        ),
        "CreateSession": sessions_pb.CreateSessionRequest(session_id=f"new {session}"),
        "ForkSession": sessions_pb.ForkSessionRequest(
            session_id=session, new_session_id=f"fork of {session}"
        ),
        "GetSession": sessions_pb.GetSessionRequest(session_id=session),
        "DeleteSession": sessions_pb.DeleteSessionRequest(session_id=session),
        "ListSessions": sessions_pb.ListSessionsRequest(),
        "ListMessages": sessions_pb.ListMessagesRequest(session_id=session),
        "SubscribeSession": sessions_pb.SubscribeSessionRequest(session_ids=[session]),
        "ListAgents": agents_pb.ListAgentsRequest(),
        "CreateWebhook": webhooks_pb.CreateWebhookRequest(url="https://example.org/"),
        "GetWebhook": webhooks_pb.GetWebhookRequest(webhook_id=f"w-{run}"),
        "ListWebhooks": webhooks_pb.ListWebhooksRequest(),
        "UpdateWebhook": webhooks_pb.UpdateWebhookRequest(
            webhook_id=f"w-{run}", update_mask=FieldMask(paths=["enabled"])
        ),
        "DeleteWebhook": webhooks_pb.DeleteWebhookRequest(webhook_id=f"w-{run}"),
        "RedeliverWebhook": webhooks_pb.RedeliverWebhookRequest(
            webhook_id=f"w-{run}", from_beginning=True
        ),
        "RotateWebhookSecret": webhooks_pb.RotateWebhookSecretRequest(webhook_id=f"w-{run}"),
        "GetServer": harness_pb.GetServerRequest(),
        "ArmGate": harness_pb.ArmGateRequest(
            point=harness_pb.GATE_POINT_BEFORE_FINISH, run_id="nobody"
        ),
        "AwaitGate": harness_pb.AwaitGateRequest(gate_id="none"),
        "ReleaseGate": harness_pb.ReleaseGateRequest(gate_id="none"),
        "ListGates": harness_pb.ListGatesRequest(),
        "AdvanceClock": harness_pb.AdvanceClockRequest(by=Duration(seconds=1)),
        "Crash": harness_pb.CrashRequest(),
        "Drain": harness_pb.DrainRequest(),
    }
    return wanted[METHODS[method].name]


class Outcome(NamedTuple):
    """The result of a call; of a stream only the first message."""

    code: StatusCode
    details: bytes = b""
    answer: Any = None

    @property
    def message(self) -> str:
        """The message of the error."""
        return str(status_pb2.Status.FromString(self.details).message)

    @property
    def reason(self) -> str:
        """The reason of the error."""
        info = error_details_pb2.ErrorInfo()
        for detail in status_pb2.Status.FromString(self.details).details:
            detail.Unpack(info)
        return str(info.reason)


@dataclass
class World:
    """A server, its callers, and a clock that the test controls."""

    wire: Wire
    security: Security
    access_control: AccessControl
    path: Path
    texts: dict[str, str]
    clock: list[float] = field(default_factory=lambda: [time.time()])

    def shown(self, who: str | None) -> Metadata:
        """Returns the metadata of a caller; None is anonymous."""
        return () if who is None else (("authorization", f"Bearer {self.texts[who]}"),)

    async def ask(self, method: str, asked: Message, metadata: Metadata = ()) -> Outcome:
        """Makes a call and returns its outcome."""
        call = self.open(method, asked, metadata)
        try:
            if METHODS[method].server_streaming:
                answer = await call.read()
                call.cancel()
            else:
                answer = await call
        except grpc.aio.AioRpcError as error:
            return outcome(error)
        return Outcome(StatusCode.OK, answer=answer)

    def open(self, method: str, asked: Message, metadata: Metadata = ()) -> Any:
        """Starts a call."""
        descriptor = METHODS[method]
        make: Any = self.wire.channel.unary_unary
        if descriptor.server_streaming:
            make = self.wire.channel.unary_stream
        answer = GetMessageClass(descriptor.output_type)
        return make(
            method,
            request_serializer=type(asked).SerializeToString,
            response_deserializer=answer.FromString,
        )(asked, metadata=metadata, timeout=SECONDS)

    def rewrite(self, *changes: tuple[str, str]) -> None:
        """Replaces text in the access file: the first of each pair by the second."""
        text = self.path.read_text()
        for old, new in changes:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        self.path.write_text(text)

    def revoke(self, name: str) -> None:
        """Removes a token from the access file."""
        blocks = self.path.read_text().split("\n\n")
        self.path.write_text("\n\n".join(one for one in blocks if f'"{name}"' not in one))

    def look(self) -> None:
        """Reloads changed files, as the server does every second."""
        self.security.refresh(self.access_control)


def outcome(error: grpc.aio.AioRpcError) -> Outcome:
    """Converts the error of a failed call."""
    details = dict(error.trailing_metadata() or ()).get(DETAILS_KEY, b"")
    assert isinstance(details, bytes)
    return Outcome(error.code(), details)


@cache
def signing_key() -> ec.EllipticCurvePrivateKey:
    """With which the issuer signs."""
    return ec.generate_private_key(ec.SECP256R1())


@cache
def rsa_key() -> rsa.RSAPrivateKey:
    """A second key, of a type that supports several algorithms."""
    return rsa.generate_private_key(65537, 2048)


def signed(key: object = None, algorithm: str = "ES256", headers: Any = None, **claims: Any) -> str:
    """Signs a valid JSON Web Token with overrides; a claim of None is omitted."""
    right = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "exp": int(time.time()) + 3600,
        "sub": "alice",
        "org": "acme",
        "may": "admin",
    }
    sent = {name: value for name, value in (right | claims).items() if value is not None}
    secret: Any = private_pem(signing_key()) if key is None else key
    return jwt.encode(sent, secret, algorithm, headers)


@asynccontextmanager
async def guarded(folder: Path, store: MemoryStore | None = None) -> AsyncIterator[World]:
    """A server with an active run `r-theirs` in the session `s-theirs` of acme."""
    clock = [time.time()]
    path = folder / "access.toml"
    (folder / "issuer.pem").write_bytes(public_pem(signing_key()))
    texts = {"jwt": signed(), "other jwt": signed(org="other")}
    blocks = []
    for tenant, name, role, expires in (
        *(("acme", role, role, None) for role in ROLES),
        ("acme", "expiring", "admin", clock[0] + LIFETIME),
        ("other", "stranger", "admin", None),
    ):
        texts[name], block = _token(tenant, name, role, expires)
        blocks.append(block)
    texts["limited"], block = _token("acme", "limited", "run", None)
    blocks.append(f'{block}\nagents = ["another"]')
    blocks.append(
        '[[certificate]]\nsubject = "uri=spiffe://acme/job"\ntenant = "acme"\nrole = "run"'
    )
    blocks.append(
        f'[jwt]\nkey = "issuer.pem"\nalgorithms = ["ES256"]\nissuer = "{ISSUER}"\n'
        f'audience = "{AUDIENCE}"\ntenant_claim = "org"\nrole_claim = "may"\nleeway = 0\n'
    )
    path.write_text("\n\n".join(blocks))
    security = Security(Config(access=str(path)), lambda: clock[0])
    access_control = security.access_control(NodeKeys([NODE_KEY], lambda: clock[0]))
    async with serving(
        access=access_control, store=store or MemoryStore(), harness=Harness()
    ) as wire:
        world = World(wire, security, access_control, path, texts, clock)
        await _with_a_run(world)
        yield world
        wire.latches.open("g")


def _token(tenant: str, name: str, role: str, expires: float | None) -> tuple[str, str]:
    text, token_id, sha256 = tokens.make()
    until = ""
    if expires is not None:
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(expires))
        until = f"\nexpires = {when}"
    return text, (
        f'[[token]]\nname = "{name}"\ntenant = "{tenant}"\nrole = "{role}"\nid = "{token_id}"\n'
        f'sha256 = "{sha256}"{until}'
    )


async def _with_a_run(world: World) -> None:
    wanted = runs_pb.RunAcceptedRequest(
        session_id="s-theirs",
        run_id="r-theirs",
        prompt=json.dumps([{"text": "one"}, {"wait": "g"}]),
        allow_missing=True,
    )
    accepted = await world.ask("/runlane.v1.RunService/RunAccepted", wanted, world.shown("admin"))
    assert accepted.code is StatusCode.OK, accepted
    key = WebhookKey("acme", "w-r-theirs")
    webhook = Webhook(
        key, "https://example.org/", (new_secret(),), WebhookFilter(), False, True, 1, 1
    )
    await world.wire.store.webhooks.create(webhook, most=Most(100, 10))
