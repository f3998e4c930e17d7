"""The benchmark works; these tests ignore the measured values."""

from __future__ import annotations

import json
import shutil
import subprocess
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from threading import Thread
from typing import ClassVar

import pytest

from bench import report, run, wire
from bench.bench import CACHE
from bench.load import call, generator
from bench.result import Budget, Curve, Figure, Results, Row, read
from bench.streams import MAX_STREAMS, search

NEEDS_GO = pytest.mark.skipif(shutil.which("go") is None, reason="the endpoint is written in Go")


def test_each_row_yields_a_figure(tmp_path: Path) -> None:
    # The generator in Python needs no build.
    wanted = ["accept", "metrics", "sight", "complete", "cancel", "gateway", "subscriptions"]
    only = [word for name in wanted for word in ("--only", name)]
    results = run.main(["--quick", "--load", "python", "--out", str(tmp_path), *only])
    assert not results.failed
    assert [row.name for row in results.rows] == wanted
    for row in results.rows:
        assert all(figure.value > 0 for figure in (*row.ours, *row.peer)), row
        assert row.verdict in {"SHORT", "pass", "stretch"}
        assert median(row.judged) > 0
    (written,) = tmp_path.glob("bench-*.json")
    assert read(written) == results


@NEEDS_GO
def test_streaming_agents_yield_figures(tmp_path: Path) -> None:
    wanted = ["streams", "chat-streams", "chat"]
    only = [word for name in wanted for word in ("--only", name)]
    results = run.main(["--quick", "--load", "go", "--out", str(tmp_path), *only])
    assert not results.failed
    rows = {row.name: row for row in results.rows}
    assert rows.keys() == {*wanted, "streams-cpu", "chat-streams-cpu"}
    for name in ("streams", "chat-streams"):
        assert rows[name].notes.keys() == {"gap p99, ms", "first word p99, ms"}
        assert rows[f"{name}-cpu"].ours[0].value > 0
    chat = rows["chat"]
    assert all(figure.value > 0 for figure in (*chat.ours, *chat.peer))


@NEEDS_GO
def test_agents_in_processes_yield_figures(tmp_path: Path) -> None:
    only = ["--only", "agent-processes"]
    results = run.main(["--quick", "--load", "go", "--out", str(tmp_path), *only])
    assert not results.failed
    assert [row.name for row in results.rows] == ["agent-processes", "chat-agent-processes"]
    for row in results.rows:
        assert all(figure.value > 0 for figure in (*row.ours, *row.peer))


class _Posts(BaseHTTPRequestHandler):
    """Notes the paths of the requests; refuses those below /refused."""

    protocol_version = "HTTP/1.1"
    paths: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.paths.append(self.path)
        self.send_response(503 if self.path.startswith("/refused") else 202)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@NEEDS_GO
def test_posts_have_a_number_each_and_report_errors(tmp_path: Path) -> None:
    name, command = generator(CACHE)
    assert name == "go"
    with ThreadingHTTPServer(("127.0.0.1", 0), _Posts) as server:
        Thread(target=server.serve_forever).start()
        for folder in ("kept", "refused"):
            job = {
                "kind": "posts",
                "address": f"127.0.0.1:{server.server_port}",
                "prefix": wire.PREFIX,
                "concurrency": 3,
                "count": 20,
                "first": 7,
                "call": call(f"/{folder}/{wire.name(0)}/send", b'"hello"'),
            }
            done = subprocess.run(
                command, input=json.dumps(job) + "\n\n", capture_output=True, text=True, check=True
            )
            result = json.loads(done.stdout.splitlines()[-1])["result"]
            assert result["errors"] == (20 if folder == "refused" else 0), result
        server.shutdown()
    kept = sorted(path for path in _Posts.paths if path.startswith("/kept"))
    assert kept == [f"/kept/{wire.name(number)}/send" for number in range(7, 27)]


@pytest.mark.parametrize("limit", [0, 1, 7, 49, 50, 51, 230, 1_700, MAX_STREAMS, 9_999])
async def test_search_finds_the_most_streams(limit: int) -> None:
    async def holds(count: int) -> bool:
        return count <= limit

    most = await search(50, holds)
    assert most <= min(limit, MAX_STREAMS)
    assert min(limit, MAX_STREAMS) <= most * 1.1 + 1


def test_verdicts() -> None:
    more, less = Budget(0.6, 0.8), Budget(8, 4, at_most=True)
    for budget, value, verdict in [
        (more, 0.59, "SHORT"),
        (more, 0.6, "pass"),
        (more, 0.8, "stretch"),
        (less, 8.1, "SHORT"),
        (less, 8, "pass"),
        (less, 4, "stretch"),
        (Budget(1, at_most=True), 0, "pass"),
    ]:
        row = Row("row", "a row", "/s", [value], [Figure(1.0)], budget=budget)
        assert row.verdict == verdict


def test_a_saturated_load_generator_is_reported() -> None:
    idle_server = Figure(1.0, server_cpu=0.5, load_cpu=1.0)
    row = Row("row", "a row", "/s", [1.0], [idle_server])
    assert row.load_bound
    assert "the load was the limit" in report.table(Results({}, [row]))


def test_report_has_all_of_it() -> None:
    row = Row("row", "a row", "/s", [0.5, 0.7], [Figure(10.0)], [Figure(20.0)], Budget(0.6))
    curve = Curve("curve", "a curve", "sessions", "µs", [(10, 1.0, 2.0), (100, 3.0, 4.0)])
    text = report.table(Results({}, [row], [curve]))
    assert "| a row | 0.6 | 0.5 to 0.7 | ≥ 0.6 | pass | 10 /s | 20 /s |  |" in text
    assert "A curve:" in text
    assert "| 100 | 3.0 | 4 |" in text
