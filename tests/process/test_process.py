"""The server as a process: start, failures to start, and shutdown."""

from __future__ import annotations

import json
import os
import resource
import shlex
import signal
import socket
import stat
import subprocess
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from runlane.v1 import run_pb2, run_service_pb2_grpc
from runlane.v1 import run_service_pb2 as pb
from support.rpc_wire import decode_error, refused
from support.server import PROGRAM, clean_environment, serving_blocking, start_fails

HOLD = json.dumps([{"text": "a"}, {"wait": "go"}, {"text": "b"}])
OPEN = json.dumps([{"open": "go"}])


def a_run(session_id: str, prompt: str, **fields: Any) -> pb.RunAcceptedRequest:
    return pb.RunAcceptedRequest(session_id=session_id, prompt=prompt, allow_missing=True, **fields)


def stub(channel: grpc.aio.Channel) -> run_service_pb2_grpc.RunServiceAsyncStub:
    return run_service_pb2_grpc.RunServiceStub(channel)


async def wait_for_text(runs: run_service_pb2_grpc.RunServiceAsyncStub, run_id: str) -> None:
    """Waits until the agent of a run has sent text."""
    call = runs.SubscribeRun(pb.SubscribeRunRequest(run_id=run_id))
    async for answer in call:
        if answer.event.HasField("text_delta"):
            break
    call.cancel()


# --- Starting -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "code", "why"),
    [
        (["--agent", "nobody"], 2, "nobody"),
        (["--store", "postgresql://127.0.0.1:1/x"], 1, "postgresql://127.0.0.1:1/x"),
        (["--store", "mysql://localhost/x"], 2, "mysql"),
        (["--store", "sqlite:////proc/none/x.db"], 2, "/proc/none/x.db"),
        (["--store", "memory:", "--listen", "203.0.113.1:1"], 2, "203.0.113.1:1"),
        (["--store", "memory:", "--listen", "unix:/proc/none/x"], 2, "unix:/proc/none/x"),
        (["--listen", "here"], 2, "HOST:PORT"),
        (["--bogus"], 2, "--bogus"),
        (["--config", "none.toml"], 2, "none.toml"),
        (["extra"], 2, "extra"),
    ],
)
def test_a_failure_to_start_is_one_line_with_the_reason(
    flags: list[str], code: int, why: str, tmp_path: Path
) -> None:
    returned, said = start_fails(tmp_path, *flags)
    assert returned == code
    lines = [line for line in said.splitlines() if not line.startswith("{")]
    assert len(lines) == 1, said
    assert lines[0].startswith("runlane-server: error: ")
    assert why in lines[0]


def test_a_port_in_use_fails_the_start(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, said = start_fails(tmp_path, "--store", "memory:", f"--listen=127.0.0.1:{port}")
    assert code == 1
    assert f"cannot listen on 127.0.0.1:{port}: address already in use" in said
    assert "Traceback" not in said


def test_a_second_server_on_the_same_port_fails_to_start(tmp_path: Path) -> None:
    with serving_blocking(tmp_path, "--store", "memory:") as first:
        code, said = start_fails(tmp_path, "--store", "memory:", "--listen", first.address)
    assert code == 1
    assert "address already in use" in said


def test_an_unknown_key_in_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "runlane.toml").write_text('agnet = "echo"\n')
    code, said = start_fails(tmp_path, "--config", "runlane.toml")
    assert code == 2
    assert "'agnet'" in said


@pytest.mark.sqlite("one server has the file")
def test_a_second_server_on_the_same_database_fails_to_start(tmp_path: Path) -> None:
    with serving_blocking(tmp_path, "--store", "sqlite:///runlane.db") as first:
        code, said = start_fails(
            tmp_path, "--listen", "127.0.0.1:0", "--store", "sqlite:///runlane.db"
        )
        assert code == 1
        assert "runlane.db" in said
        assert first.process.poll() is None


async def test_a_server_listens_on_a_unix_socket(tmp_path: Path) -> None:
    listen = f"unix:{tmp_path}/s"
    with serving_blocking(tmp_path, "--store", "memory:", listen=listen) as served:
        assert served.address == listen
        async with grpc.aio.insecure_channel(listen) as channel:
            assert (await stub(channel).RunAccepted(a_run("s", "hello"))).run.accept_seq == 1
        code, said = start_fails(tmp_path, "--store", "memory:", f"--listen={listen}")
        assert code == 1
        assert "already in use" in said


@pytest.mark.parametrize(
    ("flags", "mode"), [((), 0o600), (("--socket-mode", "0660"), 0o660)], ids=["default", "group"]
)
async def test_only_those_that_the_mode_names_can_connect_to_a_unix_socket(
    tmp_path: Path, flags: tuple[str, ...], mode: int
) -> None:
    path = tmp_path / "s"
    umask = os.umask(0)  # with which others could do everything
    try:
        with serving_blocking(tmp_path, "--store", "memory:", *flags, listen=f"unix:{path}"):
            assert stat.S_IMODE(path.stat().st_mode) == mode
    finally:
        os.umask(umask)


