"""The agent that runs a program for each turn.

The program reads its input from stdin and writes the answer to stdout:

    command:<argv>         the text of the prompt, then its text attachments, separated by blank
                           lines
    command+json:<argv>    the whole turn as one JSON object (see `turn_as_json`)

RUNLANE_SESSION_ID, RUNLANE_RUN_ID and RUNLANE_ATTEMPT in its environment name the run; see
`environment` for the other variables. The working directory is private and removed after the run,
unless a common one is configured.

No shell is involved: the words of the argv are those of the spec, the prompt is never one of them,
and the program inherits no open file of the server except its own three pipes.

Exit code 0 completes the turn. A cancel sends SIGTERM to the program and everything that it
started, and SIGKILL after a grace period. A program has no steps, so no prompt is folded into its
turn.
"""

from __future__ import annotations

import asyncio
import base64
import codecs
import errno
import json
import os
import shlex
import shutil
import signal
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import structlog

from runlane_server.agents.base import AgentError, AgentEvent, Turn
from runlane_server.agents.command.environment import (
    RUN_VARIABLES,
    TRACE_VARIABLE,
    build_environment,
)
from runlane_server.agents.command.guardian import Guardian
from runlane_server.agents.command.launcher import Command
from runlane_server.agents.command.limits import ResourceLimits
from runlane_server.agents.command.program import DRAIN_TIMEOUT, Program, ProgramLost
from runlane_server.agents.command.run_dirs import RunDirs
from runlane_server.agents.text import whole_text, without_terminal_codes
from runlane_server.core.artifact import ArtifactPiece
from runlane_server.core.errors import SettingsError, start_error
from runlane_server.core.model import (
    Attachment,
    Message,
    Part,
    Reasoning,
    ResultPart,
    Text,
    TextDelta,
    ToolCall,
    ToolResult,
)

COMMAND_FAILED = "COMMAND_FAILED"
"""Reason of a failed run: the program could not be started, or did not exit with 0."""

COMMAND_LIMIT = "COMMAND_LIMIT"
"""Reason of a failed run: a resource limit ended the program."""

START_BACKOFF = (0.1, 0.2, 0.5, 1.0)
"""Seconds between attempts to start a program for which the machine has no room."""

START_PATIENCE = 10.0
"""Seconds after which a run whose program cannot be started fails."""

