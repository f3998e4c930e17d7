"""Executes subcommands: connects, handles Ctrl-C, and maps errors to a line and an exit code."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Self

import click

from runlane.cli.command import INTERRUPTED
from runlane.cli.connection import Settings
from runlane.cli.terminal import for_terminal
from runlane.client import Client
from runlane.errors import InvalidArgument, RunlaneError, Unauthenticated
from runlane.types import RunComplete, RunState
from runlane.wire import RetryPolicy

DONE, FAILED, BAD_USAGE = 0, 1, 2

_RETRY = RetryPolicy(attempts=6, maximum=1.0)
"""Short, because a person is waiting: reconnects within a second of a server restart, and reports a
wrong address after about two."""


class Failure(click.ClickException):
    """Exits with a line on stderr and exit code 1."""

    exit_code = FAILED


class InvalidUsage(Failure):
    """Exits with a line on stderr and exit code 2."""

    exit_code = BAD_USAGE


def execute(settings: Settings, work: Callable[[Client], Awaitable[int]]) -> None:
    """Runs the work of a subcommand with a client; exits with the returned code."""

    async def run() -> int:
        async with settings.client(_RETRY) as client:
            return await work(client)

    try:
        code = asyncio.run(run())
    except Unauthenticated as error:
        if settings.has_token:
            raise failure(error) from error
        remedy = "no token was given; use --token-file or RUNLANE_TOKEN"
        raise Failure(f"{describe(error)}: {remedy}") from error
    except RunlaneError as error:
        raise failure(error) from error
    except (KeyboardInterrupt, asyncio.CancelledError):
        code = INTERRUPTED
    if code:
        sys.exit(code)


def describe(error: RunlaneError) -> str:
    """Returns the text of an error as one line."""
    violations = [f"{each.field}: {each.description}" for each in error.violations]
    # The message of the server may already contain them.
    missing = [each for each in violations if each not in error.message]
    line = f"{error.message} ({'; '.join(missing)})" if missing else error.message
    return " ".join(for_terminal(line).split())


def failure(error: RunlaneError) -> Failure:
    """Converts the error of a call to an exit of the command."""
    cls = InvalidUsage if isinstance(error, InvalidArgument) else Failure
    return cls(describe(error))


def outcome_code(complete: RunComplete) -> int:
    """Returns the exit code for a run that ended."""
    if complete.state is RunState.COMPLETED:
        return DONE
    return INTERRUPTED if complete.cancelled else FAILED


class Interrupts:
    """Handles Ctrl-C: the first sets `first`, the second cancels the task."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()

    def __enter__(self) -> Self:
        # Windows event loops have no signal handlers; Ctrl-C then ends the command as usual.
        with suppress(NotImplementedError, RuntimeError):
            self._loop.add_signal_handler(signal.SIGINT, self.handle)
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(NotImplementedError, RuntimeError):
            self._loop.remove_signal_handler(signal.SIGINT)

    def handle(self) -> None:
        """Handles one Ctrl-C."""
        if not self.first.is_set():
            self.first.set()
        elif self._task is not None:
            self._task.cancel()


async def stop(task: asyncio.Task[None]) -> None:
    """Cancels a task and waits for its end; raises the exception of the task, if any."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.result()
