"""TLS: who may connect, what is seen of him, and certificates that change while it serves."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from runlane import Client
from runlane.v1 import run_service_pb2 as runs_pb
from runlane.v1 import session_service_pb2 as pb
from runlane.v1 import session_service_pb2_grpc
from runlane_server.access.caller import Caller, Credentials, Role
from runlane_server.access.control import AccessControl
from runlane_server.core.errors import StartError
from runlane_server.rpc.tls import ServerTls
from support.certificates import Authority, Issued, replace
from support.rpc_wire import Wire, serving

LIST = pb.ListSessionsRequest()


class Notes:
    """Lets everybody in, and notes whom."""

    def __init__(self) -> None:
        self.shown: list[Credentials] = []

    def authenticate(self, credentials: Credentials) -> Caller:
        self.shown.append(credentials)
        return Caller("acme", Role.ADMIN, "somebody")


@pytest.fixture
def authority() -> Authority:
    return Authority()


def tls(folder: Path, issued: Issued, client_ca: bytes | None = None) -> ServerTls:
    if client_ca is not None:
        (folder / "ca.pem").write_bytes(client_ca)
    paths = issued.write(folder, "server")
    return ServerTls(*paths, folder / "ca.pem" if client_ca is not None else None)


def trusting(authority: Authority, shown: Issued | None = None) -> grpc.ChannelCredentials:
    if shown is None:
        return grpc.ssl_channel_credentials(authority.certificate)
    return grpc.ssl_channel_credentials(authority.certificate, shown.key, shown.certificate)


async def asked(address: str, credentials: grpc.ChannelCredentials | None) -> None:
    """Makes a call over a connection of its own."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    if credentials is None:
        channel = grpc.aio.insecure_channel(address, options)
    else:
        channel = grpc.aio.secure_channel(address, credentials, options)
    async with channel:
        await session_service_pb2_grpc.SessionServiceStub(channel).ListSessions(LIST, timeout=20)


async def unreachable(address: str, credentials: grpc.ChannelCredentials | None) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await asked(address, credentials)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_calls_are_encrypted_and_plaintext_is_not_answered(
    authority: Authority, tmp_path: Path
) -> None:
    server = tls(tmp_path, authority.issue("server", ["127.0.0.1"]))
    async with serving(tls=server, credentials=trusting(authority)) as wire:
        await wire.sessions.ListSessions(LIST)
        await unreachable(wire.address, None)
        # One who trusts somebody else does not take it for the server.
        await unreachable(wire.address, trusting(Authority()))


async def test_with_a_client_ca_a_certificate_of_it_is_needed(
    authority: Authority, tmp_path: Path
) -> None:
    clients = Authority("clients")
    server = tls(tmp_path, authority.issue("server", ["127.0.0.1"]), clients.certificate)
    mine = trusting(authority, clients.issue("me"))
    async with serving(tls=server, credentials=mine) as wire:
        await wire.sessions.ListSessions(LIST)
        await unreachable(wire.address, trusting(authority))
        await unreachable(wire.address, trusting(authority, Authority("clients").issue("me")))


@pytest.mark.parametrize(
    ("sans", "names"),
    [
        ([], ["me"]),
        (["spiffe://acme/me", "me.acme.example"], ["spiffe://acme/me", "me.acme.example"]),
    ],
)
async def test_the_names_in_the_certificate_are_seen(
    sans: list[str], names: list[str], authority: Authority, tmp_path: Path
) -> None:
    server = tls(tmp_path, authority.issue("server", ["127.0.0.1"]), authority.certificate)
    notes = Notes()
    mine = trusting(authority, authority.issue("me", sans))
    async with serving(tls=server, credentials=mine, access=AccessControl(notes)) as wire:
        await wire.sessions.ListSessions(LIST)
    (shown,) = notes.shown
    assert list(shown.certificate) == names


async def test_without_a_client_ca_nobody_has_a_name(authority: Authority, tmp_path: Path) -> None:
    """A certificate that nobody verified proves nothing."""
    server = tls(tmp_path, authority.issue("server", ["127.0.0.1"]))
    notes = Notes()
    mine = trusting(authority, authority.issue("me"))
    async with serving(tls=server, credentials=mine, access=AccessControl(notes)) as wire:
        await wire.sessions.ListSessions(LIST)
    assert list(notes.shown[0].certificate) == []


