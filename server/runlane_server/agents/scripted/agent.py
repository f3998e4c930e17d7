"""An agent for tests, that does what its prompt says.

The prompt is a JSON list of steps, each an object with one of these:

    {"text": "..."}                     says it
    {"reasoning": "..."}                thinks it
    {"tool_call": {"id": "1", "name": "look", "arguments": {}}}
    {"tool_result": {"id": "1", "name": "look", "content": "...", "is_error": false}}
    {"usage": {"input_tokens": 3}}      reports it (see `core.model.Usage` for the fields)
    {"model": "..."}                    reports the model's name
    {"finish": "length"}                reports the finish reason
    {"wait": "gate"}                    waits until the gate is open
    {"wait": "gate", "ignore_cancel": true}     the same, and takes no notice of a cancel
    {"open": "gate"}                    opens the gate, for all runs of this server
    {"step": true}                      takes the prompts that wait to join the turn, and says
                                        "[folded: <prompt>]" for each
    {"say": "attempt"}                  says what the turn has: attempt, history, metadata, run_id
                                        or session_id
    {"fail": "...", "reason": "WORD"}   fails the run, with an explanation
    {"crash": "..."}                    fails the run, with an exception of no kind we know

Each also takes "repeat": n. The whole script is read before its first step, and a bad one fails the
run with BAD_SCRIPT. A prompt that is not a list is said back.

Over the wire a gate is reached when the text before it was seen, and another session opens it with
the script [{"open": "gate"}].
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence

from runlane_server.agents.base import AgentError, AgentEvent, Report, Turn
from runlane_server.agents.scripted.latches import Latches
from runlane_server.agents.scripted.script import BadScript, Step, parse_script
from runlane_server.agents.text import whole_text
from runlane_server.core.model import Message, ReasoningDelta, Text, TextDelta

BAD_SCRIPT = "BAD_SCRIPT"
"""Why a run failed whose script cannot be read."""

STEPS_AT_ONCE = 64
"""After so many repetitions, other tasks get a chance to run."""


class ScriptedAgent:
    """Does what its prompt says; `gates` are those of this process."""

    def __init__(self, latches: Latches | None = None) -> None:
        self.latches = latches or Latches()

    async def start(self) -> None:
        """Is ready at once."""

    async def run(self, turn: Turn) -> AsyncGenerator[AgentEvent, None]:
        """Runs the script; raises AgentError where it says so, or where it is bad."""
        text = whole_text(turn.prompt)
        try:
            script = parse_script(text)
        except BadScript as exc:
            raise AgentError(f"bad script: {exc}", reason=BAD_SCRIPT) from exc
        if script is None:
            yield TextDelta(text)
            return
        for step in script:
            for count in range(1, step.repeat + 1):
                for event in await self._done(step, turn):
                    yield event
                if count % STEPS_AT_ONCE == 0:
                    await asyncio.sleep(0)

    async def close(self) -> None:
        """Has nothing to free."""

    async def _done(self, step: Step, turn: Turn) -> Sequence[AgentEvent]:
        match step.kind:
            case "fail":
                raise AgentError(step.value, reason=step.reason)
            case "crash":
                raise RuntimeError(step.value)
            case "open":
                self.latches.open(step.value)
                return []
            case "wait":
                await self._wait(step)
                return []
            case "say":
                return [TextDelta(await _said(step.value, turn))]
            case "step":
                folded = await turn.take_folded() if step.value else []
                return [TextDelta(f"[folded: {whole_text(one.prompt)}]") for one in folded]
            case _:
                return [_event(step)]

    async def _wait(self, step: Step) -> None:
        if step.ignore_cancel:
            await self.latches.wait_through_cancels(step.value)
        else:
            await self.latches.wait(step.value)


def _event(step: Step) -> AgentEvent:
    match step.kind:
        case "text":
            return TextDelta(step.value)
        case "reasoning":
            return ReasoningDelta(step.value)
        case "usage":
            return Report(usage=step.value)
        case "model":
            return Report(model=step.value)
        case "finish":
            return Report(finish_reason=step.value)
        case _:
            event: AgentEvent = step.value  # a tool call or result is its own event
            return event


async def _said(what: str, turn: Turn) -> str:
    match what:
        case "attempt":
            return str(turn.attempt)
        case "history":
            return "\n".join(_line(message) for message in await turn.history())
        case "metadata":
            return json.dumps(dict(turn.metadata), sort_keys=True)
        case "run_id":
            return turn.run_id
        case _:
            return turn.session_id


def _line(message: Message) -> str:
    text = "".join(part.text for part in message.parts if isinstance(part, Text))
    return f"{message.role}: {text}"
