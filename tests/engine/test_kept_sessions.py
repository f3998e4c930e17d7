"""Agents that keep something for each session are called when it is deleted."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

import pytest

from runlane_server.agents.base import AgentEvent, Turn
from runlane_server.core.errors import SessionBusy, SessionNotFound
from runlane_server.core.model import SessionKey, TextDelta
from runlane_server.engine.agent_table import AgentTable, DeclaredAgent
from runlane_server.store.base import Store
from support.node import Node, running

KEY = SessionKey("default", "s")


@dataclass
class Keeper:
    """An agent that keeps the prompts of each session. The prompt `wait` is not answered."""

    kept: dict[SessionKey, list[str]] = field(default_factory=dict)
    deleted: list[SessionKey] = field(default_factory=list)
    fails: bool = False

    async def start(self) -> None:
        """Does nothing."""

    async def run(self, turn: Turn) -> AsyncGenerator[AgentEvent, None]:
        """Answers with all prompts of the session."""
        key = SessionKey(turn.tenant, turn.session_id)
        prompts = self.kept.setdefault(key, [])
        prompts.append(turn.prompt.text)
        yield TextDelta(",".join(prompts))

    def session_deleted(self, key: SessionKey) -> None:
        """Forgets a session."""
        self.deleted.append(key)
        if self.fails:
            raise RuntimeError("no")
        self.kept.pop(key, None)

    async def close(self) -> None:
        """Does nothing."""


async def text(node: Node, prompt: str) -> str:
    """Runs a prompt of the session; returns the answer."""
    return (await node.end((await node.accept("s", prompt)).run.run_id)).text


async def test_a_session_that_was_deleted_leaves_nothing_to_the_next_of_its_name(
    store: Store,
) -> None:
    keeper = Keeper()
    async with running(store, agent=keeper) as node:
        assert await text(node, "a") == "a"
        assert await text(node, "b") == "a,b"
        await node.coordinator.sessions.delete("s")
        assert keeper.deleted == [KEY]
        assert await text(node, "c") == "c"


async def test_a_session_that_is_not_deleted_is_kept(store: Store) -> None:
    keeper = Keeper()
    async with running(store, agent=keeper) as node:
        with pytest.raises(SessionNotFound):
            await node.coordinator.sessions.delete("s")
        with (
            node.coordinator.begin_accepted("s", ""),
            pytest.raises((SessionBusy, SessionNotFound)),
        ):
            await node.coordinator.sessions.delete("s")
        assert keeper.deleted == []


async def test_every_agent_is_called_and_a_failure_of_one_stops_nothing(store: Store) -> None:
    bad, good = Keeper(fails=True), Keeper()
    table = AgentTable([DeclaredAgent("bad", bad), DeclaredAgent("good", good, slots=0)])
    async with running(store, agent=table) as node:
        await text(node, "a")
        await node.coordinator.sessions.delete("s")
        assert (bad.deleted, good.deleted) == ([KEY], [KEY])
        assert await text(node, "b") == "a,b"
