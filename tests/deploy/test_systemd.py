"""The unit of systemd, and the notifications that the server sends."""

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
    """All values of a key of the unit, in order."""
    return re.findall(rf"^{key}=(.*)$", UNIT.read_text(), re.MULTILINE)


def one_of(key: str) -> str:
    """The value of a key that occurs once."""
    (value,) = all_of(key)
    return value


def seconds_of(key: str) -> float:
    """A duration of the unit, in seconds."""
    found = re.fullmatch(r"(\d+)(s|min)", one_of(key))
    assert found
    return float(found[1]) * _SECONDS[found[2]]


def flags() -> list[str]:
    """The flags of the server."""
    program, *rest = shlex.split(one_of("ExecStart"))
    assert program == PROGRAM
    return rest


def test_the_stop_timeout_is_longer_than_the_longest_shutdown() -> None:
    assert seconds_of("TimeoutStopSec") > longest_stop(settings(flags()))
    # The environment cannot change these durations, as a flag overrides it.
    assert {"--drain-timeout", "--cancel-grace"} <= set(flags())


def test_the_start_timeout_is_longer_than_a_migration_takes() -> None:
    postgres = pytest.importorskip("runlane_server.store.postgres.schema")
    assert seconds_of("TimeoutStartSec") > postgres.MIGRATION_TIMEOUT


def test_the_unit_uses_the_signals_and_notifications_of_the_server() -> None:
    assert one_of("Type") == "notify"
    assert one_of("KillMode") == "mixed"
    assert one_of("Restart") == "on-failure"
    assert not all_of("KillSignal")  # SIGTERM, as it is by default


def test_every_variable_is_a_setting() -> None:
    given = re.findall(r"(RUNLANE_\w+)=", one_of("Environment"))
    example = re.findall(r"^#?(RUNLANE_\w+)=", EXAMPLE.read_text(), re.MULTILINE)
    assert given
    assert example
    assert {*given, *example} <= variables()
    assert str(EXAMPLE.name) == Path(one_of("EnvironmentFile").removeprefix("-")).name


def test_the_store_is_in_the_writable_folder() -> None:
    (store,) = re.findall(r"RUNLANE_STORE=(\S+)", one_of("Environment"))
    folder = f"/var/lib/{one_of('StateDirectory')}"
    assert store.startswith(f"sqlite:///{folder}/")
    assert one_of("WorkingDirectory") == folder


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not on this machine")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
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


# --- Notifications ------------------------------------------------------------------------------


@contextmanager
def manager(address: str) -> Iterator[socket.socket]:
    """Listens for notifications, as systemd does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(address)
        listening.settimeout(30)
        yield listening


def sockets(folder: Path) -> list[tuple[str, str]]:
    """Two kinds of sockets of a manager: the address, and its text in NOTIFY_SOCKET."""
    path = str(folder / "notify")
    return [(path, path), (f"\0{path}", f"@{path}")]


@pytest.mark.parametrize("kind", [0, 1], ids=["path", "abstract"])
def test_notify_sends_to_a_path_and_to_the_abstract_namespace(
    kind: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, text = sockets(tmp_path)[kind]
    monkeypatch.setenv("NOTIFY_SOCKET", text)
    with manager(address) as listening:
        systemd.notify(systemd.READY)
        assert listening.recv(100) == b"READY=1"


@pytest.mark.parametrize("text", ["", "@", "/nowhere/at/all", "x" * 200, "vsock:2:1234"])
def test_notify_without_a_listener_does_nothing(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", text)
    systemd.notify(systemd.READY)
    monkeypatch.delenv("NOTIFY_SOCKET")
    systemd.notify(systemd.READY)


def served(folder: Path, env: Mapping[str, str]) -> AbstractAsyncContextManager[ServerProcess]:
    """A server with the flags of the unit; `env` says where it listens."""
    return serving(folder, *flags(), env=env, base=clean_environment(), listen=None)


async def test_a_server_with_the_flags_of_the_unit_notifies_of_start_and_stop(
    tmp_path: Path,
) -> None:
    address, text = sockets(tmp_path)[1]
    env = {
        "NOTIFY_SOCKET": text,
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


async def test_the_parent_of_several_processes_notifies_systemd_for_them(
    tmp_path: Path, postgres_url: str
) -> None:
    address, text = sockets(tmp_path)[0]
    env = {
        "NOTIFY_SOCKET": text,
        "RUNLANE_LISTEN": "127.0.0.1:0",
        "RUNLANE_STORE": postgres_url,
        "RUNLANE_PROCESSES": "2",
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
