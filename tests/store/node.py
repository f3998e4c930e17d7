"""A node as a process of its own: `python -m store.node URL NAME SESSIONS RUNS TOTAL`.

It says `ready`, and begins once it is told to. It plays runs in sessions of its own, and in one
that it shares with the other nodes, and prints the positions that its listener was told of, once
there were TOTAL of them.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Sequence

import structlog

from runlane_server.store.base import LoggedComplete, Stale
from runlane_server.store.open import StoreUrl, open_store
from support.story import Story, Witness

SHARED = "shared"


class Counted(Witness):
    """A listener that knows when it has heard enough."""

    def __init__(self, total: int) -> None:
        super().__init__()
        self.enough = asyncio.Event()
        self._total = total

    def on_completes(self, events: Sequence[LoggedComplete]) -> None:
        super().on_completes(events)
        if len(self.log) >= self._total:
            self.enough.set()


async def share(story: Story, run_id: str) -> None:
    """Accepts a run where other nodes do, and cancels it: each is tried until it wins."""
    while not await _tried(story, lambda: story.accept(run_id)):
        pass
    # Another node may have cancelled it by then.
    while story.lane.is_busy and not await _tried(story, story.cancel):
        pass


async def _tried(story: Story, step: Callable[[], Awaitable[None]]) -> bool:
    try:
        await step()
    except Stale:
        story.lane = await story.store.load_lane(story.key)
        return False
    return True


async def live(url: str, name: str, sessions: int, runs: int, total: int) -> list[list[object]]:
    """Plays its runs; returns what its listener was told."""
    async with open_store(StoreUrl.parse(url)) as store:
        store.listener = witness = Counted(total)
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        stories = [Story(store, f"{name}-{n}") for n in range(sessions)]

        async def play(story: Story) -> None:
            for n in range(runs):
                complete = await story.play(f"{story.session_id}-{n}")
                assert witness.log[-1].position <= store.position
                assert any(event.complete == complete for event in witness.log)

        shared = (share(Story(store, SHARED), f"{name}-shared-{n}") for n in range(runs))
        await asyncio.gather(*map(play, stories), *shared)
        await witness.enough.wait()
        return [[event.position, event.complete.run_id] for event in witness.log]


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    url, name, *numbers = sys.argv[1:]
    print(json.dumps(asyncio.run(live(url, name, *map(int, numbers)))))
