"""A worker: executes runs of the agent `default`, or of the one that RUNLANE_AGENT names.

SIGTERM stops it.
"""

import asyncio
import os
import sys
from collections.abc import AsyncIterator

from runlane import RunlaneError
from runlane.worker import Turn, Worker


async def answer(turn: Turn) -> AsyncIterator[str]:
    """Says the prompt in capitals, a word at a time, then the prompts that joined the turn."""
    prompts = [turn.prompt.text]
    while prompts:
        for word in " ".join(prompts).split():
            yield f"{word.upper()} "
            await asyncio.sleep(0.02)
        prompts = [folded.prompt.text for folded in await turn.take_folded()]


def main() -> int:
    """Executes runs; returns the exit code."""
    server = os.environ.get("RUNLANE_SERVER") or "127.0.0.1:50051"
    agent = os.environ.get("RUNLANE_AGENT") or "default"
    token = os.environ.get("RUNLANE_TOKEN") or None
    # It gives its runs back at once, as the workers in other languages do.
    worker = Worker(server, {agent: answer}, slots=4, token=token, drain_timeout=0)
    print(f"worker for {agent}: 4 slots", flush=True)
    try:
        worker.run()
    except RunlaneError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
