"""The PostgreSQL store while its database is stopped, killed, or out of reach.

No run is lost and none is done twice; every node hears of every end once, in order; and nobody has
to start anything again.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import asyncpg
import pytest

from runlane_server.access.caller import DEFAULT_TENANT
from runlane_server.agents.loader import AgentSettings, load_agent
from runlane_server.core.errors import RunlaneError, StoreUnavailable
from runlane_server.core.model import Prompt, RunRequest, RunState
from runlane_server.engine import lanes as lanes_module
from runlane_server.engine import runner as runner_module
from runlane_server.engine.coordinator import Coordinator
from runlane_server.engine.executor import NodeSettings
from runlane_server.feed.feed import Feed
from runlane_server.store.base import EventFilter, LoggedComplete
from runlane_server.store.lookup import RunFilter
from runlane_server.store.postgres import committer as postgres_committer
from runlane_server.store.postgres import connection as postgres_connection
from runlane_server.store.postgres import log as postgres_log
from runlane_server.store.postgres.database import Database
from support.postgres import OwnPostgres, fresh_database, postgres_store, with_schema
from support.story import MANY, PLENTY, TENANT, Story, Witness

SECONDS = 60.0
SESSIONS = 12
RUNS = 6

EVERYTHING = EventFilter()

PATIENT = NodeSettings(lease=2 * SECONDS)
"""Nobody is taken for lost however long a restart takes: that would rightly end its runs."""


@pytest.fixture
def server(own_server: OwnPostgres) -> OwnPostgres:
    """A PostgreSQL that may be stopped."""
    return own_server


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries happen at once."""
    monkeypatch.setattr(postgres_log, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(lanes_module, "RETRY_PAUSE", 0.02)
    monkeypatch.setattr(runner_module, "RETRY_PAUSE", 0.02)


@pytest.fixture
async def schema(server: OwnPostgres) -> AsyncIterator[str]:
    """The URL of a store of this test's own."""
    async with fresh_database(server.url) as url:
        yield url


# --- Under load ---------------------------------------------------------------------------------


@asynccontextmanager
async def node(url: str) -> AsyncIterator[Coordinator]:
    """A node with the echo agent, as the server puts it together."""
    async with postgres_store(url) as store:
        coordinator = Coordinator(
            store, load_agent("echo", AgentSettings()), Feed(store), node=PATIENT
        )
        await coordinator.start()
        yield coordinator
        await coordinator.stop()


async def insist(call: Callable[[], Awaitable[object]]) -> None:
    """Repeats a call until the store is there: as a caller does."""
    while True:
        try:
            await call()
        except StoreUnavailable:
            await asyncio.sleep(0.01)
            continue
        return


async def live(coordinator: Coordinator, session_id: str) -> None:
    """Runs of a session, each accepted and waited for by a caller that does not give up."""
    for n in range(RUNS):
        run_id = f"{session_id}-{n}"
        request = RunRequest(run_id, Prompt("hello"))

        async def accept(request: RunRequest = request) -> None:
            with coordinator.begin_accepted(session_id, request.run_id) as accepted:
                await coordinator.run_accepted(accepted, request, allow_missing=True)

        async def wait(run_id: str = run_id) -> None:
            run = await coordinator.wait_run(run_id, timeout=None)
            assert run.state is RunState.COMPLETED

        await insist(accept)
        await insist(wait)


async def follow(coordinator: Coordinator, count: int) -> list[LoggedComplete]:
    """All terminal events, as a subscriber gets them."""
    subscription = coordinator.feed.subscribe(DEFAULT_TENANT, EVERYTHING, 0)
    found: list[LoggedComplete] = []
    while len(found) < count:
        with suppress(StoreUnavailable):
            found += (await subscription.next(1.0)).events
    subscription.close()
    return found


async def survives(url: str, trouble: Callable[[], Awaitable[None]]) -> None:
    """Two nodes work while there is trouble; in the end everything is as if there had been none."""
    total = 2 * SESSIONS * RUNS
    async with asyncio.timeout(SECONDS), node(url) as one, node(url) as two:
        followers = [asyncio.create_task(follow(it, total)) for it in (one, two)]
        work = [
            asyncio.create_task(live(it, f"{name}{n}"))
            for n in range(SESSIONS)
            for name, it in (("a", one), ("b", two))
        ]
        await trouble()
        await asyncio.gather(*work)
        logs = await asyncio.gather(*followers)
        assert [event.position for event in logs[0]] == list(range(1, total + 1))
        assert logs[0] == logs[1]
        assert len({event.complete.run_id for event in logs[0]}) == total
        assert {event.complete.state for event in logs[0]} == {RunState.COMPLETED}
        assert one.store.failed is None
        for session_id in (f"{name}{n}" for name in "ab" for n in range(SESSIONS)):
            runs = await one.store.list_runs(DEFAULT_TENANT, RunFilter(session_id), limit=MANY)
            assert len(runs.items) == RUNS


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT], ids=["stopped", "crashed"])
async def test_r21_database_that_is_restarted_under_load_costs_nothing(
    server: OwnPostgres, schema: str, how: signal.Signals
) -> None:
    async def trouble() -> None:
        for _ in range(2):
            await events_grow(server, schema)
            await server.restart(how)

    await survives(schema, trouble)


