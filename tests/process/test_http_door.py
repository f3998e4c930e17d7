"""`--http`: a process beside the server that serves HTTP, and ends with it."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import resource
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import httpx2
import pytest
from grpc_health.v1 import (  # type: ignore[import-untyped]
    health_pb2,
    health_pb2_grpc,
)
from structlog.testing import capture_logs

from runlane_server.config import Config
from runlane_server.core.errors import SettingsError, StartError
from runlane_server.net.addresses import Address
from runlane_server.process.http_door import (
    DoorSockets,
    HttpDoor,
    check_http,
    child_environment,
    door_sockets,
)
from runlane_web.serving import Address as GatewayAddress
from runlane_web.serving import bind
from support.server import FREE_PORT, ServerProcess, start_fails

LISTENING = re.compile(rb"runlane-web listening on (\S+)\nconsole: \S+#token=(\S+)\n")


@asynccontextmanager
async def served(folder: Path) -> AsyncIterator[tuple[ServerProcess, httpx2.AsyncClient]]:
    process = ServerProcess(folder, "--http", "0")
    await process.start()
    try:
        stdout = process.process.stdout
        assert stdout is not None
        text = (await asyncio.to_thread(stdout.readline)) + await asyncio.to_thread(stdout.readline)
        found = LISTENING.search(text)
        assert found, text
        headers = {"Authorization": f"Bearer {found[2].decode()}"}
        async with httpx2.AsyncClient(base_url=found[1].decode(), headers=headers) as http:
            yield process, http
    finally:
        await process.kill()


# Without capabilities root is a user like any other.
UNPRIVILEGED = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")


@asynccontextmanager
async def shown_nothing(
    folder: Path, env: Mapping[str, str]
) -> AsyncIterator[tuple[int, httpx2.AsyncClient]]:
    """A server with a token of the operator, which is therefore not printed."""
    process = ServerProcess(folder, "--http", "0", env=env, prefix=UNPRIVILEGED)
    await process.start()
    try:
        stdout = process.process.stdout
        assert stdout is not None
        line = (await asyncio.to_thread(stdout.readline)).decode()
        (pid,) = children(process.pid)
        async with httpx2.AsyncClient(base_url=line.split()[-1]) as http:
            yield pid, http
    finally:
        await process.kill()


def seen_by_root(pid: int, name: str) -> bytes:
    return Path(f"/proc/{pid}/{name}").read_bytes() if os.geteuid() == 0 else b""


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(each) for each in text.split()]


async def gone(pid: int) -> None:
    """Waits until a process that is not ours has ended."""
    descriptor = os.pidfd_open(pid)
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(descriptor, ended.set)
    try:
        async with asyncio.timeout(20):
            await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


async def accepted(http: httpx2.AsyncClient) -> int:
    body = {"prompt": "hello", "allowMissing": True}
    return (await http.post("/v1/sessions/s/runs", json=body)).status_code


async def test_the_server_prints_where_it_serves_http_and_the_token(tmp_path: Path) -> None:
    async with served(tmp_path) as (_, http):
        assert await accepted(http) == 200


async def test_the_process_is_started_again_at_the_same_port(tmp_path: Path) -> None:
    async with served(tmp_path) as (process, http):
        (first,) = children(process.pid)
        os.kill(first, signal.SIGKILL)
        async with asyncio.timeout(20):
            while not (now := children(process.pid)) or now == [first]:
                await asyncio.sleep(0.01)
        transport = httpx2.AsyncHTTPTransport(retries=8)
        async with httpx2.AsyncClient(
            base_url=http.base_url, headers=http.headers, transport=transport
        ) as again:
            assert await accepted(again) == 200


async def test_the_process_is_started_once_the_machine_has_room_again(tmp_path: Path) -> None:
    async with served(tmp_path) as (process, http):
        (first,) = children(process.pid)
        soft, hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (1, hard))
        os.kill(first, signal.SIGKILL)
        await process.logs("http process not started")
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (soft, hard))
        transport = httpx2.AsyncHTTPTransport(retries=10)
        async with httpx2.AsyncClient(
            base_url=http.base_url, headers=http.headers, transport=transport
        ) as again:
            assert await accepted(again) == 200


@asynccontextmanager
async def opened(http: Address, **how: Any) -> AsyncIterator[tuple[list[str], DoorSockets]]:
    """A door of this process; nothing stands behind it."""
    with door_sockets(Config(http=http)) as sockets:
        assert sockets is not None
        door = HttpDoor(sockets, own_token=True, **how)
        try:
            yield await door.start(), sockets
        finally:
            await door.stop()


def is_gateway(pid: int) -> bool:
    return b"runlane_web" in Path(f"/proc/{pid}/cmdline").read_bytes()


async def door_process(besides: int = 0) -> int:
    """The id of the process of this process's door, once it is there."""
    async with asyncio.timeout(30):
        while True:
            for pid in children(os.getpid()):
                with suppress(OSError):
                    if pid != besides and is_gateway(pid):
                        return pid
            await asyncio.sleep(0.001)


def refusal(place: tuple[str, int], *, reuse: bool) -> int | None:
    """The error that another process gets which tries to listen there."""
    with socket.socket(socket.AF_INET6 if ":" in place[0] else socket.AF_INET) as other:
        if reuse:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            other.bind(place)
            other.listen()
        except OSError as error:
            return error.errno
    return None


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
async def test_the_port_stays_taken_between_two_processes(host: str) -> None:
    if host == "::1" and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    async with opened(Address(host, 0)) as (lines, sockets):
        places = [each.getsockname()[:2] for each in sockets.sockets]
        assert lines[0].endswith(f":{places[0][1]}")
        first = await door_process()
        os.kill(first, signal.SIGSTOP)
        waiting = asyncio.create_task(answer(places[0]))
        os.kill(first, signal.SIGKILL)
        await gone(first)
        for place in places:
            for reuse in (False, True):
                assert refusal(place, reuse=reuse) == errno.EADDRINUSE
        # Who connects meanwhile waits for the next process.
        assert (await answer(places[0])).startswith(b"HTTP/1.1 ")
        await asyncio.wait({waiting})
        assert not waiting.cancelled()


