"""The server process: serves until it is told to stop, and goes down in good order."""

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

from runlane_server.config import Config
from runlane_server.core.errors import StartError
from runlane_server.harness.clock import MovableLoop
from runlane_server.harness.harness import STATE_VARIABLE, Harness
from runlane_server.process import systemd
from runlane_server.process.node import Node, Orders, serving
from runlane_server.telemetry import logs

log = structlog.get_logger()

EXIT_TIMEOUT = 5.0
"""Seconds after which the process ends even if the interpreter hangs at exit (grpc#40989)."""


@dataclass(frozen=True, slots=True)
class Worker:
    """What a process knows that is one of several: its number from 1 on, and how to say that it
    serves."""

    number: int
    say_serving: Callable[[], None]


def run(config: Config, worker: Worker | None = None) -> int:
    """Serves until a signal comes; returns the exit code. Raises StartError."""
    logs.configure(
        config.log_format,
        config.log_level,
        worker=worker.number if worker else None,
        content=config.log_content,
    )
    life = Life()
    with asyncio.Runner(loop_factory=_loop_factory(config)) as runner:
        return runner.run(_serve_and_leave(config, worker, life))


def _loop_factory(config: Config) -> Callable[[], asyncio.AbstractEventLoop] | None:
    return MovableLoop if config.harness else event_loop_factory(config.event_loop)


def event_loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop] | None:
    """What makes the event loop of that name; None is asyncio's own. Raises StartError."""
    if name == "asyncio":
        return None
    try:
        import uvloop  # noqa: PLC0415 - an extra
    except ImportError:
        if name == "auto":
            return None
        raise StartError(
            "--event-loop uvloop: uvloop is not installed; pip install 'runlane[uvloop]'"
        ) from None
    return uvloop.new_event_loop


async def _serve_and_leave(config: Config, worker: Worker | None, life: Life) -> int:
    code = await serve(config, worker, life)
    # Everything is closed and written by now.
    if life.goes_on:
        life.start_anew()
    watchdog = threading.Timer(EXIT_TIMEOUT, os._exit, (code,))
    watchdog.daemon = True
    watchdog.start()
    return code


async def serve(config: Config, worker: Worker | None = None, life: Life | None = None) -> int:
    """Serves until SIGTERM or SIGINT, or until the store fails; returns the exit code.

    `life` is what a harness has of the process. Raises StartError if it cannot start.
    """
    life = life or Life()
    orders = life.orders = Signals()
    life.harness = Harness.from_environment(os.environ, life)
    with ExitStack() as closing:
        async with serving(
            config,
            orders,
            worker=None if worker is None else worker.number,
            harness=life.harness,
            on_bound=partial(orders.listen, closing),
        ) as node:
            life.address = node.address
            _settle_down()
            _announce(node, config)
            if worker is None:
                say_listening(node.address)
            else:
                worker.say_serving()
            await orders.stop.wait()
            if worker is None:
                systemd.notify(systemd.STOPPING)
    return orders.exit_code


class Signals(Orders):
    """The orders that a process gets: by SIGTERM and SIGINT. The second one means to hurry."""

    def listen(self, closing: ExitStack) -> None:
        """Listens to signals until everything is closed."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)
            closing.callback(loop.remove_signal_handler, number)

    def _signalled(self, number: signal.Signals) -> None:
        log.info("signal", name=number.name, again=self.stop.is_set())
        if self.stop.is_set():
            self.hurry.set()
        self.stop.set()


class Life:
    """The life of this process, in the hands of a harness: it ends, and may begin anew.

    A new program takes the place of the old one in the same process, as by `exec`: whatever ran is
    gone in that instant, as it is by SIGKILL, and whoever looks after the process sees no end.
    """

    can_restart = True

    def __init__(self) -> None:
        self.orders = Orders()
        self.harness = Harness(process=self)
        self.address = ""
        self.goes_on = False
        """Whether it begins anew where it ends in good order."""

    def crash(self, *, restart: bool) -> None:
        """Ends it at once. Does not return."""
        if restart:
            self.start_anew()
        os.kill(os.getpid(), signal.SIGKILL)

    def drain(self, *, restart: bool) -> None:
        """Has it go down in good order."""
        self.goes_on = restart
        self.orders.stop.set()

    def start_anew(self) -> Never:
        """Begins anew, at the same address and as the harness has set it."""
        # What was added for this start takes the place of what was added for the last one.
        given = sys.orig_argv[:-2] if STATE_VARIABLE in os.environ else sys.orig_argv
        environment = {**os.environ, STATE_VARIABLE: self.harness.state()}
        arguments = [*given, "--listen", self.address]
        os.execve(sys.executable, arguments, environment)  # noqa: S606 - it is this very program


def _settle_down() -> None:
    """Tells the collector of circular garbage that what was made up to here stays.

    A run leaves no circles behind. To look for some after each 700 new objects, as is usual, would
    find nothing and cost a tenth of the work.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


def _announce(node: Node, config: Config) -> None:
    # Only the kinds: what follows may hold a password or a whole command line.
    store, agent = (setting.partition(":")[0] for setting in (config.store, config.agent))
    log.info(
        "serving",
        address=node.address,
        node_address=node.node_address,
        store=store,
        agent=agent,
    )


def say_listening(address: str) -> None:
    """Says on stdout, and to systemd, that clients are served from now on."""
    # It may have been closed before the start, or its reader may be gone.
    with contextlib.suppress(OSError, AttributeError):
        sys.stdout.write(f"runlane-server listening on {address}\n")
        sys.stdout.flush()
    systemd.notify(systemd.READY)
