"""TLS: encryption, certificates of callers, and reload of the server's certificate."""

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
from support.descriptors import no_descriptors
from support.rpc_wire import Wire, serving

LIST = pb.ListSessionsRequest()


class RecordingAuthenticator:
    """Authenticates every call and records its credentials."""

    def __init__(self) -> None:
        self.credentials: list[Credentials] = []

    def authenticate(self, credentials: Credentials) -> Caller:
        self.credentials.append(credentials)
        return Caller("acme", Role.ADMIN, "alice")


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


async def call_once(address: str, credentials: grpc.ChannelCredentials | None) -> None:
    """Makes a call over a new connection."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    if credentials is None:
        channel = grpc.aio.insecure_channel(address, options)
    else:
        channel = grpc.aio.secure_channel(address, credentials, options)
    async with channel:
        await session_service_pb2_grpc.SessionServiceStub(channel).ListSessions(LIST, timeout=20)


async def assert_unreachable(address: str, credentials: grpc.ChannelCredentials | None) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call_once(address, credentials)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_calls_are_encrypted_and_plaintext_is_refused(
    authority: Authority, tmp_path: Path
) -> None:
    server = tls(tmp_path, authority.issue("server", ["127.0.0.1"]))
    async with serving(tls=server, credentials=trusting(authority)) as wire:
        await wire.sessions.ListSessions(LIST)
        await assert_unreachable(wire.address, None)
        # A client that trusts another authority does not connect.
        await assert_unreachable(wire.address, trusting(Authority()))


async def test_a_client_ca_requires_a_certificate_of_it(
    authority: Authority, tmp_path: Path
) -> None:
    clients = Authority("clients")
    server = tls(tmp_path, authority.issue("server", ["127.0.0.1"]), clients.certificate)
    mine = trusting(authority, clients.issue("me"))
    async with serving(tls=server, credentials=mine) as wire:
        await wire.sessions.ListSessions(LIST)
        await assert_unreachable(wire.address, trusting(authority))
        await assert_unreachable(
            wire.address, trusting(authority, Authority("clients").issue("me"))
        )


@pytest.mark.parametrize(
    ("sans", "names"),
    [
        ([], ["cn=me"]),
        (["spiffe://acme/me", "me.acme.example"], ["uri=spiffe://acme/me", "dns=me.acme.example"]),
    ],
)
async def test_the_names_in_a_client_certificate_reach_authentication(
    sans: list[str], names: list[str], authority: Authority, tmp_path: Path
) -> None:
    server = tls(tmp_path, authority.issue("server", ["127.0.0.1"]), authority.certificate)
    recorder = RecordingAuthenticator()
    mine = trusting(authority, authority.issue("me", sans))
    async with serving(tls=server, credentials=mine, access=AccessControl(recorder)) as wire:
        await wire.sessions.ListSessions(LIST)
    (shown,) = recorder.credentials
    assert list(shown.certificate) == names


async def test_client_certificates_are_ignored_without_a_client_ca(
    authority: Authority, tmp_path: Path
) -> None:
    """An unverified certificate proves nothing."""
    server = tls(tmp_path, authority.issue("server", ["127.0.0.1"]))
    recorder = RecordingAuthenticator()
    mine = trusting(authority, authority.issue("me"))
    async with serving(tls=server, credentials=mine, access=AccessControl(recorder)) as wire:
        await wire.sessions.ListSessions(LIST)
    assert list(recorder.credentials[0].certificate) == []


@asynccontextmanager
async def streaming(wire: Wire) -> AsyncIterator[None]:
    """Opens a subscription that must survive what happens meanwhile."""
    call: Any = wire.runs.SubscribeRunComplete(runs_pb.SubscribeRunCompleteRequest())
    assert (await call.read()).HasField("progress")
    yield
    accepted = await wire.runs.RunAccepted(
        runs_pb.RunAcceptedRequest(session_id="s", prompt="[]", allow_missing=True)
    )
    assert (await call.read()).run_complete.run_id == accepted.run.run_id
    call.cancel()


async def test_a_reloaded_certificate_serves_new_connections_and_keeps_open_ones(
    authority: Authority, tmp_path: Path
) -> None:
    server = tls(tmp_path, authority.issue("server", ["127.0.0.1"]))
    other = Authority("other")
    async with serving(tls=server, credentials=trusting(authority)) as wire, streaming(wire):
        with capture_logs() as logs:
            other.issue("server", ["127.0.0.1"]).write(tmp_path, "server")
            await call_once(wire.address, trusting(other))
            await assert_unreachable(wire.address, trusting(authority))
        assert [line["event"] for line in logs if "certificate" in line["event"]] == [
            "certificate reloaded"
        ]


async def test_a_changed_client_ca_is_reloaded(authority: Authority, tmp_path: Path) -> None:
    server = tls(tmp_path, authority.issue("server", ["127.0.0.1"]), authority.certificate)
    other = Authority("other")
    mine, theirs = (trusting(authority, each.issue("me")) for each in (authority, other))
    async with serving(tls=server, credentials=mine) as wire:
        await wire.sessions.ListSessions(LIST)
        await assert_unreachable(wire.address, theirs)
        replace(tmp_path / "ca.pem", other.certificate)
        await call_once(wire.address, theirs)
        await assert_unreachable(wire.address, mine)


@pytest.mark.parametrize("broken", ["garbage", "another key", "gone"])
async def test_an_invalid_certificate_is_ignored_and_logged_once(
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
                await call_once(wire.address, trusting(authority))
        errors = [line for line in logs if line["log_level"] == "error"]
        assert len(errors) == 1
        assert "server." in errors[0]["error"]
        authority.issue("server", ["127.0.0.1"]).write(tmp_path, "server")
        with capture_logs() as logs:
            await call_once(wire.address, trusting(authority))
        assert "certificate reloaded" in [line["event"] for line in logs]


async def test_a_certificate_that_could_not_be_read_is_read_again(
    authority: Authority, tmp_path: Path
) -> None:
    server = tls(tmp_path, authority.issue("server", ["127.0.0.1"]), authority.certificate)
    before = server._material
    authority.issue("server", ["127.0.0.1"]).write(tmp_path, "server")
    with capture_logs() as logs:
        with no_descriptors():
            for _ in range(3):
                server.refresh()
        assert [line["log_level"] for line in logs] == ["error"]
        assert server._material is before
        server.refresh()
    assert server._material is not before


async def test_a_unix_socket_can_use_tls(authority: Authority, tmp_path: Path) -> None:
    server = tls(tmp_path, authority.issue("server", ["localhost"]))
    address = f"unix:{tmp_path}/socket"
    async with serving(tls=server, listen=address):
        async with Client(address, credentials=trusting(authority)) as client:
            assert not [session async for session in client.list_sessions()]
        await assert_unreachable(address, None)


def test_invalid_files_fail_the_start(authority: Authority, tmp_path: Path) -> None:
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
