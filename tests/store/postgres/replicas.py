"""A PostgreSQL and its standby, which gets each commit before it is confirmed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from support.postgres import SETTINGS, OwnPostgres, skip_without_wheel

HOST = "127.0.0.1"
STANDBY = "standby"

_OVER_TCP = {
    "listen_addresses": HOST,
    "hot_standby": "on",
    "wal_level": "replica",
    # In its folder, so that a server that was killed leaves nothing behind.
    "dynamic_shared_memory_type": "mmap",
}


class Member(OwnPostgres):
    """One of the two, at a port of its own."""

    def __init__(self, port: int, **settings: str) -> None:
        super().__init__()
        self.port = port
        self.settings = SETTINGS | _OVER_TCP | {"port": str(port)} | settings

    @property
    def place(self) -> str:
        """Where it is."""
        return f"{HOST}:{self.port}"

    @property
    def url(self) -> str:
        """Its database, as primary or as standby."""
        return f"postgresql://postgres@{self.place}/postgres"

    def kill(self) -> None:
        """Ends it and all its processes with SIGKILL, as when its machine is lost."""
        state, pid = self._state(), self.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for victim in (pid, *map(int, children)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        assert self._process is not None
        self._process.wait()
        # The last it holds beyond its folder: the shared memory that marks the folder as in use.
        _, segment = state[6].split()
        subprocess.run(["ipcrm", "-m", segment], check=False, capture_output=True)
        (self._data / "postmaster.pid").unlink()

    async def promote(self) -> None:
        """Makes it the primary, and returns when it is."""
        connection = await asyncpg.connect(self.url)
        assert await connection.fetchval("SELECT pg_promote(true, 30)")
        await connection.close()


class Standby(Member):
    """Follows a primary that runs, from a copy of it."""

    def __init__(self, port: int, primary: Member) -> None:
        self._primary = primary
        super().__init__(port)

    def _prepare(self) -> None:
        self._user, self._programs = self._primary._user, self._primary._programs
        if self._user is not None:
            shutil.chown(self.folder, self._user)
        source = f"host={HOST} port={self._primary.port} user=postgres application_name={STANDBY}"
        subprocess.run(
            [
                *(self._programs / "pg_basebackup", "--pgdata", self._data, "--dbname", source),
                *("--write-recovery-conf", "--checkpoint=fast", "--wal-method=stream"),
            ],
            check=True,
            capture_output=True,
            user=self._user,
            cwd="/",
        )

    def _state(self) -> list[str]:
        """As of a server that takes connections: it does, to read."""
        return ["ready" if line == "standby" else line for line in super()._state()]


@dataclass(frozen=True, slots=True)
class Replicas:
    """The two; the primary confirms nothing that the standby does not have."""

    primary: Member
    standby: Standby

    @property
    def url(self) -> str:
        """The current primary."""
        return f"postgresql://postgres@{self.primary.place},{self.standby.place}/postgres"


@contextmanager
def replicas() -> Iterator[Replicas]:
    """A primary and a standby that follows it."""
    skip_without_wheel()
    with ExitStack() as closing:
        ports = _free_ports(2)
        primary = Member(ports[0], synchronous_standby_names=STANDBY)
        closing.callback(primary.remove)
        primary.start()
        standby = Standby(ports[1], primary)
        closing.callback(standby.remove)
        standby.start()
        yield Replicas(primary, standby)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as holding:
        sockets = [holding.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((HOST, 0))
        return [one.getsockname()[1] for one in sockets]
