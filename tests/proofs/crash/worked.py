"""The agent of workers under test, the program that executes it, and the check of its output.

The output of a run follows from its id and the number of the attempt, so that a lost, repeated or
foreign piece of output shows.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise

from proofs.crash.history import History, Rule
from runlane import FinishReason, Folded, Run, RunEvent, RunState, Started, TextDelta
from runlane.worker import Turn, Worker

WORKED = "worked"
"""The name of the agent."""

FILE = "WITNESS_FILE"
"""The environment variable that names the file in which a worker records its attempts."""

SLOTS = 4
"""Slots of a worker."""

DRAIN = 0.5
"""Seconds that the runs of a worker have to end after SIGTERM."""

STEP = 5
"""Words between two steps, at which runs may join the turn."""


def words_of(run_id: str) -> int:
    """The number of words that a run says."""
    return random.Random(run_id).choice((1, 5, 20, 60))  # noqa: S311 - it is to repeat itself


async def say(turn: Turn) -> AsyncGenerator[str, None]:
    """Says the words of a run, and the id of each run that joins it."""
    pause = random.Random(f"pace of {turn.run_id}").choice((0, 0.02, 0.1))  # noqa: S311
    _record(turn, "begun")
    try:
        for number in range(words_of(turn.run_id)):
            yield f"{turn.attempt}.{number} "
            if number % STEP == 0:
                for one in await turn.take_folded():
                    yield f"[{one.run_id}] "
            await asyncio.sleep(pause)
    finally:
        _record(turn, "ended")


def _record(turn: Turn, what: str) -> None:
    """Appends a line to the record, as the agent of a node does in `proofs.crash.witness`."""
    line = {
        "what": what,
        "at": datetime.now(UTC).isoformat(),
        "session_id": turn.session_id,
        "run_id": turn.run_id,
        "attempt": turn.attempt,
        "stubborn": False,
    }
    file = os.open(os.environ[FILE], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(file, f"{json.dumps(line)}\n".encode())
    finally:
        os.close(file)


def main(targets: Sequence[str]) -> None:
    """Executes runs of the nodes until SIGTERM."""
    asyncio.run(_serve(Worker(targets, {WORKED: say}, slots=SLOTS, drain_timeout=DRAIN)))


async def _serve(worker: Worker) -> None:
    serving = asyncio.create_task(worker.serve())
    await asyncio.sleep(0)  # it handles SIGTERM from its first step on
    # What `ListeningProcess` waits for; a worker has no address.
    print("worker listening on -", flush=True)
    await serving


# --- The check -----------------------------------------------------------------------------------


def attempts_of(events: Sequence[RunEvent]) -> Iterator[tuple[int, Sequence[RunEvent]]]:
    """The attempts of a run: the number of each, and the events between its start and the next."""
    starts = [n for n, event in enumerate(events) if isinstance(event.body, Started)]
    for begin, end in pairwise((*starts, len(events))):
        body = events[begin].body
        assert isinstance(body, Started)
        yield body.attempt, events[begin + 1 : end]


def counted_attempts(run: Run, history: History) -> int:
    """The attempts of a run that its `max_attempts` limits. One that a worker handed back, or that
    was lost on its way to a worker, does not count; it has no output."""
    if run.agent != WORKED:
        return run.attempt
    events = history.final.events.get(run.run_id, [])
    return sum(any(isinstance(e.body, TextDelta) for e in of) for _, of in attempts_of(events))


def text_of(events: Sequence[RunEvent]) -> str:
    """The text of an attempt."""
    return "".join(event.body.text for event in events if isinstance(event.body, TextDelta))


def _output(history: History) -> Iterator[str]:
    """Each attempt says its words once and in order, and nothing of another attempt (R33, R34)."""
    for run in history.final.runs.values():
        if run.agent == WORKED:
            for number, events in attempts_of(history.final.events.get(run.run_id, [])):
                yield from _said(run, number, events)


def _said(run: Run, number: int, events: Sequence[RunEvent]) -> Iterator[str]:
    name = f"attempt {number} of {run.run_id}"
    text = text_of(events)
    words = [word for word in text.split() if word[0] != "["]
    if words != [f"{number}.{n}" for n in range(len(words))] or len(words) > words_of(run.run_id):
        yield f"{name} said {text!r}"
    named = [word[1:-1] for word in text.split() if word[0] == "["]
    joined = [
        event.body.run_id
        for event in events
        if isinstance(event.body, Folded) and event.body.into_run_id == run.run_id
    ]
    # The last of them may not have been named yet when the attempt ended.
    if named != joined[: len(named)]:
        yield f"{name} was joined by {joined}, and named {named}"
    if number != run.attempt or run.run_complete is None or run.folded_into is not None:
        return
    is_whole = len(words) == words_of(run.run_id) and named == joined
    if run.state is RunState.COMPLETED and not is_whole:
        yield f"{name} completed with {text!r}, joined by {joined}"
    if run.state is RunState.FAILED and run.run_complete.finish_reason != FinishReason.INTERRUPTED:
        yield f"{name} failed: {run.run_complete.error}"


RULES: Mapping[str, Rule] = {"output": _output}


if __name__ == "__main__":
    main(sys.argv[1:])