async def test_r21_connections_that_are_killed_under_load_cost_nothing(
    server: OwnPostgres, schema: str
) -> None:
    async def trouble() -> None:
        connection = await asyncpg.connect(server.url)
        for _ in range(15):
            await events_grow(server, schema)
            await connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name = 'runlane' AND pid <> pg_backend_pid()"
            )
        await connection.close()

    await survives(schema, trouble)


async def events_grow(server: OwnPostgres, url: str) -> None:
    """Returns when there are more terminal events than there were."""
    connection = await asyncpg.connect(server.url, server_settings={"search_path": schema_of(url)})
    query = "SELECT count(*) FROM events"
    before = await connection.fetchval(query)
    while before < 2 * SESSIONS * RUNS and await connection.fetchval(query) == before:
        await asyncio.sleep(0.001)
    await connection.close()


def schema_of(url: str) -> str:
    """The schema that the URL of a store names."""
    return Database.parse(url).schema


# --- A write without an answer ------------------------------------------------------------------


class Line:
    """A proxy between a node and the database: it forwards, delays, or cuts."""

    def __init__(self, folder: Path, server: OwnPostgres) -> None:
        self.url = server.url.replace(str(server.folder), str(folder))
        self._socket = folder / ".s.PGSQL.5432"
        self._target = server.folder / ".s.PGSQL.5432"
        self._answers = asyncio.Event()
        self._answers.set()
        self._writers: list[asyncio.StreamWriter] = []
        self._pumps: set[asyncio.Task[None]] = set()

    def hold(self) -> None:
        """From now on no answer comes through; questions do."""
        self._answers.clear()

    def resume(self) -> None:
        """Forwards the delayed data."""
        self._answers.set()

    def cut(self) -> None:
        """All connections are lost, with what was held back; new ones work."""
        for writer in self._writers:
            writer.transport.abort()
        for pump in self._pumps:
            pump.cancel()
        self._answers.set()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Line]:
        """Takes connections."""
        listening = await asyncio.start_unix_server(self._connected, self._socket)
        yield self
        listening.close()
        self.cut()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        for writer in self._writers:
            with suppress(OSError):
                await writer.wait_closed()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A cut may come while the other end is connected to.
        self._writers.append(writer)
        connecting = asyncio.current_task()
        assert connecting is not None
        self._pumps.add(connecting)
        connecting.add_done_callback(self._pumps.discard)
        there, back = await asyncio.open_unix_connection(self._target)
        self._writers.append(back)
        for pump in (self._pump(reader, back, None), self._pump(there, writer, self._answers)):
            task = asyncio.create_task(pump)
            self._pumps.add(task)
            task.add_done_callback(self._pumps.discard)

    @staticmethod
    async def _pump(
        source: asyncio.StreamReader, sink: asyncio.StreamWriter, gate: asyncio.Event | None
    ) -> None:
        with suppress(OSError):
            while data := await source.read(1 << 16):
                if gate is not None:
                    await gate.wait()
                sink.write(data)
                await sink.drain()
        sink.transport.abort()


@pytest.fixture
async def line(server: OwnPostgres) -> AsyncIterator[Line]:
    """A line to the database."""
    with TemporaryDirectory(prefix="runlane-line-") as folder:
        async with Line(Path(folder), server).open() as line:
            yield line


async def committed(server: OwnPostgres, schema: str, query: str) -> None:
    """Returns when something is in the database."""
    connection = await asyncpg.connect(server.url, server_settings={"search_path": schema})
    async with asyncio.timeout(SECONDS):
        while not await connection.fetchval(query):
            await asyncio.sleep(0.001)
    await connection.close()


async def test_r25_write_with_an_unknown_outcome_is_published(
    server: OwnPostgres, line: Line
) -> None:
    """Once, in order, and it is not repeated."""
    async with postgres_store(with_schema(line.url, "unknown")) as store:
        store.listener = witness = Witness()
        story = Story(store)
        await story.play("before")
        await story.accept("a")
        await story.start()
        line.hold()
        finish = asyncio.create_task(story.finish())
        await committed(server, "unknown", "SELECT count(*) = 2 FROM events")
        assert not finish.done()
        assert len(witness.log) == 1
        line.cut()
        with pytest.raises(
            StoreUnavailable, match=r"outcome unknown; repeat .* same run id"
        ) as told:
            await finish
        assert told.value.retry_after
        async with asyncio.timeout(SECONDS):
            while len(witness.log) < 2:
                await asyncio.sleep(0.001)
        story.lane = await store.load_lane(story.key)
        assert not story.lane.is_busy
        await story.play("after")
        assert [event.position for event in witness.log] == [1, 2, 3]
        assert [event.complete.run_id for event in witness.log] == ["before", "a", "after"]
        assert store.failed is None


