"""Tests of programs in five languages, and of the first-steps pages: `make test-polyglot`.

They build programs with five tool chains, so they are not part of `make test`: pytest collects them
with `RUNLANE_POLYGLOT=1` only. `--language NAME`, which may be repeated, selects languages. A
language without its tools is skipped, or fails with `RUNLANE_POLYGLOT_ALL=1`. A session in which no
test passed fails.
"""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from polyglot.languages import LANGUAGES, Language
from polyglot.program import Programs
from polyglot.projects import ConformanceClient, OddWorker, Project, Quickstart, WorkerExample
from polyglot.proxy import Proxy

WANTED = os.environ.get("RUNLANE_POLYGLOT") == "1"

collect_ignore_glob = [] if WANTED else ["test_*.py"]

TEST_SECONDS = 180.0
"""Timeout of a test. The longest wait is a minute, until a connection is found dead."""

NOTHING_RAN = 5
"""pytest's exit code for a session without tests."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--language",
        action="append",
        choices=tuple(LANGUAGES),
        help="test the programs in this language only; may be repeated",
    )


def pytest_configure() -> None:
    if not WANTED:
        return
    # The processes of xdist inherit the id, so that all of them share one session.
    os.environ.setdefault("RUNLANE_POLYGLOT_SESSION", uuid.uuid4().hex)
    # A script starts background jobs with SIGINT ignored, which programs under test would inherit.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "language" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--language", None) or list(LANGUAGES)
        metafunc.parametrize(
            "language", list(dict.fromkeys(chosen)), indirect=True, scope="session"
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The timeout covers the test only: the build in its fixture has a timeout of its own."""
    for item in items:
        if "language" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(TEST_SECONDS, func_only=True))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails a session in which every test was skipped."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    passed = WANTED and session.exitstatus == pytest.ExitCode.OK
    if passed and reporter is not None and not reporter.stats.get("passed"):
        session.exitstatus = NOTHING_RAN


@pytest.fixture(scope="session")
def language(request: pytest.FixtureRequest) -> Language:
    """A language whose tools are installed."""
    chosen = LANGUAGES[request.param]
    if reason := chosen.missing():
        if os.environ.get("RUNLANE_POLYGLOT_ALL") == "1":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    return chosen


@pytest.fixture(scope="session")
def conformance(language: Language) -> ConformanceClient:
    """The conformance client of the language, built."""
    program = ConformanceClient(language)
    _build(program)
    return program


@pytest.fixture(scope="session")
def quickstart(language: Language) -> Quickstart:
    """The quickstart of the language, built."""
    program = Quickstart(language)
    _build(program)
    return program


@pytest.fixture(scope="session")
def worker_example(language: Language) -> WorkerExample:
    """The worker of the language, built."""
    program = WorkerExample(language)
    _build(program)
    return program


@pytest.fixture(scope="session")
def odd_worker(language: Language) -> OddWorker:
    """The worker of the language whose agents go wrong, built."""
    program = OddWorker(language)
    _build(program)
    return program


_failures: dict[str, str] = {}


def _build(project: Project) -> None:
    """Builds a project, and fails the test if the build fails now or failed before."""
    if project.name not in _failures:
        _failures[project.name] = ""
        try:
            project.build(os.environ["RUNLANE_POLYGLOT_SESSION"])
        except AssertionError as error:
            _failures[project.name] = str(error)
    if failure := _failures[project.name]:
        pytest.fail(failure, pytrace=False)


@pytest.fixture
async def programs(conformance: ConformanceClient, tmp_path: Path) -> AsyncIterator[Programs]:
    """Starts conformance clients; kills those that still run after the test."""
    async with Programs(conformance, tmp_path) as started:
        yield started


@pytest.fixture
async def quickstarts(quickstart: Quickstart, tmp_path: Path) -> AsyncIterator[Programs]:
    """Starts quickstarts; kills those that still run after the test."""
    async with Programs(quickstart, tmp_path) as started:
        yield started


@pytest.fixture
async def workers(worker_example: WorkerExample, tmp_path: Path) -> AsyncIterator[Programs]:
    """Starts workers; kills those that still run after the test."""
    async with Programs(worker_example, tmp_path) as started:
        yield started


@pytest.fixture
async def odd_workers(odd_worker: OddWorker, tmp_path: Path) -> AsyncIterator[Programs]:
    """Starts workers whose agents go wrong; kills those that still run after the test."""
    async with Programs(odd_worker, tmp_path) as started:
        yield started


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    """A proxy between a program and a server."""
    async with Proxy() as opened:
        yield opened


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a server's database."""
    place = tmp_path / "server"
    place.mkdir()
    return place
