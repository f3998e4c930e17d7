"""Agents that go wrong (test_odd_workers.py)."""

import asyncio
import os

from runlane.worker import AgentError, Turn, Worker


class Wordless(Exception):
    """A failure without a text."""

    def __str__(self) -> str:
        raise ValueError("it has none")


async def answer(turn: Turn) -> str:
    """Goes wrong as the prompt says."""
    match turn.prompt.text:
        case "wordless":
            raise Wordless
        case "no text":
            raise AgentError(None, reason="NO_MODEL")  # type: ignore[arg-type]
        case "early":
            print("let go", flush=True)
            await asyncio.Event().wait()
        case "half":
            await turn.step("mail \ud800", lambda: "\ud800")
        case "nothing":
            await turn.step("mail", lambda: None)
    return "ok"


if __name__ == "__main__":
    print("worker for default: 1 slot", flush=True)
    Worker(os.environ["RUNLANE_SERVER"], {"default": answer}, slots=1, drain_timeout=0).run()
