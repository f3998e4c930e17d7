"""The agent of nodes that are watched: a scripted one that writes down when it works.

What a node says of its runs may be wrong; what the agent did is a fact. Each line is written at
once, so that it is there when the node is killed in the next instant.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from proofs.crash.history import Work
from runlane_server.agents.base import AgentEvent, Turn
from runlane_server.agents.scripted.agent import ScriptedAgent
from runlane_server.agents.text import whole_text

FILE = "WITNESS_FILE"
"""The variable that names the file."""

AGENT = "proofs.crash.witness:Witness"

PACES = (0.0, 0.0, 0.02, 0.1, 0.3, 0.6)
"""Seconds between one event and the next; which it is, the run id says."""

PACED = 10
"""After so many events an agent hurries."""


class Witness:
    """Does what its prompt says, some of it slowly, and tells."""

    def __init__(self) -> None:
        self._scripted = ScriptedAgent()
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._file = os.open(os.environ[FILE], flags, 0o600)

    async def start(self) -> None:
        """Is ready at once."""

    async def run(self, turn: Turn) -> AsyncGenerator[AgentEvent, None]:
        """Runs the script."""
        pace = random.Random(turn.run_id).choice(PACES)  # noqa: S311 - it is to repeat itself
        count = 0
        self._tell(turn, "begun")
        try:
            async with aclosing(self._scripted.run(turn)) as events:
                async for event in events:
                    yield event
                    count += 1
                    if pace and count <= PACED:
                        await asyncio.sleep(pace)
        finally:
            self._tell(turn, "ended")

    async def close(self) -> None:
        """Has nothing to free; who is fenced off may still have something to tell."""

    def _tell(self, turn: Turn, what: str) -> None:
        line = {
            "what": what,
            "at": datetime.now(UTC).isoformat(),
            "session_id": turn.session_id,
            "run_id": turn.run_id,
            "attempt": turn.attempt,
            "stubborn": '"ignore_cancel": true' in whole_text(turn.prompt),
        }
        os.write(self._file, f"{json.dumps(line)}\n".encode())


def read(path: Path, node: int) -> list[Work]:
    """What the agents of a node told, the first begun first."""
    works: list[Work] = []
    open_works: dict[tuple[str, int], dict[str, Any]] = {}
    if not path.exists():
        return works
    for line in map(json.loads, path.read_text().splitlines()):
        key = (line["run_id"], line["attempt"])
        if line["what"] == "begun":
            if (left := open_works.pop(key, None)) is not None:
                works.append(_work(node, left, None))
            open_works[key] = line
        elif (begun := open_works.pop(key, None)) is not None:
            works.append(_work(node, begun, line["at"]))
    works += [_work(node, begun, None) for begun in open_works.values()]
    return sorted(works, key=lambda work: work.begun)


def _work(node: int, begun: dict[str, Any], ended: str | None) -> Work:
    return Work(
        node=node,
        session_id=begun["session_id"],
        run_id=begun["run_id"],
        attempt=begun["attempt"],
        begun=datetime.fromisoformat(begun["at"]),
        ended=None if ended is None else datetime.fromisoformat(ended),
        stubborn=begun["stubborn"],
    )
