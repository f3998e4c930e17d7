"""`--http`: a process beside the server that serves HTTP, and ends with it."""

from __future__ import annotations

import asyncio
import os
import re
import resource
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import pytest

from runlane_server.config import Config
from runlane_server.core.errors import SettingsError
from runlane_server.net.addresses import Address
from runlane_server.process.http_door import check_http, child_environment
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
        async with asyncio.timeout(20):
            while "http process not started" not in process.log:
                await asyncio.sleep(0.01)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (soft, hard))
        transport = httpx2.AsyncHTTPTransport(retries=10)
        async with httpx2.AsyncClient(
            base_url=http.base_url, headers=http.headers, transport=transport
        ) as again:
            assert await accepted(again) == 200


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
    assert f"--listen: http://127.0.0.1:{port}: Address already in use" in said
    assert f"--http 127.0.0.1:{port}: the process ended with exit code 1" in said


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (Config(http=Address("192.0.2.1", 80)), "is not on this machine"),
        (Config(http=Address("127.0.0.1", 80), processes=2), "serves one process only"),
    ],
)
def test_settings_that_cannot_work_are_refused(config: Config, problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        check_http(config)
