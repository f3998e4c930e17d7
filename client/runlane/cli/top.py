"""`runlane top`: nodes, sessions and runs at a glance, again every second."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Self
from urllib.parse import urlsplit

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from runlane.cli.base import DONE, FAILED, Interrupts, describe, execute
from runlane.cli.connection import Settings
from runlane.cli.exposition import Scrape, fetch, quantile, rate
from runlane.cli.output import Column, RecordT, coloured, on_terminal, one_line, table, took
from runlane.cli.params import DURATION
from runlane.client import Client
from runlane.errors import RunlaneError
from runlane.types import NOT_TERMINAL, Run, RunState, Session

ROWS = 15
"""How many sessions are shown, and how many runs."""

SESSIONS = 200
"""So many sessions, the latest created, are looked through for those with work."""

READ_SECONDS = 3.0
"""How long the server has to answer before the frame goes without it."""

PIPE_WIDTH = 160
"""How wide a frame is that nobody looks at."""


class EndpointType(click.ParamType[str]):
    """Where a node tells its metrics: a URL, or HOST:PORT."""

    name = "url"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The whole URL."""
        url = value if "://" in value else f"http://{value}"
        try:
            parts = urlsplit(url)
            if parts.scheme not in {"http", "https"} or not parts.hostname:
                raise ValueError(url)
        except ValueError:
            self.fail(f"{value!r} is no URL such as http://127.0.0.1:9464/metrics", param, ctx)
        return url if parts.path not in {"", "/"} else f"{url.rstrip('/')}/metrics"


@dataclass(frozen=True, slots=True)
class Node:
    """A node by two scrapes of it."""

    url: str
    before: Scrape
    now: Scrape

    def number(self, name: str) -> str:
        """A gauge."""
        value = self.now.total(f"runlane_{name}")
        return "-" if value is None else f"{value:,.0f}"

    def rate(self, name: str, **labels: str) -> str:
        """How many a second."""
        found = rate(self.before, self.now, f"runlane_{name}", **labels)
        return "-" if found is None else f"{found:.1f}"

    def quantile(self, name: str, share: float) -> str:
        """A share of a histogram."""
        found = quantile(self.before, self.now, f"runlane_{name}", share)
        return "-" if found is None else _seconds(found)

    @property
    def name(self) -> Text:
        """Where it is; in another colour if it is not there, or not ready."""
        ready = self.now.total("runlane_agent_ready")
        return Text(self.place, style="red" if self.now.error else "" if ready else "yellow")

    @property
    def place(self) -> str:
        """Its host and port."""
        return urlsplit(self.url).netloc

    @property
    def slots(self) -> str:
        """How many are taken of how many."""
        return f"{self.number('slots_in_use')}/{self.number('slots_limit')}"

    @property
    def cpu(self) -> str:
        """The share of one core."""
        found = rate(self.before, self.now, "process_cpu_seconds_total")
        return "-" if found is None else f"{found:.0%}"

    @property
    def memory(self) -> str:
        """What it has in RAM."""
        found = self.now.total("process_resident_memory_bytes")
        return "-" if found is None else f"{found / (1 << 20):,.0f} MiB"


# Two tables, so that they fit on a terminal of 80 columns.
_NODES: tuple[Column[Node], ...] = (
    Column("NODE", lambda node: node.place, lambda node: node.name),
    Column("SLOTS", lambda node: node.slots),
    Column("WAITING", lambda node: node.number("runs_waiting")),
    Column("ACCEPT/S", lambda node: node.rate("runs_accepted_total")),
    Column("END/S", lambda node: node.rate("runs_ended_total")),
    Column("FAIL/S", lambda node: node.rate("runs_ended_total", state="failed")),
    Column("CANCEL/S", lambda node: node.rate("runs_ended_total", state="cancelled")),
    Column("SUBS", lambda node: node.number("subscriptions_open")),
)
_TIMES: tuple[Column[Node], ...] = (
    Column("NODE", lambda node: node.place, lambda node: node.name),
    Column("CALL/S", lambda node: node.rate("rpcs_total")),
    Column("QUEUED", lambda node: node.quantile("run_queue_wait_seconds", 0.5)),
    Column("FIRST", lambda node: node.quantile("run_first_delta_seconds", 0.5)),
    Column("COMMIT", lambda node: node.quantile("commit_seconds", 0.99)),
    Column("LATE", lambda node: node.quantile("event_loop_lag_seconds", 0.99)),
    Column("CPU", lambda node: node.cpu),
    Column("MEMORY", lambda node: node.memory),
)

_SESSIONS: tuple[Column[Session], ...] = (
    Column("SESSION", lambda session: session.session_id),
    Column("WAITING", lambda session: session.waiting_runs),
    Column("ACTIVE RUN", lambda session: session.active_run_id or "-"),
    Column("TITLE", lambda session: session.title),
)

_RUNS: tuple[Column[Run], ...] = (
    Column("RUN", lambda run: run.run_id),
    Column("SESSION", lambda run: run.session_id),
    Column("STATE", lambda run: run.state, lambda run: coloured(run.state)),
    Column("SINCE", lambda run: took(run.accepted_at, datetime.now(UTC))),
    Column("PROMPT", lambda run: run.prompt_excerpt, lambda run: one_line(run.prompt_excerpt, 40)),
)


