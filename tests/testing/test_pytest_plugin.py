"""The pytest plugin as its users see it: whole pytest runs, each in its own process."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from support.staging import SECONDS

pytest_plugins = ["pytester"]

pytestmark = pytest.mark.sqlite("each test names the store it needs")

GUIDE = Path(__file__).parents[2] / "docs" / "first-steps-pytest.md"

STRICT = """
    [pytest]
    addopts = -W error --strict-markers -p no:cacheprovider -p no:hypothesispytest -p no:xdist
    asyncio_mode = {mode}
    asyncio_default_fixture_loop_scope = function
"""

IMPORTS = """
    import threading
    from runlane import ClientClosed, RunState
    from runlane.harness import GatePoint
    from runlane_server.core.limits import Limits
    import pytest
"""

WITHOUT_AN_EVENT_LOOP = (
    IMPORTS
    + """
    from runlane_server.config import Config

    async def shout(turn):
        for word in turn.prompt.text.split():
            yield word.upper()

    def test_echo(runlane_server, runlane_sync_client, capsys):
        assert runlane_sync_client.target == runlane_server.address
        handle = runlane_sync_client.run_accepted("s", "hello", allow_missing=True)
        assert handle.completed().text == "hello"
        assert capsys.readouterr() == ("", "")

    class TestMarks:
        pytestmark = pytest.mark.runlane(agent=shout, store="sqlite")

        def test_an_own_agent(self, runlane_sync_client):
            handle = runlane_sync_client.run_accepted("s", "hello", allow_missing=True)
            assert handle.completed().text == "HELLO"

        @pytest.mark.runlane(config=Config(drain_timeout=0, limits=Limits(max_active_runs=0)))
        def test_a_restart(self, runlane_server, runlane_sync_client, tmp_path):
            handle = runlane_sync_client.run_accepted("s", "hello", allow_missing=True)
            address = runlane_server.address
            runlane_server.stop()
            assert (tmp_path / "runlane.db").exists()
            assert runlane_server.address == address
            runlane_server.start()
            runlane_server.restart()
            assert runlane_sync_client.get_run(handle.run_id).state is RunState.ACCEPTED

    def test_a_race(runlane_sync_client, scripted_agent):
        script = scripted_agent.script({"text": "a"}, {"wait": "g"})
        active = runlane_sync_client.run_accepted("s", script, allow_missing=True)
        scripted_agent.wait_reached("g")
        queued = runlane_sync_client.run_accepted("s", "b")
        receipt = runlane_sync_client.cancel("s")
        assert [one.run_id for one in receipt.cancelled] == [active.run_id, queued.run_id]
        for one in (active, queued):
            assert one.completed().state is RunState.CANCELLED

    def test_a_run_that_ignores_a_cancel(runlane_sync_client, scripted_agent):
        script = scripted_agent.script({"wait": "g", "ignore_cancel": True})
        runlane_sync_client.run_accepted("s", script, allow_missing=True)
        scripted_agent.wait_reached("g")
        runlane_sync_client.cancel("s")
        scripted_agent.wait_cancel_ignored("g")
        # The latch is never opened: the end of the test does not wait for it.

    @pytest.mark.runlane(agent=shout)
    def test_a_gate(runlane_sync_client, runlane_sync_harness):
        with runlane_sync_harness.arm(GatePoint.BEFORE_ACTIVE) as gate:
            handle = runlane_sync_client.run_accepted("s", "hello", allow_missing=True)
            (arrival,) = gate.reached()
            assert arrival.run_id == handle.run_id
            assert len(runlane_sync_client.cancel("s").cancelled) == 1
        assert handle.completed().state is RunState.CANCELLED
"""
)

WITH_AN_EVENT_LOOP = (
    IMPORTS
    + """
    pytestmark = {mark}

    @pytest.fixture
    def latches(scripted_agent):
        return scripted_agent

    async def test_a_race(runlane_client, latches):
        active = await runlane_client.run_accepted(
            "s", latches.script({{"wait": "g"}}), allow_missing=True
        )
        await latches.reached("g")
        queued = await runlane_client.run_accepted("s", "b")
        assert len((await runlane_client.cancel("s")).cancelled) == 2
        for one in (active, queued):
            assert (await one.completed()).state is RunState.CANCELLED
        latches.open("g")
        await latches.reached("g")
        with pytest.raises(TimeoutError, match="no run reached latch 'h' within 0.01 s"):
            await latches.reached("h", timeout=0.01)
        with pytest.raises(TimeoutError, match="no run ignored a cancel at latch 'g' within"):
            await latches.cancel_ignored("g", timeout=0.01)

    async def test_a_gate(runlane_client, runlane_harness):
        async with await runlane_harness.arm("before_active") as gate:
            handle = await runlane_client.run_accepted("s", "x", allow_missing=True)
            await gate.reached()
            assert (await handle.cancel()).cancelled

    @pytest.mark.runlane(store="sqlite")
    async def test_a_subscription_over_a_restart(runlane_server, runlane_client):
        async with runlane_client.subscribe_run_complete() as ends:
            runlane_server.restart()
            handle = await runlane_client.run_accepted("s", "hello", allow_missing=True)
            assert (await anext(ends)).run_id == handle.run_id

    left = []

    async def test_what_a_test_leaves_open(runlane_server, runlane_client):
        ends = runlane_client.subscribe_run_complete()
        await ends.start()
        other = runlane_server.client()
        await other.run_accepted("s", "hello", allow_missing=True)
        left.extend([runlane_client, ends, other])

    async def test_the_next_test_finds_it_closed():
        with pytest.raises(ClientClosed):
            await left[0].get_session("s")
        assert "runlane-server" not in [one.name for one in threading.enumerate()]
