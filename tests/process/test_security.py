"""Exposure to the network, and how nodes authenticate to each other."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import StatusCode
from structlog.testing import capture_logs

from rpc.probe_base import MIN_ROLE, RIGHTS
from rpc.test_tls import assert_unreachable, call_once, trusting
from runlane.v1 import run_service_pb2 as runs_pb
from runlane_server.access import editing
from runlane_server.access.caller import Role
from runlane_server.access.control import AccessControl
from runlane_server.access.node_keys import SETTLE_SECONDS, VALID_SECONDS, NodeKeys
from runlane_server.cluster.peers import Peers
from runlane_server.cluster.relay import RelayBroken
from runlane_server.config import Config
from runlane_server.core.errors import StartError
from runlane_server.core.model import RunKey
from runlane_server.net.addresses import Address
from runlane_server.process.security import Security, check_security
from runlane_server.rpc.tls import ServerTls
from support import server as processes
from support.callers import NODE_KEY, OF_TENANTS, ROLES, World, guarded, request
from support.certificates import Authority
from support.rpc_wire import serving

TLS: Mapping[str, Any] = {"tls_cert": "c.pem", "tls_key": "k.pem"}
LOCAL = Address("127.0.0.1", 1)
IN_NETWORK = Address("0.0.0.0", 1)  # noqa: S104
"""Reachable from other hosts, as the next one."""

OTHER = Address("10.0.0.7", 1)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"listen": Address("::1", 1)},
        {"listen": Address("localhost", 1)},
        {"listen": Address(path="/run/x")},
        {"listen": IN_NETWORK, "access": "a.toml"},
        {"listen": IN_NETWORK, **TLS, "tls_client_ca": "ca.pem"},
        {"listen": IN_NETWORK, "insecure_anywhere": True},
    ],
)
def test_a_server_that_is_local_or_identifies_callers_may_listen(settings: dict[str, Any]) -> None:
    check_security(Config(**settings))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"listen": IN_NETWORK}, "--access .*--tls-client-ca .*--insecure-anywhere"),
        ({"listen": Address("::", 1)}, "--insecure-anywhere"),
        ({"listen": OTHER}, "--insecure-anywhere"),
        ({"listen": Address("host.example", 1)}, "--insecure-anywhere"),
        ({"listen": IN_NETWORK, **TLS}, "--insecure-anywhere"),
        ({"tls_cert": "c.pem"}, "--tls-cert and --tls-key"),
        ({"tls_key": "k.pem"}, "--tls-cert and --tls-key"),
        ({"tls_client_ca": "ca.pem"}, "--tls-client-ca needs --tls-cert"),
        ({"node_tls_ca": "ca.pem"}, "--node-tls-ca needs --tls-cert"),
    ],
)
def test_settings_that_expose_the_server_or_contradict_each_other_are_refused(
    settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(StartError, match=named):
        check_security(Config(**settings))


def test_every_protection_that_is_off_is_logged_as_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "access.toml"
    path.write_text('[[certificate]]\nsubject = "cn=x"\ntenant = "t"\nrole = "run"\n')
    cases: list[tuple[dict[str, Any], Address, bool, list[str]]] = [
        ({}, LOCAL, True, []),
        (
            {"listen": IN_NETWORK, "insecure_anywhere": True},
            IN_NETWORK,
            False,
            ["every caller", "calls are not"],
        ),
        (
            {"listen": IN_NETWORK, "access": str(path)},
            OTHER,
            True,
            ["calls are not", "tokens are sent", "the certificates", "live events"],
        ),
        (
            {"listen": IN_NETWORK, "insecure_anywhere": True},
            OTHER,
            True,
            ["every caller", "calls are not", "live events"],
        ),
    ]
    for settings, node_address, shared, expected in cases:
        security = Security(Config(**settings))
        with capture_logs() as logs:
            security.log_warnings(node_address, shared=shared)
        assert len(logs) == len(expected), logs
        for line, begins in zip(logs, expected, strict=True):
            assert line["event"].startswith(begins)
            assert line["log_level"] == "warning"


@pytest.mark.parametrize("role", ROLES)
async def test_a_certificate_identifies_a_caller_at_every_rpc(role: str, tmp_path: Path) -> None:
    authority = Authority()
    certificate, key = authority.issue("server", ["127.0.0.1"]).write(tmp_path, "server")
    ca, access = tmp_path / "ca.pem", tmp_path / "access.toml"
    ca.write_bytes(authority.certificate)
    access.write_text(f'[[certificate]]\nsubject = "cn=job"\ntenant = "acme"\nrole = "{role}"\n')
    files = {"tls_cert": certificate, "tls_key": key, "tls_client_ca": ca, "access": access}
    security = Security(Config(**{name: str(path) for name, path in files.items()}))  # type: ignore[arg-type]
    access_control = security.access_control(NodeKeys())
    for name in ("job", "jobs"):
        shown = trusting(authority, authority.issue(name))
        async with serving(tls=security.tls, access=access_control, credentials=shown) as wire:
            world = World(wire, security, access_control, access, {})
            for method in OF_TENANTS:
                least = MIN_ROLE[method]
                code = (await world.ask(method, request(method))).code
                if name != "job":
                    assert code is StatusCode.UNAUTHENTICATED, method
                elif least not in RIGHTS[role]:
                    assert code is StatusCode.PERMISSION_DENIED, method
                else:
                    assert code in {StatusCode.OK, StatusCode.NOT_FOUND}, method


# --- Nodes ----------------------------------------------------------------------------------------


async def follow(peers: Peers, address: str) -> str:
    """The first word of the run, as a node hears it from another one."""
    try:
        key = RunKey("acme", "r-theirs")
        async with aclosing(peers.follow(address, key, 0, lambda: None)) as events:
            async for event in events:
                text = getattr(event.body, "text", "") if event else ""
                if text:
                    return str(text)
    finally:
        await peers.close()
    return ""


class Eavesdropper(grpc.GenericRpcHandler):
    """A stranger at the address of a dead node. Keeps the metadata of every call, and follows."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, dict[str, str]]] = []

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Notes the call, and refuses it."""
        metadata = {k: str(v) for k, v in handler_call_details.invocation_metadata or ()}
        self.heard.append((str(handler_call_details.method), metadata))


async def test_a_stranger_at_the_port_of_a_node_gets_nothing_to_use(tmp_path: Path) -> None:
    heard = Eavesdropper()
    stranger = grpc.aio.server(handlers=(heard,))
    port = stranger.add_insecure_port("127.0.0.1:0")
    await stranger.start()
    try:
        async with guarded(tmp_path) as world, asyncio.timeout(20):
            with pytest.raises(RelayBroken):
                await follow(Peers(NodeKeys([NODE_KEY])), f"127.0.0.1:{port}")
            ((method, metadata),) = heard.heard
            assert method.endswith("/SubscribeRun")
            assert NODE_KEY not in str(metadata)
            shown = (("authorization", metadata["authorization"]),)
            for each in OF_TENANTS:
                code = (await world.ask(each, request(each), shown)).code
                assert code is StatusCode.UNAUTHENTICATED, each
    finally:
        await stranger.stop(None)


async def test_nodes_call_each_other_without_tls(tmp_path: Path) -> None:
    async with guarded(tmp_path) as world, asyncio.timeout(20):
        assert await follow(Peers(NodeKeys([NODE_KEY])), world.wire.address) == "one"
        with pytest.raises(RelayBroken):
            await follow(Peers(NodeKeys(["another key"])), world.wire.address)


async def test_a_rotated_key_is_valid_until_the_next_rotation(tmp_path: Path) -> None:
    async with guarded(tmp_path) as world, asyncio.timeout(20):
        address, keys = world.wire.address, world.access_control.node_keys
        old = NodeKeys([NODE_KEY])
        assert keys.replace(["new", NODE_KEY])
        assert not keys.replace(["new", NODE_KEY])
        assert await follow(Peers(old), address) == "one"
        assert await follow(Peers(NodeKeys(["new", NODE_KEY])), address) == "one"
        # An open call ends with its key.
        key = RunKey("acme", "r-theirs")
        peers = Peers(old)
        async with aclosing(peers.follow(address, key, 0, lambda: None)) as events:
            assert await anext(events) is not None
            keys.replace(["newer", "new"])
            world.access_control.recheck()
            with pytest.raises(RelayBroken):
                async for _ in events:
                    pass
        await peers.close()


async def test_a_new_key_signs_only_once_every_node_knows_it(tmp_path: Path) -> None:
    async with guarded(tmp_path) as world, asyncio.timeout(20):
        now = [world.clock[0]]
        rotating = NodeKeys([NODE_KEY], lambda: now[0])
        rotating.replace(["new", NODE_KEY])
        # The other node does not know the new key yet.
        assert await follow(Peers(rotating), world.wire.address) == "one"
        now[0] += SETTLE_SECONDS
        with pytest.raises(RelayBroken):
            await follow(Peers(rotating), world.wire.address)
        world.access_control.node_keys.replace(["new", NODE_KEY])
        assert await follow(Peers(rotating), world.wire.address) == "one"


async def test_an_open_call_of_a_node_outlives_its_signature(tmp_path: Path) -> None:
    async with guarded(tmp_path) as world, asyncio.timeout(20):
        peers = Peers(NodeKeys([NODE_KEY]))
        key = RunKey("acme", "r-theirs")
        async with aclosing(peers.follow(world.wire.address, key, 0, lambda: None)) as events:
            assert await anext(events) is not None
            world.clock[0] += 10 * VALID_SECONDS
            world.access_control.recheck()
            world.wire.latches.open("g")
            assert [event async for event in events][-1] is None
        await peers.close()


@pytest.mark.parametrize("mutual", [False, True])
async def test_nodes_call_each_other_with_tls_where_the_server_has_it(
    mutual: bool, tmp_path: Path
) -> None:
    authority = Authority()
    paths = authority.issue("node", ["127.0.0.1"]).write(tmp_path, "node")
    ca = tmp_path / "ca.pem"
    ca.write_bytes(authority.certificate)
    tls = ServerTls(*paths, ca if mutual else None)
    settings = Config(
        tls_cert=str(paths[0]),
        tls_key=str(paths[1]),
        tls_client_ca=str(ca) if mutual else None,
        node_tls_ca=str(ca),
    )
    peers = Security(settings).peers(NodeKeys(["key"]))
    shown = trusting(authority, authority.issue("me") if mutual else None)
    access_control = AccessControl(node_keys=NodeKeys(["key"]))
    async with (
        serving(tls=tls, credentials=shown, access=access_control) as wire,
        asyncio.timeout(20),
    ):
        prompt = json.dumps([{"text": "one"}, {"wait": "g"}])
        await wire.runs.RunAccepted(
            runs_pb.RunAcceptedRequest(
                session_id="s", run_id="r-theirs", prompt=prompt, allow_missing=True
            )
        )
        key = RunKey("default", "r-theirs")
        async with aclosing(peers.follow(wire.address, key, 0, lambda: None)) as events:
            assert (await anext(events)) is not None
        await peers.close()
        wire.latches.open("g")


async def test_a_missing_ca_file_of_the_nodes_is_an_error_and_no_defect(tmp_path: Path) -> None:
    authority = Authority()
    tls = ServerTls(*authority.issue("node").write(tmp_path, "node"))
    gone = Peers(
        NodeKeys(["key"]), credentials=lambda: tls.channel_credentials(tmp_path / "ca.pem")
    )
    with pytest.raises(RelayBroken, match="No such file"):
        await follow(gone, "127.0.0.1:1")
    with pytest.raises(StartError, match="--node-tls-ca"):
        Security(Config(node_tls_ca=str(tmp_path / "ca.pem")))


async def test_a_recheck_that_fails_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise revoked callers would keep their access."""
    path = tmp_path / "access.toml"
    editing.add(path, "me", tenant="acme", role=Role.RUN)
    security = Security(Config(access=str(path)))
    rechecks: asyncio.Queue[None] = asyncio.Queue()

    class Failing(AccessControl):
        def recheck(self) -> None:
            rechecks.put_nowait(None)
            if rechecks.qsize() == 1:
                raise MemoryError

    monkeypatch.setattr("runlane_server.process.security.RECHECK_INTERVAL", 0.001)
    editing.remove(path, "me")
    with capture_logs() as logs:
        keeping = asyncio.create_task(security.keep_current(Failing()))
        async with asyncio.timeout(20):
            while rechecks.qsize() < 2:
                await asyncio.sleep(0.001)
        keeping.cancel()
        await asyncio.wait({keeping})
    assert [line["log_level"] for line in logs] == ["info", "error"]
    assert rechecks.qsize() == 2


