"""An operator decides about the questions of agents: their rate, standing approvals, and what
an answer must name. The agents are in the server, in a process of its own, and in a worker."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runlane import (
    AnswerInvalid,
    Approval,
    Client,
    InputRequest,
    InputState,
    PermissionDenied,
    RunHandle,
)
from runlane_server.access import editing
from runlane_server.access.caller import Role
from support.server import ServerProcess, serving
from support.staging import SECONDS, script
from support.workers import requested, working

MODULE = """
async def answer(turn):
    approval = await turn.ask("May I?", tool_name="deploy", arguments={"to": turn.prompt.text})
    yield f"approved {approval.by}" if approval else "denied"
"""

AGENTS = ("inside", "own", "remote")

GRANT = """
[[grant]]
name = "staging-{agent}"
tenant = "acme"
agent = "{agent}"
tool = "deploy"
arguments = {{ to = "staging" }}
set_by = "maria"
set_at = 2026-01-01T00:00:00Z
expires = 2027-01-01T00:00:00Z
"""


class Setup:
    """A server with three agents, and the tokens of its callers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "access.toml"
        self.texts = {
            name: editing.add(self.path, name, tenant="acme", role=role)
            for name, role in (("admin", Role.ADMIN), ("other", Role.ADMIN), ("work", Role.WORK))
        }
        # The second token is limited to one agent.
        lines = self.path.read_text().splitlines()
        lines.insert(lines.index('name = "other"') + 1, 'agents = ["own"]')
        self.path.write_text("\n".join(lines) + "\n")

    def add(self, text: str) -> None:
        """Adds to the access file."""
        self.path.write_text(self.path.read_text() + text)

    @asynccontextmanager
    async def serving(self, *flags: str) -> AsyncIterator[tuple[ServerProcess, Client]]:
        """The server with its worker, and a client that may do everything."""
        (self.folder / "mine.py").write_text(MODULE)
        agents = ("inside=scripted", "own=mine:answer", "remote=worker")
        declared = [part for agent in agents for part in ("--agent", agent)]
        own = ("--agent-processes", "1", "--access", str(self.path))
        async with (
            serving(self.folder, *declared, *own, *flags) as server,
            working(server.address, {"remote": ask}, token=self.texts["work"]),
            Client(server.address, token=self.texts["admin"]) as client,
        ):
            yield server, client


async def ask(turn: Any) -> str:
    """The agent of the worker."""
    asked = {"tool_name": "deploy", "arguments": {"to": turn.prompt.text}}
    approval = await turn.ask("May I?", **asked)
    return f"approved {approval.by}" if approval else "denied"


async def begin(client: Client, agent: str, to: str, session_id: str = "") -> RunHandle:
    """A run whose agent asks for an approval."""
    step = {"ask": {"text": "May I?", "tool_name": "deploy", "arguments": {"to": to}}}
    prompt = script(step) if agent == "inside" else to
    name = session_id or f"{agent}-{to}"
    return await client.run_accepted(name, prompt, agent=agent, allow_missing=True)


async def reload(server: ServerProcess, times: int) -> None:
    """Makes the server read its access file; waits until it has done so that often."""
    server.process.send_signal(signal.SIGHUP)
    log = server.folder / "server.log"
    async with asyncio.timeout(SECONDS):
        while log.read_text().count("access file reloaded") < times:
            await asyncio.sleep(0.01)


async def answered(client: Client, run_id: str) -> list[InputRequest]:
    found = client.list_input_requests(run_id=run_id, states=[InputState.ANSWERED])
    return [request async for request in found]


async def test_a_tenant_that_asks_too_often_is_refused_whatever_its_agents_are(
    tmp_path: Path,
) -> None:
    setup = Setup(tmp_path)
    setup.add("\n[tenants.acme]\nquestions_per_second = 0.000001\nquestions_burst = 3\n")
    async with setup.serving() as (_, client):
        handles = [await begin(client, agent, "staging") for agent in AGENTS]
        requests = [await requested(client, handle.run_id) for handle in handles]
        for agent in AGENTS:
            refused = await begin(client, agent, "production")
            end = await refused.completed(SECONDS)
            assert end.error is not None
            assert end.error.reason == "INPUT_RATE_LIMITED"
            assert "questions_per_second is 1e-06" in end.error.message
        # The questions that were asked before do not count again, in a further attempt neither.
        for handle, request in zip(handles, requests, strict=True):
            await client.answer_input(request, True)
            assert (await handle.completed(SECONDS)).error is None


async def test_a_standing_approval_answers_on_the_record_until_it_is_withdrawn(
    tmp_path: Path,
) -> None:
    setup = Setup(tmp_path)
    for agent in AGENTS:
        setup.add(GRANT.format(agent=agent))
    async with setup.serving() as (server, client):
        for agent in AGENTS:
            handle = await begin(client, agent, "staging")
            assert "approved" in (await handle.completed(SECONDS)).text
            [request] = await answered(client, handle.run_id)
            given = request.answer
            assert given is not None
            assert (given.answered_by, given.authenticated_by) == ("maria", "grant")
            assert given.question_digest == request.question_digest
            assert isinstance(given.value, Approval)
            assert given.value.reason.startswith(f"standing approval 'staging-{agent}', set by mar")
            # Denied by default: other arguments are for people.
            other = await begin(client, agent, "production")
            assert (await requested(client, other.run_id)).answer is None
            assert await answered(client, other.run_id) == []
        editing.remove_grant(setup.path, "staging-inside")
        await reload(server, 1)
        late = await begin(client, "inside", "staging")
        await requested(client, late.run_id)
        # A grant that is still there applies to what is asked after this one.
        again = await begin(client, "own", "staging", "again")
        assert (await again.completed(SECONDS)).text == "approved maria"
        assert await answered(client, late.run_id) == []


async def test_answers_need_the_digest_and_the_agent(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    async with (
        setup.serving("--require-question-digest") as (server, client),
        Client(server.address, token=setup.texts["other"]) as limited,
    ):
        handle = await begin(client, "inside", "staging")
        request = await requested(client, handle.run_id)
        with pytest.raises(PermissionDenied, match="'inside'"):
            await limited.answer_input(request, True)
        for digest in ("", "00"):
            with pytest.raises(AnswerInvalid, match="question_digest"):
                await client.answer_input(replace(request, question_digest=digest), True)
        assert (await client.answer_input(request, True)).accepted
        assert (await handle.completed(SECONDS)).error is None
        own = await begin(limited, "own", "staging")
        assert (await limited.answer_input(await requested(limited, own.run_id), False)).accepted
        # A text is no approval.
        step = {"ask": {"text": "Why?"}}
        text = await client.run_accepted("t", script(step), agent="inside", allow_missing=True)
        question = replace(await requested(client, text.run_id), question_digest="")
        assert (await client.answer_input(question, "because")).accepted
