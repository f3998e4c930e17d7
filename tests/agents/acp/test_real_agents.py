"""Real agents, against models of the tests: `make test-agents` installs them and runs this.

No agent reaches another network: `make test-agents` runs this in a network namespace where the
machine allows one. Otherwise settings and a proxy that does not exist keep the agents in.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from runlane_server.agents.acp.agent import AcpAgent
from runlane_server.agents.acp.opening import AcpSettings
from runlane_server.agents.acp.policy import parse_policy
from runlane_server.agents.base import AgentEvent
from runlane_server.agents.command.programs import CommandSettings
from runlane_server.agents.state_dirs import StateDirs
from runlane_server.core.model import Message, Prompt, Role, ToolCall, ToolResult
from support.gemini_server import GeminiServer
from support.turns import LocalTurn, Working, collect, message, texts

INSTALLED = os.environ.get("RUNLANE_AGENTS", "")
"""The folder with the agents, one npm prefix for each."""

IS_ISOLATED = os.environ.get("RUNLANE_NO_NETWORK") == "1"
"""Whether there is no network but the loopback."""

PLACE = Path(INSTALLED).absolute()

pytestmark = [
    pytest.mark.skipif(not INSTALLED, reason="run make test-agents"),
    pytest.mark.timeout(300),
]

NO_NETWORK = (
    *("HTTP_PROXY=http://127.0.0.1:9", "HTTPS_PROXY=http://127.0.0.1:9"),
    *("ALL_PROXY=http://127.0.0.1:9", "NO_PROXY=127.0.0.1,localhost"),
)


@dataclass(frozen=True)
class RealAgent:
    """How an agent is started. `asks`: it asks before it runs a command, and the model's API lets
    the test make it run one. `continues`: it loads its own sessions. `knows_no_proxy`: it sends
    requests to the loopback past a proxy."""

    program: str
    arguments: Sequence[str] = ()
    env: Sequence[str] = ()
    auth: str = ""
    asks: bool = False
    continues: bool = True
    knows_no_proxy: bool = True


def _codex(url: str) -> str:
    provider = f'name="local", base_url="{url}", wire_api="responses", env_key="OPENAI_API_KEY"'
    return f"model_providers.local={{{provider}}}"


def _opencode(url: str) -> str:
    options = {"baseURL": url, "apiKey": "key"}
    local = {"npm": "@ai-sdk/openai-compatible", "options": options, "models": {"test": {}}}
    return "OPENCODE_CONFIG_CONTENT=" + json.dumps(
        {
            "provider": {"local": local},
            "model": "local/test",
            "small_model": "local/test",
            "autoupdate": False,
            "share": "disabled",
        }
    )


AGENTS: dict[str, Callable[[str], RealAgent]] = {
    "codex-acp": lambda url: RealAgent(
        "codex-acp/node_modules/.bin/codex-acp",
        (
            *("-c", 'model_provider="local"', "-c", 'model="gpt-5.2-codex"', "-c", _codex(url)),
            *("-c", 'sandbox_mode="danger-full-access"', "-c", 'approval_policy="untrusted"'),
        ),
        env=("OPENAI_API_KEY=key",),
        asks=True,
    ),
    "gemini-cli": lambda url: RealAgent(
        "gemini-cli/node_modules/.bin/gemini",
        ("--acp", "--model", "gemini-2.5-flash"),
        env=("GEMINI_API_KEY=key", f"GOOGLE_GEMINI_BASE_URL={url.removesuffix('/v1')}"),
        auth="gemini-api-key",
        continues=False,
        knows_no_proxy=False,
    ),
    "opencode": lambda url: RealAgent(
        "opencode/node_modules/opencode-linux-x64/bin/opencode",
        ("acp",),
        env=(
            _opencode(url),
            *("OPENCODE_DISABLE_AUTOUPDATE=1", "OPENCODE_DISABLE_LSP_DOWNLOAD=1"),
            "OPENCODE_DISABLE_MODELS_FETCH=1",
        ),
    ),
    "qwen-code": lambda url: RealAgent(
        "qwen-code/node_modules/.bin/qwen",
        ("--acp",),
        env=("OPENAI_API_KEY=key", f"OPENAI_BASE_URL={url}", "OPENAI_MODEL=test"),
        knows_no_proxy=False,
    ),
}


@asynccontextmanager
async def running(
    name: str, tmp_path: Path, permissions: str = "allow"
) -> AsyncGenerator[AcpAgent, None]:
    """The agent, and the model that it asks."""
    async with GeminiServer().serving() as model:
        real = AGENTS[name](model.base_url)
        program = PLACE / real.program
        if not os.access(program, os.X_OK):
            pytest.skip(f"{name} is not installed")
        if not (real.knows_no_proxy or IS_ISOLATED):
            pytest.skip(f"{name} could reach other networks here")
        proxy = NO_NETWORK if real.knows_no_proxy else ()
        agent = AcpAgent(
            [str(program), *real.arguments],
            kill_grace=2.0,
            settings=AcpSettings(parse_policy(permissions), auth=real.auth),
            command=CommandSettings(
                env=(*proxy, *real.env),
                state=StateDirs(tmp_path / "states"),
            ),
        )
        await agent.start()
        try:
            yield agent
        finally:
            await agent.close()


def answer(events: Sequence[AgentEvent]) -> str:
    """The text of a turn."""
    return "".join(texts(events))


def turns(*said: tuple[str, str]) -> list[Message]:
    """A transcript of prompts and answers."""
    return [
        message(number, role, text)
        for number, both in enumerate(said, 1)
        for role, text in zip((Role.USER, Role.ASSISTANT), both, strict=True)
    ]


@pytest.mark.parametrize("name", AGENTS)
async def test_an_agent_answers_and_the_next_turn_knows_the_first(
    name: str, tmp_path: Path
) -> None:
    async with running(name, tmp_path) as agent:
        first = answer(await collect(agent, LocalTurn(Prompt("first-prompt"))))
        assert "first-prompt" in first
        second = LocalTurn(Prompt("second-prompt"), turns(("first-prompt", first)), run_id="r2")
        said = answer(await collect(agent, second))
        assert "second-prompt" in said
        # The model repeats the prompt. It has the earlier turn only if the session is a new one.
        assert ("first-prompt" in said) is not AGENTS[name]("").continues


@pytest.mark.parametrize("name", [name for name in AGENTS if AGENTS[name]("").asks])
@pytest.mark.parametrize("allows", [True, False])
async def test_an_agent_asks_before_it_runs_a_command(
    name: str, allows: bool, tmp_path: Path
) -> None:
    async with running(name, tmp_path, "allow" if allows else "deny") as agent:
        mark = tmp_path / "mark"
        events = await collect(agent, LocalTurn(Prompt(f"run: echo made > {mark}; echo done")))
    assert mark.exists() is allows
    (call,) = (one for one in events if isinstance(one, ToolCall))
    assert call.name == "execute"
    assert str(mark) in call.arguments_json
    assert [one.is_error for one in events if isinstance(one, ToolResult)] == [False] * allows


@pytest.mark.parametrize("name", [name for name in AGENTS if AGENTS[name]("").asks])
async def test_a_cancelled_agent_answers_and_the_next_turn_goes_on(
    name: str, tmp_path: Path
) -> None:
    async with running(name, tmp_path) as agent:
        working = Working(agent, LocalTurn(Prompt("hold on")))
        await working.said("holding")
        await working.cancel()
        after = LocalTurn(Prompt("next"), turns(("hold on", "holding")), run_id="r2")
        said = answer(await collect(agent, after))
        assert "you said: next" in said
