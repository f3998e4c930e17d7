"""`runlane webhooks`: lists webhooks with their health, and manages them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click

from runlane.cli.base import DONE, execute
from runlane.cli.command import Command, Group
from runlane.cli.connection import Settings
from runlane.cli.output import Column, json_line, show
from runlane.cli.params import Switch
from runlane.cli.terminal import echo
from runlane.client import Client
from runlane.ids import new_id
from runlane.types import RunState
from runlane.webhooks import Webhook, WebhookEventKind, WebhookFilter, WebhookRun

CommandT = TypeVar("CommandT", bound=Callable[..., Any])

_STATES = ("completed", "cancelled", "failed")
_KINDS = tuple(kind.value for kind in WebhookEventKind if kind is not WebhookEventKind.UNKNOWN)


def _state(webhook: Webhook) -> str:
    health = webhook.health
    if health.disabled_reason or not webhook.enabled:
        return "disabled"
    if health.failing_since is not None:
        return "failing"
    return "delivering" if health.confirmed else "unconfirmed"


_COLUMNS: tuple[Column[Webhook], ...] = (
    Column("CREATED", lambda webhook: webhook.created_at),
    Column("WEBHOOK", lambda webhook: webhook.webhook_id),
    Column("STATE", _state),
    Column("DELIVERED", lambda webhook: webhook.health.delivered),
    Column("HELD", lambda webhook: webhook.health.held_sessions),
    Column("URL", lambda webhook: webhook.url),
    Column("ERROR", lambda webhook: webhook.health.disabled_reason or _last_error(webhook)),
)


def _last_error(webhook: Webhook) -> str:
    return webhook.health.last_error if webhook.health.failing_since is not None else ""


def _json_option(command: CommandT) -> CommandT:
    return click.option("--json", "as_json", is_flag=True, help="Print the webhook as JSON.")(
        command
    )


def _filter_options(command: CommandT) -> CommandT:
    """The options that select events."""
    for option in (
        click.option(
            "--kind", multiple=True, type=click.Choice(_KINDS), help="Kind of events; repeatable."
        ),
        click.option(
            "--state",
            multiple=True,
            type=click.Choice(_STATES),
            help="Terminal state of runs; repeatable.",
        ),
        click.option(
            "--agent", multiple=True, metavar="NAME", help="Agent of the runs; repeatable."
        ),
        click.option(
            "--label", multiple=True, metavar="KEY=VALUE", help="Label of the runs; repeatable."
        ),
        click.option(
            "--session-prefix",
            multiple=True,
            metavar="TEXT",
            help="Beginning of session ids; repeatable.",
        ),
        click.option(
            "-s", "--session", multiple=True, metavar="SESSION", help="A session; repeatable."
        ),
    ):
        command = option(command)
    return command


def _filter(options: dict[str, Any]) -> WebhookFilter:
    """The filter that the options describe; it takes them out of `options`."""
    labels: dict[str, str] = {}
    for text in options.pop("label"):
        key, found, value = text.partition("=")
        if not (key and found):
            raise click.UsageError(f"--label: {text!r} is not of the form KEY=VALUE")
        labels[key] = value
    return WebhookFilter(
        session_ids=options.pop("session"),
        session_id_prefixes=options.pop("session_prefix"),
        labels=labels,
        agents=options.pop("agent"),
        states=tuple(map(RunState, options.pop("state"))),
        kinds=tuple(map(WebhookEventKind, options.pop("kind"))),
    )


@click.group(cls=Group, invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per webhook.")
@click.pass_context
def webhooks(context: click.Context, as_json: bool) -> None:
    """List webhooks, most recently created first; or create and manage them.

    Columns in a pipe: created, webhook, state, deliveries, sessions that wait for a retry, URL,
    error. The state is delivering, failing, unconfirmed or disabled.
    """
    if context.invoked_subcommand is None:
        execute(context.obj, partial(_list, as_json))


async def _list(as_json: bool, client: Client) -> int:
    found = aiter(client.list_webhooks())
    await show(found, _COLUMNS, as_json=as_json, empty_note="no webhooks")
    return DONE


@webhooks.command(cls=Command)
@_filter_options
@click.option("--full", is_flag=True, help="Deliver whole events, not only ids and states.")
@click.option("--run", metavar="RUN", help="Deliver only the events of this run.")
@click.option(
    "--name",
    metavar="NAME",
    help="With --run: replace the webhook of this name. Default: create another one.",
)
@click.option(
    "--secret-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File with the secret. Default: the server creates one.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the webhook and its secret as JSON.")
@click.argument("url")
@click.pass_obj
def create(  # noqa: PLR0917 - one per option
    settings: Settings,
    /,
    url: str,
    full: bool,
    run: str | None,
    name: str | None,
    secret_file: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Create a webhook for URL; print its id and its secret.

    No later command prints the secret. Without options, all events are delivered.
    """
    secret = "" if secret_file is None else secret_file.read_text().strip()
    given: dict[str, Any] = {"events": _filter(options), "full": full, "secret": secret}
    if (bound := _bound(run, name)) is not None:
        given["run"] = bound
    execute(settings, partial(_create, url, given, as_json))


