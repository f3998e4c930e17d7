"""The server process: serves until SIGTERM or SIGINT, then shuts down gracefully."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Never

import structlog

from runlane_server.agents.loader import agent_kind
from runlane_server.config import Config
from runlane_server.engine.agent_code import contain_exits, contained
from runlane_server.extras import require
from runlane_server.harness.clock import MovableLoop
from runlane_server.harness.harness import STATE_VARIABLE, Harness
from runlane_server.net.addresses import Address
from runlane_server.process import systemd
from runlane_server.process.http_door import check_http, door_sockets, http_door
from runlane_server.process.node import Node, ShutdownRequest, serving
from runlane_server.process.terminal import ControllingTerminal
from runlane_server.telemetry import logs

log = structlog.get_logger()

EXIT_TIMEOUT = 5.0
"""Seconds after which the process ends even if the interpreter hangs at exit (grpc#40989)."""


@dataclass(frozen=True, slots=True)
class ChildProcess:
    """This process, when it is one of several: its number, from 1, and how it reports to the parent
    that it serves."""

    number: int
    report_serving: Callable[[], None]


def run(config: Config, child: ChildProcess | None = None) -> int:
    """Serves until a signal arrives; returns the exit code. Raises StartError."""
    logs.configure(
        config.log_format,
        config.log_level,
        process=child.number if child else None,
        content=config.log_content,
    )
    check_http(config)
    with asyncio.Runner(loop_factory=_loop_factory(config)) as runner:
        return runner.run(_serve_and_exit(config, child))


def _loop_factory(config: Config) -> Callable[[], asyncio.AbstractEventLoop]:
    if config.harness:
        return contained(MovableLoop)
    return contained(event_loop_kind(config.event_loop))


def event_loop_kind(name: str) -> type[asyncio.AbstractEventLoop]:
    """The class of the event loop of that name. Raises StartError."""
    if name == "asyncio":
        return asyncio.SelectorEventLoop
    try:
        import uvloop  # noqa: PLC0415 - an extra
    except ImportError:
        if name == "auto":
            return asyncio.SelectorEventLoop
        require("uvloop", "--event-loop uvloop")
        raise
    return uvloop.Loop


async def _serve_and_exit(config: Config, child: ChildProcess | None) -> int:
    process = ControlledProcess()
    code = await serve(config, child, process)
    # Everything is closed and written at this point.
    if process.restarts_after_drain:
        process.restart()
    watchdog = threading.Timer(EXIT_TIMEOUT, os._exit, (code,))
    watchdog.daemon = True
    watchdog.start()
    return code


async def serve(config: Config, child: ChildProcess | None, process: ControlledProcess) -> int:
    """Serves until a signal requests the end, or until the store fails; returns the exit code.

    `process` is what the harness controls. Raises StartError.
    """
    shutdown = process.shutdown = ShutdownSignals()
    process.harness = Harness.from_environment(os.environ, process)
    with ExitStack() as closing, door_sockets(config) as sockets:
        async with (
            serving(
                config,
                shutdown,
                shares_port=child is not None,
                harness=process.harness,
                private=None if sockets is None else sockets.server,
                on_bound=partial(shutdown.handle_signals, closing),
            ) as node,
            http_door(config, sockets, node.set_http_health) as lines,
        ):
            process.address = node.address
            _tune_garbage_collector()
            _log_serving(node, config)
            if child is None:
                announce_listening(node.address, *lines)
            else:
                child.report_serving()
            await shutdown.requested.wait()
            if child is None:
                systemd.notify(systemd.STOPPING)
    return shutdown.exit_code


class ShutdownSignals(ShutdownRequest):
    """A shutdown requested by SIGTERM, SIGINT or the loss of the terminal.

    A second signal makes it immediate. SIGHUP with the terminal still there, or without any,
    reloads the files that can be reloaded.
    """

    def __init__(self) -> None:
        super().__init__()
        self._terminal = ControllingTerminal()

    def handle_signals(self, closing: ExitStack) -> None:
        """Handles the signals until `closing` closes."""
        loop = asyncio.get_running_loop()
        contain_exits(loop)
        handlers = {
            signal.SIGTERM: self._on_signal,
            signal.SIGINT: self._on_signal,
            signal.SIGHUP: self._on_hangup,
        }
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
            del handlers[signal.SIGHUP]  # started with nohup
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler, number)
            closing.callback(loop.remove_signal_handler, number)

    def _on_hangup(self, number: signal.Signals) -> None:
        if self._terminal.is_lost:
            self._on_signal(number)
            return
        log.info("reloading files", signal=number.name)
        self.on_reload()

    def _on_signal(self, number: signal.Signals) -> None:
        log.info("signal", name=number.name, again=self.requested.is_set())
        if self.requested.is_set():
            self.immediate.set()
        self.requested.set()


class ControlledProcess:
    """This process, as a harness controls it: it can be ended, and started again.

    A restart replaces the program within the same process, like `exec`: everything that ran is gone
    at once, as after SIGKILL, but a supervisor of the process sees no exit.
    """

    can_restart = True

    def __init__(self) -> None:
        self.shutdown = ShutdownRequest()
        self.harness = Harness(process=self)
        self.address = Address()
        self.restarts_after_drain = False

    def crash(self, *, restart: bool) -> None:
        """Ends the process at once. Does not return."""
        if restart:
            self.restart()
        os.kill(os.getpid(), signal.SIGKILL)

    def drain(self, *, restart: bool) -> None:
        """Requests a graceful shutdown."""
        self.restarts_after_drain = restart
        self.shutdown.requested.set()

    def restart(self) -> Never:
        """Starts the program again, at the same address and with the harness in the same state."""
        # The address that this appends replaces the one that the previous restart appended.
        given = sys.orig_argv[:-2] if STATE_VARIABLE in os.environ else sys.orig_argv
        environment = {**os.environ, STATE_VARIABLE: self.harness.state()}
        arguments = [*given, "--listen", str(self.address)]
        os.execve(sys.executable, arguments, environment)  # noqa: S606 - it is this very program


def _tune_garbage_collector() -> None:
    """Excludes all objects made so far from garbage collection, and collects less often.

    A run leaves no reference cycles. The default of one collection per 700 new objects would find
    nothing and cost a tenth of the CPU time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


def _log_serving(node: Node, config: Config) -> None:
    log.info(
        "serving",
        address=str(node.address),
        node_address=str(node.node_address),
        # Only the kinds: the rest may contain a password or a whole command line.
        store=config.store_url.kind,
        agents={each.name: agent_kind(each.spec) for each in config.agents},
    )


def announce_listening(address: Address, *more: str) -> None:
    """Prints the address and more on stdout, and notifies systemd that the server is ready."""
    # stdout may have been closed before the start, and its reader may be gone.
    with contextlib.suppress(OSError, AttributeError):
        lines = (f"runlane-server listening on {address}", *more)
        sys.stdout.write("".join(f"{line}\n" for line in lines))
        sys.stdout.flush()
    systemd.notify(systemd.READY)