@dataclass(frozen=True, slots=True)
class Work:
    """What the server says there is to do; `error` says why it does not."""

    sessions: Sequence[Session] = ()
    runs: Sequence[Run] = ()
    more: bool = False
    error: str = ""


@click.command()
@click.option(
    "--metrics",
    "urls",
    multiple=True,
    type=EndpointType(),
    metavar="URL",
    help="Where a node tells its metrics (--metrics-listen); may be repeated.",
)
@click.option("--interval", type=DURATION, default="1s", show_default=True, help="Between frames.")
@click.option("--once", is_flag=True, help="Print one frame, and leave.")
@click.pass_obj
def top(settings: Settings, urls: tuple[str, ...], interval: timedelta, *, once: bool) -> None:
    """Shows nodes, busy sessions, and runs that have not ended, until Ctrl-C.

    Rates and times are those since the last frame. QUEUED is how long half of the runs waited to
    be started, and FIRST how long until they said something; COMMIT and LATE, how late the event
    loop came round, are what 99 % stayed below. Sessions and runs are what the server tells now.

    In a pipe the frames are plain text. With --once the exit code is 1 if a node or the server did
    not answer.
    """
    execute(settings, partial(_top, settings.server, urls, interval.total_seconds(), once))


async def _top(
    server: str, urls: tuple[str, ...], interval: float, once: bool, client: Client
) -> int:
    before = await _scraped(urls)
    with ExitStack() as stack:
        interrupts = stack.enter_context(Interrupts())
        screen = stack.enter_context(Screen(once=once))
        while True:
            await _pause(interrupts.first, interval if urls or not once else 0)
            if interrupts.first.is_set():
                return DONE
            now, work = await asyncio.gather(_scraped(urls), _work(client))
            nodes = [Node(url, *pair) for url, *pair in zip(urls, before, now, strict=True)]
            screen.show(frame(server, nodes, work))
            if once:
                return FAILED if work.error or any(node.now.error for node in nodes) else DONE
            before = now


async def _pause(interrupted: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await interrupted.wait()
    except TimeoutError:
        pass


async def _scraped(urls: Sequence[str]) -> list[Scrape]:
    return await asyncio.gather(*map(fetch, urls))


async def _work(client: Client) -> Work:
    try:
        async with asyncio.timeout(READ_SECONDS):
            sessions, runs = await asyncio.gather(
                client.list_sessions(page_size=SESSIONS).page(),
                client.list_runs(states=NOT_TERMINAL, page_size=ROWS).page(),
            )
    except RunlaneError as error:
        return Work(error=describe(error))
    except TimeoutError:
        return Work(error=f"no answer within {READ_SECONDS:g} s")
    busy = sorted(
        (session for session in sessions.items if session.busy),
        key=lambda session: (-session.waiting_runs, session.session_id),
    )
    return Work(busy, runs.items, bool(runs.next_page_token))


class Screen:
    """Shows one frame after another: in one place on a terminal, one below the other in a pipe."""

    def __init__(self, *, once: bool) -> None:
        live = on_terminal() and not once
        self._out = Console(highlight=False, width=None if on_terminal() else PIPE_WIDTH)
        self._live = Live(console=self._out, screen=True, auto_refresh=False) if live else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, shown: RenderableType) -> None:
        """Shows a frame."""
        if self._live is not None:
            self._live.update(shown, refresh=True)
        else:
            self._out.print(shown)


def frame(server: str, nodes: Sequence[Node], work: Work) -> RenderableType:
    """All of it, for people."""
    parts: list[RenderableType] = [_head(server, work), Text()]
    if nodes:
        parts += [_listing(_NODES, nodes), Text(), _listing(_TIMES, nodes), Text()]
        silent = [f"{node.place}: {one_line(node.now.error)}" for node in nodes if node.now.error]
        parts += [Text(told, style="red") for told in silent]
    else:
        parts += [Text("nodes and rates: give --metrics HOST:PORT, once for each", "dim"), Text()]
    if work.sessions:
        parts += [_listing(_SESSIONS, work.sessions[:ROWS]), Text()]
    if work.runs:
        parts.append(_listing(_RUNS, work.runs))
    return Group(*parts)


def _head(server: str, work: Work) -> Text:
    now = datetime.now(UTC).astimezone().strftime("%H:%M:%S")
    head = Text.assemble(("runlane top", "bold"), f"  {now}  {server}  ")
    if work.error:
        return head.append(work.error, style="red")
    active = sum(run.state in {RunState.ACTIVE, RunState.CANCELLING} for run in work.runs)
    runs = f"{len(work.runs)}{'+' if work.more else ''}"
    return head.append(f"busy sessions: {len(work.sessions)}  runs: {runs}, active: {active}")


def _listing(columns: Sequence[Column[RecordT]], records: Sequence[RecordT]) -> RenderableType:
    grid = table(columns)
    for record in records:
        grid.add_row(*(column.cell(record) for column in columns))
    return grid


def _seconds(value: float) -> str:
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.1f} s"