def _bound(run: str | None, name: str | None) -> WebhookRun | None:
    """Binds a new webhook to a run. A new name replaces no other webhook."""
    if run is not None:
        return WebhookRun(run, new_id() if name is None else name)
    if name is not None:
        raise click.UsageError("--name needs --run")
    return None


async def _create(url: str, given: dict[str, Any], as_json: bool, client: Client) -> int:
    created = await client.create_webhook(url, **given)
    if as_json:
        echo(json_line(created))
    else:
        echo(f"{created.webhook.webhook_id}\t{created.secret}")
    return DONE


@webhooks.command("show", cls=Command)
@click.argument("webhook")
@click.pass_obj
def show_one(settings: Settings, webhook: str) -> None:
    """Print WEBHOOK as JSON, with its health."""
    execute(settings, partial(_show, webhook))


async def _show(webhook_id: str, client: Client) -> int:
    echo(json_line(await client.get_webhook(webhook_id)))
    return DONE


@webhooks.command(cls=Command)
@_filter_options
@click.option("--url", help="New URL, which must answer a challenge.")
@click.option(
    "--full/--thin", cls=Switch, default=None, help="Deliver whole events, or ids and states."
)
@click.option(
    "--enable/--disable",
    "enabled",
    cls=Switch,
    default=None,
    help="Deliver, also after the server has stopped; or let events wait.",
)
@click.option("--everything", is_flag=True, help="Deliver all events.")
@_json_option
@click.argument("webhook")
@click.pass_obj
def update(  # noqa: PLR0917 - one per option
    settings: Settings,
    /,
    webhook: str,
    url: str | None,
    full: bool | None,
    enabled: bool | None,
    everything: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Change WEBHOOK. Options that select events replace its whole filter."""
    wanted: WebhookFilter | None = _filter(options)
    selects = wanted != WebhookFilter()
    if selects and everything:
        raise click.UsageError("--everything: cannot be combined with options that select events")
    if not selects and not everything:
        wanted = None
    changes = {"url": url, "events": wanted, "full": full, "enabled": enabled}
    given = {name: value for name, value in changes.items() if value is not None}
    if not given:
        raise click.UsageError("give at least one option to change")
    execute(settings, partial(_update, webhook, given, as_json))


async def _update(webhook_id: str, changes: dict[str, Any], as_json: bool, client: Client) -> int:
    return _done(await client.update_webhook(webhook_id, **changes), as_json)


@webhooks.command(cls=Command)
@click.argument("webhook", nargs=-1, required=True)
@click.pass_obj
def delete(settings: Settings, webhook: tuple[str, ...]) -> None:
    """Delete webhooks."""
    execute(settings, partial(_delete, webhook))


async def _delete(webhook_ids: tuple[str, ...], client: Client) -> int:
    for webhook_id in webhook_ids:
        await client.delete_webhook(webhook_id)
    return DONE


@webhooks.command(cls=Command)
@click.option("--cursor", metavar="CURSOR", help="Begin after this cursor.")
@click.option("--from-beginning", is_flag=True, help="Begin at the oldest event of the log.")
@_json_option
@click.argument("webhook")
@click.pass_obj
def redeliver(
    settings: Settings, webhook: str, cursor: str | None, from_beginning: bool, as_json: bool
) -> None:
    """Deliver events again to WEBHOOK."""
    if (cursor is None) != from_beginning:
        raise click.UsageError("give either --cursor or --from-beginning")
    execute(settings, partial(_redeliver, webhook, cursor, as_json))


async def _redeliver(webhook_id: str, cursor: str | None, as_json: bool, client: Client) -> int:
    return _done(await client.redeliver_webhook(webhook_id, cursor=cursor), as_json)


@webhooks.command("rotate-secret", cls=Command)
@click.option("--expire-now", is_flag=True, help="Do not sign with the old secret any more.")
@click.option("--json", "as_json", is_flag=True, help="Print the webhook and its secret as JSON.")
@click.argument("webhook")
@click.pass_obj
def rotate_secret(settings: Settings, webhook: str, expire_now: bool, as_json: bool) -> None:
    """Replace the secret of WEBHOOK, and print the new one.

    Deliveries are signed with both for a day.
    """
    execute(settings, partial(_rotate, webhook, expire_now, as_json))


async def _rotate(webhook_id: str, expire_now: bool, as_json: bool, client: Client) -> int:
    rotated = await client.rotate_webhook_secret(webhook_id, expire_now=expire_now)
    echo(json_line(rotated) if as_json else rotated.secret)
    return DONE


def _done(webhook: Webhook, as_json: bool) -> int:
    if as_json:
        echo(json_line(webhook))
    return DONE
