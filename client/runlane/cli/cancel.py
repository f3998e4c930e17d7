"""`runlane cancel`: cancels runs and shows what that covered."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import click

from runlane.cli.base import DONE, execute
from runlane.cli.connection import Settings
from runlane.cli.output import Column, coloured, json_line, on_terminal, show, stderr_console
from runlane.client import Client
from runlane.types import CancelledRun, CancelReceipt, CancelScope

_COLUMNS: tuple[Column[CancelledRun], ...] = (
    Column("SESSION", lambda run: run.session_id),
    Column("SEQ", lambda run: run.accept_seq),
    Column("RUN", lambda run: run.run_id),
    Column("WAS", lambda run: run.state_when_cancelled, lambda r: coloured(r.state_when_cancelled)),
)


@click.command()
@click.option("--run", "run_id", metavar="RUN_ID", help="This run only, with those folded into it.")
@click.option(
    "--scope",
    type=click.Choice([str(each) for each in CancelScope]),
    default=str(CancelScope.SESSION),
    show_default=True,
    help="All runs of the session, the active one, or those that wait.",
)
@click.option("--all", "everything", is_flag=True, help="All runs of all sessions.")
@click.option("--reason", default="", help="Recorded with every run that is covered.")
@click.option("--json", "as_json", is_flag=True, help="Print the receipt as JSON.")
@click.argument("session", required=False)
@click.pass_obj
def cancel(
    settings: Settings,
    *,
    run_id: str | None,
    scope: str,
    everything: bool,
    reason: str,
    as_json: bool,
    session: str | None,
) -> None:
    """Cancels what is accepted and not ended in SESSION at this instant, and says what that was.

    For each run: its session, its place in the accept order, its id, and the state it was in. Then
    the fence: no run of the session with a larger number was touched. A run that is accepted later
    is never touched. On an idle session it does nothing, and succeeds.

    SESSION may be left out with --run.

    \b
    Examples:
      runlane cancel notes
      runlane cancel notes --scope waiting
      runlane cancel --all --reason "maintenance"
    """
    if everything:
        if session or run_id or scope != CancelScope.SESSION:
            raise click.UsageError("--all goes without SESSION, --run and --scope")
    elif not session and not run_id:
        raise click.UsageError("what to cancel? Give SESSION, --run or --all")
    elif run_id and scope != CancelScope.SESSION:
        raise click.UsageError("--run names one run, which leaves nothing for --scope to choose")

    async def work(client: Client) -> int:
        if everything:
            receipts = await client.cancel_all(reason)
        else:
            receipts = (
                await client.cancel(
                    session or "", run_id=run_id, scope=CancelScope(scope), reason=reason
                ),
            )
        await _show(receipts, as_json=as_json)
        return DONE

    execute(settings, work)


async def _show(receipts: tuple[CancelReceipt, ...], *, as_json: bool) -> None:
    if as_json:
        for receipt in receipts:
            click.echo(json_line(receipt))
        return
    covered = [run for receipt in receipts for run in receipt.cancelled]
    if not covered:
        stderr_console().print("nothing to cancel")
        return

    await show(_each(covered), _COLUMNS, as_json=False, nothing="")
    for receipt in receipts:
        line = f"fence {receipt.fence_accept_seq} in session {receipt.session_id}"
        if on_terminal():
            stderr_console().print(line, style="dim", markup=False)
        else:
            click.echo(line, err=True)


async def _each(covered: Sequence[CancelledRun]) -> AsyncIterator[CancelledRun]:
    for run in covered:
        yield run
