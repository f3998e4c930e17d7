"""The unit for systemd, and what the server says to it."""

from __future__ import annotations

import asyncio
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractAsyncContextManager, contextmanager
from pathlib import Path

import pytest

from deploy.health import SERVING, health
from deploy.settings import DEPLOY, longest_stop, settings, variables
from runlane_server.process import systemd
from support.server import ServerProcess, clean_environment, serving

UNIT = DEPLOY / "systemd" / "runlane-server.service"
EXAMPLE = DEPLOY / "systemd" / "runlane-server.env"
PROGRAM = "/opt/runlane/bin/runlane-server"

_SECONDS = {"s": 1, "min": 60}


def all_of(key: str) -> list[str]:
    """The values of a key of the unit, in order."""
    return re.findall(rf"^{key}=(.*)$", UNIT.read_text(), re.MULTILINE)


def one_of(key: str) -> str:
    """The value of a key that stands there once."""
    (value,) = all_of(key)
    return value


def seconds_of(key: str) -> float:
    """A time, as systemd reads it."""
    found = re.fullmatch(r"(\d+)(s|min)", one_of(key))
    assert found
    return float(found[1]) * _SECONDS[found[2]]


def flags() -> list[str]:
    """What the server is started with."""
    program, *rest = shlex.split(one_of("ExecStart"))
    assert program == PROGRAM
    return rest


def test_a_stop_has_time_for_the_drain() -> None:
    assert seconds_of("TimeoutStopSec") > longest_stop(settings(flags()))
    # What the time depends on cannot be set elsewhere: a flag goes before the environment.
    assert {"--drain-timeout", "--cancel-grace"} <= set(flags())


def test_a_start_has_time_for_a_migration() -> None:
    postgres = pytest.importorskip("runlane_server.store.postgres.schema")
    assert seconds_of("TimeoutStartSec") > postgres.MIGRATION_TIMEOUT


def test_signals_and_ends_are_those_that_the_server_knows() -> None:
    assert one_of("Type") == "notify"
    assert one_of("KillMode") == "mixed"
    assert one_of("Restart") == "on-failure"
    assert not all_of("KillSignal")  # SIGTERM, as it is by default


def test_variables_are_settings() -> None:
    given = re.findall(r"(RUNLANE_\w+)=", one_of("Environment"))
    example = re.findall(r"^#?(RUNLANE_\w+)=", EXAMPLE.read_text(), re.MULTILINE)
    assert given
    assert example
    assert {*given, *example} <= variables()
    assert str(EXAMPLE.name) == Path(one_of("EnvironmentFile").removeprefix("-")).name


def test_the_store_is_in_the_folder_that_may_be_written_to() -> None:
    (store,) = re.findall(r"RUNLANE_STORE=(\S+)", one_of("Environment"))
    folder = f"/var/lib/{one_of('StateDirectory')}"
    assert store.startswith(f"sqlite:///{folder}/")
    assert one_of("WorkingDirectory") == folder


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not on this machine")
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace(PROGRAM, sys.executable))
    found = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert [line for line in found.stderr.splitlines() if UNIT.name in line] == []
    assert found.returncode == 0


# --- What systemd is told -----------------------------------------------------------------------


@contextmanager
def manager(address: str) -> Iterator[socket.socket]:
    """Listens as systemd does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(address)
        listening.settimeout(30)
        yield listening


def places(folder: Path) -> list[tuple[str, str]]:
    """Where a manager may listen: the address, and how it is said in the environment."""
    path = str(folder / "notify")
    return [(path, path), (f"\0{path}", f"@{path}")]


@pytest.mark.parametrize("kind", [0, 1], ids=["path", "abstract"])
def test_notify_says_it_where_it_is_listened_to(
    kind: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, said = places(tmp_path)[kind]
    monkeypatch.setenv("NOTIFY_SOCKET", said)
    with manager(address) as listening:
        systemd.notify(systemd.READY)
        assert listening.recv(100) == b"READY=1"


@pytest.mark.parametrize("place", ["", "@", "/nowhere/at/all", "x" * 200, "vsock:2:1234"])
def test_notify_where_nobody_listens_is_nothing(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", place)
    systemd.notify(systemd.READY)
    monkeypatch.delenv("NOTIFY_SOCKET")
    systemd.notify(systemd.READY)


def served(folder: Path, env: Mapping[str, str]) -> AbstractAsyncContextManager[ServerProcess]:
    """A server with the flags of the unit; `env` says where it listens."""
    return serving(folder, *flags(), env=env, base=clean_environment(), listen=None)


async def test_the_server_of_the_unit_serves_and_drains(tmp_path: Path) -> None:
    address, said = places(tmp_path)[1]
    env = {
        "NOTIFY_SOCKET": said,
        "RUNLANE_LISTEN": "127.0.0.1:0",
        "RUNLANE_STORE": f"sqlite:///{tmp_path}/runlane.db",
    }
    with manager(address) as listening:
        async with served(tmp_path, env) as server:
            assert await asyncio.to_thread(listening.recv, 100) == b"READY=1"
            assert await health(server.address, "") == SERVING
            server.send(signal.SIGTERM)
            assert await asyncio.to_thread(listening.recv, 100) == b"STOPPING=1"
            assert await server.wait() == 0


async def test_the_parent_of_workers_speaks_for_them(tmp_path: Path, postgres_url: str) -> None:
    address, said = places(tmp_path)[0]
    env = {
        "NOTIFY_SOCKET": said,
        "RUNLANE_LISTEN": "127.0.0.1:0",
        "RUNLANE_STORE": postgres_url,
        "RUNLANE_WORKERS": "2",
    }
    with manager(address) as listening:
        async with served(tmp_path, env) as server:
            assert await asyncio.to_thread(listening.recv, 100) == b"READY=1"
            server.send(signal.SIGTERM)
            assert await asyncio.to_thread(listening.recv, 100) == b"STOPPING=1"
            assert await server.wait() == 0
        listening.setblocking(False)
        with pytest.raises(BlockingIOError):
            print(listening.recv(100))
