"""Follows one run: collects its output, and reports its progress."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from runlane.cli.mcp_server.records import cut
from runlane.client import Client
from runlane.inputs import InputRequested
from runlane.types import (
    Artifact,
    Folded,
    RunComplete,
    RunEvent,
    RunState,
    Started,
    Step,
    TextDelta,
    ToolCall,
    ToolResult,
)

Report = Callable[[int, str], Awaitable[None]]
"""Reports progress: the index of the last event, and a message for people."""

MESSAGE = 600
"""Maximum number of characters of a progress message."""

EXCERPT = 300
"""Maximum number of characters of a question or of arguments in one."""

PAUSE = 0.25
"""Minimum number of seconds between two reports of output, tools and the like."""

_AT_ONCE = (Started, InputRequested, RunComplete)


class Following:
    """The state of a run after some of its events."""

    def __init__(self, after_index: int, limit: int) -> None:
        self.last_index = after_index
        self.ended = False
        self.length = 0
        self._limit = limit
        self._kept: list[str] = []

    @property
    def text(self) -> str:
        """The beginning of the output since the first event that was followed."""
        return "".join(self._kept)[: self._limit]

    def take(self, event: RunEvent) -> None:
        """Takes the next event."""
        self.last_index = event.index
        match event.body:
            case TextDelta(text=text):
                if self.length < self._limit:
                    self._kept.append(text)
                self.length += len(text)
            case Started(attempt=attempt) if attempt > 1:
                self._kept.clear()
                self.length = 0
            case RunComplete():
                self.ended = True


class Reports:
    """Reports events as progress: what counts at once, everything else in bounded pieces."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._now = asyncio.get_running_loop().time
        self._last = self._now() - PAUSE
        self._output = ""

    async def take(self, event: RunEvent) -> None:
        """Reports an event, now or together with a later one."""
        if isinstance(event.body, TextDelta):
            self._output += event.body.text
        elif (message := describe(event)) is not None:
            self._output = " · ".join(filter(None, (self._output.strip(), message)))
        else:
            return
        self._output = self._output[-MESSAGE:]
        if isinstance(event.body, _AT_ONCE) or self._now() - self._last >= PAUSE:
            await self._flush(event.index)

    async def _flush(self, index: int) -> None:
        self._last = self._now()
        output, self._output = self._output, ""
        await self._report(index, cut(output, MESSAGE))


def describe(event: RunEvent) -> str | None:  # noqa: PLR0911 - one per kind
    """Describes an event in a few words; None for output and for what has no news."""
    match event.body:
        case Started(attempt=attempt):
            return f"attempt {attempt} started"
        case ToolCall(name=name, arguments_json=arguments):
            return f"{name} {cut(arguments, EXCERPT)}"
        case ToolResult(name=name, is_error=is_error):
            return f"{name} {'failed' if is_error else 'returned'}"
        case Artifact(last=True, name=name, artifact_id=artifact_id):
            return f"artifact {name or artifact_id}"
        case Step(key=key):
            return f"step {key}"
        case Folded(into_run_id=into):
            return f"joined the turn of run {into}"
        case InputRequested(input_request=request):
            return f"input required: {cut(request.text, EXCERPT)}"
        case RunComplete(state=state):
            return str(state)
        case _:
            return None


async def follow(client: Client, run_id: str, following: Following, report: Report) -> None:
    """Follows a run until it ends or waits for people; the caller limits the time.

    Raises RunlaneError.
    """
    reports = Reports(report)
    async with client.subscribe_run(run_id, after_index=following.last_index) as events:
        async for event in events:
            following.take(event)
            await reports.take(event)
            if isinstance(event.body, InputRequested) and await _waits(client, run_id):
                return


async def _waits(client: Client, run_id: str) -> bool:
    """Whether a run waits for people. An earlier question of it may have been answered since."""
    return (await client.get_run(run_id)).state is RunState.INPUT_REQUIRED
