"""`runlane run`: hands over a prompt and shows what becomes of it."""

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

from runlane.cli.base import DONE, Failure, Interrupts, describe, execute, outcome_code, stopped
from runlane.cli.connection import Settings
from runlane.cli.output import json_line
from runlane.cli.params import DURATION, read_attachment
from runlane.cli.run_view import RunView
from runlane.client import Client
from runlane.errors import RunlaneError, is_refused, is_unknown
from runlane.ids import new_id
from runlane.run_handle import RunHandle
from runlane.types import NOT_TERMINAL, Attachment, RunComplete, RunState, WhenBusy

POLL = 1.0
"""After how many seconds the place in the queue is looked up again."""


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be run, and how it is to be shown."""

    session_id: str | None
    run_id: str | None
    prompt: str
    attachments: tuple[Attachment, ...]
    when_busy: WhenBusy
    timeout: timedelta | None
    as_json: bool
    detach: bool


@click.command()
@click.option(
    "-s",
    "--session",
    metavar="SESSION",
    help="The session; created if there is none of that id. Without it: a new one.",
)
@click.option(
    "--when-busy",
    type=click.Choice([str(each) for each in WhenBusy]),
    default=str(WhenBusy.QUEUE),
    show_default=True,
    help="If the session has work: wait for its turn, join the active turn, give up, or cancel what"
    " is active and go next.",
)
@click.option("--timeout", type=DURATION, help="How long the agent may take, such as 30s or 1h30m.")
@click.option(
    "--run-id",
    metavar="ID",
    help="The idempotency key: the same id with the same prompt is the same run, however often.",
)
@click.option(
    "--attach",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A file that goes with the prompt; may be repeated.",
)
@click.option("--json", "as_json", is_flag=True, help="Print every event, the end last, as JSON.")
@click.option("--detach", is_flag=True, help="Print the run's id and leave; the run goes on.")
@click.argument("prompt", required=False)
@click.pass_obj
def run(
    settings: Settings,
    *,
    session: str | None,
    when_busy: str,
    timeout: timedelta | None,
    run_id: str | None,
    attach: tuple[Path, ...],
    as_json: bool,
    detach: bool,
    prompt: str | None,
) -> None:
    """Runs PROMPT and prints the answer as it comes.

    With `-` as the prompt, or none in a pipe, it is read from stdin.

    Ctrl-C cancels the run and waits for its end; a second one leaves at once. If the connection is
    lost the run goes on, and so does the output once the server is back. TRACEPARENT in the
    environment is sent along.

    \b
    Exit codes: 0 completed, 1 failed, 130 cancelled (by whomever).

    \b
    Examples:
      runlane run "What is new?"
      runlane run -s notes --when-busy fold "And shorter, please"
      git diff | runlane run -s review --attach README.md -
    """
    order = Order(
        session_id=session,
        run_id=run_id,
        prompt=_prompt(prompt, with_files=bool(attach)),
        attachments=tuple(_attachment(path) for path in attach),
        when_busy=WhenBusy(when_busy),
        timeout=timeout,
        as_json=as_json,
        detach=detach,
    )
    execute(settings, partial(_run, order=order))


def _attachment(path: Path) -> Attachment:
    try:
        return read_attachment(path)
    except OSError as error:
        raise click.BadParameter(f"{path}: {error.strerror}", param_hint="--attach") from error


def _prompt(given: str | None, *, with_files: bool) -> str:
    if given is not None and given != "-":
        return given
    # Where stdin is closed (`<&-`) there is none.
    if sys.stdin is None or (given is None and sys.stdin.isatty()):
        if given is None and with_files:
            return ""
        raise click.UsageError("no prompt: give one, or pipe it in")
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise click.UsageError("what is on stdin is not UTF-8; --attach takes any file") from error


def _place_in_trace() -> str:
    """What a traced script leaves in the environment of the commands it calls."""
    place = os.environ.get("TRACEPARENT", "")
    return place if place.isascii() and place.isprintable() else ""


async def _run(client: Client, order: Order) -> int:
    view = RunView(as_json=order.as_json)
    with Interrupts() as interrupts, view:
        handle = await _accept(client, order)
        if order.session_id is None:
            view.note(f"session {handle.session_id}")
        if order.detach:
            click.echo(json_line(handle.run) if order.as_json else handle.run_id)
            return DONE
        helpers = (
            asyncio.create_task(_cancel_on(interrupts.first, handle, view)),
            asyncio.create_task(_show_place(client, handle, view)),
        )
        try:
            return outcome_code(await _follow(handle, view))
        finally:
            for helper in helpers:
                await stopped(helper)


async def _accept(client: Client, order: Order) -> RunHandle:
    # A session of our own is named here, so that repeating the call creates it once.
    session_id = new_id() if order.session_id is None else order.session_id
    try:
        return await client.run_accepted(
            session_id,
            order.prompt,
            run_id=order.run_id,
            attachments=order.attachments,
            when_busy=order.when_busy,
            timeout=order.timeout,
            allow_missing=True,
            traceparent=_place_in_trace(),
        )
    except RunlaneError as error:
        if not is_unknown(error) or (is_refused(error) and error.attempts == 1):
            raise
        run_id = error.metadata["run_id"]
        again = shlex.join(["-s", session_id, "--run-id", run_id])
        raise Failure(
            f"{describe(error)}; whether run {run_id} in session {session_id} was accepted is "
            f"unknown: repeat with {again}"
        ) from error


async def _follow(handle: RunHandle, view: RunView) -> RunComplete:
    async with handle.events(on_lost=view.lost) as events:
        async for event in events:
            view.show(event)
            if isinstance(event.body, RunComplete):
                return event.body
    # Never reached: the events end with the end of the run.
    return await handle.completed()


async def _cancel_on(interrupted: asyncio.Event, handle: RunHandle, view: RunView) -> None:
    await interrupted.wait()
    view.waiting("cancelling; Ctrl-C again leaves at once")
    try:
        await handle.cancel("interrupted at the terminal")
    except RunlaneError as error:
        view.note(f"could not cancel: {describe(error)}")


async def _show_place(client: Client, handle: RunHandle, view: RunView) -> None:
    """Keeps the spinner up to date while there is one."""
    while view.spinning:
        # The stream of events tells of lost connections; this only decorates.
        with suppress(RunlaneError):
            run = await client.get_run(handle.run_id)
            if run.state is RunState.QUEUED:
                pager = client.list_runs(handle.session_id, states=NOT_TERMINAL, page_size=1000)
                before = [each async for each in pager if each.accept_seq < run.accept_seq]
                view.place(f"queued behind {len(before)}")
            else:
                view.place(str(run.state))
        await asyncio.sleep(POLL)
