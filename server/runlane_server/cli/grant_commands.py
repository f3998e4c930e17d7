"""`runlane-server grant`: creates, lists and removes standing approvals."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import click

from runlane_server.access import editing
from runlane_server.access.caller import DEFAULT_TENANT
from runlane_server.access.editing import CannotEdit
from runlane_server.access.grants import MAX_DAYS, Grant, canonical
from runlane_server.cli.token_commands import SETTINGS, access_path
from runlane_server.config.option_types import Duration
from runlane_server.config.sources import access_options
from runlane_server.core.agents import DEFAULT_AGENT

MAX_DEPTH = 8
"""Lists within each other in the value of an argument."""


@click.group("grant", context_settings=SETTINGS)
def grant() -> None:
    """Creates, lists and removes standing approvals of tool calls.

    A server answers the approvals that a grant covers, in the name of the person who set it. Grants
    are stored in the file that --access names; a server that uses it applies a change within a
    second.
    """


@grant.command("new", context_settings=SETTINGS)
@access_options
@click.argument("name")
@click.option("--tenant", default=DEFAULT_TENANT, metavar="TENANT", help="Tenant of the runs.")
@click.option("--agent", default=DEFAULT_AGENT, metavar="NAME", help="Agent that asks.")
@click.option("--tool", required=True, metavar="NAME", help="Tool that the agent may call.")
@click.option(
    "--argument",
    "arguments",
    multiple=True,
    metavar="NAME=VALUE",
    help="Value that an argument must have: text, a number, true, false, or a list of these as JSON."
    " May be repeated.",
    show_default="any arguments",
)
@click.option("--set-by", required=True, metavar="PERSON", help="Person who decides.")
@click.option(
    "--expires",
    type=Duration(zero=False, shortest=1, longest=MAX_DAYS * 86400),
    required=True,
    help="Time for which it holds.",
)
def new(  # noqa: PLR0917 - click passes the options by name
    access: str | None,
    name: str,
    tenant: str,
    agent: str,
    tool: str,
    arguments: Sequence[str],
    set_by: str,
    expires: float,
) -> None:
    """Approves the calls of a tool by an agent in advance, for a time."""
    set_at = int(time.time())
    values = _arguments(arguments)
    wanted = Grant(name, tenant, agent, tool, set_by, set_at, set_at + int(expires), values)
    try:
        editing.add_grant(access_path(access), wanted)
    except CannotEdit as error:
        raise click.ClickException(str(error)) from None


def _arguments(texts: Sequence[str]) -> Mapping[str, str]:
    """The JSON texts of arguments by their names. Raises UsageError."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise click.UsageError(f"--argument {text!r} must be NAME=VALUE")
        if name in found:
            raise click.UsageError(
                f"--argument {name!r} is given twice; a grant has one value of it"
            )
        found[name] = _value(name, value)
    return found


def _value(name: str, text: str) -> str:
    try:
        value = json.loads(text)
        shown = canonical(value)
    except ValueError:  # it is plain text
        value, shown = text, canonical(text)
    except RecursionError:
        value = None
    if not (_is_text(name) and _has_form(value, MAX_DEPTH)):
        raise click.UsageError(
            f"--argument {name!r} must have a text, a number, true, false or a list of these; write"
            " other texts in quotes of JSON"
        )
    return shown


def _has_form(value: object, depth: int) -> bool:
    """Whether an entry of the access file can have the value."""
    if isinstance(value, list):
        return depth > 0 and all(_has_form(each, depth - 1) for each in value)
    return _is_text(value) if isinstance(value, str) else isinstance(value, int | float)


def _is_text(text: str) -> bool:
    """Half of a character is no text."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


@grant.command("list", context_settings=SETTINGS)
@access_options
def listed(access: str | None) -> None:
    """Lists the grants: name, tenant, agent, tool, arguments, person, expiry; with tabs between."""
    try:
        found = editing.grants(access_path(access))
    except CannotEdit as error:
        raise click.ClickException(str(error)) from None
    now = time.time()
    for each in found:
        until = datetime.fromtimestamp(each.expires, UTC).isoformat()
        until += " (expired)" if now >= each.expires else ""
        given = " ".join(f"{name}={value}" for name, value in each.arguments.items())
        fields = (each.name, each.tenant, each.agent, each.tool, given or "-", each.set_by, until)
        click.echo("\t".join(fields))


@grant.command("remove", context_settings=SETTINGS)
@access_options
@click.argument("name")
def remove(access: str | None, name: str) -> None:
    """Removes a grant from the file. Approvals that are asked from then on need a person."""
    try:
        editing.remove_grant(access_path(access), name)
    except CannotEdit as error:
        raise click.ClickException(str(error)) from None
