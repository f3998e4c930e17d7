"""The pytest plugin: fixtures for tests of applications that call Runlane.

    def test_it(runlane_sync_client):
        handle = runlane_sync_client.run_accepted("s", "Hello", allow_missing=True)
        assert handle.completed().text == "Hello"

| fixture | |
|---|---|
| `runlane_server` | a server for this test: a `runlane_server.testing.RunningServer` |
| `runlane_client` | its client for a test with an event loop: a `runlane.Client` |
| `runlane_sync_client` | its client for a test without: a `runlane.sync.Client` |
| `scripted_agent` | runs the scripted agent; a `runlane_server.testing.Gatekeeper` |
| `runlane_harness` | gates at any point of a run, and the clock: a `runlane.harness.Harness` |
| `runlane_sync_harness` | the same for a test without an event loop: `runlane.harness.sync` |

`@pytest.mark.runlane(agent=..., store=..., config=..., harness=...)` sets the arguments of
`RunningServer`. The store `"sqlite"` is a file in the `tmp_path` of the test. If a class or module
has the mark too, the closest mark wins for each keyword.

No fixture is a coroutine, so the plugin works with any plugin for asynchronous tests, or none. The
server's log goes to `logging`, below `runlane_server`.
"""

# pytest loads this module in every environment that has the package, mostly without need: so the
# fixtures import what they use.

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import runlane
    import runlane.harness.sync
    import runlane.sync
    from runlane_server.testing.thread import Gatekeeper, RunningServer

MARK = "runlane"
HARNESSES = ("runlane_harness", "runlane_sync_harness")
KEYWORDS = ("agent", "store", "config", "harness")


def pytest_configure(config: pytest.Config) -> None:
    """Registers the mark."""
    config.addinivalue_line(
        "markers",
        f"{MARK}(agent=..., store=..., config=..., harness=...): settings of the test's "
        "server; the store 'sqlite' is a file in its tmp_path",
    )


@pytest.fixture
def runlane_server(request: pytest.FixtureRequest) -> Iterator[RunningServer]:
    """A Runlane server for this test, in its own thread; see `RunningServer`."""
    _require_server_extra()
    from runlane_server.core.errors import StartError  # noqa: PLC0415 - an extra
    from runlane_server.testing.logs import redirect_to_logging  # noqa: PLC0415
    from runlane_server.testing.thread import RunningServer  # noqa: PLC0415

    settings = _settings(request)
    with ExitStack() as closing:
        closing.enter_context(redirect_to_logging())
        with _fail_on(StartError, "runlane_server"):
            server = closing.enter_context(RunningServer(**settings))
        yield server


@pytest.fixture
def runlane_client(runlane_server: RunningServer) -> Iterator[runlane.Client]:
    """A `runlane.Client` of the test's server, for the event loop of the test."""
    client = runlane_server.client()
    yield client
    # The loop that used it may already be closed. Closing the client needs a loop, but any will do.
    runlane_server.run(client.close)


@pytest.fixture
def runlane_sync_client(runlane_server: RunningServer) -> Iterator[runlane.sync.Client]:
    """A `runlane.sync.Client` of the test's server, for a test without an event loop."""
    with runlane_server.sync_client() as client:
        yield client


@pytest.fixture
def scripted_agent(runlane_server: RunningServer) -> Gatekeeper:
    """Runs the scripted agent on the test's server, and opens its latches; see `Gatekeeper`."""
    # Another agent runs if `getfixturevalue` requests this fixture after the server started.
    with _fail_on(RuntimeError, "scripted_agent"):
        return runlane_server.gates


@pytest.fixture
def runlane_harness(runlane_server: RunningServer) -> Iterator[runlane.harness.Harness]:
    """A `runlane.harness.Harness` of the test's server, for the event loop of the test."""
    from runlane.harness import Harness  # noqa: PLC0415

    harness = Harness(runlane_server.address)
    yield harness
    # As for `runlane_client`.
    runlane_server.run(harness.close)


@pytest.fixture
def runlane_sync_harness(runlane_server: RunningServer) -> Iterator[runlane.harness.sync.Harness]:
    """A `runlane.harness.sync.Harness` of the test's server, for a test without an event loop."""
    from runlane.harness.sync import Harness  # noqa: PLC0415

    with Harness(runlane_server.address) as harness:
        yield harness


def _require_server_extra() -> None:
    try:
        import runlane_server.testing.thread  # noqa: F401, PLC0415
    except ModuleNotFoundError as error:
        from runlane_server.extras import missing  # noqa: PLC0415 - only for the error

        if not (line := missing(error)):
            raise
        raise _failure(f"runlane_server: {line}") from None


def _settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The arguments of the server: those of the marks, and the agent that the fixtures need."""
    settings = _settings_of_marks(request.node)
    scripted = "scripted_agent" in request.fixturenames
    if scripted and settings.setdefault("agent", "scripted") != "scripted":
        raise _failure(f"scripted_agent: @pytest.mark.{MARK} sets another agent")
    for fixture in HARNESSES:
        if fixture in request.fixturenames and not settings.setdefault("harness", True):
            raise _failure(f"{fixture}: @pytest.mark.{MARK} sets harness=False")
    if settings.get("store") == "sqlite":
        settings["store"] = f"sqlite:///{request.getfixturevalue('tmp_path')}/runlane.db"
    return settings


def _settings_of_marks(node: pytest.Item) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for mark in node.iter_markers(MARK):  # the closest one comes first
        invalid = [*map(repr, mark.args), *(name for name in mark.kwargs if name not in KEYWORDS)]
        if invalid:
            raise _failure(
                f"@pytest.mark.{MARK} accepts the keywords {', '.join(KEYWORDS)}; "
                f"not {', '.join(invalid)}"
            )
        settings = {**mark.kwargs, **settings}
    return settings


@contextmanager
def _fail_on(kind: type[Exception], fixture: str) -> Iterator[None]:
    """Reports an error of the test in one line, without a traceback of this module."""
    try:
        yield
    except kind as error:
        raise _failure(f"{fixture}: {error}") from None


def _failure(message: str) -> BaseException:
    return pytest.fail.Exception(message, pytrace=False)
