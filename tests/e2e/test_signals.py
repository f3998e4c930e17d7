"""SIGHUP: it reloads files, and the loss of the terminal is a graceful shutdown."""

from __future__ import annotations

import os
import pty
import signal
import sys
from pathlib import Path

import pytest

from runlane import Client
from support.server import ListeningProcess, ServerProcess, serving
from support.staging import SECONDS

SERVER = (sys.executable, "-m", "runlane_server", "--listen", "127.0.0.1:0")

# Makes the terminal of that descriptor the controlling one; stdout and stderr stay as they are.
AT_TERMINAL = (
    "import fcntl, os, sys, termios; os.setsid();"
    "fcntl.ioctl(int(sys.argv[1]), termios.TIOCSCTTY, 0); os.execv(sys.argv[2], sys.argv[2:])"
)


async def test_sighup_reloads_files_and_the_server_goes_on(tmp_path: Path) -> None:
    access = tmp_path / "access.toml"
    access.write_text("")
    async with serving(tmp_path, "--access", str(access)) as server:
        access.write_text("# changed\n")
        server.send(signal.SIGHUP)
        await server.logs('"reloading files"')
        await server.logs('"access file reloaded"')
        assert not server.has_ended
        assert await server.stop() == 0


async def test_a_lost_terminal_is_a_graceful_shutdown(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    name = os.ttyname(slave)
    command = (sys.executable, "-c", AT_TERMINAL, "0", *SERVER, "--agent", "echo:delay=20ms")
    process = ListeningProcess(["sh", "-c", f'exec "$@" <{name}', "sh", *command], tmp_path)
    await process.start()
    os.close(slave)
    async with Client(process.address) as client:
        handle = await client.run_accepted("s", "word " * 50, allow_missing=True)
        os.close(master)
        assert (await handle.completed(SECONDS)).text.startswith("word word")
    assert await process.wait() == 0
    assert '"name": "SIGHUP"' in process.log
    assert '"idle": true, "event": "stopped"' in process.log


async def test_a_server_started_with_nohup_ignores_sighup(tmp_path: Path) -> None:
    process = ListeningProcess(["nohup", *SERVER], tmp_path)
    await process.start()
    process.send(signal.SIGHUP)
    async with Client(process.address) as client:
        assert (await (await client.run_accepted("s", "x", allow_missing=True)).completed()).text
    assert await process.stop() == 0
    assert "reloading" not in process.log


async def test_several_processes_reload_and_go_on(tmp_path: Path, postgres_url: str) -> None:
    flags = ("--store", postgres_url, "--processes", "2")
    server = ServerProcess(tmp_path, *flags)
    await server.start()
    server.send(signal.SIGHUP)
    await server.logs('"reloading files"')
    assert await server.stop() == 0


pytestmark = pytest.mark.sqlite("signals do not depend on the store")