# --- Shutdown -----------------------------------------------------------------------------------


async def test_a_drain_waits_for_active_runs_and_sends_their_ends_to_subscribers(
    tmp_path: Path, store_url: str
) -> None:
    flags = ("--store", store_url, "--agent", "scripted")
    with serving_blocking(tmp_path, *flags) as served:
        async with grpc.aio.insecure_channel(served.address) as channel:
            runs = stub(channel)
            opened = (await runs.RunAccepted(a_run("open", HOLD.replace("go", "never")))).run
            active = (await runs.RunAccepted(a_run("s", HOLD))).run
            await wait_for_text(runs, active.run_id)
            await wait_for_text(runs, opened.run_id)
            waiting = (await runs.RunAccepted(a_run("s", "later"))).run
            events = runs.SubscribeRunComplete(pb.SubscribeRunCompleteRequest())
            await events.read()
            served.process.send_signal(signal.SIGTERM)
            error = await _until_refused(runs)
            assert (error.reason, error.code) == ("DRAINING", StatusCode.UNAVAILABLE)
            # Cancels and events of active runs are still served.
            await runs.Cancel(pb.CancelRequest(run_id=opened.run_id))
            first = await events.read()
            assert isinstance(first, pb.SubscribeRunCompleteResponse)
            assert first.run_complete.run_id == opened.run_id
            await runs.Cancel(pb.CancelRequest(run_id=active.run_id))
            last = await events.read()
            assert isinstance(last, pb.SubscribeRunCompleteResponse)
            assert last.run_complete.run_id == active.run_id
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await events.read()
            end = decode_error(raised.value)
            assert (end.reason, end.code) == ("DRAINING", StatusCode.UNAVAILABLE)
            assert end.metadata["cursor"] == last.cursor
        assert served.process.wait(30) == 0
    with serving_blocking(tmp_path, *flags) as served:
        async with grpc.aio.insecure_channel(served.address) as channel:
            runs = stub(channel)
            events = runs.SubscribeRunComplete(pb.SubscribeRunCompleteRequest(cursor=last.cursor))
            await events.read()
            resumed = await events.read()
            assert isinstance(resumed, pb.SubscribeRunCompleteResponse)
            assert resumed.run_complete.run_id == waiting.run_id
            assert resumed.run_complete.state == run_pb2.RUN_STATE_COMPLETED
            events.cancel()
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(30) == 0


async def _until_refused(runs: run_service_pb2_grpc.RunServiceAsyncStub) -> Any:
    """The error of an accept once the drain has begun; until then it is accepted."""
    while True:
        try:
            await runs.RunAccepted(a_run("other", "x", run_id="same"))
        except grpc.aio.AioRpcError as error:
            return decode_error(error)


async def test_r17_a_second_signal_ends_the_drain_at_once_and_active_runs_are_recorded(
    tmp_path: Path, store_url: str
) -> None:
    flags = ("--store", store_url, "--agent", "scripted", "--drain-timeout", "1h")
    with serving_blocking(tmp_path, *flags) as served:
        async with grpc.aio.insecure_channel(served.address) as channel:
            runs = stub(channel)
            active = (await runs.RunAccepted(a_run("s", HOLD))).run
            await wait_for_text(runs, active.run_id)
            events = runs.SubscribeRunComplete(pb.SubscribeRunCompleteRequest())
            await events.read()
            served.process.send_signal(signal.SIGTERM)
            await _until_refused(runs)
            served.process.send_signal(signal.SIGTERM)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await events.read()
            assert raised.value.code() is StatusCode.UNAVAILABLE
        assert served.process.wait(30) == 0
        left = time.time_ns() // 1000
    with serving_blocking(tmp_path, *flags) as served:
        async with grpc.aio.insecure_channel(served.address) as channel:
            request = pb.WaitRunRequest(run_id=active.run_id)
            run = (await stub(channel).WaitRun(request, timeout=20)).run
            assert run.state == run_pb2.RUN_STATE_FAILED
            assert run.run_complete.finish_reason == run_pb2.FINISH_REASON_INTERRUPTED
            # The server that stopped wrote the end, not the next one (R17).
            assert run.ended_at.ToMicroseconds() < left


