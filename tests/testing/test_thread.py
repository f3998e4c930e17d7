"""`RunningServer`, in its own thread, and the latches and log of a test's server."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator
from datetime import timedelta

import pytest
import structlog

from runlane import FinishReason, RunState
from runlane.harness import GatePoint, Harness
from runlane.harness.sync import Harness as SyncHarness
from runlane_server.agents.base import Turn
from runlane_server.agents.scripted.latches import CHECK_SECONDS, UnknownLatch
from runlane_server.agents.scripted.script import BadScript
from runlane_server.core.errors import StartError
from runlane_server.testing.logs import redirect_to_logging
from runlane_server.testing.thread import Gatekeeper, LoopThread, RunningServer
from support.staging import SECONDS

pytestmark = pytest.mark.sqlite("each test names the store it needs")


def test_it_serves_while_its_context_is_open() -> None:
    before = set(threading.enumerate())
    with RunningServer() as server, server.sync_client() as client:
        handle = client.run_accepted("s", "hello", allow_missing=True)
        assert handle.completed(SECONDS).text == "hello"
        (thread,) = (one for one in threading.enumerate() if one.name == "runlane-server")
    assert thread not in before
    assert not thread.is_alive()
    with pytest.raises(RuntimeError, match="runlane-server is not running"):
        server.start()
    with pytest.raises(RuntimeError, match="once"):
        server.__enter__()


async def test_a_restart_that_blocks_the_loop_of_the_test_works() -> None:
    with RunningServer() as server:
        async with server.client() as client:
            for _ in range(2):
                handle = await client.run_accepted("s", "hello", allow_missing=True)
                assert (await handle.completed(SECONDS)).text == "hello"
                server.restart()


def test_misuse_raises_an_error_with_the_reason() -> None:
    server = RunningServer("nobody")
    with pytest.raises(RuntimeError, match="no address yet"):
        _ = server.address
    with pytest.raises(RuntimeError, match="is not running"):
        server.stop()
    with pytest.raises(RuntimeError, match="only the agent 'scripted' has latches"):
        _ = server.gates
    with pytest.raises(StartError, match="there is no agent"):
        server.__enter__()


def test_a_call_from_its_own_thread_is_refused() -> None:
    async def restarts(turn: Turn) -> AsyncGenerator[str, None]:
        yield ""
        try:
            server.restart()
        except RuntimeError as error:
            yield str(error)

    server = RunningServer(restarts)
    with server, server.sync_client() as client:
        handle = client.run_accepted("s", "x", allow_missing=True)
        assert handle.completed(SECONDS).text == "runlane-server cannot wait for itself"


async def late() -> None:
    raise TimeoutError("from the coroutine")


def test_work_that_takes_too_long_raises_a_timeout_error() -> None:
    thread = LoopThread("a-thread")
    thread.start()
    try:
        with pytest.raises(TimeoutError, match="a-thread did not finish within 0 s"):
            thread.run(asyncio.Event().wait, timeout=0)
        with pytest.raises(TimeoutError, match="from the coroutine"):
            thread.run(late, timeout=SECONDS)
    finally:
        thread.stop()


def test_waiting_for_an_event_that_does_not_happen_raises_a_timeout_error() -> None:
    with RunningServer("scripted") as server:
        with pytest.raises(TimeoutError, match="no run reached latch 'g' within 0 s"):
            server.gates.wait_reached("g", timeout=0)
        with pytest.raises(TimeoutError, match="no run ignored a cancel at latch 'g' within 0 s"):
            server.gates.wait_cancel_ignored("g", timeout=0)


def test_a_misspelt_latch_is_answered_at_once_with_the_latches_there_are() -> None:
    with RunningServer("scripted") as server, server.sync_client() as client:
        script = server.gates.script({"wait": "answering"}, {"wait": "done1"})
        client.run_accepted("s", script, allow_missing=True)
        for wait in (server.gates.wait_reached, server.gates.wait_cancel_ignored):
            with pytest.raises(UnknownLatch) as error:
                wait("anwsering")
            assert str(error.value) == (
                "no script waits at latch 'anwsering'; did you mean 'answering'? "
                "The latches are: answering, done1"
            )


def test_a_latch_of_a_script_that_has_not_started_is_no_misspelling() -> None:
    with RunningServer("scripted") as server, server.sync_client() as client:
        script = server.gates.script({"wait": "done1"})
        client.run_accepted("s", script, allow_missing=True)
        longer = CHECK_SECONDS + 0.2
        for name in ("done2", "elsewhere"):
            with pytest.raises(TimeoutError, match="the scripts so far wait at: done1"):
                server.gates.wait_reached(name, timeout=longer)


def test_an_invalid_script_is_rejected_when_it_is_made() -> None:
    with pytest.raises(BadScript, match="step 2: exactly one of these is required"):
        Gatekeeper.script({"text": "a"}, {"sing": "b"})


@pytest.mark.parametrize("cancelled", [True, False])
def test_runs_that_ignore_cancels_do_not_delay_the_stop(cancelled: bool) -> None:
    with RunningServer("scripted") as server, server.sync_client() as client:
        script = server.gates.script({"wait": "g", "ignore_cancel": True})
        client.run_accepted("s", script, allow_missing=True)
        server.gates.wait_reached("g")
        if cancelled:
            client.cancel("s")
            server.gates.wait_cancel_ignored("g")
        (thread,) = (one for one in threading.enumerate() if one.name == "runlane-server")
    assert not thread.is_alive()


def test_latches_stay_open_after_a_restart() -> None:
    with RunningServer("scripted") as server, server.sync_client() as client:
        server.gates.open("g")
        server.restart()
        script = server.gates.script({"wait": "g"}, {"text": "through"})
        complete = client.run_accepted("s", script, allow_missing=True).completed(SECONDS)
        assert (complete.text, complete.state) == ("through", RunState.COMPLETED)
        assert complete.finish_reason is FinishReason.STOP


async def failing(turn: Turn) -> AsyncGenerator[str, None]:
    structlog.get_logger().info("of the agent")
    yield "so far"
    raise ValueError("out of words")


def run_one(agent: object) -> None:
    with RunningServer(agent) as server, server.sync_client() as client:  # type: ignore[arg-type]
        client.run_accepted("s", "x", allow_missing=True).completed(SECONDS)


def test_only_the_server_s_log_is_redirected_to_logging(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, "runlane_server")
    before = list(structlog.get_config()["processors"])
    with redirect_to_logging():
        assert not structlog.is_configured()
        structlog.get_logger().info("of the test")
        run_one(failing)
    assert structlog.get_config()["processors"] == before
    output = capsys.readouterr().out
    assert len(output.splitlines()) == 2
    assert "of the test" in output
    assert "of the agent" in output
    (failed,) = (one for one in caplog.records if one.levelno == logging.ERROR)
    assert failed.filename == "agent_output.py"
    assert failed.name == "runlane_server.engine.agent_output"
    assert "session_id='s'" in failed.getMessage()
    assert failed.exc_info is not None
    assert isinstance(failed.exc_info[1], ValueError)
    assert "draining timeout_s=0.0" in [one.getMessage() for one in caplog.records]


def test_a_new_structlog_configuration_applies_to_the_server_too(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with redirect_to_logging():
        structlog.configure(processors=[structlog.processors.JSONRenderer()])
        run_one("echo")
    assert '"event": "stopped"' in capsys.readouterr().out
    assert len(structlog.get_config()["processors"]) == 1


def test_a_thread_without_an_event_loop_can_arm_gates_and_advance_the_clock() -> None:
    with (
        RunningServer("echo", harness=True) as server,
        SyncHarness(server.address) as harness,
        server.sync_client() as client,
    ):
        before = harness.server()
        assert harness.advance_clock(3600) - before.time >= timedelta(hours=1)
        with harness.arm(GatePoint.BEFORE_ACTIVE, session_id="s") as gate:
            handle = client.run_accepted("s", "x", allow_missing=True)
            assert [each.run_id for each in gate.reached()] == [handle.run_id]
            (armed,) = harness.gates()
            assert (armed.gate_id, armed.point) == (gate.gate_id, gate.point)
            assert len(client.cancel("s").cancelled) == 1
        assert handle.completed(SECONDS).state is RunState.CANCELLED
        assert harness.gates() == []


async def test_a_harness_can_arm_gates_and_advance_the_clock() -> None:
    with RunningServer("scripted", harness=True) as server:
        async with Harness(server.address) as harness, server.client() as client:
            script = server.gates.script({"wait": "never"})
            handle = await client.run_accepted("s", script, timeout=3600, allow_missing=True)
            await server.gates.reached("never")
            await harness.advance_clock(3600)
            assert (await handle.completed(SECONDS)).finish_reason is FinishReason.TIMEOUT
            async with await harness.arm(GatePoint.BEFORE_ACTIVE) as gate:
                later = await client.run_accepted("s", "x")
                await gate.reached()
                assert len((await later.cancel()).cancelled) == 1
