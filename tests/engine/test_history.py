"""The transcript that an agent is given."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

import pytest

from runlane_server.agents.base import AgentEvent, Turn
from runlane_server.core.limits import Limits
from runlane_server.core.model import Message, Prompt, Role, Text, TextDelta, ToolCall, ToolResult
from runlane_server.engine.agent_turn import MESSAGE_BYTES
from runlane_server.store.base import Store
from support.node import running
from support.staging import SECONDS

pytestmark = pytest.mark.stores("memory", "sqlite", "postgresql")

TURN = 2 * (MESSAGE_BYTES + 100)
"""The size of a turn of the agent below: a prompt and an answer of 100 bytes each."""


class Remembering:
    """An agent that keeps the history it was given."""

    def __init__(self, *, with_tools: bool = False) -> None:
        self.histories: list[Sequence[Message]] = []
        self._with_tools = with_tools

    async def start(self) -> None:
        pass

    async def run(self, turn: Turn) -> AsyncGenerator[AgentEvent, None]:
        self.histories.append(await turn.history())
        if self._with_tools:
            yield ToolCall(turn.run_id, "look", "{}")
            yield ToolResult(turn.run_id, "look", "seen")
        yield TextDelta(turn.prompt.text[::-1])

    async def close(self) -> None:
        pass


async def last_history(store: Store, agent: Remembering, turns: int, limit: int) -> list[str]:
    """The texts of the history after some turns."""
    limits = Limits(cancel_grace=SECONDS, max_history=limit)
    async with running(store, agent=agent, limits=limits) as node:
        for n in range(turns + 1):
            await node.coordinator.run("s", Prompt(f"{n:03}" + "." * 97))
    return [
        part.text[:3] for m in agent.histories[-1] for part in m.parts if isinstance(part, Text)
    ]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (5 * TURN, ["000", "001", "002", "003", "004"]),
        (5 * TURN - 1, ["001", "002", "003", "004"]),
        (2 * TURN, ["003", "004"]),
        (1, ["004"]),
    ],
)
async def test_the_history_has_the_latest_turns_within_its_limit(
    store: Store, limit: int, expected: list[str]
) -> None:
    found = await last_history(store, Remembering(), 5, limit)
    assert found[::2] == expected
    assert set(found[1::2]) == {"..."}


async def test_a_turn_is_left_out_as_a_whole(store: Store) -> None:
    agent = Remembering(with_tools=True)
    await last_history(store, agent, 5, 3 * TURN)
    history = agent.histories[-1]
    assert 0 < len({message.turn for message in history}) < 5
    roles = [message.role for message in history]
    assert roles == [Role.USER, Role.ASSISTANT, Role.TOOL, Role.ASSISTANT] * (len(roles) // 4)
