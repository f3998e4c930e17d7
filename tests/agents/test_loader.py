"""Specs of agents, and agents that users write."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runlane_server.agents.base import AgentError, Report
from runlane_server.agents.command.agent import CommandAgent
from runlane_server.agents.echo import EchoAgent
from runlane_server.agents.loader import SPECS, AgentSettings, agent_kind, load_agent
from runlane_server.agents.scripted.agent import ScriptedAgent
from runlane_server.agents.scripted.latches import Latches
from runlane_server.core.errors import StartError
from runlane_server.core.model import FinishReason, TextDelta
from support.turns import Working, ask, collect, texts

MODULE = """
import asyncio, functools
from runlane_server.agents.base import Report
from runlane_server.core.model import FinishReason, TextDelta

class log: lines = []

async def answer(turn):
    try:
        yield "Hello, "
        yield TextDelta(turn.prompt.text)
        yield Report(finish_reason=FinishReason.LENGTH)
        if turn.prompt.text == "wait":
            await asyncio.Event().wait()
    finally:
        log.lines.append("cleaned up")

async def wrong(turn):
    yield 42

async def greet(word, turn):
    yield word

hello = functools.partial(greet, "hello")

class Mine:
    async def start(self): log.lines.append("started")
    async def run(self, turn):
        yield TextDelta("mine")
    async def close(self): log.lines.append("closed")

class space: mine = Mine()

class NeedsMore(Mine):
    def __init__(self, more): ...

class NotYielding(Mine):
    async def run(self, turn): return "no"

