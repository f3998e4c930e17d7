"""The command where something is wrong: what it says, and the code it leaves with."""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import PIPE
from pathlib import Path

import grpc
import grpc.aio
import pytest
from click.testing import CliRunner
from grpc import StatusCode

from runlane.cli.app import runlane as command
from runlane.cli.connection import ServerType
from runlane.v1 import run_service_pb2
from support.certificates import Authority
from support.command import START, finish, start
from support.peer import Peer, Refuse, accepted, complete, deleted, ended, event, run, says


async def test_an_error_is_one_line(peer: Peer) -> None:
    empty = Refuse(StatusCode.INVALID_ARGUMENT, "EMPTY_PROMPT", "prompt: is empty")
    peer.scripts["RunAccepted"] = [(empty,)]
    told = await finish(await start(peer, "run", ""))
    assert told == (2, "", "Error: prompt: is empty\n")
    await peer.stop()
    code, out, err = await finish(await start(peer, "runs"))
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"Error: cannot reach {peer.target}: ")


async def test_without_a_server_nothing_was_accepted_and_it_says_so_soon(peer: Peer) -> None:
    await peer.stop()
    code, out, err = await finish(await start(peer, "run", "-s", "s", "p"))
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"Error: cannot reach {peer.target}: ")
    assert err.endswith("; is a server running there?\n")


@pytest.mark.parametrize(
    "address",
    ["", "nowhere", "host:", ":1", "host:0", "host:65536", "http://host:1", "a b:1", "::1"],
)
def test_a_malformed_address_is_a_usage_error(address: str) -> None:
    result = CliRunner().invoke(command, ["-S", address, "runs"])
    assert result.exit_code == 2
    assert "'-S' / '--server'" in result.stderr


@pytest.mark.parametrize(
    "address", ["host:1", "127.0.0.1:65535", "[::1]:50051", "unix:/x", "dns:///a:1", "a_b.c:7"]
)
def test_an_address_is_accepted(address: str) -> None:
    assert ServerType().convert(address, None, None) == address


async def test_an_accept_of_unknown_outcome_says_how_to_find_out(peer: Peer) -> None:
    lost = Refuse(StatusCode.DEADLINE_EXCEEDED)
    peer.scripts["RunAccepted"] = [(lost,), (lost,)]
    code, out, err = await finish(await start(peer, "run", "-s", "my notes", "p"))
    run_id = peer.requests["RunAccepted"][0].run_id
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.endswith(
        f"; run {run_id} in session my notes may have been accepted; "
        f"to find out, repeat the command with -s 'my notes' --run-id {run_id}\n"
    )
    # The error also names a session whose id the command generated.
    err = (await finish(await start(peer, "run", "p")))[2]
    asked = peer.requests["RunAccepted"][1]
    assert err.endswith(f"repeat the command with -s {asked.session_id} --run-id {asked.run_id}\n")


async def test_a_session_without_a_name_is_for_the_server_to_refuse(peer: Peer) -> None:
    missing = Refuse(StatusCode.INVALID_ARGUMENT, "SESSION_MISSING", "session_id: is empty")
    peer.scripts["RunAccepted"] = [(missing,)]
    told = await finish(await start(peer, "run", "-s", "", "p"))
    assert told == (2, "", "Error: session_id: is empty\n")
    assert not peer.requests["RunAccepted"][0].session_id


async def test_a_session_that_is_not_there_does_not_keep_others_from_their_end(peer: Peer) -> None:
    gone = Refuse(StatusCode.NOT_FOUND, "SESSION_NOT_FOUND", "there is no session 'b'")
    peer.scripts["DeleteSession"] = [(deleted(),), (gone,), (deleted(),)]
    told = await finish(await start(peer, "sessions", "delete", "a", "b", "c"))
    assert told == (1, "", "Error: there is no session 'b'\n")
    assert [each.session_id for each in peer.requests["DeleteSession"]] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("closed", "code", "told"),
    [("<&-", 2, "PROMPT is missing; give it as an argument or on stdin"), ("p >&-", 0, "")],
)
async def test_streams_may_be_closed(peer: Peer, closed: str, code: int, told: str) -> None:
    peer.scripts["RunAccepted"] = [(accepted(),)]
    peer.scripts["SubscribeRun"] = [(says(1, "a"), event(2, run_complete=complete("r")))]
    line = f'exec "$0" -m runlane -S {peer.target} run -s s {closed}'
    process = await asyncio.create_subprocess_exec(
        "sh", "-c", line, sys.executable, stdin=PIPE, stdout=PIPE, stderr=PIPE
    )
    left, out, err = await finish(process)
    assert (left, out) == (code, "")
    assert told in err
    assert bool(err) is bool(told)


async def test_watch_prints_its_cursor_also_after_an_error(peer: Peer) -> None:
    peer.scripts["SubscribeRunComplete"] = [
        (ended("c1", "r1"), Refuse(StatusCode.PERMISSION_DENIED))
    ]
    code, _, err = await finish(await start(peer, "watch", "-s", "s"))
    assert code == 1
    assert "resume with --cursor c1" in err


async def test_of_grpc_itself_nothing_is_on_stderr(peer: Peer, tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_text("garbage")
    code, out, err = await finish(await start(peer, "--tls-ca", str(ca), "runs"))
    assert (code, out) == (1, "")
    assert err.count("\n") == 1, err
    assert err.startswith("Error: ")


async def test_a_server_for_whom_another_vouches_is_one_line(tmp_path: Path) -> None:
    issued = Authority().issue("localhost", ["localhost"])
    server = grpc.aio.server()
    credentials = grpc.ssl_server_credentials([(issued.key, issued.certificate)])
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    ca = tmp_path / "ca.pem"
    ca.write_bytes(Authority("another").certificate)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *START, "-S", f"localhost:{port}", "--tls-ca", str(ca), "runs"),
        stdin=PIPE,
        stdout=PIPE,
        stderr=PIPE,
    )
    code, out, err = await finish(process)
    await server.stop(None)
    assert (code, out, err.count("\n")) == (1, "", 1), err


async def test_a_reader_that_leaves_is_no_error(peer: Peer) -> None:
    page = run_service_pb2.ListRunsResponse(runs=[run(f"r{n}") for n in range(1000)])
    page.next_page_token = "more"  # noqa: S105 - where the next page begins
    peer.scripts["ListRuns"] = [(page,)] * 100
    process = await start(peer, "runs", "-n", "0")
    assert process.stdout is not None
    await process.stdout.readline()
    process.stdout._transport.close()  # type: ignore[attr-defined]
    assert process.stderr is not None
    assert await process.stderr.read() == b""
    await process.wait()
