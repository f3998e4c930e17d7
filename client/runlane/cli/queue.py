"""`runlane queue` and `runlane status`: what is at work and what waits, and the server itself."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import click

from runlane.cli.base import DONE, FAILED, execute
from runlane.cli.command import Command
from runlane.cli.connection import Settings
from runlane.cli.output import (
    Column,
    field,
    json_line,
    one_line,
    show,
    show_list,
    state_text,
)
from runlane.cli.params import count_option
from runlane.cli.run_ids import find_session
from runlane.cli.terminal import echo
from runlane.client import Client
from runlane.types import AgentInfo, Run, RunOrder, RunState, ServerInfo

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


@click.command(cls=Command)
@click.option("--total", is_flag=True, help="Print the number of runs to stderr.")
@count_option("runs")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per run.")
@click.argument("session", required=False)
@click.pass_obj
def queue(
    settings: Settings, *, total: bool, count: int, as_json: bool, session: str | None
) -> None:
    """List the runs that have not ended, of SESSION or of all sessions, in accept order.

    SESSION is the id of a session, or its unique beginning.

    Columns in a pipe: accepted, session, seq, run, state, when busy, agent, prompt.
    """
    execute(settings, partial(_queue, session, total, count, as_json))


async def _queue(
    session: str | None, total: bool, count: int, as_json: bool, client: Client
) -> int:
    pager = client.list_runs(
        None if session is None else await find_session(client, session),
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


async def _each(agents: tuple[AgentInfo, ...]) -> AsyncIterator[AgentInfo]:
    for agent in agents:
        yield agent


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