number = 42
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module that can be imported only from the working directory."""
    name = "users_own_module"
    (tmp_path / f"{name}.py").write_text(MODULE)
    (tmp_path / "broken_module.py").write_text("import json\n1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield name
    sys.modules.pop(name, None)


def test_each_built_in_agent_has_a_spec() -> None:
    assert isinstance(load_agent("echo"), EchoAgent)
    assert isinstance(load_agent("command:sh -c 'exit 0'"), CommandAgent)
    latches = Latches()
    scripted = load_agent("scripted", AgentSettings(latches=latches))
    assert isinstance(scripted, ScriptedAgent)
    assert scripted.latches is latches


@pytest.mark.parametrize(
    ("spec", "delay"),
    [("echo", 0), ("echo:delay=50ms", 0.05), ("echo:delay=0.5s", 0.5), ("echo:delay=2", 2)],
)
def test_the_delay_of_echo_is_in_seconds_or_milliseconds(spec: str, delay: float) -> None:
    agent = load_agent(spec)
    assert isinstance(agent, EchoAgent)
    assert agent._delay == delay


async def test_the_argv_of_a_command_is_split_as_a_shell_does() -> None:
    agent = load_agent("command:printf '%s|%s' 'a b' c")
    assert "".join(texts(await collect(agent, ask("")))) == "a b|c"
    await agent.close()
    agent = load_agent("command+json:cat")
    assert '"prompt": "hi"' in "".join(texts(await collect(agent, ask("hi"))))
    await agent.close()


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("", "there is no agent ''; use one of echo, command:<argv>, "),
        ("ecko", "there is no agent 'ecko'"),
        ("scripted:now", "cannot import"),
        ("a b:c", "there is no agent"),
        ("echo:fast", "write echo:delay=50ms"),
        ("echo:delay=-1", "write echo:delay=50ms"),
        ("command:", "the program is missing"),
        ("command:no-such-program x", "there is no program 'no-such-program'"),
        ("command:sh 'x", "No closing quotation"),
        ("acp", "agent acp: the program is missing; write acp:<argv>"),
        ("acp:no-such-program x", "agent acp: there is no program 'no-such-program'"),
        ("acp:sh 'x", "agent acp: cannot split"),
        ("no_such_module:agent", "No module named 'no_such_module'"),
    ],
)
def test_an_invalid_spec_is_rejected_in_one_line_with_the_reason(spec: str, complaint: str) -> None:
    with pytest.raises(StartError) as failed:
        load_agent(spec)
    assert complaint in str(failed.value)
    assert "\n" not in str(failed.value)


def test_the_help_describes_every_kind_of_agent() -> None:
    for kind in (*("echo", "command:", "command+json:", "acp:", "chat:", "<module>:", "scripted"),):
        assert any(line.startswith(kind) for line in SPECS.splitlines())


def test_pydantic_ai_is_imported_only_for_a_chat_agent() -> None:
    code = (
        "import sys\n"
        "from runlane_server.agents.loader import load_agent\n"
        "load_agent('echo'), load_agent('scripted')\n"
        "sys.exit('pydantic_ai' in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_types_of_acp_are_imported_only_for_an_acp_agent() -> None:
    code = (
        "import sys\n"
        "from runlane_server.agents.loader import load_agent\n"
        "import runlane_server.process.node\n"
        "load_agent('echo'), load_agent('command:cat')\n"
        "assert not {'acp', 'pydantic'} & {*sys.modules}\n"
        "load_agent('acp:cat')\n"
        "sys.exit('acp' not in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- Agents that users write --------------------------------------------------------------------


async def test_an_async_generator_function_is_an_agent(module: str) -> None:
    events = await collect(load_agent(f"{module}:answer"), ask("you"))
    assert events == [
        TextDelta("Hello, "),
        TextDelta("you"),
        Report(finish_reason=FinishReason.LENGTH),
    ]
    assert texts(await collect(load_agent(f"{module}:hello"), ask(""))) == ["hello"]


async def test_a_cancel_runs_the_finally_block_of_the_function(module: str) -> None:
    agent = load_agent(f"{module}:answer")
    log = sys.modules[module].log
    working = Working(agent, ask("wait"))
    await working.said("wait")
    await working.cancel()
    assert log.lines == ["cleaned up"]
    events = agent.run(ask("you"))
    await anext(events)
    await events.aclose()
    assert log.lines == ["cleaned up"] * 2


async def test_yielding_anything_but_text_or_an_event_fails_the_run(module: str) -> None:
    with pytest.raises(AgentError, match="yielded a int") as failed:
        await collect(load_agent(f"{module}:wrong"), ask(""))
    assert failed.value.reason == "BAD_EVENT"


@pytest.mark.parametrize("attribute", ["Mine", "space.mine"])
async def test_an_object_or_class_with_the_agent_protocol_is_an_agent(
    module: str, attribute: str
) -> None:
    agent = load_agent(f"{module}:{attribute}")
    await agent.start()
    assert texts(await collect(agent, ask(""))) == ["mine"]
    await agent.close()
    assert sys.modules[module].log.lines == ["started", "closed"]


@pytest.mark.parametrize(
    ("attribute", "complaint"),
    [
        ("nothing", "has no attribute 'nothing'"),
        ("number", "a int is not an agent; expected a function, a pydantic_ai.Agent, or an object"),
        ("NeedsMore", "cannot instantiate the class"),
        ("NotYielding", "a NotYielding is not an agent"),
    ],
)
def test_an_attribute_that_is_no_agent_is_rejected(
    module: str, attribute: str, complaint: str
) -> None:
    with pytest.raises(StartError) as failed:
        load_agent(f"{module}:{attribute}")
    assert complaint in str(failed.value)
    assert "\n" not in str(failed.value)


@pytest.mark.usefixtures("module")
def test_an_error_in_the_module_is_reported_in_one_line() -> None:
    with pytest.raises(StartError, match=r"^agent broken_module:x: cannot import: ZeroDivisionErr"):
        load_agent("broken_module:x")


async def test_a_pydantic_ai_agent_is_an_agent(module: str, tmp_path: Path) -> None:
    pytest.importorskip("pydantic_ai")
    (tmp_path / f"{module}.py").write_text(
        "from pydantic_ai import Agent\n"
        "from pydantic_ai.models.test import TestModel\n"
        "agent = Agent(TestModel(custom_output_text='I am a test'))\n"
    )
    agent = load_agent(f"{module}:agent")
    await agent.start()
    assert "".join(texts(await collect(agent, ask("hi")))) == "I am a test"
    await agent.close()


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        ("acp:codex-acp", "acp"),
        ("chat:openai:m", "chat"),
        ("command+json:cat", "command+json"),
        ("command:cat", "command"),
        ("echo", "echo"),
        ("my.module:agent", "python"),
        ("scripted", "scripted"),
        ("worker", "worker"),
    ],
)
def test_the_kind_of_a_spec_is_its_first_word(spec: str, kind: str) -> None:
    """Only `python` and `chat` agents move into processes of their own."""
    assert agent_kind(spec) == kind