async def test_a_drain_ends_after_its_timeout(tmp_path: Path) -> None:
    flags = ("--store", "memory:", "--agent", "scripted", "--drain-timeout", "10ms")
    with serving_blocking(tmp_path, *flags) as served:
        async with grpc.aio.insecure_channel(served.address) as channel:
            runs = stub(channel)
            active = (await runs.RunAccepted(a_run("s", HOLD))).run
            await wait_for_text(runs, active.run_id)
            waiting = runs.WaitRun(pb.WaitRunRequest(run_id=active.run_id))
            served.process.send_signal(signal.SIGTERM)
            assert (await refused(waiting)).reason == "DRAINING"
        assert served.process.wait(30) == 0


def test_the_log_contains_no_prompts(tmp_path: Path) -> None:
    with serving_blocking(tmp_path, "--store", "memory:", "--log-level", "debug") as served:
        with grpc.insecure_channel(served.address) as channel:
            runs = run_service_pb2_grpc.RunServiceStub(channel)
            run = runs.RunAccepted(a_run("s", "my secret prompt")).run
            runs.WaitRun(pb.WaitRunRequest(run_id=run.run_id))
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(30) == 0
        lines = [json.loads(line) for line in served.log.splitlines()]
    assert "secret" not in served.log
    (accepted,) = [line for line in lines if line.get("method") == "RunService/RunAccepted"]
    assert (accepted["session_id"], accepted["run_id"]) == ("s", run.run_id)
    assert accepted["code"] == "OK"
    assert accepted["ms"] > 0


# --- Serving ------------------------------------------------------------------------------------


async def test_a_server_whose_store_fails_logs_one_error_and_exits_with_1(tmp_path: Path) -> None:
    # It executes no runs, so the accept is the write that fails.
    flags = ("--store", "sqlite:///runlane.db", "--max-active-runs", "0")
    with serving_blocking(tmp_path, *flags) as served:
        async with grpc.aio.insecure_channel(served.address) as channel:
            runs = stub(channel)
            await runs.RunAccepted(a_run("s", "hello"))
            # No file can grow beyond this limit, as on a full disk.
            limit = (tmp_path / "runlane.db-wal").stat().st_size
            resource.prlimit(served.process.pid, resource.RLIMIT_FSIZE, (limit, limit))
            error = await refused(_accept_forever(runs))
            assert (error.reason, error.code) == ("STORE_UNAVAILABLE", StatusCode.UNAVAILABLE)
        assert served.process.wait(30) == 1
        lines = [json.loads(line) for line in served.log.splitlines()]
        (error_line,) = [line for line in lines if line["level"] == "error"]
        assert "SQLITE" in error_line["reason"]


async def test_expired_events_are_removed_in_the_background(tmp_path: Path, store_url: str) -> None:
    store = ("--store", store_url)
    with serving_blocking(tmp_path, *store) as served:
        async with grpc.aio.insecure_channel(served.address) as channel:
            accepted = await stub(channel).RunAccepted(a_run("s", "hello"))
            await stub(channel).WaitRun(pb.WaitRunRequest(run_id=accepted.run.run_id))
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(30) == 0
    with serving_blocking(tmp_path, *store, "--event-retention", "1ms") as served:
        async with grpc.aio.insecure_channel(served.address) as channel:
            request = pb.SubscribeRunCompleteRequest(cursor=accepted.cursor)
            error = await refused(_subscribe_forever(stub(channel), request))
            assert error.reason == "CURSOR_COMPACTED"


async def _accept_forever(runs: run_service_pb2_grpc.RunServiceAsyncStub) -> None:
    while True:
        await runs.RunAccepted(a_run("s", "x" * (1 << 18)))


async def _subscribe_forever(
    runs: run_service_pb2_grpc.RunServiceAsyncStub, request: pb.SubscribeRunCompleteRequest
) -> None:
    while True:
        call = runs.SubscribeRunComplete(request)
        await call.read()
        call.cancel()


def test_an_invalid_url_is_refused_without_repeating_its_password(tmp_path: Path) -> None:
    for flags in (
        ("--store", "postgresql+asyncpg://u:SECRET@h/db"),
        ("--store", "Postgresql://u:SECRET@h/db"),
        ("--otlp-endpoint", "http://u:SECRET@h:4317"),
    ):
        code, said = start_fails(tmp_path, *flags)
        assert code == 2
        assert flags[0] in said
        assert "SECRET" not in said


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_server_started_with_closed_output_streams_serves(closed: str, tmp_path: Path) -> None:
    listen = f"unix:{tmp_path}/socket"
    command = shlex.join([*PROGRAM, "--listen", listen, "--store", "memory:", "--agent", "echo"])
    process = subprocess.Popen(
        ["/bin/sh", "-c", f"exec {command} {closed}"], env=clean_environment(), cwd=tmp_path
    )
    try:
        with grpc.insecure_channel(listen) as channel:
            request = health_pb2.HealthCheckRequest()
            check = health_pb2_grpc.HealthStub(channel).Check
            assert check(request, wait_for_ready=True, timeout=30).status
        process.terminate()
        assert process.wait(30) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
