"""The answers to the questions of an agent.

`Answers` is the one place where a question of an agent gets its answer. `PolicyAnswers` answers by
the operator's settings: at once, or by asking people.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import structlog
from acp.schema import PermissionOption

from runlane_server.agents.acp.policy import Policy
from runlane_server.agents.acp.tool_calls import AskedCall
from runlane_server.agents.base import AgentError, Turn
from runlane_server.agents.questions import INVALID

MAX_QUESTION_CHARS = 500
"""Length of the question that people see; a title may be a whole script."""

_ALLOW_ONCE = ("allow_once",)
_ALLOW = ("allow_once", "allow_always")
_REJECT = ("reject_once", "reject_always")

log = structlog.get_logger()


class Answers(Protocol):
    """Answers the questions of agents. It may take its time: the agent waits."""

    async def permission(
        self, turn: Turn, options: Sequence[PermissionOption], call: AskedCall
    ) -> str:
        """The id of the chosen option; empty to reject without an option."""

    async def elicitation(self, turn: Turn, params: Mapping[str, Any]) -> Mapping[str, Any]:
        """The result for a form or an address that the agent wants a person to see."""


class PolicyAnswers:
    """Allows, denies or asks people by the kind of the tool call. No form is ever filled in."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    async def permission(
        self, turn: Turn, options: Sequence[PermissionOption], call: AskedCall
    ) -> str:
        """The option that allows or rejects, this once if there is such an option.

        A person saw this one call, so the answer allows no later one.
        """
        answer = self._policy.answer_for(call.kind)
        if answer != "ask":
            return _first(options, _ALLOW if answer == "allow" else _REJECT)
        if not await _ask(turn, call):
            return _first(options, _REJECT)
        if chosen := _first(options, _ALLOW_ONCE):
            return chosen
        log.warning("approved, but the agent does not offer to allow it once; rejected")
        return _first(options, _REJECT)

    async def elicitation(self, turn: Turn, params: Mapping[str, Any]) -> Mapping[str, Any]:
        """Declines: a setting cannot answer what only a person knows."""
        del turn, params
        return {"action": "decline"}


async def _ask(turn: Turn, call: AskedCall) -> bool:
    """Asks people, who see the whole call: one that is too large for a question is rejected. Within
    a run the same question is asked once."""
    title = call.title or call.kind
    text = f"May the agent go on? {title}"[:MAX_QUESTION_CHARS]
    arguments = {**call.arguments, "title": title}
    try:
        answer = await turn.ask(text, tool_name=call.kind, arguments=arguments)
    except AgentError as error:
        if error.reason != INVALID:
            raise
        log.warning("a permission cannot be asked as a whole; rejected", error=error.message)
        return False
    if answer and dict(answer.arguments) != arguments:
        # The protocol has no way to tell the agent.
        log.warning("a call was approved with other arguments; rejected")
        return False
    return bool(answer)


def _first(options: Sequence[PermissionOption], wanted: Sequence[str]) -> str:
    for kind in wanted:
        for option in options:
            if option.kind == kind:
                return option.option_id
    return ""
