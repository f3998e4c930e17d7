"""`runlane sessions` and `runlane messages`: manages sessions and prints transcripts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import click
from rich.text import Text as RichText

from runlane.cli.base import DONE, InvalidUsage, execute, failure
from runlane.cli.command import Command, Group
from runlane.cli.connection import Settings
from runlane.cli.output import (
    Column,
    finish_text,
    json_line,
    one_line,
    show,
    show_list,
    stderr_console,
    time_text,
)
from runlane.cli.params import LABEL, Switch, agent_option, count_option, label_option
from runlane.cli.run_ids import find_run, find_session
from runlane.cli.run_view import artifact_text
from runlane.cli.terminal import SafeConsole, echo, for_terminal, on_terminal
from runlane.client import Client
from runlane.errors import InvalidArgument, SessionBusy, SessionNotFound
from runlane.types import (
    Artifact,
    Attachment,
    Message,
    Part,
    Reasoning,
    Result,
    Role,
    Session,
    Text,
    ToolCall,
    ToolResult,
)

_ROLES = {Role.USER: "bold cyan", Role.ASSISTANT: "bold green", Role.TOOL: "bold magenta"}


def _work(session: Session) -> str:
    if not session.busy:
        return "idle"
    return f"busy, {session.waiting_runs} waiting" if session.waiting_runs else "busy"


_COLUMNS: tuple[Column[Session], ...] = (
    Column("CREATED", lambda session: session.created_at),
    Column("SESSION", lambda session: session.session_id),
    Column("WORK", lambda session: "busy" if session.busy else "idle", _work),
    Column("WAITING", lambda session: session.waiting_runs),
    Column("TOKENS", lambda session: session.usage.input_tokens + session.usage.output_tokens),
    Column("TITLE", lambda session: session.title),
)

MESSAGE_COLUMNS: tuple[Column[Message], ...] = (
    Column("TIME", lambda message: message.created_at),
    Column("TURN", lambda message: message.turn),
    Column("RUN", lambda message: message.run_id),
    Column("ROLE", lambda message: message.role),
    Column("FINISH", lambda message: message.finish_reason),
    Column("TEXT", lambda message: "\n".join(map(_part_text, _parts_without_reasoning(message)))),
)


@click.group(cls=Group, invoke_without_command=True)
@agent_option("sessions")
@label_option("sessions")
@click.option(
    "--busy/--idle", cls=Switch, default=None, help="List only busy sessions, or only idle ones."
)
@click.option("--total", is_flag=True, help="Print the number of matching sessions to stderr.")
@count_option("sessions")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per session.")
@click.pass_context
def sessions(context: click.Context, /, count: int, as_json: bool, **filters: Any) -> None:
    """List sessions, most recently created first; or create, change and delete them.

    Columns in a pipe: created, session, busy or idle, waiting runs, tokens, title.
    """
    if context.invoked_subcommand is None:
        execute(context.obj, partial(_list, filters, count, as_json))


async def _list(filters: Mapping[str, Any], count: int, as_json: bool, client: Client) -> int:
    pager = client.list_sessions(
        agent=filters["agent"],
        metadata=dict(filters["labels"]),
        busy=filters["busy"],
        with_total_size=filters["total"],
        page_size=min(count, 1000),
    )
    await show_list(pager, count, _COLUMNS, as_json=as_json, empty_note="no sessions")
    return DONE


@sessions.command()
@click.option("--title", default="", help="Display name.")
@click.option(
    "--agent",
    default="",
    metavar="NAME",
    help="Agent of the session's runs that name none. Default: that of the server.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the session as JSON.")
@click.argument("session", required=False)
@click.pass_obj
def create(settings: Settings, title: str, agent: str, as_json: bool, session: str | None) -> None:
    """Create a session and print its id. Without SESSION, the id is new."""
    execute(settings, partial(_create, session, title, agent, as_json))


async def _create(
    session_id: str | None, title: str, agent: str, as_json: bool, client: Client
) -> int:
    created = await client.create_session(session_id, title=title, agent=agent)
    echo(json_line(created) if as_json else created.session_id)
    return DONE


@sessions.command()
@click.option("--title", help="New display name.")
@click.option("--agent", metavar="NAME", help="New agent of runs that name none.")
@click.option(
    "--label",
    "labels",
    metavar="KEY=VALUE",
    multiple=True,
    type=LABEL,
    help="New label, instead of all earlier ones; repeatable.",
)
@click.option("--no-labels", is_flag=True, help="Remove all labels.")
@click.option("--etag", default="", help="Change only the session that has this etag.")
@click.option("--json", "as_json", is_flag=True, help="Print the session as JSON.")
@click.argument("session")
@click.pass_obj
def update(settings: Settings, /, session: str, as_json: bool, **changes: Any) -> None:
    """Change the title, the agent or the labels of SESSION.

    SESSION is the id of a session, or its unique beginning. `--json` of the listing shows etags.
    """
    if changes["labels"] and changes["no_labels"]:
        raise InvalidUsage("--label and --no-labels exclude each other")
    has_labels = changes["labels"] or changes["no_labels"]
    if changes["title"] is None and changes["agent"] is None and not has_labels:
        raise InvalidUsage("nothing to change; give --title, --agent, --label or --no-labels")
    execute(settings, partial(_update, session, changes, as_json))


async def _update(
    session_id: str, changes: Mapping[str, Any], as_json: bool, client: Client
) -> int:
    labels = dict(changes["labels"])
    changed = await client.update_session(
        await find_session(client, session_id),
        title=changes["title"],
        agent=changes["agent"],
        metadata=labels if labels or changes["no_labels"] else None,
        etag=changes["etag"],
    )
    echo(json_line(changed) if as_json else changed.session_id)
    return DONE


@sessions.command()
@click.argument("session", nargs=-1, required=True)
@click.pass_obj
def delete(settings: Settings, session: tuple[str, ...]) -> None:
    """Delete idle sessions, with their runs and transcripts.

    Tries every SESSION: the id of one, or its unique beginning. The exit code is 1 if a session
    does not exist or has work, and 2 if an id is invalid or the beginning of several.
    """
    execute(settings, partial(_delete, session))


async def _delete(session_ids: tuple[str, ...], client: Client) -> int:
    code = DONE
    for session_id in session_ids:
        try:
            await client.delete_session(await find_session(client, session_id))
        except (SessionNotFound, SessionBusy, InvalidArgument, InvalidUsage) as error:
            # Other errors would affect the remaining sessions too.
            failed = error if isinstance(error, InvalidUsage) else failure(error)
            failed.show()
            code = max(code, failed.exit_code)
    return code


@click.command(cls=Command)
@click.option("--run", "run_id", metavar="RUN", help="Print only the messages of this run.")
@click.option(
    "--turns",
    type=click.IntRange(1, 1_000_000),
    metavar="N",
    help="Print only the latest N turns.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per message.")
@click.argument("session")
@click.pass_obj
def messages(
    settings: Settings, run_id: str | None, turns: int | None, as_json: bool, session: str
) -> None:
    """Print the messages of SESSION, oldest first: the id of a session, or its unique beginning.

    Columns in a pipe: time, turn, run, role, finish reason, text.
    """
    execute(settings, partial(_messages, session, run_id, turns or 0, as_json))


async def _messages(
    session_id: str, run_id: str | None, turns: int, as_json: bool, client: Client
) -> int:
    run_id = None if run_id is None else await find_run(client, run_id)
    session_id = await find_session(client, session_id)
    pager = client.list_messages(session_id, run_id=run_id, latest_turns=turns)
    if as_json or not on_terminal():
        await show(aiter(pager), MESSAGE_COLUMNS, as_json=as_json, empty_note="")
        return DONE
    console = SafeConsole(wrap=False)
    count = 0
    async for message in pager:
        count += 1
        _print(console, message)
    if not count:
        stderr_console().print("no messages", style="dim")
    return DONE


def _print(console: SafeConsole, message: Message) -> None:
    console.print(
        RichText(str(message.role), style=_ROLES.get(message.role, "bold")),
        RichText(time_text(message.created_at), style="dim"),
        RichText(finish_text(message.finish_reason), style="dim"),
    )
    for part in message.parts:
        style = "" if isinstance(part, Text) else "dim"
        console.print(RichText(for_terminal(_part_text(part)), style=style))
    console.print()


def _parts_without_reasoning(message: Message) -> list[Part]:
    # In a line of plain text, reasoning would look like the output.
    return [part for part in message.parts if not isinstance(part, Reasoning)]


def _part_text(part: Part) -> str:
    match part:
        case Text(text=text) | Reasoning(text=text):
            return text
        case ToolCall(name=name, arguments_json=arguments):
            return f"[calls {name} {one_line(arguments)}]"
        case ToolResult(name=name, content=content, is_error=is_error):
            return f"[{name} {'failed' if is_error else 'returned'}: {one_line(content)}]"
        case Attachment(name=name, mime_type=mime_type, content=content):
            size = len(content if isinstance(content, bytes) else content.encode())
            return f"[attachment {name or '(unnamed)'} {mime_type} {size} bytes]"
        case Artifact():
            incomplete = "" if part.last else ", incomplete"
            return f"[{artifact_text(part)}{incomplete}]"
        case Result(json=content):
            return f"[result {one_line(content)}]"
