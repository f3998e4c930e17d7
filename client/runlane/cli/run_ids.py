"""Short ids: a listing shows prefixes of run ids that are unique, and commands accept prefixes of
run and session ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import pairwise

from runlane.cli.base import InvalidUsage
from runlane.client import Client
from runlane.errors import CorruptRecord, RunNotFound, SessionNotFound

SHOWN = 13
"""Minimum length of a shown prefix. In a generated id, it is the time in milliseconds."""

ACCEPTED = 8
"""Minimum length of an accepted prefix."""

SEARCHED = 1000
"""Number of runs or sessions, the newest first, among which a prefix is searched."""


def short_ids(ids: Iterable[str]) -> Mapping[str, str]:
    """Returns a prefix for each id, unique among the ids."""
    ordered = sorted(set(ids))
    lengths = dict.fromkeys(ordered, SHOWN)
    for one, other in pairwise(ordered):
        needed = _common(one, other) + 1
        lengths[one], lengths[other] = max(lengths[one], needed), max(lengths[other], needed)
    return {each: each[:length] for each, length in lengths.items()}


def _common(one: str, other: str) -> int:
    """Returns the length of the common beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


async def find_run(client: Client, text: str) -> str:
    """Returns the id of a run that is named by its id or by a prefix.

    Raises RunNotFound, and InvalidUsage for a prefix of several runs.
    """
    if len(text) < ACCEPTED:
        return text
    try:
        return (await client.get_run(text)).run_id
    except RunNotFound:
        page = await client.list_runs(page_size=SEARCHED).page()
        found = [run.run_id for run in page.items if run.run_id.startswith(text)]
        if not found:
            raise
    return _only(found, text, "run")


async def find_session(client: Client, text: str) -> str:
    """Returns the id of a session that is named by its id or by a prefix, or the text if there is
    none: it may be about to be created.

    Raises InvalidUsage for a prefix of several sessions.
    """
    if len(text) < ACCEPTED:
        return text
    try:
        return (await client.get_session(text)).session_id
    except SessionNotFound:
        page = await client.list_sessions(page_size=SEARCHED).page()
        found = [each.session_id for each in page.items if each.session_id.startswith(text)]
    return _only(found or [text], text, "session")


async def check_session(client: Client, session_id: str) -> None:
    """Raises SessionNotFound for a session that does not exist: an empty list does not tell."""
    with suppress(CorruptRecord):  # it exists
        await client.get_session(session_id)


def _only(found: list[str], text: str, kind: str) -> str:
    if len(found) > 1:
        raise InvalidUsage(f"{text!r} is the beginning of {len(found)} {kind} ids; give more of it")
    return found[0]
