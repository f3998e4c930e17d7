"""`runlane run`: submits a prompt and prints the output of the run."""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import click

from runlane.cli.answer import ask_on_terminal, can_ask, outcome_text
from runlane.cli.base import DONE, Failure, Interrupts, describe, execute, outcome_code, stop
from runlane.cli.command import Command
from runlane.cli.connection import Settings
from runlane.cli.editor import read_stdin
from runlane.cli.output import json_line
from runlane.cli.params import DURATION, read_attachment
from runlane.cli.run_view import RunView
from runlane.cli.terminal import echo
from runlane.client import Client
from runlane.errors import RunlaneError, is_outcome_unknown
from runlane.ids import new_id
from runlane.inputs import (
    InputAnswered,
    InputExpired,
    InputRequest,
    InputRequested,
    InputWithdrawn,
)
from runlane.run_handle import RunHandle
from runlane.types import NOT_TERMINAL, Attachment, RunComplete, RunEvent, RunState, WhenBusy

POLL_SECONDS = 1.0
"""Seconds between two updates of the spinner."""


@dataclass(frozen=True, slots=True)
class Options:
    """The options of `runlane run`."""

    session_id: str | None
    run_id: str | None
    prompt: str
    attachments: tuple[Attachment, ...]
    when_busy: WhenBusy
    if_active: str
    timeout: timedelta | None
    agent: str
    as_json: bool
    detach: bool


@click.command(cls=Command)
@click.option(
    "-s",
    "--session",
    metavar="SESSION",
    help="Session id; created if it does not exist. Default: a new session.",
)
@click.option(
    "--when-busy",
    type=click.Choice([str(each) for each in WhenBusy]),
    default=str(WhenBusy.QUEUE),
    show_default=True,
    help="If the session has work: queue the run, fold it into the active turn, reject it, or "
    "interrupt the active run and go next.",
)
@click.option(
    "--if-active",
    default="",
    metavar="RUN",
    help="Submit the prompt only while this run of the session is active.",
)
@click.option("--timeout", type=DURATION, help="Maximum duration of the run, such as 30s or 1h30m.")
@click.option(
    "--agent",
    default="",
    metavar="NAME",
    help="Agent that executes the run; see `runlane agents`. Default: that of the session, or of "
    "the server.",
)
@click.option(
    "--run-id",
    metavar="ID",
    help="Idempotency key: the same id with the same prompt returns the existing run.",
)
@click.option(
    "--attach",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File to attach to the prompt; repeatable.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print every event as JSON; the RunComplete is last."
)
@click.option("--detach", is_flag=True, help="Print the run id and exit; the run continues.")
@click.argument("prompt", required=False)
@click.pass_obj
def run(
    settings: Settings,
    *,
    session: str | None,
    when_busy: str,
    if_active: str,
    timeout: timedelta | None,
    agent: str,
    run_id: str | None,
    attach: tuple[Path, ...],
    as_json: bool,
    detach: bool,
    prompt: str | None,
) -> None:
    """Run PROMPT and print the output as it arrives.

    The prompt is read from stdin if PROMPT is `-`, or if it is missing and stdin is not a terminal.

    Ctrl-C cancels the run and waits for its end; a second Ctrl-C exits immediately. The run
    continues after a lost connection, and the output resumes when the server is back. The
    environment variable TRACEPARENT makes the run part of a trace.

    \b
    Exit codes: 0 completed, 1 failed, 130 cancelled (by anyone).

    \b
    Examples:
      runlane run "What is new?"
      runlane run -s notes --when-busy fold "And shorter, please"
      git diff | runlane run -s review --attach README.md -
    """
    options = Options(
        session_id=session,
        run_id=run_id,
        prompt=_read_prompt(prompt, may_be_empty=bool(attach)),
        attachments=tuple(_read_attachment(path) for path in attach),
        when_busy=WhenBusy(when_busy),
        if_active=if_active,
        timeout=timeout,
        agent=agent,
        as_json=as_json,
        detach=detach,
    )
    execute(settings, partial(_run, options=options))


def _read_attachment(path: Path) -> Attachment:
    try:
        return read_attachment(path)
    except OSError as error:
        raise click.BadParameter(f"{path}: {error.strerror}", param_hint="--attach") from error


def _read_prompt(argument: str | None, *, may_be_empty: bool) -> str:
    if argument is not None and argument != "-":
        return argument
    # sys.stdin is None if it is closed (`<&-`).
    if argument is None and (sys.stdin is None or sys.stdin.isatty()):
        if may_be_empty:
            return ""
        raise click.UsageError("PROMPT is missing; give it as an argument or on stdin")
    return read_stdin("PROMPT")


