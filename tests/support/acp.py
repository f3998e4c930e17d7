"""ACP agents of the tests: programs of some lines, and helpers that run them.

A program begins with `PRELUDE`, which reads and writes messages. `prompt()` answers everything
before the prompt and returns it, so most programs only say what they do with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from runlane_server.agents.acp.agent import AcpAgent
from runlane_server.agents.acp.opening import AcpSettings
from runlane_server.agents.acp.policy import parse_policy
from runlane_server.agents.base import AgentError, AgentEvent
from runlane_server.agents.command.programs import CommandSettings
from runlane_server.agents.state_dirs import StateDirs
from support.programs import GRACE
from support.turns import LocalTurn, Working, ask, collect

PRELUDE = '''
import json, os, signal, sys, time

SESSION = "session-1"

def read():
    line = sys.stdin.readline()
    if not line:
        sys.exit(0)
    return json.loads(line)

def write(**message):
    sys.stdout.write(json.dumps({"jsonrpc": "2.0", **message}) + "\\n")
    sys.stdout.flush()

def answer(request, **result):
    write(id=request["id"], result=result)

def update(name, /, **fields):
    fields = {"sessionUpdate": name, **fields}
    write(method="session/update", params={"sessionId": SESSION, "update": fields})

def text(content):
    return {"type": "text", "text": content}

def say(content, **fields):
    update("agent_message_chunk", content=text(content), **fields)

def ask(call, *kinds):
    """Asks for a permission; returns the outcome."""
    options = [{"optionId": "id-" + kind, "name": kind, "kind": kind} for kind in kinds]
    params = {"sessionId": SESSION, "toolCall": call, "options": options}
    write(id="ask-1", method="session/request_permission", params=params)
    return read()["result"]["outcome"]

def prompt(session=None, modes=None, **capabilities):
    """Answers everything until the prompt; returns that request."""
    while True:
        request = read()
        method = request["method"]
        if method == "session/prompt":
            return request
        if method == "initialize":
            answer(request, protocolVersion=1, agentCapabilities=capabilities)
        elif method == "session/new":
            answer(request, sessionId=SESSION, **({"modes": modes} if modes else {}))
        elif session is not None and method in session:
            session[method](request)
        else:
            answer(request)

def done(request, reason="end_turn", **fields):
    answer(request, stopReason=reason, **fields)
'''


def agent(
    code: str,
    *,
    permissions: str = "deny",
    mode: str = "",
    auth: str = "",
    grace: float = GRACE,
    state: Path | None = None,
    cwd: Path | None = None,
) -> AcpAgent:
    """An agent that is Python source; see `PRELUDE` for what it may use."""
    return AcpAgent(
        [sys.executable, "-c", PRELUDE + code],
        kill_grace=grace,
        settings=AcpSettings(parse_policy(permissions), mode, auth),
        command=CommandSettings(cwd=cwd, state=None if state is None else StateDirs(state)),
    )


async def events(agent: AcpAgent, turn: LocalTurn | None = None) -> list[AgentEvent]:
    """Runs a turn and closes the agent; returns what it yielded."""
    try:
        return await collect(agent, turn or ask(""))
    finally:
        await agent.close()


async def failure(agent: AcpAgent, reason: str, turn: LocalTurn | None = None) -> str:
    """Runs a turn that fails and closes the agent; returns the error text."""
    with pytest.raises(AgentError) as failed:
        await events(agent, turn)
    assert failed.value.reason == reason
    return failed.value.message


@contextlib.asynccontextmanager
async def at_work(agent: AcpAgent, prompt: str = "") -> AsyncIterator[Working]:
    """The agent at work on a prompt; it is cancelled and closed at the end."""
    working = Working(agent, ask(prompt))
    try:
        yield working
    finally:
        working.task.cancel()
        await asyncio.wait({working.task})
        await agent.close()