async def test_write_on_a_line_that_says_nothing_is_given_up(
    server: OwnPostgres, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_committer, "WRITE_TIMEOUT", 0.3)
    monkeypatch.setattr(postgres_committer, "CHECK_TIMEOUT", 0.3)
    async with postgres_store(with_schema(line.url, "silent")) as store:
        story = Story(store)
        await story.play("a")
        line.hold()
        with pytest.raises(StoreUnavailable, match="outcome unknown"):
            await Story(store, "other").accept("b")
        # It was committed, and nothing is left open by it.
        await committed(server, "silent", "SELECT count(*) = 2 FROM runs")
        await committed(
            server,
            "silent",
            "SELECT count(*) = 0 FROM pg_stat_activity"
            " WHERE application_name = 'runlane' AND state LIKE '%in transaction%'",
        )
        line.resume()
        await story.play("c")
        # Where a connection that was idle is found dead, nothing was sent.
        monkeypatch.setattr(postgres_committer, "IDLE_SECONDS", 0.0)
        line.hold()
        waiting = asyncio.create_task(story.play("d"))
        await asyncio.sleep(0)
        line.cut()
        await waiting


async def test_read_whose_connection_is_lost_is_repeated(line: Line) -> None:
    async with postgres_store(with_schema(line.url, "reading")) as store:
        story = Story(store)
        await story.accept("a")
        assert await store.load_lane(story.key) == story.lane
        line.hold()
        reading = asyncio.create_task(store.load_lane(story.key))
        await asyncio.sleep(0)
        line.cut()
        assert await reading == story.lane


async def test_outage_of_the_database_is_logged_and_ends(server: OwnPostgres, schema: str) -> None:
    async with postgres_store(schema) as store:
        store.listener = witness = Witness()
        stories = [Story(store, f"s{n}") for n in range(20)]
        await asyncio.gather(*(story.accept(f"r{story.session_id}") for story in stories))
        await asyncio.to_thread(server.stop)
        try:
            results = await asyncio.gather(
                *(story.start() for story in stories), return_exceptions=True
            )
            for error in results:
                assert isinstance(error, StoreUnavailable)
                assert "nothing was written" in error.message or "unknown" in error.message
            with pytest.raises(StoreUnavailable, match="nothing was written"):
                await stories[0].start()
            for read in (store.load_lane(stories[0].key), store.log_bytes(), store.busy_sessions()):
                with pytest.raises(StoreUnavailable, match="could not be read"):
                    await read
            with pytest.raises(StoreUnavailable):
                await store.compact(0, 1)
            assert store.failed is None
        finally:
            await asyncio.to_thread(server.start)
        # The first call after it works: no dead connection is in its way.
        assert await store.load_lane(stories[0].key) == stories[0].lane
        assert len(await store.busy_sessions()) == 20
        for story in stories:
            story.lane = await store.load_lane(story.key)
            if story.lane.active is None:
                await story.start()
            await story.finish()
        assert [event.position for event in witness.log] == list(range(1, 21))


async def test_write_that_the_server_gives_up_is_known_not_to_be_written(
    server: OwnPostgres, schema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = postgres_connection._SETTINGS["statement_timeout"]
    # The statements that make a connection ready have to do with it too.
    monkeypatch.setitem(postgres_connection._SETTINGS, "statement_timeout", "1s")
    async with postgres_store(schema) as store:
        story = Story(store)
        await story.accept("a")
        monkeypatch.setitem(postgres_connection._SETTINGS, "statement_timeout", usual)
        other = await asyncpg.connect(
            server.url, server_settings={"search_path": schema_of(schema)}
        )
        async with other.transaction():
            await other.execute("UPDATE sessions SET title = 'held'")
            with pytest.raises(StoreUnavailable, match="nothing was written"):
                await story.start()
        await other.close()
        await story.start()


async def test_close_finishes_pending_writes(schema: str) -> None:
    async with AsyncExitStack() as closing:
        store = await closing.enter_async_context(postgres_store(schema))
        stories = [Story(store, f"s{n}") for n in range(50)]
        work = [asyncio.create_task(story.accept(story.session_id)) for story in stories]
        await asyncio.sleep(0)
    await asyncio.gather(*work)
    with pytest.raises(RunlaneError):
        await stories[0].start()
    async with postgres_store(schema) as store:
        assert len((await store.list_runs(TENANT, limit=MANY)).items) == 50
        page = await store.completes(TENANT, EVERYTHING, after=0, limit=9, max_bytes=PLENTY)
        assert page.events == ()
