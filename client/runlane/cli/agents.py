"""`runlane agents`: lists the agents of the server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial

import click

from runlane.cli.base import DONE, execute
from runlane.cli.command import Command
from runlane.cli.connection import Settings
from runlane.cli.output import Column, show
from runlane.client import Client
from runlane.types import AgentInfo

_COLUMNS: tuple[Column[AgentInfo], ...] = (
    Column("AGENT", lambda agent: agent.name),
    Column("KIND", lambda agent: agent.kind),
    Column("STATE", lambda agent: "ready" if agent.ready else "not ready"),
    Column("DEFAULT", lambda agent: "default" if agent.is_default else ""),
    Column("IN USE", lambda agent: agent.slots_in_use),
    Column("LIMIT", lambda agent: "" if agent.slots_limit is None else agent.slots_limit),
    Column("CAN", lambda agent: ", ".join(agent.can)),
)


@click.command(cls=Command)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per agent.")
@click.pass_obj
def agents(settings: Settings, as_json: bool) -> None:
    """List the agents that you may use, with their state on the node that answers.

    Columns in a pipe: name, kind, ready or not ready, default or nothing, slots in use, limit,
    what its runs can do.
    """
    execute(settings, partial(_agents, as_json))


async def _agents(as_json: bool, client: Client) -> int:
    found = await client.list_agents()

    async def each() -> AsyncIterator[AgentInfo]:
        for agent in found:
            yield agent

    await show(each(), _COLUMNS, as_json=as_json, empty_note="no agents")
    return DONE
