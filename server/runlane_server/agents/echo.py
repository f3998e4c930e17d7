"""The echo agent: it answers with the prompt, word by word."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator

from runlane_server.agents.abilities import Ability
from runlane_server.agents.base import AgentEvent, Turn
from runlane_server.agents.text import attached_texts
from runlane_server.core.model import Prompt, TextDelta

_WORD = re.compile(r"\s*\S+\s*|\s+")

WORDS_PER_SLICE = 256
"""Number of words without a delay after which other tasks get a chance to run."""


class EchoAgent:
    """Answers with the text of the prompt, or with its text attachments if it has no text.

    Each word is one delta, with the white space around it; joined, the deltas are exactly the text.
    `delay` is the pause between two words, in seconds.

    One answer is one step: after it the agent answers the prompts that wait to join the turn, one
    line for each.
    """

    def __init__(self, *, delay: float = 0.0) -> None:
        self._delay = delay

    abilities = frozenset({Ability.FOLD})

    async def start(self) -> None:
        """Does nothing: the agent is always ready."""

    async def run(self, turn: Turn) -> AsyncGenerator[AgentEvent, None]:
        """Echoes the prompt, and then the prompts that were folded in."""
        answer = _answer(turn.prompt)
        while True:
            for number, word in enumerate(_WORD.findall(answer)):
                if number and self._delay:
                    await asyncio.sleep(self._delay)
                elif number % WORDS_PER_SLICE == WORDS_PER_SLICE - 1:
                    await asyncio.sleep(0)
                yield TextDelta(word)
            folded = await turn.take_folded()
            if not folded:
                return
            answer = "\n".join(_answer(one.prompt) for one in folded)

    async def close(self) -> None:
        """Does nothing: there is nothing to free."""


def _answer(prompt: Prompt) -> str:
    return prompt.text or "\n\n".join(attached_texts(prompt))