async def answer(place: tuple[str, int]) -> bytes:
    """The answers of the door on one connection; empty if the connection is closed."""
    reader, writer = await asyncio.open_connection(*place)
    writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    try:
        return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


def test_the_gateway_listens_at_every_address_of_a_name() -> None:
    sockets = bind(GatewayAddress("localhost", 0))
    try:
        port = sockets[0].getsockname()[1]
        resolved = socket.getaddrinfo("localhost", port, type=socket.SOCK_STREAM)
        for _, _, _, _, place in resolved:
            assert refusal((str(place[0]), port), reuse=True) in (
                errno.EADDRINUSE,
                errno.EADDRNOTAVAIL,
            )
    finally:
        for each in sockets:
            each.close()


def has_ipv6() -> bool:
    return refusal(("::1", 0), reuse=False) is None


async def test_a_process_that_stays_silent_is_killed_and_replaced() -> None:
    health: list[bool] = []

    async def note(is_serving: bool) -> None:
        health.append(is_serving)

    started = opened(Address("127.0.0.1", 0), on_health=note, start_timeout=5.0)
    with capture_logs() as log:
        async with started as (_, sockets):
            first = await door_process()
            os.kill(first, signal.SIGKILL)
            silent = await door_process(besides=first)
            os.kill(silent, signal.SIGSTOP)
            await gone(silent)
            place = sockets.sockets[0].getsockname()
            assert (await answer(place)).startswith(b"HTTP/1.1 ")
    problems = [each["error"] for each in log if each["event"] == "http process not started"]
    assert problems[0].endswith("the process did not serve within 5 s and was killed")
    assert health[:2] == [True, False]


async def test_a_first_process_that_stays_silent_fails_the_start() -> None:
    async def silence() -> None:
        os.kill(await door_process(), signal.SIGSTOP)

    silencing = asyncio.create_task(silence())
    with pytest.raises(StartError, match="did not serve within 2 s and was killed"):
        async with opened(Address("127.0.0.1", 0), start_timeout=2.0):
            pass
    await silencing


async def test_health_says_whether_http_is_served(tmp_path: Path) -> None:
    async with served(tmp_path) as (process, _):
        assert await asyncio.to_thread(http_health, process) == "SERVING"
        (first,) = children(process.pid)
        soft, hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        # So that no other can be started.
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (1, hard))
        os.kill(first, signal.SIGKILL)
        await process.logs("http process not started")
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (soft, hard))
        async with asyncio.timeout(20):
            seen = [await asyncio.to_thread(http_health, process)]
            while seen[-1] != "SERVING":
                seen.append(await asyncio.to_thread(http_health, process))
        assert seen[0] == "NOT_SERVING"


def http_health(process: ServerProcess) -> str:
    with grpc.insecure_channel(process.address) as channel:
        request = health_pb2.HealthCheckRequest(service="runlane.http")
        status = health_pb2_grpc.HealthStub(channel).Check(request, timeout=10).status
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(status))


def test_the_process_gets_no_secret_by_its_environment() -> None:
    kept = {"PATH": "/bin", "HOME": "/", "LC_ALL": "C", "PYTHONPATH": "/x", "GRPC_VERBOSITY": "x"}
    secrets = {"RUNLANE_STORE": "postgresql://u:p@h/d", "OPENAI_API_KEY": "k", "PGPASSWORD": "p"}
    assert child_environment(kept | secrets) == kept


async def test_nobody_reads_a_secret_of_the_server_or_the_token_in_proc(tmp_path: Path) -> None:
    secret, token = "sk-secret-of-a-model", "token-given-by-the-operator"
    env = {"MODEL_API_KEY": secret, "RUNLANE_WEB_TOKEN": token}
    async with shown_nothing(tmp_path, env) as (pid, http):
        http.headers["Authorization"] = f"Bearer {token}"
        assert await accepted(http) == 200
        for name in ("environ", "cmdline"):
            text = seen_by_root(pid, name)
            assert secret.encode() not in text
            assert token.encode() not in text
        for name in ("environ", "mem", "maps"):
            command = [*UNPRIVILEGED, "head", "-c", "1", f"/proc/{pid}/{name}"]
            got = await asyncio.to_thread(subprocess.run, command, capture_output=True)
            assert b"Permission denied" in got.stderr, (name, got)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_the_process_ends_with_the_server(tmp_path: Path, number: signal.Signals) -> None:
    async with served(tmp_path) as (process, _):
        (pid,) = children(process.pid)
        watching = asyncio.create_task(gone(pid))
        await asyncio.sleep(0)
        await process.stop(number)
        await watching


def test_a_port_in_use_fails_the_start(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, said = start_fails(tmp_path, "--listen", FREE_PORT, "--http", str(port))
    assert code == 1
    assert f"--http 127.0.0.1:{port}: cannot listen: address already in use" in said
    assert "listening on" not in said  # no run of the store was touched


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (Config(http=Address("192.0.2.1", 80)), "is not on this machine"),
        (Config(http=Address("127.0.0.1", 80), processes=2), "serves one process only"),
        (Config(a2a="http://x"), "--a2a: needs --http"),
        (Config(http=Address("127.0.0.1", 80), a2a="x"), "must be an address such as"),
    ],
)
def test_settings_that_cannot_work_are_refused(config: Config, problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        check_http(config)
