"""What pytest has for the tests of whatever calls Runlane, where this package is installed.

    def test_it(runlane_sync_client):
        handle = runlane_sync_client.run_accepted("s", "Hello", allow_missing=True)
        assert handle.completed().text == "Hello"

| fixture | |
|---|---|
| `runlane_server` | a server of the test's own: a `runlane_server.testing.thread.RunningServer` |
| `runlane_client` | its client for a test with an event loop: a `runlane.Client` |
| `runlane_sync_client` | its client for one without: a `runlane.sync.Client` |
| `scripted_agent` | has it run the scripted agent; a `runlane_server.testing.thread.Gatekeeper` |

`@pytest.mark.runlane(agent=..., store=..., config=..., harness=...)` says what the server is made
with, as `RunningServer` takes it. The store `"sqlite"` is a file in the `tmp_path` of the test.
Where a class or a module has the mark as well, each keyword is taken from the closest one.

No fixture is a coroutine, so any plugin for asynchronous tests will do, or none. The server's log
goes to `logging`, below `runlane_server`.
"""

# Every pytest of an environment that has this package loads it, most of them for nothing: what it
# needs is imported by the fixtures.

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import runlane
    import runlane.sync
    from runlane_server.testing.thread import Gatekeeper, RunningServer

MARK = "runlane"
KEYWORDS = ("agent", "store", "config", "harness")

OF_THE_EXTRA = {"aiosqlite", "click", "grpc_health", "grpc_reflection", "structlog", "uuid_utils"}
"""What the extra `server` brings."""


def pytest_configure(config: pytest.Config) -> None:
    """Makes the mark known."""
    config.addinivalue_line(
        "markers",
        f"{MARK}(agent=..., store=..., config=..., harness=...): what the server of the test is "
        "made with; the store 'sqlite' is a file in its tmp_path",
    )


@pytest.fixture
def runlane_server(request: pytest.FixtureRequest) -> Iterator[RunningServer]:
    """A Runlane server of the test's own, in a thread of its own; see `RunningServer`."""
    _need_the_server()
    from runlane_server.core.errors import StartError  # noqa: PLC0415 - an extra
    from runlane_server.testing.logs import redirect_to_logging  # noqa: PLC0415
    from runlane_server.testing.thread import RunningServer  # noqa: PLC0415

    settings = _settings(request)
    with ExitStack() as closing:
        closing.enter_context(redirect_to_logging())
        with _told(StartError, "runlane_server"):
            server = closing.enter_context(RunningServer(**settings))
        yield server


@pytest.fixture
def runlane_client(runlane_server: RunningServer) -> Iterator[runlane.Client]:
    """A `runlane.Client` of the test's server, for the event loop of the test."""
    client = runlane_server.client()
    yield client
    # The loop that used it may be closed by now. What is left to do needs some loop, not that one.
    runlane_server.run(client.close)


@pytest.fixture
def runlane_sync_client(runlane_server: RunningServer) -> Iterator[runlane.sync.Client]:
    """A `runlane.sync.Client` of the test's server, for a test without an event loop."""
    with runlane_server.sync_client() as client:
        yield client


@pytest.fixture
def scripted_agent(runlane_server: RunningServer) -> Gatekeeper:
    """Has the test's server run the scripted agent, and opens its gates; see `Gatekeeper`."""
    # It is another agent's where `getfixturevalue` asks for this after the server was made.
    with _told(RuntimeError, "scripted_agent"):
        return runlane_server.gates


def _need_the_server() -> None:
    try:
        import runlane_server.testing.thread  # noqa: F401, PLC0415
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in OF_THE_EXTRA:
            raise
        raise _refusal(
            f"runlane_server: {missing} is not installed; try: pip install 'runlane[server]'"
        ) from None


def _settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What the server is made with: what the marks say, and what the test asks for."""
    settings = _marked(request.node)
    asked = "scripted_agent" in request.fixturenames
    if asked and settings.setdefault("agent", "scripted") != "scripted":
        raise _refusal(f"scripted_agent: @pytest.mark.{MARK} gives the test another agent")
    if settings.get("store") == "sqlite":
        settings["store"] = f"sqlite:///{request.getfixturevalue('tmp_path')}/runlane.db"
    return settings


def _marked(node: pytest.Item) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for mark in node.iter_markers(MARK):  # the closest one comes first
        wrong = [*map(repr, mark.args), *(name for name in mark.kwargs if name not in KEYWORDS)]
        if wrong:
            raise _refusal(
                f"@pytest.mark.{MARK} takes {', '.join(KEYWORDS)}, by name: not {', '.join(wrong)}"
            )
        settings = {**mark.kwargs, **settings}
    return settings


@contextmanager
def _told(kind: type[Exception], fixture: str) -> Iterator[None]:
    """Tells an error that the test has made in a line, without where we noticed it."""
    try:
        yield
    except kind as error:
        raise _refusal(f"{fixture}: {error}") from None


def _refusal(message: str) -> BaseException:
    return pytest.fail.Exception(message, pytrace=False)
