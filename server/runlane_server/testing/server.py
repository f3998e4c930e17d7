"""A real server inside your own process, for tests of applications that call Runlane.

    async def test_it():
        async with LocalServer() as server, server.client() as client:
            handle = await client.run_accepted("s", "Hello", allow_missing=True)
            assert (await handle.completed()).text == "Hello"

It is the same server as on the command line, listens on a real port, and starts in some
milliseconds. By default its store is in memory; with a SQLite file it can be restarted. It logs
through structlog as your process configures it: without a configuration everything, to stdout.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, TypeAlias

from runlane import Client
from runlane_server.agents.base import Agent, AgentEvent, Turn
from runlane_server.agents.custom import as_agent
from runlane_server.agents.loader import agent_kind, load_agent
from runlane_server.agents.scripted.latches import Latches
from runlane_server.config import Config
from runlane_server.core.agents import DEFAULT_AGENT
from runlane_server.engine.agent_table import AgentTable, DeclaredAgent
from runlane_server.engine.coordinator import Coordinator
from runlane_server.harness.harness import Harness
from runlane_server.net.addresses import Address
from runlane_server.process.node import Node, ShutdownRequest, agent_settings, serving

AgentLike: TypeAlias = str | Agent | Callable[[Turn], AsyncGenerator[AgentEvent | str, None]]
"""A value of `--agent`, or your own agent, such as a function."""

_DEFAULTS = Config(drain_timeout=0.0)

_OWN = "own:agent"
"""Stands in the settings for an agent that is no value of `--agent`."""


class LocalServer:
    """A server inside this process, on the event loop that starts it.

    Args:
        agent: The agent. With `"scripted"`, prompts are scripts, and `gates` has their latches.
        agents: Several agents by name, in place of `agent`.
        store: A value of `--store`.
        listen: A value of `--listen`. Port 0 is a free port; a Unix socket is `unix:PATH`.
        config: All other settings. The default does not wait for active runs when it stops.
        harness: Whether to serve `runlane.harness.v1` too. It can hold runs at gates; it cannot
            advance the clock or end the process, as both belong to your program.

    Raises ValueError if `listen` is not an address. Entering the context raises StartError if the
    server cannot start.
    """

    def __init__(
        self,
        agent: AgentLike = "echo",
        *,
        agents: Mapping[str, AgentLike] | None = None,
        store: str = "memory:",
        listen: str = "127.0.0.1:0",
        config: Config = _DEFAULTS,
        harness: bool = False,
    ) -> None:
        if not isinstance(config, Config):
            raise TypeError(f"config must be a runlane_server.config.Config, not {config!r}")
        self.gates = Latches()
        self._agents = {DEFAULT_AGENT: agent} if agents is None else dict(agents)
        if not self._agents:
            raise ValueError("agents: name at least one agent")
        self._config = replace(
            config,
            agent=tuple(
                f"{name}={its if isinstance(its, str) else _OWN}"
                for name, its in self._agents.items()
            ),
            store=store,
            listen=Address.parse(listen),
            harness=harness or config.harness,
        )
        self._harness = Harness()
        self._node: Node | None = None
        self._closing = AsyncExitStack()

    @property
    def address(self) -> str:
        """The address that it listens on; a restart keeps it."""
        return str(self._running.address)

    @property
    def coordinator(self) -> Coordinator:
        """The Python API of the same server, without gRPC."""
        return self._running.coordinator

    @property
    def _running(self) -> Node:
        if self._node is None:
            raise RuntimeError("the server is not running")
        return self._node

    def client(self, **options: Any) -> Client:
        """Creates a client, to be closed by the caller; `options` are those of `runlane.Client`."""
        return Client(self.address, **options)

    async def start(self) -> None:
        """Starts the server. Raises StartError, or RuntimeError if it is running."""
        if self._node is not None:
            raise RuntimeError("the server is already running")
        node = serving(
            self._config, ShutdownRequest(), agents=self._make_agents(), harness=self._harness
        )
        self._node = await self._closing.enter_async_context(node)
        # A restart must keep the port.
        self._config = replace(self._config, listen=self._node.address)

    def _make_agents(self) -> AgentTable:
        """The agents: yours, and those of the settings. Scripted ones share the latches."""
        settings = replace(agent_settings(self._config), latches=self.gates)
        declared = []
        for each in self._config.agents:
            own = self._agents[each.name]
            is_spec = isinstance(own, str)
            agent = load_agent(each.spec, settings) if is_spec else as_agent("agent", own)
            kind = agent_kind(each.spec) if is_spec else "python"
            declared.append(DeclaredAgent(each.name, agent, kind, each.slots))
        return AgentTable(declared)

    async def stop(self) -> None:
        """Shuts down gracefully. Waiting runs stay in the store; a store in memory is lost."""
        self._node = None
        await self._closing.aclose()

    async def restart(self) -> None:
        """Stops, then starts at the same address. Raises StartError."""
        await self.stop()
        await self.start()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()
