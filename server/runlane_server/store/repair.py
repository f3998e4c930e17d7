"""The replacement of a damaged record of a database, for every store.

A record that others refer to by its place is replaced by what callers already get for it: a
message, an event of a run, a terminal event of the log. A session whose lane, runs or prompts are
damaged is removed as a whole; each of its unfinished runs gets its terminal event (R21).
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from runlane_server.core.errors import CorruptRecord
from runlane_server.core.model import FinishReason, Role, Run, RunComplete, SessionKey
from runlane_server.store.base import Store
from runlane_server.store.codec import encode_complete, encode_parts
from runlane_server.store.corrupt import (
    CORRUPT_PARTS,
    collecting,
    corrupt_complete,
    shown_name,
)

CORRUPT_KIND = "corrupt"
"""The kind of an event of a run that was repaired; its body is empty."""

EMPTY_BODY = "[]"

CORRUPT_PROMPT = CORRUPT_PARTS[0].text
"""The prompt of a copied message whose own cannot be read."""


def is_damaged(read: Callable[[], object]) -> bool:
    """Whether reading a row finds a damaged record."""
    with collecting() as lines:
        try:
            read()
        except (CorruptRecord, UnicodeEncodeError):
            return True
    return bool(lines)


async def is_damaged_row(read: Callable[[], Awaitable[object]]) -> bool:
    """The same for a row whose reading needs others."""
    with collecting() as lines:
        try:
            await read()
        except CorruptRecord:
            return True
    return bool(lines)


def message_values(row: Any) -> tuple[object, ...]:
    """Sound values for role, finish reason, model, time and parts of a damaged message."""
    is_prompt = row["role"] == Role.USER
    reason = row["finish_reason"]
    if is_prompt:
        reason = None
    elif reason not in {each.value for each in FinishReason}:
        reason = str(FinishReason.ERROR)
    return (
        str(Role.USER if is_prompt else Role.ASSISTANT),
        reason,
        "",
        time_of(row["created_at"]),
        None if is_prompt else encode_parts(CORRUPT_PARTS),
    )


def terminal_body(row: Any, run: Run | None) -> str:
    """The body of a damaged terminal event: that of its run, or a placeholder."""
    complete = None if run is None else run.complete
    if complete is None or not _is_of(complete, row):
        complete = corrupt_complete(row["session_id"], row["run_id"], ended_at=row["ended_at"])
    return encode_complete(complete)


def _is_of(complete: RunComplete, row: Any) -> bool:
    """Whether an end is that of a row of the log: a run id may be used again."""
    return (complete.session_id, complete.ended_at) == (row["session_id"], row["ended_at"])


def time_of(value: object) -> int:
    """A stored time, or 0 for a damaged one."""
    return value if type(value) is int and 0 <= value < 1 << 57 else 0


def name_of(kind: str, *key: object) -> str:
    """The name of a repaired record, as the check names it."""
    return f"{kind} {'/'.join(map(shown_name, key))}"


async def remove_sessions(store: Store, keys: Iterable[SessionKey]) -> Sequence[str]:
    """Removes damaged sessions with their runs; returns a line for each."""
    lines = []
    for key in keys:
        await store.discard(key, time.time_ns() // 1_000)
        lines.append(f"{name_of('session', *key)} was removed with its runs and messages")
    return lines
