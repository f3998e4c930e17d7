"""Which session of the agent continues a session of ours.

The record lies beside the agent's own directory and is removed with it. It names the last run that
the agent's session has seen: turns after it, of another agent, another node, or of a run that was
stopped, are handed over as text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from runlane_server.agents.program_files import read_file, replace_file
from runlane_server.core.model import Message

MAX_RECORD = 1 << 16
"""Size limit of a record, in bytes; a larger one was not written here."""


@dataclass(frozen=True, slots=True)
class AgentSession:
    """A session of the agent. `cwd` is its working directory, which must not change."""

    agent_session_id: str
    last_run_id: str
    cwd: str


def record_path(directory: Path, argv: Sequence[str]) -> Path:
    """The file of the record. Another command line is another agent, with sessions of its own."""
    digest = hashlib.blake2b("\0".join(argv).encode(errors="surrogateescape"), digest_size=8)
    return directory / f"acp-{digest.hexdigest()}.json"


def read_record(path: Path) -> AgentSession | None:
    """The record; None if there is none that can be used."""
    try:
        record = AgentSession(**json.loads(read_file(path, MAX_RECORD)))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    values = asdict(record).values()
    return record if all(isinstance(one, str) and one for one in values) else None


def write_record(path: Path, record: AgentSession) -> None:
    """Replaces the record at once, as a whole. Raises OSError."""
    replace_file(path, json.dumps(asdict(record)).encode())


def unseen(history: Sequence[Message], last_run_id: str) -> Sequence[Message] | None:
    """The messages of the turns after that of a run; None if that turn is not in the history."""
    turns = [message.turn for message in history if message.run_id == last_run_id]
    if not turns:
        return None
    return [message for message in history if message.turn > turns[-1]]
