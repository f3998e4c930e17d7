"""Confidential input of a server appears in no log and in no metric."""

from __future__ import annotations

import socket
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from runlane import Client, RunlaneError, RunState
from runlane.v1 import run_pb2
from runlane.worker.v1 import worker_service_pb2 as pb
from runlane_server.access import editing
from runlane_server.access.caller import Role
from runlane_server.agents.worker.quarantine import WORKER_FAULTS, Fault
from support.server import serving
from support.staging import SECONDS, script
from support.workers import RawWorker, accept, be_refused

PLANTED = "xyzzy"
"""A marker that is part of every confidential input."""


def a_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def page(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=SECONDS) as answer:
        text: str = answer.read().decode()
        return text


async def say_much(client: Client) -> None:
    """Sends the marker in every call, in valid and invalid ones."""
    labels = {f"{PLANTED}-key": f"{PLANTED}-value"}
    await client.create_session("s", title=f"{PLANTED} title", metadata=labels)
    call = {"tool_call": {"id": "1", "name": "look", "arguments": {"at": PLANTED}}}
    result = {"tool_result": {"id": "1", "name": "look", "content": PLANTED}}
    steps = ({"text": PLANTED}, {"reasoning": PLANTED}, call, result)
    for last in ({"finish": "stop"}, {"fail": f"{PLANTED} failed"}, {"crash": f"{PLANTED} crash"}):
        handle = await client.run_accepted("s", script(*steps, last), metadata=labels)
        await handle.completed(SECONDS)
    # A refused prompt, a reason and a cursor are confidential too.
    with pytest.raises(RunlaneError):
        await client.run_accepted("s" * 200, PLANTED, metadata=labels)
    handle = await client.run_accepted("s", script({"text": PLANTED}, {"wait": "never"}))
    await client.cancel("s", reason=f"{PLANTED} reason")
    assert (await handle.completed(SECONDS)).state is RunState.CANCELLED
    with pytest.raises(RunlaneError):
        await anext(client.subscribe_run_complete(cursor=f"{PLANTED}-cursor"))


@pytest.mark.sqlite("the name of a store has nothing to do with it")
async def test_confidential_input_is_in_no_log_and_no_metric(tmp_path: Path) -> None:
    access, port = tmp_path / "access.toml", a_free_port()
    token = editing.add(access, "ci", tenant="acme", role=Role.ADMIN)
    settings = (
        *("--agent", "scripted", "--log-level", "debug", "--access", str(access)),
        *("--metrics-listen", f"127.0.0.1:{port}"),
    )
    async with serving(tmp_path, *settings) as server:
        async with Client(server.address, token=token) as client:
            await say_much(client)
        async with Client(server.address, token=f"{token}{PLANTED}") as stranger:
            with pytest.raises(RunlaneError, match=r"credentials|caller"):
                await stranger.get_run("x")
        metrics = page(port)
        assert await server.stop() == 0
        output = server.log + metrics
    # The server does log and count these calls.
    assert "RunService/RunAccepted" in output
    assert "runlane_runs_ended_total" in output
    secret = token.rpartition("_")[2]
    assert PLANTED not in output
    assert secret not in output


async def fail_much(address: str, client: Client) -> None:
    """Ends runs of a worker with the marker in its errors and in content that is refused."""
    result = run_pb2.ToolResult(tool_call_id=PLANTED, name=PLANTED, content=PLANTED)
    events = [
        pb.Event(tool_result=result),
        pb.Event(custom=run_pb2.RunEvent.Custom(type=PLANTED, json=PLANTED)),
        pb.Event(step=run_pb2.RunEvent.Step(key=PLANTED, result=f"[{PLANTED}")),
    ]
    fail = pb.WorkRequest.Fail(reason=PLANTED, message=f"{PLANTED} rejected")
    messages: list[dict[str, Any]] = [{"fail": fail}] * WORKER_FAULTS
    messages += [{"emit": pb.WorkRequest.Emit(number=1, events=[event])} for event in events]
    async with RawWorker(address) as worker:
        for n, message in enumerate(messages):
            run = await accept(client, f"s {n}", PLANTED)
            await worker.turn()
            await worker.send(**message)
            await worker.expect("acked" if "fail" in message else "fenced")
            assert (await run.completed(SECONDS)).state is RunState.FAILED


@pytest.mark.sqlite("the name of a store has nothing to do with it")
async def test_what_workers_send_is_in_no_log(tmp_path: Path) -> None:
    settings = ("--agent", "worker", "--log-level", "debug")
    async with serving(tmp_path, *settings) as server, Client(server.address) as client:
        await fail_much(server.address, client)
        await be_refused(server.address, client)
        assert await server.stop() == 0
        assert PLANTED not in server.log
        assert "worker gets no turns" in server.log
        assert Fault.LOST in server.log


@pytest.mark.sqlite("the name of a store has nothing to do with it")
async def test_texts_of_unexpected_errors_are_logged_only_on_request(tmp_path: Path) -> None:
    settings = ("--agent", "scripted", "--log-content")
    async with serving(tmp_path, *settings) as server, Client(server.address) as client:
        handle = await client.run_accepted("s", script({"crash": PLANTED}), allow_missing=True)
        await handle.completed(SECONDS)
        await server.logs(f"RuntimeError: {PLANTED}")
