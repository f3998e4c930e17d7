"""The tools that change what waits, and that begin a session with the transcript of another one."""

from __future__ import annotations

from typing import Annotated, Literal

from mcp.server.mcpserver.exceptions import ToolError
from pydantic import Field

from runlane.cli.mcp_server.records import Record, record, run_record
from runlane.cli.mcp_server.tools import RunId, SessionId, reported
from runlane.client import Client
from runlane.types import WhenBusy


class Edits:
    """The tools of one server that edit queues and fork sessions."""

    def __init__(self, client: Client) -> None:
        self._client = client

    @reported
    async def update_run(
        self,
        *,
        run_id: RunId,
        prompt: Annotated[str | None, Field(description="The new prompt; null: as it is.")] = None,
        labels: Annotated[
            dict[str, str] | None,
            Field(description="The new labels, instead of all earlier ones; null: as they are."),
        ] = None,
        send_now: Annotated[
            Literal["fold", "interrupt"] | None,
            Field(
                description="Do not wait: join the active turn at its next step (fold), or cancel "
                "the active run and start next (interrupt)."
            ),
        ] = None,
        place: Annotated[
            Literal["first", "last", "before", "after"] | None,
            Field(description="The new place in the queue; before and after need anchor_run_id."),
        ] = None,
        anchor_run_id: Annotated[
            str, Field(description="The waiting run that `place` refers to.")
        ] = "",
        revision: Annotated[
            int | None,
            Field(ge=0, description="Change only the run at this revision; null: any."),
        ] = None,
    ) -> Record:
        """Edit, move, or send now a run that waits. To drop it, call cancel_runs with its run_id.

        ALREADY_STARTED: the run has left the queue, and nothing was changed.
        """
        if bool(anchor_run_id) != (place in {"before", "after"}):
            raise ToolError("anchor_run_id: only the places before and after need it")
        if (prompt, labels, send_now, place) == (None, None, None, None):
            raise ToolError("prompt: nothing to change; give prompt, labels, send_now or place")
        run = await self._client.update_run(
            run_id,
            prompt=prompt,
            when_busy=None if send_now is None else WhenBusy(send_now),
            metadata=labels,
            first=place == "first",
            last=place == "last",
            before=anchor_run_id if place == "before" else "",
            after=anchor_run_id if place == "after" else "",
            revision=revision,
        )
        return {"run": run_record(run)}

    @reported
    async def fork_session(
        self,
        *,
        session_id: SessionId,
        new_session_id: Annotated[
            str, Field(description="Idempotency key and new id; empty: a new one.")
        ] = "",
        at_turn: Annotated[
            int, Field(ge=0, description="Last turn to copy; 0: the last one that has finished.")
        ] = 0,
    ) -> Record:
        """Create a session with a copy of the finished turns of another, which stays as it is."""
        session = await self._client.fork_session(
            session_id, new_session_id or None, at_turn=at_turn
        )
        return {"session": record(session)}
