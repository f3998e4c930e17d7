"""The server process: puts the parts together, serves, and goes down in good order."""

from __future__ import annotations

import asyncio
import gc
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from runlane_server import logs, systemd
from runlane_server.agents.command import CommandSettings
from runlane_server.agents.launcher import ResourceLimits
from runlane_server.agents.loader import AgentSettings, load_agent
from runlane_server.config import Config
from runlane_server.coordinator import Coordinator
from runlane_server.core.errors import RunlaneError, StartError
from runlane_server.entrance import Entrance
from runlane_server.entrance import check as check_entrance
from runlane_server.executor import NodeSettings
from runlane_server.feed import Feed
from runlane_server.monitor import Monitor
from runlane_server.node_address import of_worker, own_listen, reached_at
from runlane_server.observer import Both
from runlane_server.relay import Relay
from runlane_server.retention import Retention, keepers
from runlane_server.rpc.endpoint import Endpoint
from runlane_server.store.base import StoreError
from runlane_server.stores import open_store
from runlane_server.tracing import Tracing

log = structlog.get_logger()

STOP_GRACE = 2.0
"""Seconds that calls have to end after their subscriptions were told to. A health Watch takes all
of it."""

HURRIED_GRACE = 0.5
"""The same where there is no time to lose: enough for what is known already to be said."""

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
    check_entrance(config)
    orders = Orders()
    entrance = Entrance(config)
    async with AsyncExitStack() as closing:
        monitor = Monitor(
            config.metrics_listen,
            config.store.partition(":")[0],
            worker.number if worker else None,
        )
        tracing = Tracing(
            config.otlp_endpoint, ratio=config.trace_ratio, content=config.log_content
        )
        await closing.enter_async_context(tracing.exporting())
        agent = load_agent(config.agent, agent_settings(config))
        store = open_store(config.store)
        store.on_failure = orders.store_failed
        await closing.enter_async_context(store)
        node = NodeSettings(lease=config.node_lease)
        feed = Feed(store)
        monitor.watch(store, feed)
        observer = Both(monitor.observer, tracing.observer)
        coordinator = Coordinator(
            store,
            agent,
            feed,
            config.limits,
            node=node,
            observer=observer,
            quotas=entrance.quotas,
        )
        relay, peer_key = None, ""
        if store.cluster is not None:
            peer_key = store.cluster.peer_key
            relay = Relay(store.cluster, coordinator.feed, entrance.peers(peer_key))
        door = entrance.door(peer_key)
        endpoint = Endpoint(
            coordinator,
            door=door,
            progress_interval=config.progress_interval,
            shares_port=worker is not None,
            relay=relay,
            observer=observer,
            tls=entrance.tls,
        )
        # Before anything is run: a server that finds its port taken must not touch the work.
        address, node_address = _bind(endpoint, config, worker)
        await closing.enter_async_context(monitor.serving(coordinator, endpoint))
        orders.listen(closing)
        try:
            await coordinator.start(node_address)
        except RunlaneError as error:
            raise StartError(error.message) from error
        if relay is not None:
            relay.start(node_address)
            closing.push_async_callback(relay.close)
        await endpoint.start()
        _settle_down()
        entrance.warn(node_address, shared=relay is not None)
        background = _in_background(
            *keepers(coordinator, retention_of(config)),
            entrance.watch(door),
            coordinator.stored.keep_measuring(),
        )
        _announce(address, node_address, config)
        if worker is None:
            say_listening(address)
        else:
            worker.say_serving()
        await orders.stop.wait()
        if worker is None:
            systemd.notify(systemd.STOPPING)
        for task in background:
            task.cancel()
        await _go_down(coordinator, endpoint, orders, config.drain_timeout)
    return orders.exit_code


def _bind(endpoint: Endpoint, config: Config, worker: Worker | None) -> tuple[str, str]:
    """Takes the address to listen on; returns it, and the one where the other nodes reach this one.

    What workers listen on together leads to any of them, so each has a port of its own, too.
    """
    address = endpoint.bind(config.listen)
    if worker is None:
        return address, reached_at(address, config.node_address)
    given = of_worker(config.node_address, worker.number)
    own = endpoint.bind(own_listen(config.listen, given), alone=True)
    return address, reached_at(own, given)


