"""`runlane watch`: prints runs as they end and, on a terminal, shows unfinished runs."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import Self

import click
from rich.live import Live
from rich.text import Text

from runlane.cli.base import DONE, Interrupts, describe, execute, stop
from runlane.cli.command import Command
from runlane.cli.connection import Settings
from runlane.cli.keys import quit_key
from runlane.cli.output import (
    Column,
    duration_text,
    field,
    json_line,
    one_line,
    rows,
    state_text,
    table,
    time_text,
    to_json,
    tsv,
)
from runlane.cli.run_ids import check_session
from runlane.cli.run_view import end_text
from runlane.cli.terminal import SafeConsole, echo, on_terminal
from runlane.client import Client
from runlane.errors import RunlaneError, SessionNotFound
from runlane.subscription import Subscription
from runlane.types import NOT_TERMINAL, Run, RunComplete

POLL_SECONDS = 1.0
"""Seconds between two updates of the unfinished runs."""

ROWS = 20
"""Maximum number of unfinished runs shown."""

_COLUMNS: tuple[Column[Run], ...] = (
    Column("SINCE", lambda run: run.accepted_at),
    Column("STATE", lambda run: run.state, lambda run: state_text(run.state)),
    Column("SESSION", lambda run: run.session_id),
    Column("RUN", lambda run: run.run_id, is_run_id=True),
    Column("PROMPT", lambda run: run.prompt_excerpt, lambda run: one_line(run.prompt_excerpt, 40)),
)


@click.command(cls=Command)
@click.option("-s", "--session", multiple=True, help="Show only runs of this session; repeatable.")
@click.option("--from-beginning", is_flag=True, help="Start at the oldest retained event.")
@click.option("--cursor", help="Resume after the cursor printed by an earlier watch.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per run.")
@click.pass_obj
def watch(
    settings: Settings,
    session: tuple[str, ...],
    from_beginning: bool,
    cursor: str | None,
    as_json: bool,
) -> None:
    """Print every run that ends from now on, until `q` or Ctrl-C.

    Resumes after a lost connection or a server restart without missing a run. On exit, prints the
    cursor to resume from on stderr. On a terminal, also shows the unfinished runs.

    Columns in a pipe: ended, session, seq, run, state, finish reason, text.
    """
    if from_beginning and cursor is not None:
        raise click.UsageError("--from-beginning cannot be combined with --cursor")
    execute(settings, partial(_watch, session, cursor, from_beginning, as_json))


async def _watch(
    sessions: tuple[str, ...],
    cursor: str | None,
    from_beginning: bool,
    as_json: bool,
    client: Client,
) -> int:
    view = WatchView(as_json=as_json)
    subscription = client.subscribe_run_complete(
        session_ids=sessions, cursor=cursor, from_beginning=from_beginning, on_lost=view.show_lost
    )
    async with AsyncExitStack() as stack:
        # Registered first to run last, and also after an error: the cursor is needed to resume.
        stack.callback(_print_cursor, subscription, cursor)
        interrupts = stack.enter_context(Interrupts())
        stack.enter_context(view)
        if view.live:
            stack.enter_context(quit_key(interrupts.first.set))
        stack.push_async_callback(subscription.aclose)
        checker = asyncio.create_task(_check(client, sessions, view))
        stack.push_async_callback(stop, checker)
        if view.live:
            poller = asyncio.create_task(_poll(client, sessions, view))
            stack.push_async_callback(stop, poller)
        reader = asyncio.create_task(_read(subscription, view))
        stack.push_async_callback(stop, reader)
        interrupted = asyncio.create_task(_wait_for(interrupts.first))
        stack.push_async_callback(stop, interrupted)
        await asyncio.wait({reader, interrupted}, return_when=asyncio.FIRST_COMPLETED)
    return DONE


async def _check(client: Client, sessions: tuple[str, ...], view: WatchView) -> None:
    """Names the sessions that do not exist: nothing else would show a name that is misspelt."""
    for session in sessions:
        try:
            await check_session(client, session)
        except SessionNotFound:
            view.note(f"no session {field(session)}; waiting for a session with this id")
        except RunlaneError:
            pass  # the subscription reports lost connections


def _print_cursor(subscription: Subscription, start: str | None) -> None:
    if subscription.cursor not in {None, start}:
        echo(f"resume with --cursor {subscription.cursor}", err=True)


async def _wait_for(event: asyncio.Event) -> None:
    await event.wait()


async def _read(subscription: Subscription, view: WatchView) -> None:
    async for item in subscription.with_progress():
        view.show_connected()
        if isinstance(item, RunComplete):
            view.show_end(item, subscription.cursor or "")


async def _poll(client: Client, sessions: tuple[str, ...], view: WatchView) -> None:
    while True:
        # The subscription reports lost connections.
        with suppress(RunlaneError):
            view.show_unfinished(await _list_unfinished(client, sessions))
        await asyncio.sleep(POLL_SECONDS)


async def _list_unfinished(client: Client, sessions: tuple[str, ...]) -> list[Run]:
    runs: list[Run] = []
    for session in sessions or (None,):
        if len(runs) < ROWS:
            pager = client.list_runs(session, states=NOT_TERMINAL, page_size=ROWS)
            runs += (await pager.page()).items
    return runs[:ROWS]


class WatchView:
    """Shows runs. A context manager, which restores the terminal on exit."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._out = SafeConsole(wrap=False)
        live = on_terminal() and not as_json
        self.live = Live(console=self._out, transient=True, auto_refresh=False) if live else None
        self._is_lost = False

    def __enter__(self) -> Self:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def show_lost(self, error: RunlaneError) -> None:
        """Shows that the connection is lost; once until it is back."""
        if not self._is_lost:
            self._is_lost = True
            self.note(f"reconnecting: {describe(error)}")

    def show_connected(self) -> None:
        """Shows that a lost connection is back."""
        if self._is_lost:
            self._is_lost = False
            self.note("connected again")

    def show_end(self, complete: RunComplete, cursor: str) -> None:
        """Prints a run that ended."""
        if self.live is not None:
            self._out.print(line(complete))
        elif self._as_json:
            echo(json_line({"cursor": cursor, **to_json(complete)}))
        else:
            echo(tsv(columns(complete)))

    def show_unfinished(self, runs: list[Run]) -> None:
        """Shows the runs that have not ended."""
        if self.live is None or self._is_lost:
            return
        grid = table(_COLUMNS)
        for cells in rows(_COLUMNS, runs):
            grid.add_row(*cells)
        self.live.update(grid if runs else Text("no active or waiting runs", "dim"), refresh=True)

    def note(self, text: str) -> None:
        """Prints a line about the watch."""
        if self.live is not None:
            self._out.print(Text(text, style="yellow"))
        else:
            echo(text, err=True)


def columns(complete: RunComplete) -> tuple[object, ...]:
    """Returns the columns of an ended run for programs."""
    return (
        complete.ended_at,
        complete.session_id,
        complete.accept_seq,
        complete.run_id,
        complete.state,
        complete.finish_reason,
        complete.text,
    )


def line(complete: RunComplete) -> Text:
    """Returns the line of an ended run for people."""
    error = end_text(complete) if complete.error is not None else None
    return Text("  ").join(
        [
            Text(time_text(complete.ended_at), style="dim"),
            state_text(complete.state),
            Text(field(complete.session_id), style="bold"),
            Text(field(complete.run_id), style="dim"),
            Text(duration_text(complete.started_at or complete.accepted_at, complete.ended_at)),
            Text(one_line(error or complete.text)),
        ]
    )
