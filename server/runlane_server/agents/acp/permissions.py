"""The answers to the questions of an agent.

`Answers` is the one place where a question of an agent gets its answer. `PolicyAnswers` answers by
the operator's settings: at once, or by asking people.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from acp.schema import PermissionOption, RequestPermissionRequest

from runlane_server.agents.acp.policy import Policy
from runlane_server.agents.base import Turn

MAX_QUESTION_CHARS = 500
"""Length of the question that people see; a title may be a whole script."""

_ALLOW = ("allow_once", "allow_always")
_REJECT = ("reject_once", "reject_always")


class Answers(Protocol):
    """Answers the questions of agents. It may take its time: the agent waits."""

    async def permission(self, turn: Turn, request: RequestPermissionRequest, kind: str) -> str:
        """The id of the chosen option; empty to reject without an option.

        `kind` is the kind of the tool call, which an earlier update may have named.
        """

    async def elicitation(self, turn: Turn, params: Mapping[str, Any]) -> Mapping[str, Any]:
        """The result for a form or an address that the agent wants a person to see."""


class PolicyAnswers:
    """Allows, denies or asks people by the kind of the tool call. No form is ever filled in."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    async def permission(self, turn: Turn, request: RequestPermissionRequest, kind: str) -> str:
        """The option that allows or rejects, this once if there is such an option."""
        answer = self._policy.answer_for(kind)
        allows = await _ask(turn, request, kind) if answer == "ask" else answer == "allow"
        return _first(request.options, _ALLOW if allows else _REJECT)

    async def elicitation(self, turn: Turn, params: Mapping[str, Any]) -> Mapping[str, Any]:
        """Declines: a setting cannot answer what only a person knows."""
        del turn, params
        return {"action": "decline"}


async def _ask(turn: Turn, request: RequestPermissionRequest, kind: str) -> bool:
    """Asks people. Within a run the same question is asked once."""
    call = request.tool_call
    title = call.title or kind
    arguments: dict[str, Any] = {"title": title}
    if isinstance(call.raw_input, dict):
        arguments["input"] = call.raw_input
    text = f"May the agent go on? {title}"[:MAX_QUESTION_CHARS]
    return bool(await turn.ask(text, tool_name=kind, arguments=arguments))


def _first(options: Sequence[PermissionOption], wanted: Sequence[str]) -> str:
    for kind in wanted:
        for option in options:
            if option.kind == kind:
                return option.option_id
    return ""
