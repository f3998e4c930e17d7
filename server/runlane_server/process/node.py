"""A node with all its parts: from when it takes its address until it has gone down."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from runlane_server.agents.base import Agent
from runlane_server.agents.command.agent import CommandSettings
from runlane_server.agents.command.launcher import ResourceLimits
from runlane_server.agents.loader import AgentSettings, load_agent
from runlane_server.cluster.relay import Relay
from runlane_server.config import Config
from runlane_server.core.errors import RunlaneError, StartError
from runlane_server.core.observer import ObserverPair
from runlane_server.engine.coordinator import Coordinator
from runlane_server.engine.executor import NodeSettings
from runlane_server.engine.retention import Retention, retention_tasks
from runlane_server.feed.feed import Feed
from runlane_server.harness.harness import Harness, ServerInfo
from runlane_server.net.addresses import of_worker, own_listen, reached_at
from runlane_server.process.security import Entrance
from runlane_server.process.security import check as check_entrance
from runlane_server.rpc.endpoint import Endpoint
from runlane_server.store.base import StoreError
from runlane_server.store.open import StoreUrl, open_store
from runlane_server.telemetry.metrics_server import MetricsServer
from runlane_server.telemetry.trace_export import TraceExport

log = structlog.get_logger()

STOP_GRACE = 2.0
"""Seconds that calls have to end after their subscriptions were told to. A health Watch takes all
of it."""

HURRIED_GRACE = 0.5
"""The same where there is no time to lose: enough for what is known already to be said."""


class Orders:
    """What a node is told from outside: to stop, and to be quick about it."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()
        self.exit_code = 0

    def store_failed(self, error: StoreError) -> None:
        """Ends the node: what is in doubt is found out from the disk at the next start.

        The store has told the log about it.
        """
        log.info("stopping, as the store failed", reason=error.message)
        self.exit_code = 1
        self.hurry.set()
        self.stop.set()


@dataclass(frozen=True, slots=True)
class Node:
    """A node that serves: where callers reach it, and where the other nodes do."""

    address: str
    node_address: str
    coordinator: Coordinator


@asynccontextmanager
async def serving(
    config: Config,
    orders: Orders,
    *,
    agent: Agent | None = None,
    worker: int | None = None,
    harness: Harness | None = None,
    on_bound: Callable[[], None] = lambda: None,
) -> AsyncIterator[Node]:
    """A node that serves meanwhile, and goes down in good order, at once if it is to hurry.

    `agent` takes the place of the one that the settings name; `worker` is its number if it is one
    of several; `harness` is what a test has a hold of, if the settings have it served; `on_bound`
    is called when it has its address and has not touched the work yet.
    Raises StartError if it cannot start.
    """
    check_entrance(config)
    store_url = StoreUrl.parse(config.store)
    harness = harness or Harness()
    harness.server = about(config, store_url)
    clock = harness.clock
    entrance = Entrance(config, clock.seconds)
    async with AsyncExitStack() as closing:
        monitor = MetricsServer(config.metrics_listen, store_url.kind, worker, clock.micros)
        tracing = TraceExport(
            config.otlp_endpoint,
            ratio=config.trace_ratio,
            content=config.log_content,
            now=clock.micros,
        )
        await closing.enter_async_context(tracing.exporting())
        agent = agent or load_agent(config.agent, agent_settings(config))
        store = open_store(store_url)
        store.on_failure = orders.store_failed
        await closing.enter_async_context(store)
        feed = Feed(store)
        monitor.attach(store, feed)
        observer = ObserverPair(monitor.observer, tracing.observer)
        coordinator = Coordinator(
            store,
            agent,
            feed,
            config.limits,
            node=NodeSettings(lease=config.node_lease),
            observer=observer,
            quotas=entrance.quotas,
            gates=harness.gates,
            now=clock.micros,
        )
        relay, peer_key = None, ""
        if store.cluster is not None:
            peer_key = store.cluster.peer_key
            relay = Relay(store.cluster, coordinator.feed, entrance.peers(peer_key))
        door = entrance.door(peer_key)
        endpoint = Endpoint(
            coordinator,
            access=door,
            progress_interval=config.progress_interval,
            shares_port=worker is not None,
            relay=relay,
            observer=observer,
            tls=entrance.tls,
            harness=harness if config.harness else None,
        )
        # Before anything is run: a server that finds its port taken must not touch the work.
        address, node_address = _bind(endpoint, config, worker)
        await closing.enter_async_context(monitor.serving(coordinator, endpoint))
        on_bound()
        try:
            await coordinator.start(node_address)
        except RunlaneError as error:
            raise StartError(error.message) from error
        if relay is not None:
            relay.start(node_address)
            closing.push_async_callback(relay.close)
        await endpoint.start()
        entrance.warn(node_address, shared=relay is not None)
        background = _in_background(
            _keep_serving(endpoint, orders),
            *retention_tasks(coordinator, retention_of(config), clock.seconds),
            entrance.watch(door),
            coordinator.stored.keep_measuring(),
        )
        try:
            yield Node(address, node_address, coordinator)
        finally:
            for task in background:
                task.cancel()
            await _go_down(coordinator, endpoint, orders, config.drain_timeout)


def _bind(endpoint: Endpoint, config: Config, worker: int | None) -> tuple[str, str]:
    """Takes the address to listen on; returns it, and the one where the other nodes reach this one.

    What workers listen on together leads to any of them, so each has a port of its own, too.
    """
    address = endpoint.bind(config.listen)
    if worker is None:
        return address, reached_at(address, config.node_address)
    given = of_worker(config.node_address, worker)
    own = endpoint.bind(own_listen(config.listen, given), alone=True)
    return address, reached_at(own, given)


def about(config: Config, store_url: StoreUrl) -> ServerInfo:
    """What a test is told of the settings."""
    return ServerInfo(
        store=store_url.kind,
        agent=config.agent.partition(":")[0],
        limits=config.limits,
        drain_timeout=config.drain_timeout,
        progress_interval=config.progress_interval,
        event_retention=config.event_retention,
    )


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


async def _go_down(
    coordinator: Coordinator, endpoint: Endpoint, orders: Orders, drain_timeout: float
) -> None:
    """New work is refused first, what is active may end, and subscribers hear of it."""
    await endpoint.mark_not_serving()
    coordinator.begin_drain()
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


async def _keep_serving(endpoint: Endpoint, orders: Orders) -> None:
    """A server that cannot be reached any more is of no use; whoever looks after it starts one
    that can."""
    try:
        await endpoint.keep_serving()
    except StartError as error:
        log.error("stopping", reason=str(error))  # noqa: TRY400 - it says all
        orders.exit_code = 1
        orders.stop.set()


def _in_background(*work: Coroutine[Any, Any, None]) -> list[asyncio.Task[None]]:
    tasks = [asyncio.create_task(one) for one in work]
    for task in tasks:
        task.add_done_callback(_log_failure)
    return tasks


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (failure := task.exception()) is not None:
        log.error("background work failed", exc_info=failure)
