"""A real server within your own process, for the tests of whatever calls Runlane.

    async def test_it():
        async with LocalServer() as server, server.client() as client:
            handle = await client.run_accepted("s", "Hello", allow_missing=True)
            assert (await handle.completed()).text == "Hello"

It is the same server as that of the command line, over a real port of this machine, started in some
milliseconds. By default its store is in memory; with a SQLite file it can be started again. It logs
by structlog as your process has set that up: without any set-up that is all of it, on stdout.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, TypeAlias

from runlane import Client
from runlane_server.agents.base import Agent, AgentEvent, Turn
from runlane_server.agents.custom import as_agent
from runlane_server.agents.scripted.agent import ScriptedAgent
from runlane_server.agents.scripted.latches import Latches
from runlane_server.config import Config
from runlane_server.engine.coordinator import Coordinator
from runlane_server.harness.harness import Harness
from runlane_server.process.node import Node, Orders, serving

AgentLike: TypeAlias = str | Agent | Callable[[Turn], AsyncGenerator[AgentEvent | str, None]]
"""What `--agent` takes; or an agent of your own, such as an async generator function."""

_DEFAULTS = Config(drain_timeout=0.0)


class LocalServer:
    """A server of this process, for the event loop that it is started on.

    Args:
        agent: What runs. With `"scripted"` prompts are scripts, and `gates` are theirs.
        store: As `--store` takes it.
        listen: As `--listen` takes it. Port 0 is a free one; a Unix socket is `unix:PATH`.
        config: All other settings. By default it does not wait for active runs when it stops.
        harness: Whether to serve `runlane.harness.v1` too. It can hold runs at gates; the clock and
            the process are not this server's own, and stay as they are.

    Entering it raises StartError if it cannot start.
    """

    def __init__(
        self,
        agent: AgentLike = "echo",
        *,
        store: str = "memory:",
        listen: str = "127.0.0.1:0",
        config: Config = _DEFAULTS,
        harness: bool = False,
    ) -> None:
        if not isinstance(config, Config):
            raise TypeError(f"config has to be a runlane_server.config.Config, not {config!r}")
        self.gates = Latches()
        self._agent = agent
        spec = agent if isinstance(agent, str) else config.agent
        self._config = replace(
            config, agent=spec, store=store, listen=listen, harness=harness or config.harness
        )
        self._harness = Harness()
        self._node: Node | None = None
        self._closing = AsyncExitStack()

    @property
    def address(self) -> str:
        """Where it serves; it keeps its port over a restart."""
        return self._running.address

    @property
    def coordinator(self) -> Coordinator:
        """The same server without a wire: a Python API."""
        return self._running.coordinator

    @property
    def _running(self) -> Node:
        if self._node is None:
            raise RuntimeError("the server does not run")
        return self._node

    def client(self, **options: Any) -> Client:
        """A client of it, to be closed by the caller; `options` are those of `runlane.Client`."""
        return Client(self.address, **options)

    async def start(self) -> None:
        """Serves from now on. Raises StartError."""
        if self._node is not None:
            raise RuntimeError("the server runs already")
        agent = None if isinstance(self._agent, str) else as_agent("agent", self._agent)
        if self._agent == "scripted":
            agent = ScriptedAgent(self.gates)
        node = serving(self._config, Orders(), agent=agent, harness=self._harness)
        self._node = await self._closing.enter_async_context(node)
        # What is there after a restart is found where it was.
        self._config = replace(self._config, listen=self._node.address)

    async def stop(self) -> None:
        """Goes down in good order: what waits is left in the store, which is gone if it is in
        memory."""
        self._node = None
        await self._closing.aclose()

    async def restart(self) -> None:
        """Stops, and serves again at the same address. Raises StartError."""
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
