"""The server process: serves until it is told to stop, and goes down in good order."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import structlog

from runlane_server import logs, systemd
from runlane_server.config import Config
from runlane_server.core.errors import StartError
from runlane_server.node import Node, Orders, serving

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
    with asyncio.Runner(loop_factory=event_loop_factory(config.event_loop)) as runner:
        return runner.run(_serve_and_leave(config, worker))


def event_loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop] | None:
    """What makes the event loop of that name; None is asyncio's own. Raises StartError."""
    if name == "asyncio":
        return None
    try:
        import uvloop  # noqa: PLC0415 - an extra
    except ImportError:
        raise StartError(
            "--event-loop uvloop: uvloop is not installed; pip install 'runlane[uvloop]'"
        ) from None
    return uvloop.new_event_loop


async def _serve_and_leave(config: Config, worker: Worker | None) -> int:
    code = await serve(config, worker)
    # Everything is closed and written by now.
    watchdog = threading.Timer(EXIT_TIMEOUT, os._exit, (code,))
    watchdog.daemon = True
    watchdog.start()
    return code


async def serve(config: Config, worker: Worker | None = None) -> int:
    """Serves until SIGTERM or SIGINT, or until the store fails; returns the exit code.

    Raises StartError if it cannot start.
    """
    orders = Signals()
    with ExitStack() as closing:
        async with serving(
            config,
            orders,
            worker=None if worker is None else worker.number,
            on_bound=partial(orders.listen, closing),
        ) as node:
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
    sys.stdout.write(f"runlane-server listening on {address}\n")
    sys.stdout.flush()
    systemd.notify(systemd.READY)