# --- The whole ------------------------------------------------------------------------------------


def runlane(*arguments: str, **env: str) -> tuple[int, str, str]:
    """The client's command: its exit code, stdout and stderr."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RUNLANE_")}
    ended = subprocess.run(
        [sys.executable, "-c", "from runlane.cli import main; main()", *arguments],
        env=kept | {"PYTHONPATH": os.pathsep.join(sys.path)} | env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return ended.returncode, ended.stdout, ended.stderr


def test_the_command_calls_a_server_with_tls_and_tokens(tmp_path: Path) -> None:
    authority = Authority()
    certificate, key = authority.issue("server", ["127.0.0.1"]).write(tmp_path, "server")
    ca = tmp_path / "ca.pem"
    ca.write_bytes(authority.certificate)
    access = tmp_path / "access.toml"
    token = editing.add(access, "me", tenant="acme", role=Role.RUN)
    file = tmp_path / "token"
    file.write_text(f"{token}\n")
    flags = ("--tls-cert", str(certificate), "--tls-key", str(key), "--access", str(access))
    listen = "0.0.0.0:0"
    with processes.serving_blocking(
        tmp_path, "--store", "memory:", *flags, listen=listen
    ) as server:
        port = server.address.rpartition(":")[2]
        to = ("-S", f"127.0.0.1:{port}", "--tls-ca", str(ca))
        assert runlane(*to, "--token-file", str(file), "run", "Hello")[:2] == (0, "Hello\n")
        assert runlane(*to, "sessions", RUNLANE_TOKEN=token)[0] == 0
        code, said, why = runlane(*to, "sessions")
        assert (code, said) == (1, "")
        assert "invalid or missing credentials" in why
        # Without TLS the token is sent only within this machine, where no plaintext server answers.
        code, _, why = runlane("-S", f"127.0.0.1:{port}", "--token", token, "sessions")
        assert code == 1
        assert token not in why
        code, _, why = runlane("-S", "192.0.2.1:1", "--token", token, "sessions")
        assert code == 2
        assert "--plaintext-token" in why
        assert token not in why
        editing.remove(access, "me")
        for _ in range(60):
            if runlane(*to, "--token", token, "sessions")[0] == 1:
                break
        else:
            raise AssertionError("the token was revoked, and is still accepted")
    log = server.log
    assert token.rpartition("_")[2] not in log
    assert "unknown token id" in log


def test_a_server_exposed_to_the_network_by_mistake_does_not_start(tmp_path: Path) -> None:
    for flags in (("--store", "memory:"), ("--processes", "2", "--store", "postgresql://x/y")):
        listen = ("--listen", "0.0.0.0:0")
        code, said = processes.start_fails(tmp_path, *listen, *flags)
        assert code == 2
        assert "--insecure-anywhere" in said
        assert said.count("\n") == 1


async def test_the_own_ports_of_processes_have_tls_too(postgres_url: str, tmp_path: Path) -> None:
    authority = Authority()
    certificate, key = authority.issue("server", ["127.0.0.1"]).write(tmp_path, "server")
    ca = tmp_path / "ca.pem"
    ca.write_bytes(authority.certificate)
    flags = ("--tls-cert", str(certificate), "--tls-key", str(key), "--node-tls-ca", str(ca))
    more = ("--processes", "2", "--store", postgres_url, "--log-format", "json")
    with processes.serving_blocking(tmp_path, *flags, *more) as server:
        lines = [json.loads(line) for line in server.log.splitlines()]
        own = {line["node_address"] for line in lines if "node_address" in line}
        assert len(own) == 2
        for address in (server.address, *own):
            await call_once(address, trusting(authority))
            await assert_unreachable(address, None)