def _traceparent() -> str:
    """Returns the trace context set by a traced parent process."""
    value = os.environ.get("TRACEPARENT", "")
    return value if value.isascii() and value.isprintable() else ""


async def _run(client: Client, options: Options) -> int:
    view = RunView(as_json=options.as_json)
    with Interrupts() as interrupts, view:
        handle = await _accept(client, options)
        if options.session_id is None:
            view.note(f"session {handle.session_id}")
        if options.detach:
            echo(json_line(handle.run) if options.as_json else handle.run_id)
            return DONE
        helpers = (
            asyncio.create_task(_cancel_on(interrupts.first, handle, view)),
            asyncio.create_task(_update_spinner(client, handle, view)),
        )
        is_asking = can_ask() and not options.as_json
        answering = _Answering(client, view, enabled=is_asking)
        try:
            return outcome_code(await _follow(handle, view, answering))
        finally:
            await answering.stop()
            for helper in helpers:
                await stop(helper)


async def _accept(client: Client, options: Options) -> RunHandle:
    # A new session gets its id here, so that retries create it only once.
    session_id = new_id() if options.session_id is None else options.session_id
    try:
        return await client.run_accepted(
            session_id,
            options.prompt,
            run_id=options.run_id,
            attachments=options.attachments,
            when_busy=options.when_busy,
            timeout=options.timeout,
            agent=options.agent,
            expected_active_run_id=options.if_active,
            allow_missing=True,
            traceparent=_traceparent(),
        )
    except RunlaneError as error:
        if not (is_outcome_unknown(error) and error.may_have_arrived):
            raise
        run_id = error.metadata["run_id"]
        arguments = shlex.join(["-s", session_id, "--run-id", run_id])
        raise Failure(
            f"{describe(error)}; run {run_id} in session {session_id} may have been accepted; "
            f"to find out, repeat the command with {arguments}"
        ) from error


class _Answering:
    """Asks the questions of the run at the terminal, one after another."""

    def __init__(self, client: Client, view: RunView, *, enabled: bool) -> None:
        self._client = client
        self._view = view
        self._enabled = enabled
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def show(self, event: RunEvent) -> None:
        """Asks when input is requested, and stops asking when it no longer is."""
        match event.body:
            case InputRequested(input_request=request) if self._enabled:
                if request.input_request_id not in self._tasks:
                    task = asyncio.create_task(self._ask(request))
                    self._tasks[request.input_request_id] = task
            case InputAnswered() | InputWithdrawn() | InputExpired():
                asked = self._tasks.get(event.body.input_request_id)
                if asked is not None:
                    asked.cancel()
            case _:
                pass

    async def _ask(self, request: InputRequest) -> None:
        try:
            given = await ask_on_terminal(request)
            if given is not None:
                receipt = await self._client.answer_input(request, given)
                if not receipt.accepted:
                    self._view.note(outcome_text(receipt))
        except (RunlaneError, click.ClickException) as error:
            text = describe(error) if isinstance(error, RunlaneError) else error.message
            self._view.note(f"not answered: {text}")

    async def stop(self) -> None:
        """Stops asking."""
        for task in self._tasks.values():
            await stop(task)


async def _follow(handle: RunHandle, view: RunView, answering: _Answering) -> RunComplete:
    async with handle.events(on_lost=view.show_lost) as events:
        async for event in events:
            view.show(event)
            answering.show(event)
            if isinstance(event.body, RunComplete):
                return event.body
    # Not reached: the events end with a RunComplete.
    return await handle.completed()


async def _cancel_on(interrupted: asyncio.Event, handle: RunHandle, view: RunView) -> None:
    await interrupted.wait()
    view.show_cancelling("cancelling; press Ctrl-C again to exit immediately")
    try:
        await handle.cancel("interrupted at the terminal")
    except RunlaneError as error:
        view.note(f"cancel failed: {describe(error)}")


async def _update_spinner(client: Client, handle: RunHandle, view: RunView) -> None:
    """Shows the state of the run in the spinner, until the first output."""
    while view.has_spinner:
        # The event stream reports lost connections.
        with suppress(RunlaneError):
            run = await client.get_run(handle.run_id)
            if run.state is RunState.QUEUED:
                pager = client.list_runs(handle.session_id, states=NOT_TERMINAL, page_size=1000)
                before = [each async for each in pager if each.accept_seq < run.accept_seq]
                view.update_spinner(f"queued behind {len(before)}")
            else:
                view.update_spinner(str(run.state))
        await asyncio.sleep(POLL_SECONDS)
