"""The agent of nodes under test: a scripted agent that records when it attempts.

A node's own account of its runs may be wrong; the record of the agent is a fact. Each line is
written at once, so that it survives a kill right after it.
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

from proofs.crash.history import AttemptRecord
from runlane_server.agents.base import AgentEvent, Turn
from runlane_server.agents.scripted.agent import ScriptedAgent
from runlane_server.agents.text import whole_text

FILE = "WITNESS_FILE"
"""The environment variable that names the file."""

AGENT = "proofs.crash.witness:Witness"

PACES = (0.0, 0.0, 0.02, 0.1, 0.3, 0.6)
"""Seconds between two events; the run id selects one."""

PACED = 10
"""The number of events after which an agent stops pausing."""


class Witness:
    """Runs its script, some runs slowly, and records each attempt."""

    def __init__(self) -> None:
        self._scripted = ScriptedAgent()
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._file = os.open(os.environ[FILE], flags, 0o600)

    async def start(self) -> None:
        """Returns at once: the agent is always ready."""

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
        """Leaves the file open: a fenced-off attempt may still have to record its end."""

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


def read(path: Path, node: int) -> list[AttemptRecord]:
    """The records of a node's agents, in the order of their starts."""
    attempts: list[AttemptRecord] = []
    open_attempts: dict[tuple[str, int], dict[str, Any]] = {}
    if not path.exists():
        return attempts
    for line in map(json.loads, path.read_text().splitlines()):
        key = (line["run_id"], line["attempt"])
        if line["what"] == "begun":
            if (left := open_attempts.pop(key, None)) is not None:
                attempts.append(_work(node, left, None))
            open_attempts[key] = line
        elif (begun := open_attempts.pop(key, None)) is not None:
            attempts.append(_work(node, begun, line["at"]))
    attempts += [_work(node, begun, None) for begun in open_attempts.values()]
    return sorted(attempts, key=lambda work: work.begun)


def _work(node: int, begun: dict[str, Any], ended: str | None) -> AttemptRecord:
    return AttemptRecord(
        node=node,
        session_id=begun["session_id"],
        run_id=begun["run_id"],
        attempt=begun["attempt"],
        begun=datetime.fromisoformat(begun["at"]),
        ended=None if ended is None else datetime.fromisoformat(ended),
        stubborn=begun["stubborn"],
    )
