"""`runlane runs` and `runlane wait`: lists runs, and waits for the end of one."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from typing import Any

import click

from runlane.cli.base import DONE, FAILED, execute, outcome_code
from runlane.cli.command import Command
from runlane.cli.connection import Settings
from runlane.cli.output import (
    Column,
    duration_text,
    json_line,
    one_line,
    show_list,
    state_text,
    stderr_console,
)
from runlane.cli.params import DURATION, agent_option, count_option, label_option, time_ago
from runlane.cli.run_ids import check_session, find_run
from runlane.cli.run_view import RunView
from runlane.cli.terminal import echo
from runlane.client import Client
from runlane.types import Run, RunEvent, RunOrder, RunState

STATES = [str(each) for each in RunState if each is not RunState.UNKNOWN]

_COLUMNS: tuple[Column[Run], ...] = (
    Column("ACCEPTED", lambda run: run.accepted_at),
    Column("SESSION", lambda run: run.session_id),
    Column("SEQ", lambda run: run.accept_seq),
    Column("RUN", lambda run: run.run_id, is_run_id=True),
    Column("STATE", lambda run: run.state, lambda run: state_text(run.state)),
    Column(
        "TOOK", lambda run: run.ended_at, lambda run: duration_text(run.started_at, run.ended_at)
    ),
    Column("PROMPT", lambda run: run.prompt_excerpt, lambda run: one_line(run.prompt_excerpt, 40)),
    Column("ERROR", lambda run: _error(run, ""), lambda run: _error(run, ": ", 60)),
    Column("AGENT", lambda run: run.agent),
)


def _error(run: Run, separator: str, limit: int = 0) -> str:
    """Returns the reason of a failure, and with a separator also the beginning of its message."""
    error = None if run.run_complete is None else run.run_complete.error
    if error is None:
        return ""
    message = one_line(error.message, limit) if separator else ""
    return f"{error.reason}{separator}{message}"


@click.command(cls=Command)
@click.option("-s", "--session", metavar="SESSION", help="List only runs of this session.")
@click.option(
    "--state",
    multiple=True,
    type=click.Choice(STATES),
    help="List only runs in this state; repeatable.",
)
@agent_option("runs")
@label_option("runs")
@click.option(
    "--since", type=DURATION, help="List only runs accepted within this time, such as 2h."
)
@click.option("--ended-since", type=DURATION, help="List only runs that ended within this time.")
@click.option("--order", type=click.Choice([*RunOrder]), help="Default: latest-accepted.")
@click.option("--total", is_flag=True, help="Print the number of matching runs to stderr.")
@count_option("runs")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per run.")
@click.pass_obj
def runs(settings: Settings, /, count: int, as_json: bool, **filters: Any) -> None:
    """List runs, most recently accepted first.

    Columns in a pipe: accepted, session, seq, run, state, ended, prompt, reason of the failure,
    agent.
    """
    execute(settings, partial(_runs, filters, count, as_json))


async def _runs(filters: Mapping[str, Any], count: int, as_json: bool, client: Client) -> int:
    pager = client.list_runs(
        filters["session"],
        states=[RunState(each) for each in filters["state"]],
        agent=filters["agent"],
        metadata=dict(filters["labels"]),
        accepted_from=time_ago(filters["since"]),
        ended_from=time_ago(filters["ended_since"]),
        order=filters["order"] and RunOrder(filters["order"]),
        with_total_size=filters["total"],
        page_size=min(count, 1000),
    )
    shown = await show_list(pager, count, _COLUMNS, as_json=as_json, empty_note="no runs")
    if not shown and filters["session"]:
        await check_session(client, filters["session"])
    return DONE


@click.command(cls=Command)
@click.option(
    "--timeout", type=DURATION, help="Maximum time to wait, such as 30s. Default: no limit."
)
@click.option("--json", "as_json", is_flag=True, help="Print the RunComplete as JSON.")
@click.argument("run_id", metavar="RUN")
@click.pass_obj
def wait(settings: Settings, timeout: timedelta | None, as_json: bool, run_id: str) -> None:
    """Wait for the end of a run, print its text, and exit like `run`.

    RUN is a run id, or the unique beginning of one. The wait survives lost connections and server
    restarts. The exit code is 1 after the timeout.
    """
    execute(settings, partial(_wait, run_id, timeout, as_json))


async def _wait(run_id: str, timeout: timedelta | None, as_json: bool, client: Client) -> int:
    run = await client.wait_run(await find_run(client, run_id), timeout=timeout)
    complete = run.run_complete
    if complete is None:
        stderr_console().print(f"run {run_id} has not ended: it is {run.state}")
        return FAILED
    if as_json:
        echo(json_line(complete))
    else:
        RunView(as_json=False).show(RunEvent(0, complete.ended_at, complete))
    return outcome_code(complete)
