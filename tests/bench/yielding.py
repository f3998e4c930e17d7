"""An agent that yields the words of its prompt as fast as it can."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any


async def answer(turn: Any) -> AsyncIterator[str]:
    """Lets others use the event loop after each word, as an agent that reads from a socket does."""
    for word in turn.prompt.text.split():
        yield f"{word} "
        await asyncio.sleep(0)
