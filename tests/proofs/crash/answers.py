"""Answers, cancels, expiries and kills in the same instant:
`python -m proofs.crash.answers --rounds 1000`.

Each round is one question. Two people answer it, a third one cancels its session, it expires, and
the server is killed, all within a few milliseconds; some rounds leave out some of this. Then
receipts, request, run, events, transcript and the stream of the session must tell the same story.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from proofs.crash.answer_rules import FAR, Case, Given, Story, violations
from runlane import (
    CancelReceipt,
    Client,
    InputClosed,
    InputRequest,
    InputRequested,
    InputState,
    RunComplete,
    RunlaneError,
    SessionRunEvent,
    SessionSnapshot,
)
from support.postgres import OTHER_SERVER, fresh_database, own_postgres
from support.server import ServerProcess, clean_environment
from support.staging import Step, say, script

BATCH = 10
"""Rounds that share a kill."""

EXPIRY = 1.0
"""Seconds after which a question expires, in rounds with an expiry."""

SPREAD = 0.004
"""Seconds around the instant in which everything happens."""

KILLS = 0.8
"""Probability that the server of a batch is killed."""

PATIENCE = 60.0
"""Seconds in which a batch has to end after its instant."""

FLAGS = ("--agent", "scripted", "--max-active-runs", "10000", "--log-format", "json")


def draw(rng: random.Random, number: int) -> Case:
    """Draws a round."""
    return Case(
        number=number,
        leaves=rng.random() < 0.5,
        expires=rng.random() < 0.6,
        has_default=rng.random() < 0.5,
        cancels=rng.random() < 0.6,
        answers=rng.choice((0, 1, 2, 2)),
        max_attempts=rng.choice((1, 3)),
    )


class Batch:
    """Rounds that share an instant."""

    def __init__(
        self, server: ServerProcess, client: Client, rng: random.Random, cases: Sequence[Case]
    ) -> None:
        self._server = server
        self._client = client
        self._rng = rng
        self._cases = {case.session_id: case for case in cases}
        self._requests: dict[str, InputRequest] = {}
        self._given: dict[str, list[Given]] = {case.session_id: [] for case in cases}
        self._receipts: dict[str, CancelReceipt | None] = {}
        self._streamed: dict[str, list[SessionRunEvent]] = {case.session_id: [] for case in cases}
        self._gate = f"gate {min(self._cases)}"
        self._is_streaming = asyncio.Event()
        self.was_killed = False

    async def play(self) -> list[Story]:
        """Plays the rounds; returns what everybody knows of each."""
        streaming = asyncio.create_task(self._stream())
        try:
            async with asyncio.timeout(PATIENCE):
                await self._is_streaming.wait()
                await self._stage()
            await self._instant()
            async with asyncio.timeout(PATIENCE):
                await asyncio.gather(*map(self._end, self._cases.values()))
                await streaming
                stories = [await self._story(case) for case in self._cases.values()]
        finally:
            streaming.cancel()
        return stories

    async def _stream(self) -> None:
        left = set(self._cases)
        snapshots = 0
        async with self._client.subscribe_session(self._cases) as stream:
            async for event in stream:
                body = event.body
                snapshots += isinstance(body, SessionSnapshot)
                if snapshots == len(self._cases):
                    self._is_streaming.set()
                if isinstance(body, SessionRunEvent) and body.run_id == run_of(event.session_id):
                    self._streamed[event.session_id].append(body)
                    if isinstance(body.event.body, RunComplete):
                        left.discard(event.session_id)
                if not left:
                    return

    async def _stage(self) -> None:
        """Accepts the runs, and makes all agents ask at the same time."""
        for case in self._cases.values():
            await self._client.run_accepted(
                case.session_id,
                script(say("a "), {"wait": self._gate}, _question(case)),
                run_id=run_of(case.session_id),
                max_attempts=case.max_attempts,
                allow_missing=True,
            )
        asked = [asyncio.create_task(self._until_asked(case)) for case in self._cases.values()]
        await self._open_gate()
        await asyncio.gather(*asked)

    async def _open_gate(self) -> None:
        await self._client.run_accepted("gates", script({"open": self._gate}), allow_missing=True)

    async def _until_asked(self, case: Case) -> None:
        async for event in self._client.subscribe_run(run_of(case.session_id)):
            if isinstance(event.body, InputRequested):
                self._requests[case.session_id] = event.body.input_request
                return
        raise AssertionError(f"{case.session_id} ended without a question")

    async def _instant(self) -> None:
        """Does everything at the time when the questions expire."""
        ends = [request.expires_at for request in self._requests.values() if request.expires_at]
        instant = time.monotonic() + 0.05
        if ends:
            instant = time.monotonic() + (min(ends) - datetime.now(UTC)).total_seconds()
        tasks = [
            asyncio.create_task(self._at(instant, work))
            for case in self._cases.values()
            for work in self._works(case)
        ]
        self.was_killed = self._rng.random() < KILLS
        if self.was_killed:
            await self._at(instant, self._server.kill())
            await self._server.start()
            # An attempt that was lost begins before the gate.
            await self._open_gate()
        await asyncio.gather(*tasks)

    def _works(self, case: Case) -> Iterable[Coroutine[Any, Any, object]]:
        yield from (self._answer(case, f"answer {n}") for n in range(case.answers))
        if case.cancels:
            yield self._cancel(case)

    async def _at(self, instant: float, work: Coroutine[Any, Any, object]) -> None:
        # The race itself: nothing waits for this time.
        seconds = instant + self._rng.uniform(-SPREAD, SPREAD) - time.monotonic()
        await asyncio.sleep(max(seconds, 0))
        await work

    async def _answer(self, case: Case, value: str) -> None:
        """Answers; the client repeats the call until it has a reply."""
        request = self._requests[case.session_id]
        given = Given(f"{case.session_id} {value}", value)
        try:
            given.receipt = await self._client.answer_input(
                request, value, answer_id=given.answer_id
            )
        except InputClosed:
            given.was_closed = True
        self._given[case.session_id].append(given)

    async def _cancel(self, case: Case) -> None:
        self._receipts[case.session_id] = None
        try:
            receipt = await self._client.cancel(case.session_id, reason=case.reason)
        except RunlaneError:
            return
        self._receipts[case.session_id] = receipt

    async def _end(self, case: Case) -> None:
        """Answers a question that is still open, and waits for the end of the run."""
        run_id = run_of(case.session_id)
        listed = self._client.list_input_requests(run_id=run_id, states=[InputState.OPEN])
        if [request async for request in listed]:
            await self._answer(case, FAR)
        await self._client.wait_run(run_id)

    async def _story(self, case: Case) -> Story:
        """The views of a round."""
        client, run_id = self._client, run_of(case.session_id)
        return Story(
            case=case,
            run=await client.get_run(run_id),
            given=self._given[case.session_id],
            was_cancel_sent=case.session_id in self._receipts,
            receipt=self._receipts.get(case.session_id),
            requests=[one async for one in client.list_input_requests(run_id=run_id)],
            events=[event async for event in client.subscribe_run(run_id)],
            streamed=[one.event for one in self._streamed[case.session_id]],
            messages=[message async for message in client.list_messages(case.session_id)],
        )


def run_of(session_id: str) -> str:
    """The id of the run of a round."""
    return f"run of {session_id}"


def _question(case: Case) -> Step:
    options: dict[str, object] = {"text": "well?"}
    if case.expires:
        options["timeout"] = EXPIRY
        if case.has_default:
            options["default"] = "default"
    return {"ask": options, "leave": case.leaves}


@asynccontextmanager
async def _store(kind: str, folder: Path) -> AsyncIterator[tuple[str, ...]]:
    """The flags of a store of its own."""
    if kind == "sqlite":
        yield ("--store", f"sqlite:///{folder}/answers.db")
        return
    async with AsyncExitStack() as closing:
        base = os.environ.get(OTHER_SERVER) or closing.enter_context(own_postgres()).url
        url = await closing.enter_async_context(fresh_database(base))
        # The next process takes over what the killed one hosted.
        yield ("--store", url, "--node-lease", "1s")


async def play(kind: str, rounds: int, seed: str, folder: Path) -> tuple[Counter[str], list[str]]:
    """Plays rounds; returns how they ended, and what is wrong."""
    rng = random.Random(f"answers {seed}")  # noqa: S311 - it is to repeat itself
    figures: Counter[str] = Counter()
    wrong: list[str] = []
    async with _store(kind, folder) as flags:
        server = ServerProcess(folder, *FLAGS, *flags, base=clean_environment())
        await server.start()
        try:
            async with Client(server.address, timeout=PATIENCE) as client:
                for first in range(0, rounds, BATCH):
                    numbers = range(first, min(first + BATCH, rounds))
                    batch = Batch(server, client, rng, [draw(rng, n) for n in numbers])
                    for story in await batch.play():
                        figures[story.outcome] += 1
                        wrong += violations(story)
                    figures["rounds"] += len(numbers)
                    figures["kills"] += batch.was_killed
                    if sys.stdout.isatty() or first % 100 == 0:
                        print(f"{first + len(numbers)} rounds, {len(wrong)} wrong", flush=True)
        finally:
            await server.kill()
    wrong += [line for line in server.log.splitlines() if '"level": "error"' in line]
    return figures, wrong


def main() -> int:
    """Plays the rounds; returns 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m proofs.crash.answers", description=__doc__)
    parser.add_argument("--rounds", type=int, default=1000, help="number of questions")
    parser.add_argument("--store", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument(
        "--seed", default=str(time.time_ns() % 1_000_000), help="seed of all rounds"
    )
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="runlane-answers-") as folder:
        figures, wrong = asyncio.run(
            play(options.store, options.rounds, options.seed, Path(folder))
        )
    for name, count in sorted(figures.items()):
        print(f"{name:40}{count:>8,}")
    print("\n".join(wrong[:50]))
    print(
        f"{options.store}, seed {options.seed}: {figures['rounds']:,} rounds, {figures['kills']}"
        f" kills in {time.monotonic() - began:.0f} s, {len(wrong)} wrong"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
