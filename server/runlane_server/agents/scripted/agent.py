"""An agent for tests that follows the script in its prompt.

The prompt is a JSON list of steps, each an object with one of these:

    {"text": "..."}                     yields text
    {"reasoning": "..."}                yields reasoning
    {"tool_call": {"id": "1", "name": "look", "arguments": {}}}
    {"tool_result": {"id": "1", "name": "look", "content": "...", "is_error": false}}
    {"artifact": {"id": "a", "text": "...", "append": false, "last": true}}
                                        yields an artifact (see `agents.base.Artifact` for the
                                        fields); "data" is in base64
    {"custom": {"type": "...", "json": 1}}      yields an event of a type of its own
    {"result": {"total": 1}}            reports the structured result
    {"usage": {"input_tokens": 3}}      reports usage (see `core.model.Usage` for the fields)
    {"model": "..."}                    reports the name of the model
    {"finish": "length"}                reports the finish reason
    {"wait": "name"}                    waits until the latch of that name is open
    {"wait": "name", "ignore_cancel": true}     the same, and ignores cancels
    {"open": "name"}                    opens the latch, for all runs of this server
    {"step": true}                      takes the prompts that wait to join the turn, and yields the
                                        text "[folded: <prompt>]" for each
    {"once": "key"}                     yields the number of the attempt that did the step of that
                                        key, as its result
    {"say": "attempt"}                  yields a fact about the turn as text: attempt, history,
                                        metadata, run_id or session_id
    {"ask": {"text": "..."}}            asks people, and yields the answer; the object has the
                                        arguments of `Turn.ask`
    {"ask": {...}, "leave": true}       the same, and the agent leaves meanwhile
    {"fail": "...", "reason": "WORD"}   fails the run with an AgentError; with "attempts": n only
                                        in the first n attempts
    {"crash": "..."}                    fails the run with an unexpected exception

Each step also takes "repeat": n. The whole script is parsed before its first step; an invalid one
fails the run with BAD_SCRIPT. A prompt that is not a JSON list is echoed.

Over the wire, a run has reached a latch when the text before it has arrived, and a run of another
session opens the latch with the script [{"open": "name"}].
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence

from runlane_server.agents.abilities import Ability
from runlane_server.agents.base import AgentError, AgentEvent, Approval, Report, Turn
from runlane_server.agents.scripted.latches import Latches
from runlane_server.agents.scripted.script import BadScript, Step, parse_script
from runlane_server.agents.text import whole_text
from runlane_server.core.model import Message, ReasoningDelta, Text, TextDelta

BAD_SCRIPT = "BAD_SCRIPT"
"""Reason of a failed run: its script is invalid."""

STEPS_PER_SLICE = 64
"""Number of repetitions after which other tasks get a chance to run."""


class ScriptedAgent:
    """Follows the script in its prompt; `latches` are where its runs wait."""

    def __init__(self, latches: Latches | None = None) -> None:
        self.latches = latches or Latches()
        self.abilities = frozenset({Ability.FOLD, Ability.ASK, Ability.STEPS, Ability.RESUME})

    async def start(self) -> None:
        """Does nothing: the agent is always ready."""

    async def run(self, turn: Turn) -> AsyncGenerator[AgentEvent, None]:
        """Runs the script. Raises AgentError if the script is invalid, or has a step that fails."""
        text = whole_text(turn.prompt)
        try:
            script = parse_script(text)
        except BadScript as exc:
            raise AgentError(f"bad script: {exc}", reason=BAD_SCRIPT) from exc
        if script is None:
            yield TextDelta(text)
            return
        self.latches.declare(step.value for step in script if step.kind == "wait")
        done = 0
        if turn.checkpoint:
            done = int(turn.checkpoint)
            yield TextDelta(_answer(await turn.answer_to(turn.checkpoint)))
        for number, step in enumerate(script[done:], start=done + 1):
            if step.leave:
                asked = step.value._replace(key=str(number))
                if await turn.ask_and_leave([asked], str(number)):
                    return
                yield TextDelta(_answer(await turn.answer_to(str(number))))
                continue
            for count in range(1, step.repeat + 1):
                for event in await self._execute(step, turn):
                    yield event
                if count % STEPS_PER_SLICE == 0:
                    await asyncio.sleep(0)

    async def close(self) -> None:
        """Does nothing: there is nothing to free."""

    async def _execute(  # noqa: PLR0911 - one per kind
        self, step: Step, turn: Turn
    ) -> Sequence[AgentEvent]:
        match step.kind:
            case "fail" if step.attempts is not None and turn.attempt > step.attempts:
                return []
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
            case "once":
                return [TextDelta(str(await turn.step(step.value, lambda: turn.attempt)))]
            case "say":
                return [TextDelta(await _fact(step.value, turn))]
            case "ask":
                return [TextDelta(_answer(await turn.ask(**step.value._asdict())))]
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


def _answer(value: object) -> str:
    """An answer as text: of an approval, the verdict and the arguments."""
    if isinstance(value, Approval):
        arguments = json.dumps(value.arguments, sort_keys=True, ensure_ascii=False)
        return f"{'approved' if value else 'denied'} {arguments}"
    if isinstance(value, str):
        return value
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


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
            event: AgentEvent = step.value  # the value is the event
            return event


async def _fact(name: str, turn: Turn) -> str:
    match name:
        case "attempt":
            return str(turn.attempt)
        case "history":
            return "\n".join(_line(message) for message in await turn.history())
        case "metadata":
            return json.dumps(dict(turn.metadata), sort_keys=True, ensure_ascii=False)
        case "run_id":
            return turn.run_id
        case _:
            return turn.session_id


def _line(message: Message) -> str:
    text = "".join(part.text for part in message.parts if isinstance(part, Text))
    return f"{message.role}: {text}"
