"""The agent that runs a program for each turn.

The program reads its input from stdin and writes the answer to stdout:

    command:<argv>         the text of the prompt, then its text attachments, separated by blank
                           lines
    command+json:<argv>    the whole turn as one JSON object (see `turn_as_json`)

RUNLANE_TENANT, RUNLANE_SESSION_ID, RUNLANE_RUN_ID and RUNLANE_ATTEMPT in its environment name the
run; see `environment` for the other variables. The working directory is private and removed after
the run, unless a common one or one for each session is configured.

No shell is involved: the words of the argv are those of the spec, the prompt is never one of them,
and the program inherits no open file of the server except its own three pipes.

Exit code 0 completes the turn. A cancel sends SIGTERM to the program and everything that it
started, and SIGKILL after a grace period. A program has no steps, so no prompt is folded into its
turn.
"""

from __future__ import annotations

import base64
import codecs
import json
from collections.abc import AsyncGenerator, Sequence
from dataclasses import asdict
from typing import Any

from runlane_server.agents.abilities import Ability
from runlane_server.agents.base import AgentError, AgentEvent, Turn
from runlane_server.agents.command.program import DRAIN_TIMEOUT
from runlane_server.agents.command.programs import (
    COMMAND_FAILED,
    DEFAULTS,
    CommandSettings,
    Programs,
    exit_code,
)
from runlane_server.agents.text import whole_text
from runlane_server.core.artifact import ArtifactPiece
from runlane_server.core.model import (
    Attachment,
    KeptPart,
    Message,
    Part,
    Reasoning,
    ResultPart,
    SessionKey,
    Text,
    TextDelta,
    ToolCall,
    ToolResult,
)


class CommandAgent:
    """Runs a program for each turn.

    `kill_grace` is the time in seconds between SIGTERM and SIGKILL. It must be below the server's
    `--cancel-grace`.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        as_json: bool = False,
        kill_grace: float,
        settings: CommandSettings = DEFAULTS,
    ) -> None:
        """Raises StartError if there is no such program, or no directory can be created."""
        self.programs = Programs(argv, kind="command", kill_grace=kill_grace, settings=settings)
        self._as_json = as_json
        self.abilities = frozenset({Ability.ATTACHMENTS} if as_json else ())

    async def start(self) -> None:
        """Starts the guardian, and removes the directories that a killed server left behind."""
        await self.programs.start()

    async def run(self, turn: Turn) -> AsyncGenerator[AgentEvent, None]:
        """Runs the program. Raises AgentError (COMMAND_FAILED or COMMAND_LIMIT) if it does not exit
        with 0."""
        stdin = await turn_as_json(turn) if self._as_json else whole_text(turn.prompt)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        async with self.programs.place(turn) as place:
            program = await self.programs.launch(turn, place, stdin=stdin.encode())
            try:
                while data := await program.read():
                    if text := decoder.decode(data):
                        yield TextDelta(text)
                if text := decoder.decode(b"", final=True):
                    yield TextDelta(text)
                code = await exit_code(program)
            finally:
                await program.end(self.programs.kill_grace)
        if code != 0:
            raise self.programs.failure(code, program.error_tail)
        if program.was_cut:
            raise AgentError(
                "the command exited with code 0, but processes that it left behind were still "
                f"writing to its output {DRAIN_TIMEOUT:g} s later, and were ended",
                reason=COMMAND_FAILED,
            )

    def session_deleted(self, key: SessionKey) -> None:
        """Removes what was kept for a session."""
        self.programs.session_deleted(key)

    async def close(self) -> None:
        """Stops the guardian and removes this server's directory."""
        await self.programs.close()


async def turn_as_json(turn: Turn) -> str:
    """The turn as one JSON object.

    Its keys are `tenant`, `session_id`, `run_id`, `attempt`, `origin` (null, or `session_id` and
    `turn` of the session that this one is a fork of), `prompt`, `attachments` (each with `name`,
    `mime_type`, and `text` or `data` in base64), `metadata`, and `history`: the messages before
    this turn, the oldest first, each with `message_id`, `run_id`, `role`, `finish_reason`,
    `model` and `parts`. The `type` of a part is text, reasoning, tool_call, tool_result,
    attachment, artifact or result.
    """
    return json.dumps(
        {
            "tenant": turn.tenant,
            "session_id": turn.session_id,
            "run_id": turn.run_id,
            "attempt": turn.attempt,
            "origin": None if turn.origin is None else asdict(turn.origin),
            "prompt": turn.prompt.text,
            "attachments": [_attachment(a) for a in turn.prompt.attachments],
            "metadata": dict(turn.metadata),
            "history": [_message(message) for message in await turn.history()],
        },
        ensure_ascii=False,
    )


def _message(message: Message) -> dict[str, Any]:
    return {
        "message_id": message.message_id,
        "run_id": message.run_id,
        "role": message.role,
        "finish_reason": message.finish_reason,
        "model": message.model,
        "parts": [_part(part) for part in message.parts],
    }


def _part(part: Part) -> dict[str, Any]:  # noqa: PLR0911 - one per kind
    match part:
        case Attachment():
            return {"type": "attachment", **_attachment(part)}
        case Text(text):
            return {"type": "text", "text": text}
        case Reasoning(text):
            return {"type": "reasoning", "text": text}
        case ToolCall():
            return {"type": "tool_call", **asdict(part)}
        case ToolResult():
            return {"type": "tool_result", **asdict(part)}
        case ArtifactPiece():
            return {"type": "artifact", **_artifact(part)}
        case ResultPart(text):
            return {"type": "result", "json": text}
        case KeptPart():
            raise ValueError("reading a message puts its kept parts back")


def _artifact(artifact: ArtifactPiece) -> dict[str, Any]:
    content = artifact.content
    return {
        "artifact_id": artifact.artifact_id,
        "name": artifact.name,
        "mime_type": artifact.mime_type,
        str(artifact.kind): base64.b64encode(content).decode()
        if isinstance(content, bytes)
        else content,
        "last": artifact.last,
    }


def _attachment(attachment: Attachment) -> dict[str, str]:
    fields = {"name": attachment.name, "mime_type": attachment.mime_type}
    if isinstance(attachment.content, str):
        return {**fields, "text": attachment.content}
    return {**fields, "data": base64.b64encode(attachment.content).decode()}
