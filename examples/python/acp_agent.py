"""An agent that speaks the Agent Client Protocol: it keeps notes.

`note TEXT` adds a line to notes.txt in its working directory, once it is permitted; any other
prompt is answered with the number of prompts in this session. Start a server with it:

    runlane-server --agent "acp:python examples/python/acp_agent.py" --acp-permissions edit=allow

It requires the package `agent-client-protocol`.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from pathlib import Path
from typing import Any

import acp
from acp.schema import (
    AgentCapabilities,
    AllowedOutcome,
    InitializeResponse,
    LoadSessionResponse,
    NewSessionResponse,
    PermissionOption,
    PromptResponse,
    ToolCallUpdate,
)

OPTIONS = [
    PermissionOption(option_id="yes", name="Write it", kind="allow_once"),
    PermissionOption(option_id="no", name="Leave it", kind="reject_once"),
]


class NotesAgent:
    """Its sessions are files in the working directory, so they continue in another process."""

    client: Any = None

    def on_connect(self, conn: Any) -> None:
        """Called when the client is there."""
        self.client = conn

    async def initialize(self, protocol_version: int, **_: Any) -> InitializeResponse:
        """Reports what this agent can."""
        capabilities = AgentCapabilities(load_session=True)
        return InitializeResponse(protocol_version=1, agent_capabilities=capabilities)

    async def new_session(self, cwd: str, **_: Any) -> NewSessionResponse:
        """Begins a session."""
        session_id = str(uuid.uuid4())
        self._prompts_file(session_id).write_text("[]")
        return NewSessionResponse(session_id=session_id)

    async def load_session(self, session_id: str, **_: Any) -> LoadSessionResponse:
        """Continues a session of an earlier process."""
        if not self._prompts_file(session_id).exists():
            raise acp.RequestError.invalid_params({"reason": "there is no such session"})
        return LoadSessionResponse()

    async def prompt(self, session_id: str, prompt: list[Any], **_: Any) -> PromptResponse:
        """Answers a prompt."""
        text = next((block.text for block in reversed(prompt) if block.type == "text"), "")
        file = self._prompts_file(session_id)
        prompts = [*json.loads(file.read_text()), text]
        file.write_text(json.dumps(prompts))
        if text.startswith("note "):
            await self._note(session_id, text.removeprefix("note "))
        else:
            await self._say(session_id, f"This is prompt {len(prompts)} of our session.")
        return PromptResponse(stop_reason="end_turn")

    async def cancel(self, session_id: str, **_: Any) -> None:
        """Nothing here takes long enough to be cancelled."""

    async def _note(self, session_id: str, text: str) -> None:
        call_id = str(uuid.uuid4())
        call = acp.start_tool_call(call_id, "Add a note", kind="edit", raw_input={"text": text})
        await self.client.session_update(session_id, call)
        asked = ToolCallUpdate(tool_call_id=call_id)
        answer = await self.client.request_permission(
            session_id=session_id, tool_call=asked, options=OPTIONS
        )
        permitted = isinstance(answer.outcome, AllowedOutcome) and answer.outcome.option_id == "yes"
        if permitted:
            _append(Path("notes.txt"), f"{text}\n")
        ended = acp.update_tool_call(call_id, status="completed" if permitted else "failed")
        await self.client.session_update(session_id, ended)
        await self._say(session_id, "Noted." if permitted else "I may not write.")

    async def _say(self, session_id: str, text: str) -> None:
        for word in text.split(" "):
            update = acp.update_agent_message_text(f"{word} ")
            await self.client.session_update(session_id, update)

    def _prompts_file(self, session_id: str) -> Path:
        return Path(f"{uuid.UUID(session_id)}.json")


def _append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


if __name__ == "__main__":
    asyncio.run(acp.run_agent(NotesAgent()))  # type: ignore[arg-type] # a part of the interface
