"""`runlane-server token`: creates, lists and revokes tokens."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import click

from runlane_server.access import editing
from runlane_server.access.caller import DEFAULT_TENANT, Role
from runlane_server.access.editing import CannotEdit
from runlane_server.config.option_types import Duration
from runlane_server.config.sources import access_options

SETTINGS = {
    "auto_envvar_prefix": "RUNLANE",
    "show_default": True,
    "help_option_names": ["-h", "--help"],
}


_RIGHTS: Mapping[Role, str] = {
    Role.READ: "look up and subscribe",
    Role.ANSWER: "also answer the questions of agents",
    Role.RUN: "look up, subscribe, accept and cancel",
    Role.OPERATOR: "both answer and run",
    Role.WEBHOOKS: "look up, subscribe and manage webhooks",
    Role.WORK: "execute runs as a worker, and nothing else",
    Role.ADMIN: "all of these, and delete sessions",
}


@click.group("token", context_settings=SETTINGS)
def token() -> None:
    """Creates, lists and revokes tokens of callers.

    Tokens are stored in the file that --access names. A server that uses the file applies a change
    within a second.
    """


@token.command("new", context_settings=SETTINGS)
@access_options
@click.argument("name")
@click.option(
    "--tenant",
    default=DEFAULT_TENANT,
    metavar="TENANT",
    help="Tenant whose data the token gives access to.",
)
@click.option(
    "--role",
    type=click.Choice([role.value for role in Role]),
    required=True,
    help=" ".join(f"{role.value}: {rights}." for role, rights in _RIGHTS.items()),
)
@click.option(
    "--expires",
    type=Duration(zero=False),
    default=None,
    help="Time after which the token expires.",
    show_default="never",
)
def new(access: str | None, name: str, tenant: str, role: str, expires: float | None) -> None:
    """Creates a token and prints it.

    The token is shown only this once: the file stores its hash. A missing file is created.
    """
    until = None if expires is None else datetime.fromtimestamp(int(time.time() + expires), UTC)
    try:
        text = editing.add(access_path(access), name, tenant=tenant, role=Role(role), expires=until)
    except CannotEdit as error:
        raise click.ClickException(str(error)) from None
    click.echo(text)


@token.command("list", context_settings=SETTINGS)
@access_options
def listed(access: str | None) -> None:
    """Lists the tokens: name, tenant, role, expiry and id, separated by tabs."""
    try:
        found = editing.tokens(access_path(access))
    except CannotEdit as error:
        raise click.ClickException(str(error)) from None
    now = time.time()
    for each in found:
        until = "never"
        if each.expires is not None:
            until = datetime.fromtimestamp(each.expires, UTC).isoformat()
            until += " (expired)" if now >= each.expires else ""
        caller = each.caller
        click.echo("\t".join((caller.name, caller.tenant, caller.role.value, until, each.id)))


@token.command("revoke", context_settings=SETTINGS)
@access_options
@click.argument("name")
def revoke(access: str | None, name: str) -> None:
    """Removes a token from the file. A server then ends the calls that were made with it."""
    try:
        editing.remove(access_path(access), name)
    except CannotEdit as error:
        raise click.ClickException(str(error)) from None


def access_path(access: str | None) -> Path:
    """The access file. Raises UsageError if none is named."""
    if access is None:
        raise click.UsageError("--access FILE is required")
    return Path(access)
