"""Prompts that the stream of a session lacks, because their runs ended too soon."""

from __future__ import annotations

from contextlib import suppress
from typing import Protocol

from runlane.client import Client
from runlane.errors import RunlaneError
from runlane.session_stream import SessionChanged, SessionEvent
from runlane.types import Run


class Learner(Protocol):
    """A view that shows prompts."""

    def lacking(self, event: SessionEvent) -> str:
        """The run whose prompt the event makes visible but is not known; empty if there is none."""
        ...

    def learn(self, *runs: Run) -> None:
        """Notes the prompts of runs."""
        ...


async def find_late(client: Client, view: Learner, event: SessionEvent) -> None:
    """Reads the prompt that a view lacks for an event. A view shows the run without it if that
    fails."""
    if run_id := view.lacking(event):
        with suppress(RunlaneError):
            view.learn(await client.get_run(run_id))


def brings(event: SessionEvent, run_id: str) -> bool:
    """Whether the event has the prompt of a run that has just started."""
    match event.body:
        case SessionChanged(active_run=Run(run_id=active)):
            return active == run_id
        case _:
            return False
