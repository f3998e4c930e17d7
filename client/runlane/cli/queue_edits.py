"""`runlane queue move`, `edit`, `now` and `drop`: what becomes of a run that waits."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import click

from runlane.cli.answer import can_ask
from runlane.cli.base import DONE, FAILED, Failure, InvalidUsage, execute
from runlane.cli.cancel import print_receipts
from runlane.cli.connection import Settings
from runlane.cli.editor import Draft, read_stdin
from runlane.cli.output import field, json_line
from runlane.cli.params import LABEL
from runlane.cli.queue import queue
from runlane.cli.run_ids import find_run
from runlane.cli.terminal import echo
from runlane.client import Client
from runlane.types import RunPrompt, RunState, WhenBusy

_json_option = click.option("--json", "as_json", is_flag=True, help="Print the run as JSON.")
_revision_option = click.option(
    "--revision",
    type=click.IntRange(0),
    metavar="N",
    help="Change only the run at this revision, as `runlane show` prints it.",
)


@queue.command()
@click.option("--first", is_flag=True, help="Move it to the head of the queue.")
@click.option("--last", is_flag=True, help="Move it to the end of the queue.")
@click.option("--before", metavar="RUN", default="", help="Move it directly before this run.")
@click.option("--after", metavar="RUN", default="", help="Move it directly after this run.")
@_revision_option
@_json_option
@click.argument("run")
@click.pass_obj
def move(
    settings: Settings, /, run: str, as_json: bool, revision: int | None, **place: Any
) -> None:
    """Move RUN, which waits, to another place in the queue of its session.

    Runs are named by their ids, or by the unique beginnings of them.
    """
    if sum(map(bool, place.values())) != 1:
        raise InvalidUsage("give one of --first, --last, --before and --after")
    execute(settings, partial(_move, run, place, revision, as_json))


async def _move(
    run: str, place: Mapping[str, Any], revision: int | None, as_json: bool, client: Client
) -> int:
    anchors = {
        name: await find_run(client, place[name]) for name in ("before", "after") if place[name]
    }
    return await _update(run, {**place, **anchors, "revision": revision}, as_json, client)


@queue.command()
@click.option("--prompt", metavar="TEXT", help="New prompt; `-` reads it from stdin.")
@click.option(
    "--label",
    "labels",
    metavar="KEY=VALUE",
    multiple=True,
    type=LABEL,
    help="New label, instead of all earlier ones; repeatable.",
)
@click.option("--no-labels", is_flag=True, help="Remove all labels.")
@_revision_option
@_json_option
@click.argument("run")
@click.pass_obj
def edit(
    settings: Settings,
    *,
    prompt: str | None,
    labels: tuple[tuple[str, str], ...],
    no_labels: bool,
    revision: int | None,
    as_json: bool,
    run: str,
) -> None:
    """Change the prompt or the labels of RUN, which waits: a run id, or its unique beginning.

    Without a change, at a terminal, VISUAL or EDITOR opens the whole prompt. The saved text is the
    new prompt, unless the run was changed or started meanwhile; the text is then kept in a file.
    """
    if labels and no_labels:
        raise InvalidUsage("--label and --no-labels exclude each other")
    if prompt is None and not labels and not no_labels:
        if not can_ask():
            raise InvalidUsage("the editor needs a terminal; give --prompt, --label or --no-labels")
        _edit_by_hand(settings, run, revision, as_json)
        return
    metadata = dict(labels) if labels or no_labels else None
    text = read_stdin("--prompt") if prompt == "-" else prompt
    changes = {"prompt": text, "metadata": metadata, "revision": revision}
    execute(settings, partial(_update, run, changes, as_json))


def _edit_by_hand(settings: Settings, run: str, revision: int | None, as_json: bool) -> None:
    """Edits the prompt of a run in an editor; no connection is open meanwhile."""
    found: list[RunPrompt] = []
    execute(settings, partial(_read, run, revision, found))
    (prompt,) = found
    draft = Draft(prompt.text)
    try:
        text = draft.edit()
        if text is None:
            echo("not changed", err=True)
        else:
            changes = {"prompt": text, "revision": prompt.run.revision}
            execute(settings, partial(_update, prompt.run.run_id, changes, as_json))
    except BaseException:
        draft.rescue()
        raise
    draft.discard()


async def _read(run: str, revision: int | None, into: list[RunPrompt], client: Client) -> int:
    """Reads a prompt that can be edited. Raises Failure if the run has started."""
    prompt = await client.get_prompt(await find_run(client, run))
    if prompt.run.state not in {RunState.ACCEPTED, RunState.QUEUED}:
        state = str(prompt.run.state).replace("_", " ")
        raise Failure(f"run {field(prompt.run.run_id)} has left the queue; it is {state}")
    if revision not in {None, prompt.run.revision}:
        raise Failure(f"--revision: the run is at revision {prompt.run.revision}, not {revision}")
    into.append(prompt)
    return DONE


@queue.command()
@click.option(
    "--interrupt", is_flag=True, help="Cancel the active run and start RUN next. Default: fold."
)
@_json_option
@click.argument("run")
@click.pass_obj
def now(settings: Settings, interrupt: bool, as_json: bool, run: str) -> None:
    """Send RUN, which waits, without waiting for its turn: it joins the active turn at its next
    step.

    RUN is a run id, or its unique beginning.
    """
    sent = WhenBusy.INTERRUPT if interrupt else WhenBusy.FOLD
    execute(settings, partial(_update, run, {"when_busy": sent}, as_json))


async def _update(run: str, changes: Mapping[str, Any], as_json: bool, client: Client) -> int:
    changed = await client.update_run(await find_run(client, run), **changes)
    echo(json_line(changed) if as_json else changed.run_id)
    return DONE


@queue.command()
@click.option("--reason", default="", help="Reason, recorded with the run.")
@click.option("--json", "as_json", is_flag=True, help="Print the receipt as JSON.")
@click.argument("run")
@click.pass_obj
def drop(settings: Settings, reason: str, as_json: bool, run: str) -> None:
    """Cancel RUN, also if it has just started, and print the receipt.

    The exit code is 1 if it has ended. RUN is a run id, or its unique beginning.
    """
    execute(settings, partial(_drop, run, reason, as_json))


async def _drop(run: str, reason: str, as_json: bool, client: Client) -> int:
    run_id = await find_run(client, run)
    receipt = await client.cancel(run_id=run_id, reason=reason)
    if not receipt.cancelled and not as_json:
        raise Failure(f"run {field(run_id)} has ended; there is nothing to drop")
    await print_receipts((receipt,), as_json=as_json)
    return DONE if receipt.cancelled else FAILED
