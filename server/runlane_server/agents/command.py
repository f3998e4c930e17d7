"""An agent that is any program.

The prompt goes to its standard input, and what it writes to its standard output is the answer:

    command:<argv>         the text of the prompt, then its text attachments, with a blank line
                           between two of them
    command+json:<argv>    the whole turn as one JSON object (see `turn_as_json`)

Its environment has RUNLANE_SESSION_ID, RUNLANE_RUN_ID and RUNLANE_ATTEMPT besides the server's own.
Exit code 0 ends the turn well. A cancel sends SIGTERM to its process group, and SIGKILL after a
grace. It has no steps, so nothing is folded into its turns.
"""

from __future__ import annotations

import base64
import codecs
import json
import os
import shlex
import shutil
import signal
from collections.abc import AsyncGenerator, Sequence
from dataclasses import asdict
from typing import Any

from runlane_server.agents.base import AgentError, AgentEvent, Turn
from runlane_server.agents.guardian import Guardian
from runlane_server.agents.program import Program
from runlane_server.agents.text import whole_text
from runlane_server.core.errors import StartError
from runlane_server.core.model import (
    Attachment,
    Message,
    Part,
    Reasoning,
    Text,
    TextDelta,
    ToolCall,
)

COMMAND_FAILED = "COMMAND_FAILED"
"""Why a run failed whose program could not be started, or did not exit with 0."""


class CommandAgent:
    """Runs a program for each turn.

    `kill_grace`, in seconds, is how long a program may take to end after SIGTERM. It must lie below
    the server's `--cancel-grace`.
    """

    def __init__(self, argv: Sequence[str], *, as_json: bool = False, kill_grace: float) -> None:
        """Raises StartError where there is no such program."""
        if not argv:
            raise StartError("agent command: no program is named; write command:<argv>")
        path = shutil.which(argv[0])
        if path is None:
            raise StartError(f"agent command: there is no program {argv[0]!r}")
        self._argv = [path, *argv[1:]]
        self._as_json = as_json
        self._kill_grace = kill_grace
        self._guardian = Guardian(grace=kill_grace)

    async def start(self) -> None:
        """Gets ready to end the programs also when the server is killed."""
        self._guardian.start()

    async def run(self, turn: Turn) -> AsyncGenerator[AgentEvent, None]:
        """Runs the program; raises AgentError (COMMAND_FAILED) where it does not exit with 0."""
        stdin = await turn_as_json(turn) if self._as_json else whole_text(turn.prompt)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        program = self._spawn(turn, stdin.encode())
        try:
            while data := await program.read():
                if text := decoder.decode(data):
                    yield TextDelta(text)
            if text := decoder.decode(b"", final=True):
                yield TextDelta(text)
            code = await program.exit_code()
        finally:
            await program.end(self._kill_grace)
        if code != 0:
            raise AgentError(_failure(code, program.error_tail), reason=COMMAND_FAILED)

    async def close(self) -> None:
        """Ends what `start` began."""
        await self._guardian.close()

    def _spawn(self, turn: Turn, stdin: bytes) -> Program:
        env = {
            **os.environ,
            "RUNLANE_SESSION_ID": turn.session_id,
            "RUNLANE_RUN_ID": turn.run_id,
            "RUNLANE_ATTEMPT": str(turn.attempt),
        }
        try:
            program = Program(self._argv, env=env, stdin=stdin, on_exit=self._guardian.forget)
        except (OSError, ValueError) as exc:
            message = f"cannot start {self._argv[0]}: {exc}"
            raise AgentError(message, reason=COMMAND_FAILED) from exc
        self._guardian.watch(program.group)
        return program


def split_argv(text: str) -> list[str]:
    """The words of a command line, as a POSIX shell splits them. Raises StartError."""
    try:
        return shlex.split(text)
    except ValueError as exc:
        raise StartError(f"agent command: cannot split {text!r}: {exc}") from exc


async def turn_as_json(turn: Turn) -> str:
    """The turn as one JSON object.

    `session_id`, `run_id`, `attempt`, `prompt`, `attachments` (each with `name`, `mime_type`, and
    `text` or `data` in base64), `metadata`, and `history`: the messages before this turn, the
    oldest first, each with `message_id`, `run_id`, `role`, `finish_reason`, `model` and `parts`
    whose `type` is text, reasoning, tool_call, tool_result or attachment.
    """
    return json.dumps(
        {
            "session_id": turn.session_id,
            "run_id": turn.run_id,
            "attempt": turn.attempt,
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


def _part(part: Part) -> dict[str, Any]:
    match part:
        case Attachment():
            return {"type": "attachment", **_attachment(part)}
        case Text(text):
            return {"type": "text", "text": text}
        case Reasoning(text):
            return {"type": "reasoning", "text": text}
        case ToolCall():
            return {"type": "tool_call", **asdict(part)}
        case _:
            return {"type": "tool_result", **asdict(part)}


def _attachment(attachment: Attachment) -> dict[str, str]:
    described = {"name": attachment.name, "mime_type": attachment.mime_type}
    if isinstance(attachment.content, str):
        return {**described, "text": attachment.content}
    return {**described, "data": base64.b64encode(attachment.content).decode()}


def _failure(code: int, error_tail: str) -> str:
    how = f"exited with code {code}" if code > 0 else f"was ended by {_signal_name(-code)}"
    return f"the command {how}: {error_tail}" if error_tail else f"the command {how}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
