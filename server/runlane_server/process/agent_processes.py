"""The agents of a node: in its own process, or in processes of their own (`--agent-processes`)."""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from runlane_server.agents.abilities import OF_CODE, OF_MODEL
from runlane_server.agents.declaration import AgentDeclaration
from runlane_server.agents.loader import AgentSettings, agent_kind, load_agent
from runlane_server.agents.processes.agent import ProcessAgent
from runlane_server.agents.processes.supervisor import ProcessSpec
from runlane_server.config import Config
from runlane_server.engine.agent_table import AgentTable, DeclaredAgent
from runlane_server.rpc.agent_socket import AgentSocket

IN_PROCESSES = frozenset({"python", "chat"})
"""The kinds of agents whose code is Python. That of an ACP agent is a program of its own."""

_CHILD = "runlane_server.process.agent_child"


@asynccontextmanager
async def serving_agents(config: Config, settings: AgentSettings) -> AsyncIterator[AgentTable]:
    """Makes the agents that the settings declare, and ends their processes. Raises StartError."""
    if not (config.agent_processes and any(map(_is_in_processes, config.agents))):
        yield AgentTable([load_declared(each, settings) for each in config.agents])
        return
    directory = Path(tempfile.mkdtemp(prefix="runlane-agents-"))  # with mode 0700
    socket = AgentSocket(str(directory / "s"))
    agents = [
        _in_processes(config, each, socket)
        if _is_in_processes(each)
        else load_declared(each, settings)
        for each in config.agents
    ]
    started = [each.agent for each in agents if isinstance(each.agent, ProcessAgent)]
    try:
        await socket.start()
        for agent in started:
            await agent.load()
        yield AgentTable(agents)
    finally:
        for agent in started:
            await agent.close()
        await socket.stop()
        shutil.rmtree(directory, ignore_errors=True)


def load_declared(declared: AgentDeclaration, settings: AgentSettings) -> DeclaredAgent:
    """Creates an agent in this process. Raises StartError."""
    agent = load_agent(declared.spec, settings)
    return DeclaredAgent(declared.name, agent, agent_kind(declared.spec), declared.slots)


def _is_in_processes(declared: AgentDeclaration) -> bool:
    return agent_kind(declared.spec) in IN_PROCESSES


def _in_processes(config: Config, declared: AgentDeclaration, socket: AgentSocket) -> DeclaredAgent:
    secret = socket.new_secret()
    slots = config.limits.max_active_runs if declared.slots is None else declared.slots
    count = config.agent_processes if slots else 0
    settings: dict[str, object] = {
        # The agent has no use for the password of the store.
        "config": replace(config, store="memory:").to_json(),
        "agent": declared.name,
        "address": socket.address,
        "secret": secret,
        "slots": math.ceil(slots / max(1, count)),
    }
    specs = [_spec(settings, f"{declared.name}#{number}") for number in range(1, count + 1)]
    kind = agent_kind(declared.spec)
    agent = ProcessAgent(declared.name, specs, OF_MODEL if kind == "chat" else OF_CODE)
    socket.admit(secret, agent.workers)
    return DeclaredAgent(declared.name, agent, kind, declared.slots)


def _spec(settings: Mapping[str, object], worker_id: str) -> ProcessSpec:
    text = json.dumps({**settings, "worker_id": worker_id})
    return ProcessSpec((sys.executable, "-m", _CHILD), text, worker_id)
