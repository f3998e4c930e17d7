"""An agent that yields, reports and raises at random. The prompt is the seed, so a run repeats."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from random import Random
from typing import Any

from runlane_server.agents.base import (
    AgentError,
    AgentEvent,
    Artifact,
    Custom,
    Report,
    Result,
    Turn,
)
from runlane_server.core.model import (
    Attachment,
    FinishReason,
    Folded,
    ReasoningDelta,
    RunError,
    Started,
    TextDelta,
    ToolCall,
    ToolResult,
    Usage,
)

Wrong = Any
"""A value of a type that the annotation of its field does not allow."""

CALM = "calm"
"""The prompt and the answer of runs that must not notice the others."""

MOST_EVENTS = 60


class Text(str):
    """A text whose methods are not to be trusted."""

    __slots__ = ()

    def encode(self, *_: object) -> bytes:
        raise RuntimeError("no bytes")

    def isascii(self) -> bool:
        raise KeyboardInterrupt


class Number(int):
    """A number whose methods are not to be trusted."""

    def __str__(self) -> str:
        return "seven"

    def __le__(self, _: object) -> bool:
        return True


class RudeError(Exception):
    """An exception without a text."""

    def __str__(self) -> str:
        if not self.args:
            sys.exit(9)
        return ""

    __repr__ = __str__


class OddError(BaseException):
    """An exception that is no Exception."""


TEXTS: Sequence[Wrong] = (
    *("a", "word ", "", "é", "\U0001f600", "\ud83d", "\ude00", "\0", "\x1b[31m", "x" * 3_000),
    *("y" * 70_000, "\ufeff", "\u2028", Text("sub"), None, 7, b"x", ["a"]),
)
NAMES: Sequence[Wrong] = ("look", "", "n" * 1_024, "n" * 1_025, "\ud800", "\0", None, 3)
ARGUMENTS: Sequence[Wrong] = (
    *("{}", '{"a": 1}', "", "not json", '{"a": ', "[1]", "null", '{"a": NaN}', '{"a": 1e999}'),
    *('{"a": "\\ud800"}', "[" * 5_000, "9" * 5_000, {}, None, "\0", "z" * 50_000),
)
COUNTS: Sequence[Wrong] = (
    *(0, 1, 7, 2.5, -1, 1 << 62, (1 << 63) - 1, 1 << 63, 1 << 200, float("nan"), float("inf")),
    *(None, "3", True, 10.0**300, Number(7)),
)
VALUES: Sequence[Wrong] = (
    *(None, 1, "\ud800", {"a": [1.5, None, "\0"]}, Text("sub")),
    *(float("nan"), object(), {1, 2}, {(1,): 2}, Number(3), b"x", "z" * (1 << 20)),
)
DATA: Sequence[Wrong] = (None, b"x", "x")
FLAGS: Sequence[Wrong] = (True, False, None)
REASONS: Sequence[Wrong] = (*FinishReason, "stop", "finished", "", None, 3, {})


def some_event(random: Random, calls: list[Wrong]) -> Wrong:  # noqa: PLR0911 - one per kind
    """A random event: usually a valid one."""
    kind = random.randrange(30)
    if kind < 12:
        return TextDelta(random.choice(TEXTS[:8]) if random.random() < 0.97 else _text(random))
    if kind < 15:
        return ReasoningDelta(random.choice(TEXTS[:4]))
    if kind < 18:
        call_id: Wrong = f"c{len(calls)}" if random.random() < 0.95 else random.choice(NAMES)
        calls.append(call_id)
        name = "look" if random.random() < 0.9 else random.choice(NAMES)
        return ToolCall(call_id, name, random.choice(ARGUMENTS[:11]))
    if kind < 21 and calls:
        call_id = calls.pop(random.randrange(len(calls)))
        return ToolResult(call_id, "look", random.choice(TEXTS[:10]), random.random() < 0.2)
    if kind < 23:
        return Report(Usage(random.choice(COUNTS[:4]), random.choice(COUNTS[:4])), "model")
    if kind < 27:
        return _some_artifact(random)
    if kind < 29:
        return random.choice((Custom, _result))("t", random.choice(VALUES[:5]))
    return _wrong_event(random) if random.random() < 0.15 else TextDelta("fine")


def _some_artifact(random: Random) -> Wrong:
    """An artifact or a piece of one; usually it fits what came before."""
    key = random.choice("ab")
    if random.random() < 0.1:
        return Artifact(artifact_id=key, text="x", append=True, last=random.random() < 0.5)
    return random.choice(
        (
            Artifact(artifact_id=key, text=random.choice(TEXTS[:10]), last=False),
            Artifact(artifact_id=key, data=b"\0\xff", mime_type="image/png"),
            Artifact(artifact_id=key, json=random.choice(VALUES[1:5])),
            Artifact(artifact_id=key, uri="https://example.com"),
        )
    )


def _result(_: str, value: Wrong) -> Result:
    return Result(value)


def _text(random: Random) -> Wrong:
    return random.choice(TEXTS)


def _wrong_event(random: Random) -> Wrong:
    makers: Sequence[Callable[[], Wrong]] = (
        lambda: random.choice((None, b"x", 7, "text", object(), [], TextDelta)),
        lambda: ToolCall(random.choice(NAMES), random.choice(NAMES), random.choice(ARGUMENTS)),
        lambda: ToolResult(random.choice(NAMES), random.choice(NAMES), random.choice(TEXTS)),
        lambda: Report(Usage(*(random.choice(COUNTS) for _ in range(5)))),
        lambda: Report(random.choice(COUNTS), random.choice(TEXTS), random.choice(REASONS)),
        lambda: Artifact(
            artifact_id=random.choice(NAMES),
            name=random.choice(NAMES),
            text=random.choice(TEXTS),
            data=random.choice(DATA),
            append=random.choice(FLAGS),
        ),
        lambda: Custom(random.choice(NAMES), random.choice(VALUES)),
        lambda: Result(random.choice(VALUES)),
        lambda: Started(random.choice(COUNTS)),
        lambda: Folded("run", "other"),
        lambda: RunError("R", "m"),
        lambda: Attachment("a", "text/plain", "x"),
    )
    return random.choice(makers)()


def _leave(random: Random) -> None:
    """Raises an exception of any kind."""
    nothing: Wrong = None
    failures = [ValueError("value"), RudeError(), OddError("odd"), SystemExit(3)]
    failures += [KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError(), MemoryError()]
    failures += [RecursionError("deep"), StopAsyncIteration(), TimeoutError(), OSError(5, "\ud800")]
    failures += [AgentError("m\ud800" * 3_000, reason="R\0"), AgentError("m", reason="WORD")]
    failures += [AgentError(nothing), ExceptionGroup("many", [ValueError("\ud800")])]
    raise random.choice(failures)


class WildAgent:
    """Executes any number of runs at once; counts what it yields."""

    def __init__(self) -> None:
        self.events = 0
        self.invalid: list[str] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Does nothing."""

    async def close(self) -> None:
        """Raises, at the worst moment."""
        raise OddError("closed")

    async def run(self, turn: Turn) -> AsyncGenerator[AgentEvent, None]:
        """Yields events until it raises or returns."""
        if turn.prompt.text == CALM:
            yield TextDelta(CALM)
            return
        random = Random(f"{turn.prompt.text} {turn.attempt}")  # noqa: S311 - a seed repeats it
        calls: list[Wrong] = []
        for _ in range(random.randrange(MOST_EVENTS)):
            await self._do_something(turn, random)
            self.events += 1
            yield some_event(random, calls)
        if random.random() < 0.5:
            _leave(random)

    def is_own_fault(self, _: object) -> bool:
        """It may fail in any way."""
        return True

    async def _do_something(self, turn: Turn, random: Random) -> None:
        match random.randrange(150):
            case 0:
                await turn.take_folded()
            case 1:
                await turn.history()
            case 2:
                await asyncio.sleep(random.random() / 100)
            case 3:
                self._keep(_leave_later(random))
            case 4:
                await asyncio.create_task(_leave_later(random))
            case 5:
                asyncio.get_running_loop().call_soon(_leave, random)
            case 6:
                await asyncio.to_thread(random.random)
            case 7:
                self._keep(asyncio.sleep(random.random() / 50))
            case number if number < 50:
                await asyncio.sleep(0)

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        """Starts a task, and leaves it alone."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


@asynccontextmanager
async def wild_agent() -> AsyncIterator[tuple[WildAgent, WildAgent]]:
    """A wild agent, which is what does the harm too."""
    agent = WildAgent()
    yield agent, agent


async def _leave_later(random: Random) -> None:
    await asyncio.sleep(0)
    _leave(random)
