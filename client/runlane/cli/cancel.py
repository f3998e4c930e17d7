"""`runlane cancel`: cancels runs and prints the receipt."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import click

from runlane.cli.base import DONE, FAILED, execute
from runlane.cli.command import Command
from runlane.cli.connection import Settings
from runlane.cli.output import Column, field, json_line, show, state_text, stderr_console
from runlane.cli.run_ids import find_run, find_session
from runlane.cli.terminal import echo, on_terminal
from runlane.client import Client
from runlane.types import CancelledRun, CancelReceipt, CancelScope

_COLUMNS: tuple[Column[CancelledRun], ...] = (
    Column("SESSION", lambda run: run.session_id),
    Column("SEQ", lambda run: run.accept_seq),
    Column("RUN", lambda run: run.run_id),
    Column(
        "WAS",
        lambda run: run.state_when_cancelled,
        lambda run: state_text(run.state_when_cancelled),
    ),
)


@click.command(cls=Command)
@click.option(
    "--run",
    "run_id",
    metavar="RUN",
    help="Cancel only this run and the runs folded into it: a run id, or the unique "
    "beginning of one.",
)
@click.option(
    "--scope",
    type=click.Choice([str(each) for each in CancelScope]),
    default=str(CancelScope.SESSION),
    show_default=True,
    help="Runs of the session to cancel: all, the active one, or the waiting ones.",
)
@click.option("--all", "all_sessions", is_flag=True, help="Cancel all runs of all sessions.")
@click.option("--reason", default="", help="Reason, recorded with every cancelled run.")
@click.option("--json", "as_json", is_flag=True, help="Print the receipt as JSON.")
@click.argument("session", required=False)
@click.pass_obj
def cancel(
    settings: Settings,
    *,
    run_id: str | None,
    scope: str,
    all_sessions: bool,
    reason: str,
    as_json: bool,
    session: str | None,
) -> None:
    """Cancel the runs of SESSION that are accepted and have not ended, and print the receipt.

    The receipt has one line per cancelled run: session, accept number, run id, and the state before
    the cancel. The fence on stderr is the last accept number at the time of the cancel: runs with a
    larger number are not affected. On an idle session the command has no effect and succeeds.

    The exit code of --all is 1 if the stored records of a session are damaged, which it names.

    SESSION is the id of a session, or the unique beginning of one. It is optional with --run.

    \b
    Examples:
      runlane cancel notes
      runlane cancel notes --scope waiting
      runlane cancel --all --reason "maintenance"
    """
    if all_sessions:
        if session or run_id or scope != CancelScope.SESSION:
            raise click.UsageError("--all cannot be combined with SESSION, --run or --scope")
    elif not session and not run_id:
        raise click.UsageError("nothing selected; give SESSION, --run or --all")
    elif run_id and scope != CancelScope.SESSION:
        raise click.UsageError("--run cannot be combined with --scope")

    async def work(client: Client) -> int:
        if all_sessions:
            receipts = await client.cancel_all(reason)
        else:
            run = None if run_id is None else await find_run(client, run_id)
            named = await find_session(client, session) if session else ""
            receipts = (
                await client.cancel(named, run_id=run, scope=CancelScope(scope), reason=reason),
            )
        await print_receipts(receipts, as_json=as_json)
        return FAILED if any(receipt.unreadable for receipt in receipts) else DONE

    execute(settings, work)


async def print_receipts(receipts: tuple[CancelReceipt, ...], *, as_json: bool) -> None:
    """Prints the receipts of a cancel."""
    if as_json:
        for receipt in receipts:
            echo(json_line(receipt))
        return
    for receipt in receipts:
        if receipt.unreadable:
            name = field(receipt.session_id)
            echo(f"not cancelled: the records of session {name} are damaged; delete it", err=True)
    cancelled = [run for receipt in receipts for run in receipt.cancelled]
    if not cancelled:
        stderr_console().print("nothing to cancel")
        return

    await show(_iterate(cancelled), _COLUMNS, as_json=False, empty_note="")
    for receipt in receipts:
        if receipt.unreadable:
            continue
        line = f"fence {receipt.fence_accept_seq} in session {field(receipt.session_id)}"
        if on_terminal():
            stderr_console().print(line, style="dim")
        else:
            echo(line, err=True)


async def _iterate(runs: Sequence[CancelledRun]) -> AsyncIterator[CancelledRun]:
    for run in runs:
        yield run
