"""A worker: executes runs of the agent `default`, or of the one that RUNLANE_AGENT names.

SIGTERM stops it.
"""

import asyncio
import os
import sys
from collections.abc import AsyncIterator

from runlane import RunlaneError, Text
from runlane.worker import AgentError, Artifact, Custom, Result, Turn, Worker


async def answer(turn: Turn) -> AsyncIterator[object]:
    """Says the prompt in capitals, a word at a time, then the prompts that joined the turn."""
    if turn.prompt.text.startswith("release "):
        async for event in release(turn, turn.prompt.text.removeprefix("release ")):
            yield event
        return
    if turn.prompt.text == "recall":
        for message in await turn.history():
            for part in message.parts:
                yield f"{part.text}|" if isinstance(part, Text) else ""
        return
    prompts = [turn.prompt.text]
    while prompts:
        for word in " ".join(prompts).split():
            yield f"{word.upper()} "
            await asyncio.sleep(0.02)
        prompts = [folded.prompt.text for folded in await turn.take_folded()]


async def release(turn: Turn, version: str) -> AsyncIterator[object]:
    """Builds once, also if it is called again, asks people, and deploys."""

    def build() -> str:
        print("building", version, flush=True)
        return f"app-{version}"

    built = await turn.step("build", build)
    if not await turn.ask(f"May I deploy {built}?", tool_name="deploy"):
        raise AgentError("nothing was deployed", reason="NOT_APPROVED")
    yield Artifact(
        artifact_id="notes", name="notes.txt", mime_type="text/plain", text=f"Release {version}"
    )
    yield Custom("deployed", {"build": built})
    yield Result({"build": built})
    yield f"Deployed {built}."


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
