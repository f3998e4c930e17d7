"""The programs of one command line: one for each turn, in directories of its own.

`Programs` knows where a program works and what it gets; `Program` is one that runs. The agent
decides what the two sides say over its pipes (`command/agent.py`, `acp/agent.py`).
"""

from __future__ import annotations

import asyncio
import errno
import os
import shlex
import shutil
import signal
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import chain, repeat
from pathlib import Path

import structlog

from runlane_server.agents.base import AgentError, Turn
from runlane_server.agents.command.environment import (
    ORIGIN_VARIABLES,
    RUN_VARIABLES,
    STATE_VARIABLE,
    TRACE_VARIABLE,
    build_environment,
)
from runlane_server.agents.command.guardian import Guardian
from runlane_server.agents.command.launcher import Command
from runlane_server.agents.command.limits import ResourceLimits
from runlane_server.agents.command.program import Program, ProgramLost
from runlane_server.agents.command.run_dirs import RunDirs
from runlane_server.agents.state_dirs import HOME, StateDirs
from runlane_server.agents.text import without_terminal_codes
from runlane_server.core.errors import SettingsError, start_error
from runlane_server.core.model import SessionKey

COMMAND_FAILED = "COMMAND_FAILED"
"""Reason of a failed run: the program could not be started, or did not exit with 0."""

COMMAND_LIMIT = "COMMAND_LIMIT"
"""Reason of a failed run: a resource limit ended the program."""

START_BACKOFF = (0.1, 0.2, 0.5, 1.0)
"""Seconds between attempts to start a program for which the machine has no room."""

START_PATIENCE = 10.0
"""Seconds after which a run whose program cannot be started fails."""

