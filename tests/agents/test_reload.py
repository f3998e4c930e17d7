"""`--reload`: the code of an agent is loaded again when its files change."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from runlane.worker import AgentError
from runlane.worker.reload import Code, ReloadingFunction
from runlane.worker.threads import ThreadTurn, call_function
from runlane_server.agents.base import Agent
from runlane_server.agents.loader import AgentSettings, load_agent
from runlane_server.core.errors import SettingsError
from runlane_server.core.model import TextDelta
from support.turns import LocalTurn

MODULE = "reloaded_agent"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the import path; its modules are forgotten at the end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", sys.dont_write_bytecode)
    yield tmp_path
    for name in (MODULE, "reloaded_helper"):
        sys.modules.pop(name, None)


def write(folder: Path, text: str, name: str = MODULE) -> None:
    (folder / f"{name}.py").write_text(text)


def function(word: str) -> str:
    return f"async def answer(turn):\n    yield '{word} '\n    yield '{word}'\n"


def load() -> Agent:
    return load_agent(f"{MODULE}:answer", AgentSettings(reload=True))


async def said(agent: Agent) -> str:
    return "".join(
        [event.text async for event in agent.run(LocalTurn()) if isinstance(event, TextDelta)]
    )


async def test_the_next_run_has_the_new_code_and_one_under_way_the_old(folder: Path) -> None:
    write(folder, function("old"))
    agent = load()
    async with aclosing(agent.run(LocalTurn())) as under_way:
        assert await anext(under_way) == TextDelta("old ")
        write(folder, function("newer"))
        assert await said(agent) == "newer newer"
        assert await anext(under_way) == TextDelta("old")
    assert await said(agent) == "newer newer"


async def test_a_module_that_the_agent_imports_is_loaded_again_too(folder: Path) -> None:
    write(folder, "WORD = 'one'", "reloaded_helper")
    write(folder, "from reloaded_helper import WORD\ndef answer(turn):\n    return WORD\n")
    agent = load()
    assert await said(agent) == "one"
    write(folder, "WORD = 'three'", "reloaded_helper")
    assert await said(agent) == "three"


async def test_code_that_is_broken_fails_the_run_until_it_is_repaired(folder: Path) -> None:
    write(folder, function("good"))
    agent = load()
    write(folder, "async def answer(turn:\n")
    for _ in range(2):
        with pytest.raises(Exception, match="cannot import: SyntaxError"):
            await said(agent)
    write(folder, function("repaired"))
    assert await said(agent) == "repaired repaired"


CLASS = """
from runlane_server.core.model import TextDelta

def log(what):
    with open("seen", "a") as file:
        file.write(what + " ")

class answer:
    async def start(self):
        log("start")

    async def run(self, turn):
        yield TextDelta("a")
        yield TextDelta("b")

    async def close(self):
        log("close")
"""


async def test_an_agent_is_closed_after_its_last_run(folder: Path) -> None:
    seen = folder / "seen"
    write(folder, CLASS)
    agent = load()
    await agent.start()
    async with aclosing(agent.run(LocalTurn())) as under_way:
        await anext(under_way)
        write(folder, f"{CLASS}# changed")
        assert await said(agent) == "ab"
        assert seen.read_text().split() == ["start", "start"]
    assert seen.read_text().split() == ["start", "start", "close"]
    await agent.close()
    assert seen.read_text().split() == ["start", "start", "close", "close"]


def test_what_cannot_be_imported_at_first_is_an_error_of_the_settings(folder: Path) -> None:
    write(folder, "x = 1\n")
    with pytest.raises(SettingsError, match="has no attribute 'answer'"):
        load()


async def test_a_worker_loads_its_function_again(folder: Path) -> None:
    write(folder, "def answer(turn):\n    return 'one'\n")
    found = ReloadingFunction(Code(MODULE, "answer"))

    async def call() -> Any:
        return await call_function(found, LocalTurn(), ThreadTurn, lambda event: event)

    assert await call() == "one"
    write(folder, "def answer(turn):\n    return 'three'\n")
    assert await call() == "three"
    write(folder, "nothing = 1\n")
    with pytest.raises(AgentError, match="cannot import reloaded_agent:answer: AttributeError"):
        await call()