_SCARCE = frozenset(
    {
        *(errno.EAGAIN, errno.EMFILE, errno.ENFILE),
        *(errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS),
    }
)
"""Errors of a start that may succeed later: too many processes or open files, too little memory."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class CommandSettings:
    """The settings of all programs.

    `env`: variables to pass or set (see `environment.parse_variables`). `directory`: the parent of
    the runs' private directories; None is the system's directory for temporary files. `cwd`: a
    common working directory instead of the private ones; HOME and TMPDIR stay private. `limits`:
    resource limits of a program.
    """

    env: Sequence[str] = ()
    directory: Path | None = None
    cwd: Path | None = None
    limits: ResourceLimits = field(default_factory=ResourceLimits)


_DEFAULTS = CommandSettings()


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
        settings: CommandSettings = _DEFAULTS,
    ) -> None:
        """Raises StartError if there is no such program, or no directory can be created."""
        if not argv:
            raise SettingsError("agent command: the program is missing; write command:<argv>")
        path = shutil.which(argv[0])
        if path is None:
            raise SettingsError(f"agent command: there is no program {argv[0]!r}")
        # Found from the server's working directory, so absolute: the program works in another one.
        self._argv = [str(Path(path).absolute()), *argv[1:]]
        self._as_json = as_json
        self._kill_grace = kill_grace
        self._settings = settings
        # Absolute for the same reason: the launcher works in another directory.
        self._cwd = None if settings.cwd is None else settings.cwd.absolute()
        self._guardian = Guardian(grace=kill_grace)
        try:
            self._run_dirs = RunDirs(settings.directory)
        except OSError as exc:
            raise start_error(f"agent command: --command-dir: {exc}", exc) from exc
        if settings.cwd is None:
            _warn_about_relative_paths(argv[1:])

    async def start(self) -> None:
        """Starts the guardian, and removes the directories that a killed server left behind."""
        self._guardian.start()
        await self._run_dirs.start()

    async def run(self, turn: Turn) -> AsyncGenerator[AgentEvent, None]:
        """Runs the program. Raises AgentError (COMMAND_FAILED or COMMAND_LIMIT) if it does not exit
        with 0."""
        stdin = await turn_as_json(turn) if self._as_json else whole_text(turn.prompt)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        home = self._create_directory()
        try:
            program = await self._start_program(turn, stdin.encode(), home)
            try:
                while data := await program.read():
                    if text := decoder.decode(data):
                        yield TextDelta(text)
                if text := decoder.decode(b"", final=True):
                    yield TextDelta(text)
                code = await _exit_code(program)
            finally:
                await program.end(self._kill_grace)
        finally:
            await self._run_dirs.remove(home)
        if code != 0:
            raise _failure(code, program.error_tail, self._settings.limits)
        if program.was_cut:
            raise AgentError(
                "the command exited with code 0, but processes that it left behind were still "
                f"writing to its output {DRAIN_TIMEOUT:g} s later, and were ended",
                reason=COMMAND_FAILED,
            )

    async def close(self) -> None:
        """Stops the guardian and removes this server's directory."""
        await self._guardian.close()
        await self._run_dirs.close()

    def _create_directory(self) -> Path:
        try:
            return self._run_dirs.create()
        except OSError as exc:
            message = f"cannot create a directory for the run: {exc}"
            raise AgentError(message, reason=COMMAND_FAILED) from exc

    async def _start_program(self, turn: Turn, stdin: bytes, home: Path) -> Program:
        """Starts the program. While the machine lacks what a start needs, it retries.

        Raises AgentError (COMMAND_FAILED).
        """
        command = self._command(turn, home)
        give_up_at = time.monotonic() + START_PATIENCE
        for delay in chain(START_BACKOFF, repeat(START_BACKOFF[-1])):
            try:
                return await self._try_to_start(command, stdin)
            except OSError as exc:
                if exc.errno not in _SCARCE or time.monotonic() + delay > give_up_at:
                    message = f"cannot start {self._argv[0]}: {exc.strerror}"
                    raise AgentError(message, reason=COMMAND_FAILED) from exc
                log.warning("program not started", error=exc.strerror, retry_in_s=delay)
            await asyncio.sleep(delay)
        raise AssertionError("unreachable")

    async def _try_to_start(self, command: Command, stdin: bytes) -> Program:
        program = Program(self._guardian, command, stdin=stdin)
        try:
            await program.started()
        except BaseException:
            await program.end(0.0)
            raise
        return program

    def _command(self, turn: Turn, home: Path) -> Command:
        settings = self._settings
        ids = (turn.session_id, turn.run_id, str(turn.attempt))
        run_variables = dict(zip(RUN_VARIABLES, ids, strict=True))
        if turn.traceparent:
            run_variables[TRACE_VARIABLE] = turn.traceparent
        return Command(
            self._argv,
            build_environment(os.environ, settings.env, run_variables, home),
            str(self._cwd or home),
            grace=self._kill_grace,
            limits=settings.limits.rlimits(),
        )


async def _exit_code(program: Program) -> int:
    try:
        return await program.exit_code()
    except ProgramLost as exc:
        message = "the process that watches the command was killed"
        raise AgentError(message, reason=COMMAND_FAILED) from exc


def _warn_about_relative_paths(arguments: Sequence[str]) -> None:
    """Logs the arguments that are relative paths of existing files: the program works elsewhere."""
    if found := [one for one in arguments if not Path(one).is_absolute() and os.path.lexists(one)]:
        log.warning(
            "programs run in their own directory and will not find these relative paths; "
            "use absolute paths or --command-cwd",
            arguments=found,
        )


def split_argv(text: str) -> list[str]:
    """Splits a command line into words, as a POSIX shell does. Raises StartError."""
    try:
        return shlex.split(text)
    except ValueError as exc:
        raise SettingsError(f"agent command: cannot split {text!r}: {exc}") from exc


async def turn_as_json(turn: Turn) -> str:
    """The turn as one JSON object.

    Its keys are `session_id`, `run_id`, `attempt`, `prompt`, `attachments` (each with `name`,
    `mime_type`, and `text` or `data` in base64), `metadata`, and `history`: the messages before
    this turn, the oldest first, each with `message_id`, `run_id`, `role`, `finish_reason`, `model`
    and `parts`. The `type` of a part is text, reasoning, tool_call, tool_result, attachment,
    artifact or result.
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


def _failure(code: int, error_tail: str, limits: ResourceLimits) -> AgentError:
    reason, how = COMMAND_FAILED, f"exited with code {code}"
    # A shell exits with 128 plus the number of the signal that ended its child.
    limit = limits.describe_signal(-code if code < 0 else code - 128)
    if limit is not None:
        reason = COMMAND_LIMIT
        how = f"was ended by {limit}" if code < 0 else f"{how}: a child of it reached {limit}"
    elif code < 0:
        how = f"was ended by {_signal_name(-code)}"
        if code == -signal.SIGKILL and limits.cpu:  # the kernel's answer to an ignored SIGXCPU
            how += f", possibly for exceeding {limits.describe_signal(signal.SIGXCPU)}"
    text = without_terminal_codes(error_tail).strip()
    message = f"the command {how}: {text}" if text else f"the command {how}"
    return AgentError(message, reason=reason)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