_LOST = "the process that watches the command was killed"

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
    resource limits of a program. `state`: directories that stay for the session, as HOME and
    working directory; None for private ones.
    """

    env: Sequence[str] = ()
    directory: Path | None = None
    cwd: Path | None = None
    limits: ResourceLimits = field(default_factory=ResourceLimits)
    state: StateDirs | None = None


DEFAULTS = CommandSettings()


@dataclass(frozen=True, slots=True)
class Place:
    """The directories of a turn's program: `temp` is removed after the turn, `home` is its HOME,
    `cwd` where it starts. `state` is that of the session, which has `home` in it, or None."""

    temp: Path
    home: Path
    cwd: Path
    state: Path | None = None


class Programs:
    """Starts a program for each turn. `kind` is the kind of agent, for messages.

    `kill_grace` is the time in seconds between SIGTERM and SIGKILL.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        kind: str,
        kill_grace: float,
        settings: CommandSettings = DEFAULTS,
    ) -> None:
        """Raises StartError if there is no such program, or no directory can be created."""
        if not argv:
            raise SettingsError(f"agent {kind}: the program is missing; write {kind}:<argv>")
        path = shutil.which(argv[0])
        if path is None:
            raise SettingsError(f"agent {kind}: there is no program {argv[0]!r}")
        # Found from the server's working directory, so absolute: the program works in another one.
        self.argv = [str(Path(path).absolute()), *argv[1:]]
        self.kill_grace = kill_grace
        self._settings = settings
        # Absolute for the same reason: the launcher works in another directory.
        self._cwd = None if settings.cwd is None else settings.cwd.absolute()
        self.guardian = Guardian(grace=kill_grace)
        try:
            self._run_dirs = RunDirs(settings.directory)
        except OSError as exc:
            raise start_error(f"agent {kind}: --command-dir: {exc}", exc) from exc
        if settings.cwd is None:
            _warn_about_relative_paths(argv[1:])

    async def start(self) -> None:
        """Starts the guardian, and removes the directories and processes that a killed server left
        behind."""
        self.guardian.start()
        await self.guardian.cgroups.start(self.kill_grace)
        await self._run_dirs.start()

    async def close(self) -> None:
        """Stops the guardian and removes this server's directory."""
        await self.guardian.close()
        await self._run_dirs.close()

    @asynccontextmanager
    async def place(self, turn: Turn) -> AsyncGenerator[Place, None]:
        """The directories of a turn, until the context ends. Raises AgentError (COMMAND_FAILED)."""
        temp = self._create_directory()
        try:
            state = await asyncio.to_thread(self._open_state, turn)
            home = temp if state is None else state / HOME
            yield Place(temp, home, self._cwd or home, state)
        finally:
            await self._run_dirs.remove(temp)

    async def launch(self, turn: Turn, place: Place, *, stdin: bytes | None) -> Program:
        """Starts the program; its caller must end it. While the machine lacks what a start needs,
        it retries.

        With None, stdin stays open for `Program.write`. Raises AgentError (COMMAND_FAILED).
        """
        command = self._command(turn, place)
        give_up_at = time.monotonic() + START_PATIENCE
        for delay in chain(START_BACKOFF, repeat(START_BACKOFF[-1])):
            try:
                return await self._try_to_start(command, stdin)
            except OSError as exc:
                if exc.errno not in _SCARCE or time.monotonic() + delay > give_up_at:
                    message = f"cannot start {self.argv[0]}: {exc.strerror}"
                    raise AgentError(message, reason=COMMAND_FAILED) from exc
                log.warning("program not started", error=exc.strerror, retry_in_s=delay)
            except ProgramLost as exc:
                raise AgentError(_LOST, reason=COMMAND_FAILED) from exc
            await asyncio.sleep(delay)
        raise AssertionError("unreachable")

    def session_deleted(self, key: SessionKey) -> None:
        """Removes what was kept for a session."""
        if self._settings.state is not None:
            self._settings.state.remove(key)

    def failure(self, code: int, error_tail: str) -> AgentError:
        """The error of a program that exited with a code, or was ended by a signal (negative)."""
        return _failure(code, error_tail, self._settings.limits)

    def _create_directory(self) -> Path:
        try:
            return self._run_dirs.create()
        except OSError as exc:
            message = f"cannot create a directory for the run: {exc}"
            raise AgentError(message, reason=COMMAND_FAILED) from exc

    def _open_state(self, turn: Turn) -> Path | None:
        if self._settings.state is None:
            return None
        try:
            return self._settings.state.open(SessionKey(turn.tenant, turn.session_id))
        except OSError as exc:
            message = f"cannot open the directory of the session: {exc}"
            raise AgentError(message, reason=COMMAND_FAILED) from exc

    async def _try_to_start(self, command: Command, stdin: bytes | None) -> Program:
        program = Program(self.guardian, command, stdin=stdin)
        try:
            await program.started()
        except BaseException:
            await program.end(0.0)
            raise
        return program

    def _command(self, turn: Turn, place: Place) -> Command:
        settings = self._settings
        ids = (turn.tenant, turn.session_id, turn.run_id, str(turn.attempt))
        run_variables = dict(zip(RUN_VARIABLES, ids, strict=True))
        if turn.origin is not None:
            origin = (turn.origin.session_id, str(turn.origin.turn))
            run_variables |= dict(zip(ORIGIN_VARIABLES, origin, strict=True))
        if turn.traceparent:
            run_variables[TRACE_VARIABLE] = turn.traceparent
        if place.state is not None:
            run_variables[STATE_VARIABLE] = str(place.home)
        return Command(
            self.argv,
            build_environment(os.environ, settings.env, run_variables, place.home, place.temp),
            str(place.cwd),
            grace=self.kill_grace,
            limits=settings.limits.rlimits(),
        )


async def exit_code(program: Program) -> int:
    """Waits for a program's exit; returns its code. Raises AgentError (COMMAND_FAILED)."""
    try:
        return await program.exit_code()
    except ProgramLost as exc:
        raise AgentError(_LOST, reason=COMMAND_FAILED) from exc


def split_argv(text: str, kind: str = "command") -> list[str]:
    """Splits the command line of a kind of agent into words, as a POSIX shell does. Raises
    StartError."""
    try:
        return shlex.split(text)
    except ValueError as exc:
        raise SettingsError(f"agent {kind}: cannot split {text!r}: {exc}") from exc


def _warn_about_relative_paths(arguments: Sequence[str]) -> None:
    """Logs the arguments that are relative paths of existing files: the program works elsewhere."""
    if found := [one for one in arguments if not Path(one).is_absolute() and os.path.lexists(one)]:
        log.warning(
            "programs run in their own directory and will not find these relative paths; "
            "use absolute paths or --command-cwd",
            arguments=found,
        )


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
