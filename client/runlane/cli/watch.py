"""`runlane watch`: shows runs as they end, and on a terminal those that have not."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, suppress
from functools import partial
from types import TracebackType
from typing import Self

import click
from rich.console import Console
from rich.live import Live
from rich.text import Text

from runlane.cli.base import DONE, Interrupts, describe, execute, stopped
from runlane.cli.connection import Settings
from runlane.cli.output import (
    Column,
    coloured,
    json_line,
    on_terminal,
    one_line,
    plain,
    table,
    took,
    tsv,
    when,
)
from runlane.cli.run_view import ending
from runlane.client import Client
from runlane.errors import RunlaneError
from runlane.subscription import Subscription
from runlane.types import NOT_TERMINAL, Run, RunComplete

POLL = 1.0
"""After how many seconds the runs that have not ended are looked up again."""

ROWS = 20
"""How many of them are shown."""

_COLUMNS: tuple[Column[Run], ...] = (
    Column("SINCE", lambda run: run.accepted_at),
    Column("STATE", lambda run: run.state, lambda run: coloured(run.state)),
    Column("SESSION", lambda run: run.session_id),
    Column("RUN", lambda run: run.run_id),
    Column("PROMPT", lambda run: run.prompt_excerpt, lambda run: one_line(run.prompt_excerpt, 40)),
)


@click.command()
@click.option("-s", "--session", multiple=True, help="Only runs of this session; may be repeated.")
@click.option("--from-beginning", is_flag=True, help="Begin with the oldest event that is kept.")
@click.option("--cursor", help="Go on where an earlier watch ended.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per ended run.")
@click.pass_obj
def watch(
    settings: Settings,
    session: tuple[str, ...],
    from_beginning: bool,
    cursor: str | None,
    as_json: bool,
) -> None:
    """Shows every run as it ends, from now on, until Ctrl-C.

    It goes on by itself when the connection is lost or the server restarts, and misses nothing. At
    the end it prints the cursor to go on from, on stderr. On a terminal the runs that have not
    ended stand below.

    In a pipe the columns are: ended, session, seq, run, state, finish reason, text.
    """
    if from_beginning and cursor is not None:
        raise click.UsageError("--from-beginning and --cursor exclude each other")
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
        session_ids=sessions, cursor=cursor, from_beginning=from_beginning, on_lost=view.lost
    )
    async with AsyncExitStack() as stack:
        # Last of all, and also where it ends for an error: one wants to go on then above all.
        stack.callback(_tell_cursor, subscription, cursor)
        interrupts = stack.enter_context(Interrupts())
        stack.enter_context(view)
        stack.push_async_callback(subscription.aclose)
        if view.live:
            poller = asyncio.create_task(_poll(client, sessions, view))
            stack.push_async_callback(stopped, poller)
        reader = asyncio.create_task(_read(subscription, view))
        stack.push_async_callback(stopped, reader)
        interrupted = asyncio.create_task(_until(interrupts.first))
        stack.push_async_callback(stopped, interrupted)
        await asyncio.wait({reader, interrupted}, return_when=asyncio.FIRST_COMPLETED)
    return DONE


def _tell_cursor(subscription: Subscription, given: str | None) -> None:
    if subscription.cursor not in {None, given}:
        click.echo(f"go on with --cursor {subscription.cursor}", err=True)


async def _until(event: asyncio.Event) -> None:
    await event.wait()


async def _read(subscription: Subscription, view: WatchView) -> None:
    async for item in subscription.with_progress():
        view.heard()
        if isinstance(item, RunComplete):
            view.ended(item, subscription.cursor or "")


async def _poll(client: Client, sessions: tuple[str, ...], view: WatchView) -> None:
    while True:
        # The subscription tells of lost connections; this only decorates.
        with suppress(RunlaneError):
            view.working(await _working(client, sessions))
        await asyncio.sleep(POLL)


async def _working(client: Client, sessions: tuple[str, ...]) -> list[Run]:
    found: list[Run] = []
    for session in sessions or (None,):
        if len(found) < ROWS:
            listed = client.list_runs(session, states=NOT_TERMINAL, page_size=ROWS)
            found += (await listed.page()).items
    return found[:ROWS]


class WatchView:
    """Shows runs. A context manager, as it may have to give the terminal back."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._out = Console(highlight=False, soft_wrap=True)
        live = on_terminal() and not as_json
        self.live = Live(console=self._out, transient=True, auto_refresh=False) if live else None
        self._lost = False

    def __enter__(self) -> Self:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.live is not None:
            self.live.stop()

    def lost(self, error: RunlaneError) -> None:
        """Says that the connection is lost; once, however often it takes."""
        if not self._lost:
            self._lost = True
            self._note(f"reconnecting: {describe(error)}")

    def heard(self) -> None:
        """Says that the server is there again."""
        if self._lost:
            self._lost = False
            self._note("connected again")

    def ended(self, complete: RunComplete, cursor: str) -> None:
        """Shows the end of a run."""
        if self.live is not None:
            self._out.print(line(complete))
        elif self._as_json:
            click.echo(json_line({"cursor": cursor, **plain(complete)}))
        else:
            click.echo(tsv(columns(complete)))

    def working(self, runs: list[Run]) -> None:
        """Shows the runs that have not ended."""
        if self.live is None or self._lost:
            return
        grid = table(_COLUMNS)
        for run in runs:
            grid.add_row(*(column.cell(run) for column in _COLUMNS))
        self.live.update(grid if runs else Text("no run is active or waits", "dim"), refresh=True)

    def _note(self, text: str) -> None:
        if self.live is not None:
            self._out.print(Text(text, style="yellow"))
        else:
            click.echo(text, err=True)


def columns(complete: RunComplete) -> tuple[object, ...]:
    """The end of a run for programs."""
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
    """The end of a run for people."""
    told = ending(complete) if complete.error is not None else None
    return Text("  ").join(
        [
            Text(when(complete.ended_at), style="dim"),
            coloured(complete.state),
            Text(complete.session_id, style="bold"),
            Text(complete.run_id, style="dim"),
            Text(took(complete.started_at or complete.accepted_at, complete.ended_at)),
            Text(one_line(told or complete.text)),
        ]
    )