@asynccontextmanager
async def streaming(wire: Wire) -> AsyncIterator[None]:
    """A subscription that goes on over all that happens in it."""
    call: Any = wire.runs.SubscribeRunComplete(runs_pb.SubscribeRunCompleteRequest())
    assert (await call.read()).HasField("progress")
    yield
    accepted = await wire.runs.RunAccepted(
        runs_pb.RunAcceptedRequest(session_id="s", prompt="[]", allow_missing=True)
    )
    assert (await call.read()).run_complete.run_id == accepted.run.run_id
    call.cancel()


async def test_a_new_certificate_is_shown_to_who_connects_and_nobody_is_dropped(
    authority: Authority, tmp_path: Path
) -> None:
    server = tls(tmp_path, authority.issue("server", ["127.0.0.1"]))
    other = Authority("other")
    async with serving(tls=server, credentials=trusting(authority)) as wire, streaming(wire):
        with capture_logs() as logs:
            other.issue("server", ["127.0.0.1"]).write(tmp_path, "server")
            await asked(wire.address, trusting(other))
            await unreachable(wire.address, trusting(authority))
        assert [line["event"] for line in logs if "certificate" in line["event"]] == [
            "certificate reloaded"
        ]


async def test_the_client_ca_is_taken_up_too(authority: Authority, tmp_path: Path) -> None:
    server = tls(tmp_path, authority.issue("server", ["127.0.0.1"]), authority.certificate)
    other = Authority("other")
    mine, theirs = (trusting(authority, each.issue("me")) for each in (authority, other))
    async with serving(tls=server, credentials=mine) as wire:
        await wire.sessions.ListSessions(LIST)
        await unreachable(wire.address, theirs)
        replace(tmp_path / "ca.pem", other.certificate)
        await asked(wire.address, theirs)
        await unreachable(wire.address, mine)


@pytest.mark.parametrize("broken", ["garbage", "another key", "gone"])
async def test_a_broken_certificate_is_not_taken_up_and_told_once(
    broken: str, authority: Authority, tmp_path: Path
) -> None:
    server = tls(tmp_path, authority.issue("server", ["127.0.0.1"]))
    async with serving(tls=server, credentials=trusting(authority)) as wire:
        with capture_logs() as logs:
            if broken == "garbage":
                replace(tmp_path / "server.pem", b"garbage")
            elif broken == "another key":
                replace(tmp_path / "server.key", authority.issue("x").key)
            else:
                (tmp_path / "server.key").unlink()
            for _ in range(3):
                await asked(wire.address, trusting(authority))
        errors = [line for line in logs if line["log_level"] == "error"]
        assert len(errors) == 1
        assert "server." in errors[0]["error"]
        authority.issue("server", ["127.0.0.1"]).write(tmp_path, "server")
        with capture_logs() as logs:
            await asked(wire.address, trusting(authority))
        assert "certificate reloaded" in [line["event"] for line in logs]


async def test_tls_over_a_unix_socket(authority: Authority, tmp_path: Path) -> None:
    server = tls(tmp_path, authority.issue("server", ["localhost"]))
    address = f"unix:{tmp_path}/socket"
    async with serving(tls=server, listen=address):
        async with Client(address, credentials=trusting(authority)) as client:
            assert not [session async for session in client.list_sessions()]
        await unreachable(address, None)


def test_what_cannot_be_used_is_told_at_the_start(authority: Authority, tmp_path: Path) -> None:
    certificate, key = authority.issue("server").write(tmp_path, "server")
    other, _ = authority.issue("other").write(tmp_path, "other")
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"garbage")
    for paths, why in (
        ((tmp_path / "nothing", key), "nothing: No such file"),
        ((other, key), "--tls-cert .*other.pem, --tls-key .*server.key: .*mismatch"),
        ((garbage, key), "--tls-cert .*garbage"),
        ((certificate, key, garbage), "--tls-client-ca .*garbage"),
    ):
        with pytest.raises(StartError, match=why):
            ServerTls(*paths)
