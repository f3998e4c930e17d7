"""`python -m runlane_server.process.agent_child`: a process of an agent (`--agent-processes`).

Only a server starts it, with a socket as its stdin; `agents/processes/protocol` says what goes over
it. It executes runs as a worker of the server, over a Unix socket.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any

from runlane_server.agents.command.prctl import end_first, protect_memory

if __name__ == "__main__":
    end_first()
    # Before the imports, which take long: programs of other processes may already run.
    protect_memory()

from runlane_commands.streams import keep_exit_code
from runlane_server.agents.base import Agent, KeepsSessions
from runlane_server.agents.loader import load_agent
from runlane_server.agents.processes.protocol import (
    BEAT,
    BEAT_INTERVAL,
    DELETED,
    ERROR,
    LOADED,
    READY,
    START,
)
from runlane_server.config import Config
from runlane_server.core.errors import StartError
from runlane_server.core.model import SessionKey
from runlane_server.engine.agent_code import contain_exits, contain_tasks, contained
from runlane_server.process.agent_worker import AgentWorker
from runlane_server.process.app import event_loop_kind
from runlane_server.process.node import agent_settings
from runlane_server.telemetry import logs
from runlane_server.telemetry.watchdog import watching

ORPHAN_GRACE = 10.0
"""Seconds in which a process whose server is gone must have closed its agent."""


@dataclass(frozen=True, slots=True)
class Given:
    """The settings of a process: the agent, and how to reach the server."""

    config: Config
    agent: str
    slots: int
    worker_id: str
    address: str
    secret: str

    @classmethod
    def from_json(cls, line: bytes) -> Given:
        """The settings that the server has sent."""
        found: dict[str, Any] = json.loads(line)
        return cls(config=Config.from_json(found.pop("config")), **found)


class Server:
    """The other end of the socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._started = threading.Event()
        self.gone = threading.Event()
        self._early: list[SessionKey] = []
        self._on_deleted: Callable[[SessionKey], None] = self._early.append

    def lines(self) -> BufferedReader:
        """The messages that the server sends."""
        return self._connection.makefile("rb")

    def send(self, *words: str) -> None:
        """Sends a line."""
        with suppress(OSError):  # it is gone, which `follow` handles
            self._connection.sendall(f"{' '.join(words)}\n".encode())

    def follow(self, lines: BufferedReader, given: Given) -> None:
        """Reads in a thread of its own what the server sends; ends this process after the server,
        also if an agent blocks the event loop."""
        with suppress(OSError):
            for line in lines:
                kind, _, rest = line.decode().strip().partition(" ")
                if kind == START:
                    self._started.set()
                elif kind == DELETED:
                    self._on_deleted(SessionKey(*json.loads(rest)))
        self.gone.set()
        self._started.set()
        # A server that was killed could not remove it.
        shutil.rmtree(Path(given.address.removeprefix("unix:")).parent, ignore_errors=True)
        time.sleep(ORPHAN_GRACE)
        os._exit(1)

    def follow_deleted(self, on_deleted: Callable[[SessionKey], None]) -> None:
        """Calls `on_deleted`, in another thread, for each session that was or will be deleted."""
        self._on_deleted = on_deleted
        for key in self._early:
            on_deleted(key)

    def wait_for_start(self) -> bool:
        """Waits until the server starts the agent; False if it is gone."""
        self._started.wait()
        return not self.gone.is_set()


def main() -> None:
    """Executes runs until the server is gone."""
    keep_exit_code()
    try:
        server = Server(_take_stdin())
    except OSError:
        sys.stderr.write("runlane-server: error: only runlane-server starts this program\n")
        sys.exit(2)
    lines = server.lines()
    settings = lines.readline()
    if not settings:
        sys.exit(1)  # the server is already gone
    given = Given.from_json(settings)
    config = given.config
    logs.configure(config.log_format, config.log_level, content=config.log_content)
    threading.Thread(target=server.follow, args=(lines, given), daemon=True).start()
    try:
        agent = _load(given)
    except StartError as error:
        server.send(ERROR, str(error.exit_code), _line(error))
        sys.exit(error.exit_code)
    server.send(LOADED)
    if not server.wait_for_start():
        sys.exit(0)
    with asyncio.Runner(loop_factory=contained(event_loop_kind(config.event_loop))) as runner:
        code = runner.run(_serve(server, agent, given))
    # Threads of the agent must not keep the process.
    sys.stdout.flush()
    os._exit(code)


def _load(given: Given) -> Agent:
    spec = next(each.spec for each in given.config.agents if each.name == given.agent)
    return load_agent(spec, agent_settings(given.config))


def _take_stdin() -> socket.socket:
    """The socket to the server. Programs that the agent starts do not inherit it."""
    connection = socket.socket(fileno=os.dup(0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return connection


async def _serve(server: Server, agent: Agent, given: Given) -> int:
    """Starts the agent, executes runs, and closes it; returns the exit code."""
    loop = asyncio.get_running_loop()
    contain_tasks(loop)
    contain_exits(loop)
    # A service manager signals all processes of a service: the server decides when this one ends.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, lambda: None)
    if isinstance(agent, KeepsSessions):
        forget = agent.session_deleted
        server.follow_deleted(partial(_call_on, loop, forget))
    beating = asyncio.create_task(_beat(server))
    try:
        try:
            await agent.start()
        except BaseException as error:  # noqa: BLE001 - it is the agent's, and the server logs it
            server.send(ERROR, "1", _line(error, with_type=True))
            return 1
        server.send(READY)
        worker = AgentWorker(
            agent,
            given.agent,
            address=given.address,
            secret=given.secret,
            worker_id=given.worker_id,
            slots=given.slots,
        )
        threading.Thread(target=_stop_after, args=(server, worker), daemon=True).start()
        with watching(lambda: None):
            await worker.serve()
        await agent.close()
    finally:
        beating.cancel()
    return 0


def _call_on(
    loop: asyncio.AbstractEventLoop, call: Callable[[SessionKey], None], key: SessionKey
) -> None:
    loop.call_soon_threadsafe(call, key)


def _stop_after(server: Server, worker: AgentWorker) -> None:
    server.gone.wait()
    worker.stop()


async def _beat(server: Server) -> None:
    while True:
        server.send(BEAT)
        await asyncio.sleep(BEAT_INTERVAL)


def _line(error: BaseException, *, with_type: bool = False) -> str:
    text = f"{type(error).__name__}: {error}" if with_type else str(error)
    return " ".join(text.split())[:2048]


if __name__ == "__main__":
    main()