"""
)


def test_tests_without_an_event_loop_and_with_pytest_asyncio(pytester: pytest.Pytester) -> None:
    pytester.makeini(STRICT.format(mode="auto"))
    pytester.makepyfile(
        test_without=WITHOUT_AN_EVENT_LOOP, test_with=WITH_AN_EVENT_LOOP.format(mark="[]")
    )
    result = pytester.runpytest_subprocess(timeout=SECONDS)
    result.assert_outcomes(passed=11)
    # With the installed package it is there by itself.
    result.stdout.fnmatch_lines(["plugins: *runlane-*"])


def test_tests_with_a_mark_for_their_event_loop(pytester: pytest.Pytester) -> None:
    pytester.makeini(STRICT.format(mode="strict"))
    pytester.makeconftest("""
        import pytest

        @pytest.fixture
        def anyio_backend():
            return "asyncio"  # grpc knows no other
    """)
    # The plugin of anyio comes along with something else; where it does not, so be it.
    plugins = ["asyncio"] + ["anyio"] * (find_spec("anyio") is not None)
    for plugin in plugins:
        inner = WITH_AN_EVENT_LOOP.format(mark=f"pytest.mark.{plugin}")
        pytester.makepyfile(**{f"test_{plugin}": inner})
    result = pytester.runpytest_subprocess(timeout=SECONDS)
    result.assert_outcomes(passed=5 * len(plugins))


def test_errors_of_users_are_reported_in_one_line(pytester: pytest.Pytester) -> None:
    pytester.makeini(STRICT.format(mode="strict"))
    pytester.makepyfile("""
        import sys
        import pytest

        @pytest.fixture
        def client_only(monkeypatch):
            for name in ("aiosqlite", "click", "grpc_health", "grpc_reflection", "structlog"):
                monkeypatch.setitem(sys.modules, name, None)

        # The first one: what uses no fixture of the plugin has nothing to do with it.
        def test_nothing_is_imported():
            found = {name.partition(".")[0] for name in sys.modules}
            assert not found & {"grpc", "google", "structlog", "runlane"}
            ours = {name for name in sys.modules if name.startswith("runlane_server.")}
            assert ours == {"runlane_server.pytest_plugin"}

        def test_no_extra(client_only, runlane_server):
            pass

        @pytest.mark.runlane(agnet="echo")
        def test_no_such_keyword(runlane_server):
            pass

        @pytest.mark.runlane("echo")
        def test_no_keyword(runlane_server):
            pass

        @pytest.mark.runlane(agent="nobody")
        def test_no_such_agent(runlane_server):
            pass

        @pytest.mark.runlane(agent="echo")
        def test_two_agents(scripted_agent):
            pass

        @pytest.mark.runlane(harness=False)
        def test_no_harness(runlane_sync_harness):
            pass

        def test_too_late(runlane_server, request):
            request.getfixturevalue("scripted_agent")

        async def broken(turn):
            yield "so far"
            raise ValueError("out of words")

        @pytest.mark.runlane(agent=broken)
        def test_the_log_is_shown_where_a_test_fails(runlane_sync_client, caplog):
            handle = runlane_sync_client.run_accepted("s", "hello", allow_missing=True)
            handle.completed()
            (record,) = (one for one in caplog.records if one.exc_info)
            assert record.name.startswith("runlane_server.")
            pytest.fail("on purpose")
    """)
    result = pytester.runpytest_subprocess(timeout=SECONDS)
    result.assert_outcomes(passed=1, failed=2, errors=6)
    result.stdout.fnmatch_lines_random(
        [
            "runlane_server: * is not installed; run: pip install 'runlane[[]server[]]'",
            "@pytest.mark.runlane accepts the keywords agent, store, config, harness; not agnet",
            "@pytest.mark.runlane accepts the keywords agent, store, config, harness; not 'echo'",
            "runlane_server: there is no agent 'nobody'; *",
            "scripted_agent: @pytest.mark.runlane sets another agent",
            "runlane_sync_harness: @pytest.mark.runlane sets harness=False",
            "scripted_agent: gates: only the agent 'scripted' has latches",
            "ERROR *runlane_server.*agent failed*session_id='s'*",
            "ValueError: out of words",
        ]
    )
    result.stdout.no_fnmatch_line("*During handling of*")


def test_the_files_of_the_guide_pass_as_written(pytester: pytest.Pytester) -> None:
    files = re.findall(
        r"Write this to `([\w.]+)`:\n\n```\w+\n(.*?)^```$",
        GUIDE.read_text(),
        re.DOTALL | re.MULTILINE,
    )
    assert len(files) == GUIDE.read_text().count("Write this to")
    for name, text in files:
        (pytester.path / name).write_text(text)
    result = pytester.runpytest_subprocess("-W", "error", timeout=SECONDS)
    (passed,) = re.findall(r"^=+ (\d+) passed in .*", GUIDE.read_text(), re.MULTILINE)
    result.assert_outcomes(passed=int(passed))
