"""Tool calls that wait for people: pydantic-ai's deferred tools and `requires_approval`.

The run of the model ends with the deferred calls as its output, and the agent leaves with its
messages as a checkpoint. When all calls are answered it goes on from there, on any node.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from pydantic_ai.agent import AbstractAgent, WrapperAgent
from pydantic_ai.messages import ModelMessage, ModelMessagesTypeAdapter, ToolCallPart
from pydantic_ai.tools import (
    DeferredToolRequests,
    DeferredToolResults,
    ToolApproved,
    ToolDenied,
)

from runlane_server.agents.base import Approval, Turn
from runlane_server.agents.chat.grammar import valid_arguments
from runlane_server.agents.questions import Asked

DENIED = "The tool call was denied."


@dataclass(slots=True)
class Waiting:
    """The calls that wait, and what the agent has said in this turn so far.

    `calls` maps the key of a question to the id of its tool call; `asked` counts equal calls, so
    that each has a key of its own; `is_open` are the ids of the calls that were reported.
    """

    messages: list[ModelMessage] = field(default_factory=list)
    calls: dict[str, str] = field(default_factory=dict)
    approvals: set[str] = field(default_factory=set)
    asked: Counter[str] = field(default_factory=Counter)
    is_open: set[str] = field(default_factory=set)

    def add(self, requests: DeferredToolRequests) -> list[Asked]:
        """Adds the calls of a model; returns the questions for people."""
        self.calls.clear()
        self.approvals.clear()
        questions: list[Asked] = []
        for call in requests.approvals:
            key = self._key(call)
            self.approvals.add(key)
            text = f"The agent asks to call the tool {call.tool_name}."
            questions.append(Asked(text, key, call.tool_name, _arguments(call)))
        for call in requests.calls:
            shown = json.dumps(_arguments(call), ensure_ascii=False)
            text = f"The agent asks for the result of {call.tool_name} {shown}."
            questions.append(Asked(text, self._key(call)))
        return questions

    def _key(self, call: ToolCallPart) -> str:
        content = json.dumps([call.tool_name, _arguments(call)], sort_keys=True)
        digest = hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
        self.asked[digest] += 1
        key = f"tool-{digest}-{self.asked[digest]}"
        self.calls[key] = call.tool_call_id
        return key

    async def results(self, turn: Turn) -> DeferredToolResults:
        """The answers, as pydantic-ai takes them."""
        results = DeferredToolResults()
        for key, call_id in self.calls.items():
            answer = await turn.answer_to(key)
            if key in self.approvals:
                results.approvals[call_id] = _verdict(answer)
            else:
                results.calls[call_id] = answer
        return results

    def checkpoint(self) -> str:
        """All of it as text."""
        return json.dumps(
            {
                "messages": ModelMessagesTypeAdapter.dump_json(self.messages).decode(),
                "calls": self.calls,
                "approvals": sorted(self.approvals),
                "asked": self.asked,
                "is_open": sorted(self.is_open),
            },
            ensure_ascii=False,
        )

    @classmethod
    def of_checkpoint(cls, text: str) -> Waiting:
        """Reads what `checkpoint` wrote; of an agent that has not left there is nothing."""
        if not text:
            return cls()
        stored = json.loads(text)
        return cls(
            list(ModelMessagesTypeAdapter.validate_json(stored["messages"])),
            stored["calls"],
            set(stored["approvals"]),
            Counter(stored["asked"]),
            set(stored["is_open"]),
        )


def _arguments(call: ToolCallPart) -> dict[str, Any]:
    found = json.loads(json.dumps(valid_arguments(call.args_as_dict())))
    return cast("dict[str, Any]", found)


def _verdict(answer: Approval) -> ToolApproved | ToolDenied:
    if not answer:
        return ToolDenied(answer.reason or DENIED)
    return ToolApproved(override_args=dict(answer.arguments))


def output_type(agent: AbstractAgent[Any, Any]) -> Any:
    """The output types of an agent with deferred calls among them; None for those it has.

    An agent with output validators decides about its outputs alone.
    """
    inner = agent
    while isinstance(inner, WrapperAgent):
        inner = inner.wrapped
    own = inner.output_type
    types = list(own) if isinstance(own, Sequence) and not isinstance(own, str) else [own]
    if DeferredToolRequests in types or getattr(inner, "_output_validators", None):
        return None
    return [*types, DeferredToolRequests]
