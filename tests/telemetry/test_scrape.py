"""The metrics page of real server processes, over real sockets."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit

import pytest

from e2e.test_processes import parent
from runlane import Client, RunState, SessionNotFound
from runlane_server.config import Config
from runlane_server.core.errors import StartError
from runlane_server.net.addresses import Address
from runlane_server.telemetry.metrics_server import MAX_CONNECTIONS, MetricsServer
from support.processes import open_descriptors
from support.server import ServerProcess, serving, start_fails
from support.staging import SECONDS, say
from support.wire import Wire
from telemetry.scrape import Page, scrape, url_in

FLAGS = ("--metrics-listen", "0", "--log-format", "json", "--store", "memory:")


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[ServerProcess]:
    async with serving(tmp_path, *FLAGS, "--agent", "scripted", "--max-active-runs", "3") as made:
        yield made


@pytest.fixture
async def wire(server: ServerProcess) -> AsyncIterator[Wire]:
    async with Client(server.address) as client:
        yield Wire(client)


async def page(server: ServerProcess) -> Page:
    return await scrape(url_in(server.log))


async def until(server: ServerProcess, name: str, value: float, **labels: str) -> Page:
    """Scrapes until a sample has a value: a stream ends some time after the call."""
    async with asyncio.timeout(SECONDS):
        while (found := await page(server))(name, **labels) != value:
            await asyncio.sleep(0.01)
    return found


# --- Gauges and calls --------------------------------------------------------------------------


async def test_gauges_show_the_load_and_the_node(server: ServerProcess, wire: Wire) -> None:
    await wire.start_blocked("s", "g")
    await wire.accept("s", say("waits"))
    await wire.accept("s", say("waits, too"))
    found = await page(server)
    assert found("runs_active") == found("slots_in_use") == 1
    assert found("runs_waiting") == 2
    assert found("slots_limit") == 3
    assert found("agent_ready") == 1
    assert found("draining") == found("log_behind_events") == 0
    assert found("subscription_behind_events") == 0
    info = found.labels("node_info")
    assert (info["store"], info["node_id"]) == ("memory", "")
    assert info["version"]


async def test_open_subscriptions_and_streams_are_shown(server: ServerProcess, wire: Wire) -> None:
    handle = await wire.accept("s", *({"wait": "g"},))
    follower = handle.events()
    await anext(follower)
    async with wire.client.subscribe_run_complete() as subscription:
        following = asyncio.ensure_future(anext(subscription))
        found = await until(server, "subscriptions_open", 1, kind="run_complete")
        assert found("subscriptions_open", kind="run") == 1
        assert found("rpcs_open", method="RunService/SubscribeRun") == 1
        assert found("rpcs_open", method="RunService/SubscribeRunComplete") == 1
        await wire.open_latch("g")
        await following
    await handle.completed(SECONDS)
    await follower.aclose()
    found = await until(server, "subscriptions_open", 0, kind="run_complete")
    found = await until(server, "subscriptions_open", 0, kind="run")
    assert found("rpcs_total", method="RunService/SubscribeRun", code="OK") is not None
    assert found("rpc_seconds_count", method="RunService/SubscribeRun") is None
    assert found("rpcs_open", method="RunService/SubscribeRun") is None


async def test_calls_count_by_method_and_code(server: ServerProcess, wire: Wire) -> None:
    for _ in range(2):
        with pytest.raises(SessionNotFound):
            await wire.client.cancel("nowhere")
    await wire.end(await wire.accept("s", say("x")))
    found = await page(server)
    method = "RunService/Cancel"
    assert found("rpcs_total", method=method, code="NOT_FOUND") == 2
    assert found("rpc_refusals_total", reason="SESSION_NOT_FOUND") == 2
    assert found("rpc_seconds_count", method=method) == 2
    assert found("rpc_seconds_sum", method=method) != 0
    assert found("rpcs_total", method="RunService/RunAccepted", code="OK") == 1
    assert found("runs_accepted_total") == 1


async def test_a_blocked_event_loop_shows_in_its_lag(tmp_path: Path) -> None:
    holding = "import time\nasync def answer(turn):\n    time.sleep(0.7)\n    yield 'done'\n"
    (tmp_path / "holding.py").write_text(holding)
    async with (
        serving(tmp_path, *FLAGS, "--agent", "holding:answer") as server,
        Client(server.address) as client,
    ):
        handle = await client.run_accepted("s", "x", allow_missing=True)
        assert (await handle.completed(SECONDS)).state is RunState.COMPLETED
        async with asyncio.timeout(SECONDS):
            # The next measurement may not have happened yet.
            while True:
                found = await page(server)
                late, quick = found("event_loop_lag_seconds_count"), _within(found, "0.25")
                if late != quick:
                    break
                await asyncio.sleep(0.05)
        assert (late or 0) > (quick or 0) >= 0


def _within(found: Page, bound: str) -> float | None:
    return found("event_loop_lag_seconds_bucket", le=bound)


async def test_a_draining_node_is_shown_as_draining(server: ServerProcess, wire: Wire) -> None:
    await wire.start_blocked("s", "g")
    os.kill(server.pid, 15)
    assert (await until(server, "draining", 1))("runs_active") == 1
    os.kill(server.pid, 15)
    await server.wait()


# --- HTTP ---------------------------------------------------------------------------


async def test_other_paths_methods_and_oversized_requests_are_refused(
    server: ServerProcess,
) -> None:
    url = url_in(server.log)
    with pytest.raises(HTTPError) as caught:
        await scrape(url.removesuffix("/metrics"))
    assert caught.value.code == 404
    caught.value.close()
    head = await _send(url, b"HEAD /metrics?x=1 HTTP/1.1\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert head.endswith(b"\r\n\r\n")
    assert (await _send(url, b"POST /metrics HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 405 ")
    assert await _send(url, b"GET /metrics " + b"x" * 100_000) == b""
    await page(server)


async def _send(url: str, request: bytes) -> bytes:
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        writer.write(request)
        async with asyncio.timeout(SECONDS):
            return await reader.read()
    except ConnectionError:
        return b""  # closed before it had read everything
    finally:
        writer.close()


async def test_an_incomplete_request_delays_no_other_and_is_cut_off(server: ServerProcess) -> None:
    url = urlsplit(url_in(server.log))
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    writer.write(b"GET /met")
    await asyncio.gather(*(page(server) for _ in range(5)))
    async with asyncio.timeout(SECONDS):
        assert await reader.read() == b""  # until the server closes
    writer.close()


async def test_connections_are_bounded(server: ServerProcess, wire: Wire) -> None:
    url = urlsplit(url_in(server.log))
    # A server listens before all that it keeps open is open.
    await wire.end(await wire.accept("s", say("x")))
    await page(server)
    before = open_descriptors(server.pid)
    count = MAX_CONNECTIONS + 50
    kept = [await asyncio.open_connection(url.hostname, url.port) for _ in range(count)]
    async with asyncio.timeout(SECONDS):
        closed = [asyncio.create_task(reader.read()) for reader, _ in kept[MAX_CONNECTIONS:]]
        assert await asyncio.gather(*closed) == [b""] * (count - MAX_CONNECTIONS)
        assert open_descriptors(server.pid) <= before + MAX_CONNECTIONS + 1
        # The first ones still have time to ask.
        reader, writer = kept[0]
        writer.write(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 200 OK\r\n")
    for _, writer in kept:
        writer.close()


def test_a_port_in_use_fails_the_start(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        flags = ("--listen", "127.0.0.1:0", "--metrics-listen", address)
        code, line = start_fails(tmp_path, *flags)
    assert code == 1
    assert f"--metrics-listen: cannot listen on {address}: address already in use" in line


async def test_without_prometheus_client_the_start_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(StartError, match=r"pip install 'runlane\[server,metrics\]'"):
        MetricsServer(Address("127.0.0.1"), "memory")
    MetricsServer(None, "memory")  # does not need it


def test_without_the_flag_prometheus_client_is_not_imported() -> None:
    assert Config().metrics_listen is None
    code = (
        "import sys, runlane_server.process.app\n"
        "ours = 'runlane_server.telemetry.metrics'\n"
        "sys.exit('prometheus_client' in sys.modules or ours in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- Many nodes ---------------------------------------------------------------------------------


def _free_ports() -> int:
    """The first of two consecutive free ports."""
    while True:
        with ExitStack() as stack:
            first = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            port: int = first.getsockname()[1]
            try:
                stack.enter_context(socket.create_server(("127.0.0.1", port + 1)))
            except (OSError, OverflowError):
                continue
            return port


async def test_each_process_has_its_own_page(tmp_path: Path, postgres_url: str) -> None:
    port = _free_ports()
    flags = ("--store", postgres_url, "--log-format", "json", "--metrics-listen", str(port))
    async with parent(tmp_path, *flags) as made:
        async with Client(made.address) as client:
            handle = await client.run_accepted("s", "hello", allow_missing=True)
            assert (await handle.completed(SECONDS)).state is RunState.COMPLETED
        pages = [await scrape(f"http://127.0.0.1:{port + n}/metrics") for n in range(2)]
    assert len({found.labels("node_info")["node_id"] for found in pages}) == 2
    assert sum(found("runs_accepted_total") or 0 for found in pages) == 1
    assert sum(found("runs_ended_total", state="completed") or 0 for found in pages) == 1
    for found in pages:
        assert found("node_alive") == 1
        assert found("node_lease_seconds") == 10
        assert 0 <= (found("node_beat_age_seconds") or 0) < 10


def test_a_process_without_a_port_fails_the_start(tmp_path: Path) -> None:
    flags = ("--store", "postgresql://127.0.0.1:1/none", "--processes", "2")
    code, line = start_fails(tmp_path, *flags, "--metrics-listen", "65535")
    assert code == 2
    assert "--metrics-listen 127.0.0.1:65535: has no port for process 2" in line


async def test_announced_events_are_behind_until_they_are_read(postgres_url: str) -> None:
    from support.postgres import postgres_store  # noqa: PLC0415 - an extra

    async with postgres_store(postgres_url) as store:
        log = store._open.log
        assert store.behind == 0
        log._on_notification(None, 0, "", "other 7 0")
        assert store.behind == 7
        log.position = 5
        assert store.behind == 2


async def test_store_and_oldest_work_are_measured(tmp_path: Path) -> None:
    flags = (*FLAGS, "--store", "sqlite:///runlane.db", "--agent", "scripted")
    async with serving(tmp_path, *flags) as server, Client(server.address) as client:
        wire = Wire(client)
        assert (await page(server))("oldest_waiting_run_seconds") == 0
        await wire.start_blocked("s", "g")
        await wire.accept("s", say("waits"))
        async with asyncio.timeout(SECONDS):
            # The age grows while the run waits.
            while not (found := await page(server))("oldest_waiting_run_seconds"):
                await asyncio.sleep(0.05)
        assert found("oldest_input_request_seconds") == 0
        assert (found("store_size_bytes") or 0) > 0
        assert (found("store_free_bytes") or 0) > 0
