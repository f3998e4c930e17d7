"""`runlane fork`: begins a new session with the transcript of another one."""

from __future__ import annotations

from functools import partial

import click

from runlane.cli.base import DONE, execute
from runlane.cli.command import Command
from runlane.cli.connection import Settings
from runlane.cli.output import json_line
from runlane.cli.run_ids import find_session
from runlane.cli.terminal import echo
from runlane.client import Client


@click.command(cls=Command)
@click.option(
    "--at-turn",
    type=click.IntRange(min=1),
    metavar="N",
    help="Last turn to copy, as in `runlane messages`. Default: the last one that has finished.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the new session as JSON.")
@click.argument("session")
@click.argument("new", required=False)
@click.pass_obj
def fork(
    settings: Settings, at_turn: int | None, as_json: bool, session: str, new: str | None
) -> None:
    """Create session NEW with a copy of the transcript of SESSION, and print its id.

    SESSION is the id of a session, or its unique beginning; it stays as it is. Without NEW, the id
    is new. With NEW, the command can be repeated: it prints the session that it has created before.
    """
    execute(settings, partial(_fork, session, new, at_turn or 0, as_json))


async def _fork(
    session_id: str, new: str | None, at_turn: int, as_json: bool, client: Client
) -> int:
    source = await find_session(client, session_id)
    created = await client.fork_session(source, new, at_turn=at_turn)
    echo(json_line(created) if as_json else created.session_id)
    return DONE
