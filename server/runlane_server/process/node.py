"""A node with all its parts, from binding its address to the end of its shutdown."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from runlane_server.access.node_keys import NodeKeys
from runlane_server.agents.acp.policy import parse_policy
from runlane_server.agents.command.environment import read_variables
from runlane_server.agents.command.limits import ResourceLimits
from runlane_server.agents.command.programs import CommandSettings
from runlane_server.agents.loader import AgentSettings, agent_kind
from runlane_server.agents.scripted.latches import Latches
from runlane_server.agents.state_dirs import StateDirs
from runlane_server.cluster.key_refresh import keep_node_keys
from runlane_server.cluster.relay import Relay
from runlane_server.config import Config
from runlane_server.core.agents import AgentNames
from runlane_server.core.errors import RunlaneError, StartError, start_error
from runlane_server.core.observer import ObserverPair
from runlane_server.engine.agent_table import AgentTable
from runlane_server.engine.coordinator import Coordinator
from runlane_server.engine.executor import NodeSettings
from runlane_server.engine.pulse import Pulse
from runlane_server.engine.retention import Retention, retention_tasks
from runlane_server.feed.feed import Feed
from runlane_server.harness.harness import Harness, ServerInfo
from runlane_server.net.addresses import Address, advertised_address
from runlane_server.process.agent_processes import load_declared, serving_agents
from runlane_server.process.deliveries import NodeWebhooks
from runlane_server.process.security import Security, check_security
from runlane_server.rpc.endpoint import Endpoint
from runlane_server.store.base import StoreError
from runlane_server.store.open import open_store
from runlane_server.telemetry.metrics_server import MetricsServer
from runlane_server.telemetry.trace_export import TraceExport
from runlane_server.telemetry.watchdog import watching

log = structlog.get_logger()

STOP_GRACE = 2.0
"""Seconds that calls have to end after their subscriptions were ended. A health Watch uses all of
it."""

IMMEDIATE_STOP_GRACE = 0.5
"""The same in an immediate shutdown: enough to send what is already known."""


class ShutdownRequest:
    """A request from outside to shut a node down, gracefully or immediately."""

    def __init__(self) -> None:
        self.requested = asyncio.Event()
        self.immediate = asyncio.Event()
        self.exit_code = 0
        self.on_reload: Callable[[], None] = lambda: None
        """Reloads changed files at once. The node sets it."""

    def on_store_failure(self, error: StoreError) -> None:
        """Shuts the node down: the next start reads from the disk which writes succeeded.

        The store has logged the error already.
        """
        log.info("stopping because the store failed", reason=error.message)
        self.exit_code = 1
        self.immediate.set()
        self.requested.set()


@dataclass(frozen=True, slots=True)
class Node:
    """A serving node: its address for callers, and the one for other nodes.

    `set_http_health` reports whether HTTP is served.
    """

    address: Address
    node_address: Address
    coordinator: Coordinator
    set_http_health: Callable[[bool], Awaitable[None]]


@asynccontextmanager
async def serving(
    config: Config,
    shutdown: ShutdownRequest,
    *,
    agents: AgentTable | None = None,
    shares_port: bool = False,
    harness: Harness | None = None,
    private: Address | None = None,
    on_bound: Callable[[], None] = lambda: None,
) -> AsyncIterator[Node]:
    """Runs a node inside the context, and shuts it down at the end.

    Args:
        config: The settings.
        shutdown: Decides at the end whether the shutdown is graceful or immediate. The node makes
            the request itself when its store fails or its address is lost.
        agents: Replaces the agents that the settings name.
        shares_port: Whether other processes of this server listen on the same port.
        harness: The gates and the clock that a test controls, if the settings enable it.
        private: A socket for other processes of this server, besides the address of the settings.
        on_bound: Called when the address is bound and no run has been touched yet.

    Raises StartError if it cannot start.
    """
    check_security(config)
    harness = harness or Harness()
    harness.server = server_info(config)
    clock = harness.clock
    security = Security(config, clock.seconds)
    async with AsyncExitStack() as closing:
        metrics = MetricsServer(config.metrics_listen, config.store_url.kind, clock.micros)
        traces = TraceExport(
            config.otlp_endpoint,
            ratio=config.trace_ratio,
            content=config.log_content,
            now=clock.micros,
        )
        await closing.enter_async_context(traces.exporting())
        states = closing.enter_context(_state_dirs(config))
        table = agents or await _own_agents(closing, config, states)
        store = open_store(config.store_url)
        store.on_failure = shutdown.on_store_failure
        await closing.enter_async_context(store)
        feed = Feed(store)
        metrics.attach(store, feed)
        observer = ObserverPair(metrics.observer, traces.observer)
        closing.enter_context(watching(observer.on_loop_blocked))
        coordinator = Coordinator(
            store,
            table,
            feed,
            config.limits,
            node=NodeSettings(lease=config.node_lease),
            observer=observer,
            quotas=security.quotas,
            grants=security.grants,
            gates=harness.gates,
            pulse=Pulse(),
            now=clock.micros,
        )
        relay, node_keys = None, NodeKeys()
        if store.cluster is not None:
            node_keys = NodeKeys(store.cluster.node_keys)
            relay = Relay(store.cluster, coordinator.feed, security.peers(node_keys))
        access_control = security.access_control(node_keys)
        shutdown.on_reload = partial(security.refresh_safely, access_control)
        endpoint = Endpoint(
            coordinator,
            access=access_control,
            progress_interval=config.progress_interval,
            shares_port=shares_port,
            relay=relay,
            observer=observer,
            tls=security.tls,
            harness=harness if config.harness else None,
            workers=table.workers,
            webhooks=(webhooks := NodeWebhooks(config, coordinator, metrics.webhooks)).registry,
            socket_mode=int(config.socket_mode, 8),
            private=private,
            max_per_address=config.max_connections_per_address,
            requires_digest=config.require_question_digest,
        )
        # Before any run: a server whose port is in use must not touch the runs in the store.
        address, node_address = _bind(endpoint, config, shares_port=shares_port)
        if private is not None:
            endpoint.bind(private)
        node_keys.address = str(node_address)
        await closing.enter_async_context(metrics.serving(coordinator, endpoint))
        on_bound()
        try:
            await coordinator.start(str(node_address))
        except RunlaneError as error:
            raise StartError(error.message) from error
        if relay is not None:
            relay.start(str(node_address))
            closing.push_async_callback(relay.close)
        await closing.enter_async_context(webhooks.delivering())
        await endpoint.start()
        security.log_warnings(node_address, shared=relay is not None)
        background = _in_background(
            _keep_serving(endpoint, shutdown),
            endpoint.keep_shares(),
            endpoint.keep_floods_out(),
            *retention_tasks(coordinator, retention_of(config), clock.seconds),
            security.keep_current(access_control),
            coordinator.stored.keep_measuring(),
            coordinator.inputs.keep_expiring(),
            keep_node_keys(store.cluster, access_control),
            *([] if states is None else [states.keep_swept(coordinator.sessions.exists)]),
        )
        try:
            yield Node(address, node_address, coordinator, endpoint.set_http_health)
        finally:
            for task in background:
                task.cancel()
            await _shut_down(coordinator, endpoint, shutdown, config.drain_timeout)


async def _own_agents(
    closing: AsyncExitStack, config: Config, states: StateDirs | None
) -> AgentTable:
    """The agents that the settings declare, until `closing` closes."""
    agents = serving_agents(config, agent_settings(config, states))
    return await closing.enter_async_context(agents)


def _bind(endpoint: Endpoint, config: Config, *, shares_port: bool) -> tuple[Address, Address]:
    """Binds the address for callers; returns it, and the address for other nodes.

    Calls to a shared port reach any of its processes, so each also has a port of its own.
    """
    address = endpoint.bind(config.listen)
    if not shares_port:
        return address, advertised_address(address, config.node_address)
    port = config.node_address.port if config.node_address else 0
    own = endpoint.bind(config.listen.with_port(port), alone=True)
    return address, advertised_address(own, config.node_address)


def server_info(config: Config) -> ServerInfo:
    """The settings that a harness reports to a test."""
    return ServerInfo(
        store=config.store_url.kind,
        agent=_default_kind(config),
        limits=config.limits,
        drain_timeout=config.drain_timeout,
        progress_interval=config.progress_interval,
        event_retention=config.event_retention,
    )


@contextmanager
def _state_dirs(config: Config) -> Iterator[StateDirs | None]:
    """The directories that agents keep for sessions, if they keep any. Raises StartError."""
    if config.agent_state_dir is None:
        yield None
        return
    try:
        states = StateDirs(Path(config.agent_state_dir), config.store_url.name)
    except OSError as error:
        raise start_error(f"--agent-state-dir: {error}", error) from error
    try:
        yield states
    finally:
        states.close()


def _default_kind(config: Config) -> str:
    """The kind of the default agent."""
    specs = {each.name: each.spec for each in config.agents}
    return agent_kind(specs[AgentNames.of(tuple(specs)).default])


def load_agents(config: Config, states: StateDirs | None = None) -> AgentTable:
    """Creates the agents that the settings declare in this process. Raises StartError."""
    settings = agent_settings(config, states)
    return AgentTable([load_declared(each, settings) for each in config.agents])


def agent_settings(config: Config, states: StateDirs | None = None) -> AgentSettings:
    """The settings of the agents. Scripted agents under several names share their latches.

    A cancelled program has half of the cancel grace to exit. It is killed and reaped in the other
    half.
    """
    return AgentSettings(
        command_kill_grace=config.limits.cancel_grace / 2,
        command=command_settings(config, states),
        acp_policy=parse_policy(config.acp_permissions),
        acp_mode=config.acp_mode,
        acp_auth=config.acp_auth,
        chat_instructions=config.chat_instructions or None,
        chat_lenient_end=config.chat_lenient_end,
        reload=config.reload,
        latches=Latches(),
        worker_lease=config.worker_lease,
    )


def command_settings(config: Config, states: StateDirs | None = None) -> CommandSettings:
    """The settings of programs. Raises StartError for a wrong file of variables."""
    path = config.command_env_file
    from_file = read_variables(Path(path)) if path else ()
    return CommandSettings(
        env=(*from_file, *config.command_env),
        directory=Path(config.command_dir) if config.command_dir else None,
        cwd=Path(config.command_cwd) if config.command_cwd else None,
        limits=ResourceLimits(
            cpu=math.ceil(config.command_cpu),
            memory=config.command_memory,
            files=config.command_files,
            processes=config.command_processes,
            file_size=config.command_file_size,
        ),
        state=states,
    )


def retention_of(config: Config) -> Retention:
    """How long data is kept."""
    return Retention(
        events=config.event_retention or None,
        event_bytes=config.event_retention_bytes or None,
        sessions=config.session_retention or None,
    )


async def _shut_down(
    coordinator: Coordinator,
    endpoint: Endpoint,
    shutdown: ShutdownRequest,
    drain_timeout: float,
) -> None:
    """Refuses new work, waits for active runs, and sends their ends to the subscribers."""
    await endpoint.mark_not_serving()
    coordinator.begin_drain()
    log.info("draining", timeout_s=drain_timeout)
    idle = await _unless(shutdown.immediate, coordinator.wait_idle(drain_timeout))
    coordinator.feed.close()
    immediate = shutdown.immediate.is_set()
    returned = await endpoint.stop(IMMEDIATE_STOP_GRACE if immediate else STOP_GRACE)
    if not returned:
        log.warning("handlers have not returned")
    await coordinator.stop()
    log.info("stopped", idle=bool(idle))


async def _unless(event: asyncio.Event, wait: Coroutine[Any, Any, bool]) -> bool:
    """The result of `wait`; False if the event comes first."""
    waiting = asyncio.ensure_future(wait)
    interrupted = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({waiting, interrupted}, return_when=asyncio.FIRST_COMPLETED)
        return waiting.done() and waiting.result()
    finally:
        waiting.cancel()
        interrupted.cancel()


async def _keep_serving(endpoint: Endpoint, shutdown: ShutdownRequest) -> None:
    """Ends a server that can no longer be reached, so that its supervisor starts another."""
    try:
        await endpoint.keep_serving()
    except StartError as error:
        log.error("stopping", reason=str(error))  # noqa: TRY400 - the text is the whole reason
        shutdown.exit_code = 1
        shutdown.requested.set()


def _in_background(*work: Coroutine[Any, Any, None]) -> list[asyncio.Task[None]]:
    tasks = [asyncio.create_task(one) for one in work]
    for task in tasks:
        task.add_done_callback(_log_failure)
    return tasks


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (failure := task.exception()) is not None:
        log.error("background task failed", exc_info=failure)
