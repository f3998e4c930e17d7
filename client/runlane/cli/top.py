"""`runlane top`: shows nodes, busy sessions and unfinished runs, updated every second."""

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
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from runlane.cli.base import DONE, FAILED, Interrupts, describe, execute
from runlane.cli.command import Command
from runlane.cli.connection import Settings
from runlane.cli.exposition import Scrape, fetch, quantile, rate
from runlane.cli.keys import quit_key
from runlane.cli.output import (
    Column,
    RecordT,
    duration_text,
    one_line,
    rows,
    state_text,
    table,
)
from runlane.cli.params import DURATION
from runlane.cli.terminal import SafeConsole, on_terminal
from runlane.client import Client
from runlane.errors import RunlaneError
from runlane.types import NOT_TERMINAL, Run, RunState, Session

ROWS = 15
"""Maximum number of sessions, and of runs, in a frame."""

SESSIONS = 200
"""Number of recently created sessions searched for busy ones."""

READ_SECONDS = 3.0
"""Timeout of the server for one frame."""

PIPE_WIDTH = 160
"""Width of a frame in a pipe, in columns."""


class EndpointType(click.ParamType[str]):
    """The metrics endpoint of a node: a URL or HOST:PORT."""

    name = "url"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Returns the full URL."""
        url = value if "://" in value else f"http://{value}"
        try:
            parts = urlsplit(url)
            if parts.scheme not in {"http", "https"} or not parts.hostname:
                raise ValueError(url)
        except ValueError:
            self.fail(f"{value!r} is not a URL such as http://127.0.0.1:9464/metrics", param, ctx)
        return url if parts.path not in {"", "/"} else f"{url.rstrip('/')}/metrics"


@dataclass(frozen=True, slots=True)
class Node:
    """A node, measured by two scrapes."""

    url: str
    before: Scrape
    now: Scrape

    def number(self, name: str) -> str:
        """Formats a gauge."""
        value = self.now.total(f"runlane_{name}")
        return "-" if value is None else f"{value:,.0f}"

    def rate(self, name: str, **labels: str) -> str:
        """Formats the rate of a counter per second."""
        value = rate(self.before, self.now, f"runlane_{name}", **labels)
        return "-" if value is None else f"{value:.1f}"

    def quantile(self, name: str, share: float) -> str:
        """Formats a quantile of a histogram."""
        value = quantile(self.before, self.now, f"runlane_{name}", share)
        return "-" if value is None else _seconds(value)

    @property
    def name(self) -> Text:
        """The address: red if the node does not respond, yellow if an agent is not ready."""
        ready = self.now.least("runlane_agent_ready")
        return Text(self.address, style="red" if self.now.error else "" if ready else "yellow")

    @property
    def address(self) -> str:
        """The host and port."""
        return urlsplit(self.url).netloc

    @property
    def barred(self) -> float:
        """Workers that get no turns for a while."""
        return self.now.total("runlane_workers_quarantined") or 0.0

    @property
    def slots(self) -> str:
        """Slots in use and the limit."""
        return f"{self.number('slots_in_use')}/{self.number('slots_limit')}"

    @property
    def cpu(self) -> str:
        """CPU usage in percent of one core."""
        value = rate(self.before, self.now, "process_cpu_seconds_total")
        return "-" if value is None else f"{value:.0%}"

    @property
    def memory(self) -> str:
        """Resident memory."""
        value = self.now.total("process_resident_memory_bytes")
        return "-" if value is None else f"{value / (1 << 20):,.0f} MiB"


# Two tables, to fit a terminal of 80 columns.
_NODES: tuple[Column[Node], ...] = (
    Column("NODE", lambda node: node.address, lambda node: node.name),
    Column("SLOTS", lambda node: node.slots),
    Column("WAITING", lambda node: node.number("runs_waiting")),
    Column("ACCEPT/S", lambda node: node.rate("runs_accepted_total")),
    Column("END/S", lambda node: node.rate("runs_ended_total")),
    Column("FAIL/S", lambda node: node.rate("runs_ended_total", state="failed")),
    Column("CANCEL/S", lambda node: node.rate("runs_ended_total", state="cancelled")),
    Column("SUBS", lambda node: node.number("subscriptions_open")),
)
_TIMES: tuple[Column[Node], ...] = (
    Column("NODE", lambda node: node.address, lambda node: node.name),
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
    Column("RUN", lambda run: run.run_id, is_run_id=True),
    Column("SESSION", lambda run: run.session_id),
    Column("STATE", lambda run: run.state, lambda run: state_text(run.state)),
    Column("SINCE", lambda run: duration_text(run.accepted_at, datetime.now(UTC))),
    Column("PROMPT", lambda run: run.prompt_excerpt, lambda run: one_line(run.prompt_excerpt, 40)),
)


@dataclass(frozen=True, slots=True)
class Workload:
    """Busy sessions and unfinished runs, or the error of the calls."""

    sessions: Sequence[Session] = ()
    runs: Sequence[Run] = ()
    has_more_runs: bool = False
    error: str = ""


@click.command(cls=Command)
@click.option(
    "--metrics",
    "urls",
    multiple=True,
    type=EndpointType(),
    metavar="URL",
    help="URL or HOST:PORT of a node's metrics (its --metrics-listen); repeatable.",
)
@click.option(
    "--interval", type=DURATION, default="1s", show_default=True, help="Time between frames."
)
@click.option("--once", is_flag=True, help="Print one frame and exit.")
@click.pass_obj
def top(settings: Settings, urls: tuple[str, ...], interval: timedelta, *, once: bool) -> None:
    """Show nodes, busy sessions and unfinished runs, until `q` or Ctrl-C.

    Rates and times cover the time since the last frame. QUEUED is the median time from accept to
    start, FIRST the median time to the first output. COMMIT and LATE are 99th percentiles: the
    duration of a commit, and the lag of the event loop.

    In a pipe, frames are plain text. With --once, the exit code is 1 if a node or the server does
    not respond.
    """
    execute(settings, partial(_top, settings.server, urls, interval.total_seconds(), once))


async def _top(
    server: str, urls: tuple[str, ...], interval: float, once: bool, client: Client
) -> int:
    before = await _scrape(urls)
    with ExitStack() as stack:
        interrupts = stack.enter_context(Interrupts())
        screen = stack.enter_context(Screen(once=once))
        stack.enter_context(quit_key(interrupts.first.set))
        while True:
            await _pause(interrupts.first, interval if urls or not once else 0)
            if interrupts.first.is_set():
                return DONE
            now, workload = await asyncio.gather(_scrape(urls), _read_workload(client))
            nodes = [Node(url, *pair) for url, *pair in zip(urls, before, now, strict=True)]
            screen.show(frame(server, nodes, workload))
            if once:
                return FAILED if workload.error or any(node.now.error for node in nodes) else DONE
            before = now


async def _pause(interrupted: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await interrupted.wait()
    except TimeoutError:
        pass


async def _scrape(urls: Sequence[str]) -> list[Scrape]:
    return await asyncio.gather(*map(fetch, urls))


async def _read_workload(client: Client) -> Workload:
    try:
        async with asyncio.timeout(READ_SECONDS):
            sessions, runs = await asyncio.gather(
                client.list_sessions(page_size=SESSIONS).page(),
                client.list_runs(states=NOT_TERMINAL, page_size=ROWS).page(),
            )
    except RunlaneError as error:
        return Workload(error=describe(error))
    except TimeoutError:
        return Workload(error=f"no response within {READ_SECONDS:g} s")
    busy = sorted(
        (session for session in sessions.items if session.busy),
        key=lambda session: (-session.waiting_runs, session.session_id),
    )
    return Workload(busy, runs.items, bool(runs.next_page_token))


class Screen:
    """Shows frames: in place on a terminal, one after another in a pipe."""

    def __init__(self, *, once: bool) -> None:
        live = on_terminal() and not once
        self._out = SafeConsole(width=None if on_terminal() else PIPE_WIDTH)
        self._live = Live(console=self._out, screen=True, auto_refresh=False) if live else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, content: RenderableType) -> None:
        """Shows a frame."""
        if self._live is not None:
            self._live.update(content, refresh=True)
        else:
            self._out.print(content)


def frame(server: str, nodes: Sequence[Node], workload: Workload) -> RenderableType:
    """Renders a frame."""
    parts: list[RenderableType] = [_head(server, workload), Text()]
    if nodes:
        parts += [_listing(_NODES, nodes), Text(), _listing(_TIMES, nodes), Text()]
        failed = [node for node in nodes if node.now.error]
        parts += [
            Text(f"{node.address}: {one_line(node.now.error)}", style="red") for node in failed
        ]
        parts += [
            Text(
                f"{node.address}: {node.barred:.0f} workers get no turns after repeated faults",
                style="yellow",
            )
            for node in nodes
            if node.barred
        ]
    else:
        parts += [
            Text("for nodes and rates, give --metrics HOST:PORT for each node", "dim"),
            Text(),
        ]
    if workload.sessions:
        parts += [_listing(_SESSIONS, workload.sessions[:ROWS]), Text()]
    if workload.runs:
        parts.append(_listing(_RUNS, workload.runs))
    return Group(*parts)


def _head(server: str, workload: Workload) -> Text:
    now = datetime.now(UTC).astimezone().strftime("%H:%M:%S")
    head = Text.assemble(("runlane top", "bold"), f"  {now}  {server}  ")
    if workload.error:
        return head.append(workload.error, style="red")
    active = sum(run.state in {RunState.ACTIVE, RunState.CANCELLING} for run in workload.runs)
    runs = f"{len(workload.runs)}{'+' if workload.has_more_runs else ''}"
    return head.append(f"busy sessions: {len(workload.sessions)}  runs: {runs}, active: {active}")


def _listing(columns: Sequence[Column[RecordT]], records: Sequence[RecordT]) -> RenderableType:
    grid = table(columns)
    for cells in rows(columns, records):
        grid.add_row(*cells)
    return grid


def _seconds(value: float) -> str:
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.1f} s"
