"""The harness over the wire: gates, the clock, and crash and restart of a server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from runlane import (
    FinishReason,
    Progress,
    RunState,
    UnexpectedStatus,
    Unsupported,
)
from runlane.harness import Arrival, GatePoint, Harness
from runlane_server.testing.server import LocalServer
from support.server import ServerProcess, serving
from support.staging import SECONDS, say, script
from support.wire import Wire

S, P = RunState, GatePoint
STEP = {"step": True}


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[ServerProcess]:
    flags = ("--agent", "scripted", "--harness", "--progress-interval", "30s")
    async with serving(tmp_path, *flags) as process:
        yield process


@pytest.fixture
async def harness(server: ServerProcess) -> AsyncIterator[Harness]:
    async with Harness(server.address) as made:
        yield made


async def test_the_harness_reports_the_settings_of_the_server(
    harness: Harness, store_kind: str
) -> None:
    info = await harness.server()
    assert (info.store, info.durable) == (store_kind, True)
    assert (info.agent, info.restarts, info.advances_clock) == (
        "scripted",
        True,
        True,
    )
    assert info.progress_interval.total_seconds() == 30
    assert info.event_retention.days == 7


# --- The clock ----------------------------------------------------------------------------------


async def test_advancing_the_clock_ends_a_run_by_its_timeout(harness: Harness, wire: Wire) -> None:
    began = (await harness.server()).time
    handle = await wire.start_blocked("s", "never", timeout=7 * 86400)
    assert (await harness.advance_clock(7 * 86400) - began).days == 7
    complete = await wire.end(handle)
    assert (complete.finish_reason, complete.text) == (FinishReason.TIMEOUT, "<never>")
    assert complete.started_at is not None
    assert (complete.ended_at - complete.started_at).days == 7


async def test_advancing_the_clock_sends_progress_marks(harness: Harness, wire: Wire) -> None:
    async with wire.client.subscribe_run_complete() as subscription:
        assert isinstance(await subscription.next_item(), Progress)
        mark = asyncio.create_task(subscription.next_item())
        while not mark.done():
            # The server may not have started to wait for the next mark yet.
            await harness.advance_clock(31)
        assert isinstance(await mark, Progress)


# --- The end of a server ------------------------------------------------------------------------


async def test_r01_a_server_restarted_after_a_crash_keeps_runs_and_settings(
    server: ServerProcess, harness: Harness, wire: Wire
) -> None:
    before = await harness.server()
    ahead = await harness.advance_clock(3600)
    active = await wire.start_blocked("s", "g")
    queued = await wire.accept("s", say("x"))
    gate = await harness.arm(P.BEFORE_AGENT_READY)
    pid = server.pid
    await harness.crash()
    after = await harness.until_restarted(before)
    assert after.time > ahead
    assert server.pid == pid
    await harness.crash()
    after = await harness.until_restarted(after)
    assert _arguments(pid).count("--listen") == 2, "one was given, one is added"
    assert await gate.reached(timeout=SECONDS) == [Arrival("", "")]
    run = await wire.client.get_run(queued.run_id)
    assert run.state in {S.ACCEPTED, S.QUEUED}
    await gate.release()
    complete = await wire.end(active)
    assert (complete.finish_reason, complete.text) == (FinishReason.INTERRUPTED, "<g>")
    assert (await wire.end(queued)).state is S.COMPLETED
    assert complete.ended_at > ahead


def _arguments(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


async def test_r30_runs_fail_when_the_agent_never_gets_ready(harness: Harness, wire: Wire) -> None:
    before = await harness.server()
    gate = await harness.arm(P.BEFORE_AGENT_READY)
    await harness.drain()
    await harness.until_restarted(before)
    await gate.reached(timeout=SECONDS)
    handle = await wire.accept("s", say("x"))
    await harness.advance_clock(before.ready_timeout)
    complete = await wire.end(handle)
    assert complete.error is not None
    assert complete.error.reason == "AGENT_NOT_READY"


async def test_r17_gates_do_not_delay_a_drain(harness: Harness, wire: Wire) -> None:
    before = await harness.server()
    await harness.arm(P.BEFORE_FINISH, session_id="s")
    handle = await wire.start_blocked("s", "g")
    receipt = await handle.cancel()
    assert len(receipt.cancelled) == 1
    await harness.drain()
    after = await harness.until_restarted(before)
    assert after.time - before.time < before.drain_timeout
    assert (await wire.end(handle)).state is S.CANCELLED
    assert [gate.point for gate in await harness.gates()] == [P.BEFORE_FINISH]


async def test_a_crash_without_restart_ends_the_process(
    server: ServerProcess, harness: Harness
) -> None:
    await harness.crash(restart=False)
    assert await server.wait() == -9
    await server.start()
    await harness.drain(restart=False)
    assert await server.wait() == 0


# --- Restrictions ------------------------------------------------------------------------------


@pytest.mark.sqlite("it is about the command line")
@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (("--listen", "0.0.0.0:0", "--insecure-anywhere"), "listen on 127.0.0.1 or unix:PATH"),
        (("--node-address", "10.0.0.7:1"), "listen on 127.0.0.1 or unix:PATH"),
        (("--event-loop", "uvloop"), "--event-loop asyncio"),
        (("--processes", "2", "--store", "postgresql://x/y"), "--processes 1"),
    ],
)
async def test_the_harness_is_refused_with_unsafe_settings(
    tmp_path: Path, flags: tuple[str, ...], why: str
) -> None:
    server = ServerProcess(tmp_path, "--harness", *flags)
    with pytest.raises(AssertionError, match="did not start"):
        await server.start()
    assert why in server.log


@pytest.mark.sqlite("it is about the command line")
async def test_the_harness_is_off_by_default(tmp_path: Path) -> None:
    async with serving(tmp_path) as server, Harness(server.address) as harness:
        with pytest.raises(UnexpectedStatus) as error:
            await harness.server()
        assert error.value.status is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.sqlite("its store is in memory")
async def test_a_server_in_the_test_process_has_gates() -> None:
    async with (
        LocalServer("scripted", harness=True) as server,
        Harness(server.address) as harness,
        server.client() as client,
    ):
        info = await harness.server()
        assert (
            info.store,
            info.durable,
            info.restarts,
            info.advances_clock,
        ) == (
            "memory",
            False,
            False,
            False,
        )
        gate = await harness.arm(P.BEFORE_ACTIVE)
        handle = await client.run_accepted("s", script(say("x")), allow_missing=True)
        await gate.reached()
        for call in (harness.crash(), harness.drain(), harness.advance_clock(1)):
            with pytest.raises(Unsupported):
                await call
        await server.restart()
        await gate.release()
        assert await harness.gates() == []
        del handle