def agent_settings(config: Config) -> AgentSettings:
    """What the agents are told. A program has half the grace of a cancel to go by itself, and is
    killed and reaped within the other half."""
    return AgentSettings(
        command_kill_grace=config.limits.cancel_grace / 2,
        command=command_settings(config),
        chat_instructions=config.chat_instructions or None,
    )


def command_settings(config: Config) -> CommandSettings:
    """What programs are given."""
    return CommandSettings(
        env=config.command_env,
        directory=Path(config.command_dir) if config.command_dir else None,
        cwd=Path(config.command_cwd) if config.command_cwd else None,
        limits=ResourceLimits(
            cpu=math.ceil(config.command_cpu),
            memory=config.command_memory,
            files=config.command_files,
            processes=config.command_processes,
            file_size=config.command_file_size,
        ),
    )


def retention_of(config: Config) -> Retention:
    """What is kept how long."""
    return Retention(
        events=config.event_retention or None,
        event_bytes=config.event_retention_bytes or None,
        sessions=config.session_retention or None,
    )


class Orders:
    """What the process is told from outside: to stop, and to be quick about it."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()
        self.exit_code = 0

    def listen(self, closing: AsyncExitStack) -> None:
        """Listens to signals until everything is closed."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)
            closing.callback(loop.remove_signal_handler, number)

    def store_failed(self, error: StoreError) -> None:
        """Ends the process: what is in doubt is found out from the disk at the next start.

        The store has told the log about it.
        """
        log.info("stopping, as the store failed", reason=error.message)
        self.exit_code = 1
        self.hurry.set()
        self.stop.set()

    def _signalled(self, number: signal.Signals) -> None:
        log.info("signal", name=number.name, again=self.stop.is_set())
        if self.stop.is_set():
            self.hurry.set()
        self.stop.set()


async def _go_down(
    coordinator: Coordinator, endpoint: Endpoint, orders: Orders, drain_timeout: float
) -> None:
    """New work is refused first, what is active may end, and subscribers hear of it."""
    await endpoint.retire()
    coordinator.refuse()
    log.info("draining", timeout_s=drain_timeout)
    idle = await _unless(orders.hurry, coordinator.wait_idle(drain_timeout))
    coordinator.feed.close()
    returned = await endpoint.stop(HURRIED_GRACE if orders.hurry.is_set() else STOP_GRACE)
    if not returned:
        log.warning("handlers have not returned")
    await coordinator.stop()
    log.info("stopped", idle=bool(idle))


async def _unless(event: asyncio.Event, wait: Coroutine[Any, Any, bool]) -> bool:
    """What a wait returns; False if the event comes first."""
    waiting = asyncio.ensure_future(wait)
    interrupted = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({waiting, interrupted}, return_when=asyncio.FIRST_COMPLETED)
        return waiting.done() and waiting.result()
    finally:
        waiting.cancel()
        interrupted.cancel()


def _settle_down() -> None:
    """Tells the collector of circular garbage that what was made up to here stays.

    A run leaves no circles behind. To look for some after each 700 new objects, as is usual, would
    find nothing and cost a tenth of the work.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


def _in_background(*work: Coroutine[Any, Any, None]) -> list[asyncio.Task[None]]:
    tasks = [asyncio.create_task(one) for one in work]
    for task in tasks:
        task.add_done_callback(_log_failure)
    return tasks


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (failure := task.exception()) is not None:
        log.error("background work failed", exc_info=failure)


def _announce(address: str, node_address: str, config: Config) -> None:
    # Only the kinds: what follows may hold a password or a whole command line.
    store, agent = (setting.partition(":")[0] for setting in (config.store, config.agent))
    log.info("serving", address=address, node_address=node_address, store=store, agent=agent)


def say_listening(address: str) -> None:
    """Says on stdout, and to systemd, that clients are served from now on."""
    sys.stdout.write(f"runlane-server listening on {address}\n")
    sys.stdout.flush()
    systemd.notify(systemd.READY)
