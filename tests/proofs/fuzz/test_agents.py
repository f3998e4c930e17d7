"""A wild agent harms nobody, and the search finds planted faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from proofs.fuzz.agents import WILD, search_agents
from proofs.fuzz.tries import Tries
from runlane_server.agents.chat import grammar
from runlane_server.engine.agent_output import ReportCheck
from runlane_server.engine.runner import Runner


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    yield
    structlog.reset_defaults()


def search(kind: str, store: str, folder: Path, seconds: float = 2.0) -> Tries:
    tries = Tries("agent", folder)
    search_agents(kind, store, tries, seconds, 1)
    return tries


@pytest.mark.parametrize("store", ["memory", "sqlite", "postgresql"])
@pytest.mark.parametrize("kind", WILD)
def test_r21_every_run_of_a_wild_agent_ends_and_nobody_else_notices(
    tmp_path: Path, kind: str, store: str
) -> None:
    tries = search(kind, store, tmp_path)
    assert tries.crashes == {}
    assert tries.inputs > 0


async def forget(*_: Any, **__: Any) -> bool:
    return True


def leave_as_is(args: Any) -> Any:
    return args


PLANTED: dict[str, tuple[str, Any, str, Callable[..., Any]]] = {
    "counts that are not checked": ("agent", ReportCheck, "_count", lambda *given: given[-1]),
    "an end that is not committed": ("agent", Runner, "_commit_end", forget),
    "arguments that are not JSON": ("chat", grammar, "valid_arguments", leave_as_is),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_the_search_finds_a_planted_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    kind, owner, name, planted = PLANTED[fault]
    monkeypatch.setattr(owner, name, planted)
    monkeypatch.setattr("proofs.fuzz.agents.PATIENCE", 3.0)
    assert search(kind, "memory", tmp_path).crashes != {}
