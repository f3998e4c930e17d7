"""What every subcommand does: connect, work, and turn errors into a line and an exit code."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

import click

from runlane.cli.connection import Settings
from runlane.client import Client
from runlane.errors import InvalidArgument, RunlaneError
from runlane.types import RunComplete, RunState
from runlane.wire import RetryPolicy

DONE, FAILED, BAD_USAGE, INTERRUPTED = 0, 1, 2, 130

_RETRY = RetryPolicy(maximum=1.0)
"""Somebody looks on: a server that is back is found within a second."""


class Failure(click.ClickException):
    """Ends the command with a line on stderr."""

    exit_code = FAILED


class Refused(Failure):
    """The same, where an argument is at fault."""

    exit_code = BAD_USAGE


def execute(settings: Settings, work: Callable[[Client], Awaitable[int]]) -> None:
    """Works with a client, and leaves the command with the exit code that comes of it."""

    async def connected() -> int:
        async with settings.client(_RETRY) as client:
            return await work(client)

    try:
        code = asyncio.run(connected())
    except RunlaneError as error:
        raise failure(error) from error
    except (KeyboardInterrupt, asyncio.CancelledError):
        code = INTERRUPTED
    if code:
        sys.exit(code)


def describe(error: RunlaneError) -> str:
    """An error in one line."""
    found = [f"{each.field}: {each.description}" for each in error.violations]
    # The server's sentence may name the violations already.
    told = [each for each in found if each not in error.message]
    line = f"{error.message} ({'; '.join(told)})" if told else error.message
    return " ".join(line.split())


def failure(error: RunlaneError) -> Failure:
    """How a call that failed ends the command."""
    cls = Refused if isinstance(error, InvalidArgument) else Failure
    return cls(describe(error))


def outcome_code(complete: RunComplete) -> int:
    """The exit code for a run that ended."""
    if complete.state is RunState.COMPLETED:
        return DONE
    return INTERRUPTED if complete.cancelled else FAILED


class Interrupts:
    """Makes something of Ctrl-C: the first sets `first`, the second cancels the task at once."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()

    def __enter__(self) -> Self:
        # Where the loop cannot do it (Windows), Ctrl-C ends the command as it always does.
        with suppress(NotImplementedError, RuntimeError):
            self._loop.add_signal_handler(signal.SIGINT, self.hit)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with suppress(NotImplementedError, RuntimeError):
            self._loop.remove_signal_handler(signal.SIGINT)

    def hit(self) -> None:
        """Ctrl-C was pressed."""
        if not self.first.is_set():
            self.first.set()
        elif self._task is not None:
            self._task.cancel()


async def stopped(task: asyncio.Task[None]) -> None:
    """Cancels a helper task and waits until it is gone; what it raised is raised here."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.result()
