"""`runlane queue` and `runlane status`: what is at work and what waits, and the server itself."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any, TypeVar

import click

from runlane.cli.base import DONE, FAILED, Failure, execute
from runlane.cli.command import Command, Group
from runlane.cli.connection import Settings
from runlane.cli.output import (
    Column,
    field,
    json_line,
    one_line,
    show,
    show_list,
    state_text,
    stderr_console,
)
from runlane.cli.params import count_option
from runlane.cli.run_ids import find_session
from runlane.cli.terminal import echo
from runlane.client import Client
from runlane.session_stream import SessionSnapshot
from runlane.types import AgentInfo, Run, RunOrder, RunState, ServerInfo

RecordT = TypeVar("RecordT")

_AT_WORK = (RunState.ACTIVE, RunState.INPUT_REQUIRED, RunState.CANCELLING, RunState.FOLDED)
_WAITING = (RunState.ACCEPTED, RunState.QUEUED)

_COLUMNS: tuple[Column[Run], ...] = (
    Column("ACCEPTED", lambda run: run.accepted_at),
    Column("SESSION", lambda run: run.session_id),
    Column("SEQ", lambda run: run.accept_seq),
    Column("RUN", lambda run: run.run_id, is_run_id=True),
    Column("STATE", lambda run: run.state, lambda run: state_text(run.state)),
    Column("WHEN BUSY", lambda run: run.when_busy),
    Column("AGENT", lambda run: run.agent),
    Column("PROMPT", lambda run: run.prompt_excerpt, lambda run: one_line(run.prompt_excerpt, 40)),
)


class QueueGroup(Group):
    """A group that lists unless its first argument names another command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Puts the name of the default command before its arguments."""
        if not args or args[0] not in {*self.commands, *ctx.help_option_names}:
            args = [list_queue.name or "", *args]
        return super().parse_args(ctx, args)


@click.group(cls=QueueGroup)
def queue() -> None:
    """List the runs that have not ended; edit, move, send and drop those that wait.

    Without a command, it lists: `runlane queue SESSION` is `runlane queue list SESSION`.

    \b
    Examples:
      runlane queue notes
      runlane queue move 01a22a95 --first
      runlane queue edit 01a22a95 --prompt "and in French"
      runlane queue now 01a22a95 --interrupt
    """


@queue.command("list")
@click.option("--total", is_flag=True, help="Print the number of runs to stderr.")
@count_option("runs")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per run.")
@click.argument("session", required=False)
@click.pass_obj
def list_queue(
    settings: Settings, *, total: bool, count: int, as_json: bool, session: str | None
) -> None:
    """List the runs that have not ended: those of all sessions in accept order, or those of SESSION
    in the order in which they start.

    SESSION is the id of a session, or its unique beginning.

    Columns in a pipe: accepted, session, seq, run, state, when busy, agent, prompt.
    """
    if session is None:
        execute(settings, partial(_queues, total, count, as_json))
    else:
        execute(settings, partial(_queue_of, session, total, count, as_json))


async def _queue_of(session: str, total: bool, count: int, as_json: bool, client: Client) -> int:
    """Prints the queue of one session, from the snapshot with which its stream begins."""
    runs: tuple[Run, ...] = ()
    async with client.subscribe_session(await find_session(client, session)) as stream:
        first = (await anext(stream)).body
    if isinstance(first, SessionSnapshot):
        if first.session is None:
            raise Failure(f"there is no session {session!r}")
        active = () if first.active_run is None else (first.active_run,)
        runs = (*active, *first.folded, *first.queue)
    if total:
        stderr_console().print(f"{len(runs)} in all", style="dim")
    shown = runs[: count or None]
    await show(_each(shown), _COLUMNS, as_json=as_json, empty_note="no run has work")
    return DONE


async def _queues(total: bool, count: int, as_json: bool, client: Client) -> int:
    pager = client.list_runs(
        states=(*_AT_WORK, *_WAITING),
        order=RunOrder.EARLIEST_ACCEPTED,
        with_total_size=total,
        page_size=min(count, 1000),
    )
    await show_list(pager, count, _COLUMNS, as_json=as_json, empty_note="no run has work")
    return DONE


@click.command(cls=Command)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_obj
def status(settings: Settings, as_json: bool) -> None:
    """Print the state of the server: its answer, its agents, and the runs of your tenant.

    The exit code is 1 if the server does not answer, or if no agent is ready.
    """
    execute(settings, partial(_status, as_json))


async def _status(as_json: bool, client: Client) -> int:
    began = time.monotonic()
    server = await client.server_info()
    answer = time.monotonic() - began
    active, waiting = [await _count(client, states) for states in (_AT_WORK, _WAITING)]
    if as_json:
        echo(json_line(_as_object(client.target, answer, server, active, waiting)))
    else:
        echo(f"server\t{field(client.target)}")
        echo(f"version\t{field(server.version)}")
        echo(f"answer\t{answer * 1000:.1f} ms")
        echo(f"active runs\t{active}")
        echo(f"waiting runs\t{waiting}")
        await show(_each(server.agents), _AGENTS, as_json=False, empty_note="no agents")
    return DONE if any(agent.ready for agent in server.agents) else FAILED


def _slots(agent: AgentInfo) -> str:
    """The slots in use, and their limit if the agent has one of its own."""
    used = str(agent.slots_in_use)
    return used if agent.slots_limit is None else f"{used}/{agent.slots_limit}"


_AGENTS: tuple[Column[AgentInfo], ...] = (
    Column("AGENT", lambda agent: f"agent {agent.name}"),
    Column("STATE", lambda agent: "ready" if agent.ready else "not ready"),
    Column("KIND", lambda agent: agent.kind),
    Column("SLOTS", _slots),
)


async def _count(client: Client, states: tuple[RunState, ...]) -> int:
    page = await client.list_runs(states=states, with_total_size=True, page_size=1).page()
    return page.total_size or 0


async def _each(records: tuple[RecordT, ...]) -> AsyncIterator[RecordT]:
    for record in records:
        yield record


def _as_object(
    target: str, answer: float, server: ServerInfo, active: int, waiting: int
) -> dict[str, Any]:
    return {
        "server": target,
        "version": server.version,
        "answer_seconds": round(answer, 6),
        "active_runs": active,
        "waiting_runs": waiting,
        "agents": server.agents,
    }
