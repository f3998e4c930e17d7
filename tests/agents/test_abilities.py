"""The abilities of the runs of an agent, as the server reports it."""

from __future__ import annotations

from pathlib import Path

import pytest

from runlane_server.agents.abilities import Ability, abilities_of
from runlane_server.agents.acp.policy import parse_policy
from runlane_server.agents.loader import AgentSettings, load_agent

MODULE = """
from pydantic_ai import Agent
from pydantic_ai.models.test import TestModel
from runlane_server.agents.functions import resumable as again

async def answer(turn):
    yield "hello"

@again
async def asker(turn):
    yield await turn.ask("well?")

model = Agent(TestModel())
"""


@pytest.mark.parametrize(
    ("spec", "can"),
    [
        ("echo", "fold"),
        ("command:cat", ""),
        ("command+json:cat", "attachments"),
        ("acp:cat", ""),
        ("chat:openai:m", "fold attachments"),
        ("able_agents:answer", "fold ask steps attachments"),
        ("able_agents:asker", "fold ask steps attachments resume"),
        ("able_agents:model", "fold ask attachments resume"),
        ("worker", "fold ask steps attachments resume outlive"),
        ("scripted", "fold ask steps resume"),
    ],
)
def test_an_agent_can_do_what_its_kind_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, can: str
) -> None:
    (tmp_path / "able_agents.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    assert " ".join(abilities_of(load_agent(spec))) == can


@pytest.mark.parametrize(("policy", "can"), [("allow", ""), ("deny,edit=ask", "ask")])
def test_an_acp_agent_asks_people_only_if_the_policy_leaves_it_to_them(
    policy: str, can: str
) -> None:
    agent = load_agent("acp:cat", AgentSettings(acp_policy=parse_policy(policy)))
    assert " ".join(abilities_of(agent)) == can


def test_an_agent_that_never_asks_does_not_resume() -> None:
    class Silent:
        abilities = (Ability.FOLD,)
        resumable = True

    assert abilities_of(Silent()) == (Ability.FOLD,)
