"""The same tests for a program in each language, and a walk through the first steps of each:
`make test-polyglot`.

They build five programs with five tools, so they are no part of `make test`: they are collected
with `RUNLANE_POLYGLOT=1` only. `--language NAME`, which may be repeated, chooses some. A language
whose tools are not installed is skipped, or with `RUNLANE_POLYGLOT_ALL=1` fails. A session in which
no test passed fails.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from polyglot.languages import LANGUAGES, Language
from polyglot.program import Programs
from polyglot.proxy import Proxy

WANTED = os.environ.get("RUNLANE_POLYGLOT") == "1"

collect_ignore_glob = [] if WANTED else ["test_*.py"]

TEST_SECONDS = 180.0
"""How long a test may take; the longest wait a minute for a connection to be found dead."""

NOTHING_RAN = 5
"""The exit code of pytest for a session without tests."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--language",
        action="append",
        choices=tuple(LANGUAGES),
        help="test the example in this language only; may be repeated",
    )


def pytest_configure() -> None:
    # Processes of xdist are told it by the first one, and have the same session then.
    if WANTED:
        os.environ.setdefault("RUNLANE_POLYGLOT_SESSION", uuid.uuid4().hex)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "language" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--language", None) or list(LANGUAGES)
        metafunc.parametrize(
            "language", list(dict.fromkeys(chosen)), indirect=True, scope="session"
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The time for a test is for the test: its language is built before, and has its own limit."""
    for item in items:
        if "language" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(TEST_SECONDS, func_only=True))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """All skipped is not all well."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    well = WANTED and session.exitstatus == pytest.ExitCode.OK
    if well and reporter is not None and not reporter.stats.get("passed"):
        session.exitstatus = NOTHING_RAN


_failed: dict[str, str] = {}


@pytest.fixture(scope="session")
def language(request: pytest.FixtureRequest) -> Language:
    """An example, built."""
    chosen = LANGUAGES[request.param]
    if reason := chosen.missing():
        if os.environ.get("RUNLANE_POLYGLOT_ALL") == "1":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    if chosen.name not in _failed:
        try:
            chosen.build(os.environ["RUNLANE_POLYGLOT_SESSION"])
        except AssertionError as error:
            _failed[chosen.name] = str(error)
        else:
            _failed[chosen.name] = ""
    if said := _failed[chosen.name]:
        pytest.fail(said, pytrace=False)
    return chosen


@pytest.fixture
async def programs(language: Language, tmp_path: Path) -> AsyncIterator[Programs]:
    """Starts the program of the language; what is left of it ends with the test."""
    async with Programs(language, tmp_path) as started:
        yield started


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    """What a test puts between a program and a server."""
    async with Proxy() as opened:
        yield opened


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a server has its database."""
    place = tmp_path / "server"
    place.mkdir()
    return place
