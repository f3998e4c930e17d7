"""A run is a trace: exported to a collector, passed to the agent, continued after a restart."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from grpc import StatusCode

from runlane import Client, RunState
from runlane_server.core.trace import SpanContext
from support.openai_server import OpenAIServer
from support.server import ServerProcess, serving
from support.staging import SECONDS, script
from telemetry.collector import Collector, ReceivedSpan, collecting

PLACE = SpanContext("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", sampled=True)
SENT = str(PLACE)
UNSAMPLED = str(PLACE._replace(sampled=False))

MARKER = "xyzzy"

S = RunState


@asynccontextmanager
async def traced(
    folder: Path, *flags: str, env: dict[str, str] | None = None
) -> AsyncIterator[tuple[ServerProcess, Client, Collector]]:
    """A server that exports traces, its client, and the collector."""
    async with (
        collecting() as collector,
        serving(folder, "--otlp-endpoint", collector.url, *flags, env=env) as server,
        Client(server.address) as client,
    ):
        yield server, client, collector


async def finish_run(client: Client, prompt: str, **options: Any) -> S:
    handle = await client.run_accepted("s", prompt, allow_missing=True, **options)
    return (await handle.completed(SECONDS)).state


def tree(spans: list[ReceivedSpan], parent: str) -> dict[str, Any]:
    """The names of the spans below a parent, as a tree."""
    below = [one for one in spans if one.parent == parent]
    assert len({one.name for one in below}) == len(below)
    return {one.name: tree(spans, one.span_id) for one in below}


def lies_within(inner: ReceivedSpan, outer: ReceivedSpan) -> bool:
    begins = outer.span.start_time_unix_nano <= inner.span.start_time_unix_nano
    return begins and inner.span.end_time_unix_nano <= outer.span.end_time_unix_nano


async def test_a_run_is_a_tree_of_spans_below_the_caller_s_span(tmp_path: Path) -> None:
    before = time.time_ns()
    async with traced(tmp_path) as (server, client, collector):
        assert await finish_run(client, "Hello", run_id="r1", traceparent=SENT) is S.COMPLETED
        assert await server.stop() == 0
    assert {one.trace_id for one in collector.spans} == {PLACE.trace_id}
    assert tree(collector.spans, PLACE.span_id) == {
        "accept": {"commit": {}, "run": {"wait": {}, "active": {"agent": {}, "commit": {}}}}
    }
    accept, run, active = map(collector.one, ("accept", "run", "active"))
    assert before <= accept.span.start_time_unix_nano <= run.span.start_time_unix_nano
    assert all(one.span.end_time_unix_nano <= time.time_ns() for one in collector.spans)
    assert lies_within(collector.named("commit")[0], accept)
    assert lies_within(collector.one("wait"), run)
    assert lies_within(active, run)
    assert lies_within(collector.one("agent"), active)
    assert lies_within(collector.named("commit")[1], active)
    assert accept.span.kind == accept.span.SPAN_KIND_SERVER
    assert run.resource["service.name"] == "runlane"
    assert run.attributes == {
        "runlane.tenant": "default",
        "runlane.run_id": "r1",
        "runlane.session_id": "s",
        "runlane.state": "completed",
        "runlane.finish_reason": "stop",
        "runlane.attempts": 1,
    }


async def test_a_run_without_a_traceparent_begins_a_trace(tmp_path: Path) -> None:
    async with traced(tmp_path) as (server, client, collector):
        assert await finish_run(client, "Hello") is S.COMPLETED
        assert await finish_run(client, "Hello", traceparent="no such thing") is S.COMPLETED
        assert await server.stop() == 0
    assert [one.parent for one in collector.named("accept")] == ["", ""]
    assert len({one.trace_id for one in collector.spans}) == 2


@pytest.mark.parametrize(
    ("flags", "sent"), [((), UNSAMPLED), (("--trace-ratio", "0"), "")], ids=["caller", "ratio"]
)
async def test_an_unsampled_run_is_not_exported(
    flags: tuple[str, ...], sent: str, tmp_path: Path
) -> None:
    async with traced(tmp_path, *flags) as (server, client, collector):
        assert await finish_run(client, "Hello", traceparent=sent) is S.COMPLETED
        assert await finish_run(client, "Hello", run_id="other", traceparent=SENT) is S.COMPLETED
        assert await server.stop() == 0
    assert {one.attributes["runlane.run_id"] for one in collector.named("accept")} == {"other"}
    assert {one.trace_id for one in collector.spans} == {PLACE.trace_id}


async def test_a_run_cancelled_before_it_started_has_no_attempt(tmp_path: Path) -> None:
    async with traced(tmp_path, "--max-active-runs", "0") as (server, client, collector):
        handle = await client.run_accepted("s", "x", allow_missing=True, traceparent=SENT)
        await client.cancel("s")
        assert (await handle.completed(SECONDS)).state is S.CANCELLED
        assert await server.stop() == 0
    assert tree(collector.spans, PLACE.span_id) == {"accept": {"commit": {}, "run": {}}}
    assert collector.one("run").attributes["runlane.state"] == "cancelled"


@pytest.mark.sqlite("it is killed, and started again on its file")
async def test_after_a_restart_the_run_continues_the_same_trace(tmp_path: Path) -> None:
    async with traced(tmp_path, "--agent", "scripted") as (server, client, collector):
        prompt = script({"text": "a"}, {"wait": "never"})
        handle = await client.run_accepted(
            "s", prompt, max_attempts=2, allow_missing=True, traceparent=SENT
        )
        later = await client.run_accepted("s", script({"text": "b"}), traceparent=SENT)
        async for event in handle.events():
            if event.index == 3:
                break
        await server.kill()
        await server.start()
        # The second attempt, on a node that did not accept the run.
        async for event in handle.events():
            if event.index == 5:
                break
        await client.cancel(run_id=handle.run_id)
        assert (await later.completed(SECONDS)).state is S.COMPLETED
        assert await server.stop() == 0
    assert {one.trace_id for one in collector.spans} == {PLACE.trace_id}
    active = [
        one
        for one in collector.named("active")
        if one.attributes["runlane.run_id"] == handle.run_id
    ]
    assert [one.attributes["runlane.attempt"] for one in active] == [2]
    runs = {one.attributes["runlane.run_id"]: one for one in collector.named("run")}
    assert runs[handle.run_id].span_id == active[0].parent
    assert runs[handle.run_id].attributes["runlane.state"] == "cancelled"
    assert runs[later.run_id].attributes["runlane.state"] == "completed"


async def test_a_program_gets_the_span_of_its_attempt(tmp_path: Path) -> None:
    agent = ("--agent", "command:printenv TRACEPARENT")
    async with traced(tmp_path, *agent) as (server, client, collector):
        handle = await client.run_accepted("s", "x", allow_missing=True, traceparent=SENT)
        said = (await handle.completed(SECONDS)).text
        assert await server.stop() == 0
    agent_span = collector.one("agent").span_id
    assert said.strip() == str(PLACE._replace(span_id=agent_span))


@pytest.mark.parametrize("sent", [SENT, UNSAMPLED, ""])
async def test_without_a_collector_the_program_gets_the_caller_s_span(
    sent: str, tmp_path: Path
) -> None:
    agent = ("--agent", "command:printenv", "--log-level", "debug")
    async with serving(tmp_path, *agent) as server, Client(server.address) as client:
        handle = await client.run_accepted("s", "x", allow_missing=True, traceparent=sent)
        variables = (await handle.completed(SECONDS)).text.splitlines()
    found = [line for line in variables if line.startswith("TRACEPARENT")]
    assert found == ([f"TRACEPARENT={sent}"] if sent else [])
    lines = [json.loads(line) for line in server.log.splitlines()]
    of_the_run = [line for line in lines if line.get("run_id") == handle.run_id]
    of_the_accept = [line for line in of_the_run if line.get("method") == "RunService/RunAccepted"]
    started = [line for line in of_the_run if line["event"] in {"run started", "run ended"}]
    assert len(of_the_accept) == 1
    assert len(started) == 2
    expected = PLACE.trace_id if sent else None
    assert {line.get("trace_id") for line in (*of_the_accept, *started)} == {expected}


async def test_a_request_to_a_model_carries_the_span_of_the_attempt(tmp_path: Path) -> None:
    async with OpenAIServer().serving() as provider:
        env = {"OPENAI_BASE_URL": provider.base_url, "OPENAI_API_KEY": "none"}
        async with traced(tmp_path, "--agent", "chat:openai:some", env=env) as (
            server,
            client,
            collector,
        ):
            assert await finish_run(client, "Hello", traceparent=SENT) is S.COMPLETED
            assert await server.stop() == 0
        (request,) = provider.requests
    agent_span = collector.one("agent").span_id
    assert request.headers["traceparent"] == str(PLACE._replace(span_id=agent_span))


@pytest.mark.parametrize("content", [False, True])
async def test_spans_have_content_only_with_log_content(content: bool, tmp_path: Path) -> None:
    flags = ("--agent", "scripted", *(["--log-content"] if content else []))
    prompt = script({"text": MARKER}, {"fail": f"{MARKER} failed"})
    async with traced(tmp_path, *flags) as (server, client, collector):
        assert await finish_run(client, prompt, metadata={MARKER: MARKER}) is S.FAILED
        assert await server.stop() == 0
    status = collector.one("run").span.status
    assert status.code == status.STATUS_CODE_ERROR
    assert status.message.startswith("AGENT_ERROR")
    assert (MARKER.encode() in collector.raw) is content


async def test_an_unavailable_collector_delays_nothing(tmp_path: Path) -> None:
    async with collecting() as collector:
        gone = collector.url
    async with (
        serving(tmp_path, "--otlp-endpoint", gone) as server,
        Client(server.address) as client,
    ):
        for _ in range(20):
            assert await finish_run(client, "Hello") is S.COMPLETED
        begun = time.monotonic()
        assert await server.stop() == 0
        assert time.monotonic() - begun < 10
    # Logged once, with the number of lost spans.
    assert server.log.count("trace collector unavailable") == 1
    assert '"spans": 140' in server.log


@pytest.mark.parametrize("code", [StatusCode.UNAVAILABLE, StatusCode.INVALID_ARGUMENT])
async def test_spans_are_sent_again_after_a_retryable_error_only(
    code: StatusCode, tmp_path: Path
) -> None:
    async with traced(tmp_path) as (server, client, collector):
        collector.refusal = code
        assert await finish_run(client, "Hello", run_id="first") is S.COMPLETED
        await server.logs("trace collector")
        collector.refusal = None
        assert await finish_run(client, "Hello", run_id="second") is S.COMPLETED
        assert await server.stop() == 0
    exported = {one.attributes["runlane.run_id"] for one in collector.named("run")}
    assert exported == ({"first", "second"} if code is StatusCode.UNAVAILABLE else {"second"})


async def test_the_environment_variables_of_opentelemetry_apply(tmp_path: Path) -> None:
    env = {
        "OTEL_SERVICE_NAME": "agents",
        "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment=test, note=a%2Cb",
        "OTEL_EXPORTER_OTLP_HEADERS": "api-key=some%20key,x-more=1",
    }
    async with traced(tmp_path, env=env) as (server, client, collector):
        assert await finish_run(client, "Hello") is S.COMPLETED
        assert await server.stop() == 0
    resource = collector.one("run").resource
    assert resource["service.name"] == "agents"
    assert resource["deployment.environment"] == "test"
    assert resource["note"] == "a,b"
    assert collector.metadata["api-key"] == "some key"
    assert collector.metadata["x-more"] == "1"


async def test_without_opentelemetry_proto_the_start_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = tmp_path / "hide" / "sitecustomize.py"
    hidden.parent.mkdir()
    hidden.write_text("import sys\nsys.modules['opentelemetry'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(hidden.parent))
    server = ServerProcess(tmp_path, "--otlp-endpoint", "http://127.0.0.1:4317")
    with pytest.raises(AssertionError, match="did not start"):
        await server.start()
    assert "pip install 'runlane[server,traces]'" in server.log
