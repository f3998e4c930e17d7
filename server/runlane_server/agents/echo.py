"""An agent that answers with the prompt, word by word."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator

from runlane_server.agents.base import AgentEvent, Turn
from runlane_server.agents.text import attached_texts
from runlane_server.core.model import Prompt, TextDelta

_WORD = re.compile(r"\s*\S+\s*|\s+")

WORDS_AT_ONCE = 256
"""After so many words without a delay, other tasks get a chance to run."""


class EchoAgent:
    """Answers with the text of the prompt, or with its text attachments where it has no text.

    Each word is a delta of its own, together with the white space around it; the deltas make
    exactly the text. `delay` is how many seconds pass between two words.

    A step is an answer: after each one the prompts that wait to join the turn are answered, those
    of one step a line each.
    """

    def __init__(self, *, delay: float = 0.0) -> None:
        self._delay = delay

    async def start(self) -> None:
        """Is ready at once."""

    async def run(self, turn: Turn) -> AsyncGenerator[AgentEvent, None]:
        """Echoes the prompt, and then what was folded in."""
        answer = _answer(turn.prompt)
        while True:
            for number, word in enumerate(_WORD.findall(answer)):
                if number and self._delay:
                    await asyncio.sleep(self._delay)
                elif number % WORDS_AT_ONCE == WORDS_AT_ONCE - 1:
                    await asyncio.sleep(0)
                yield TextDelta(word)
            folded = await turn.take_folded()
            if not folded:
                return
            answer = "\n".join(_answer(one.prompt) for one in folded)

    async def close(self) -> None:
        """Has nothing to free."""


def _answer(prompt: Prompt) -> str:
    return prompt.text or "\n\n".join(attached_texts(prompt))
