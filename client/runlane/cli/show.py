"""`runlane show`: prints everything about a run."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import click

from runlane.cli.base import DONE, execute
from runlane.cli.command import Command
from runlane.cli.connection import Settings
from runlane.cli.output import duration_text, field, finish_text, json_line
from runlane.cli.run_ids import find_run
from runlane.cli.terminal import echo
from runlane.client import Client
from runlane.types import Run, RunComplete


@click.command(cls=Command)
@click.option("--json", "as_json", is_flag=True, help="Print the run as one JSON object.")
@click.option("--prompt", "only_prompt", is_flag=True, help="Print only the prompt, whole.")
@click.argument("run_id", metavar="RUN")
@click.pass_obj
def show(settings: Settings, as_json: bool, only_prompt: bool, run_id: str) -> None:
    """Print everything about a run: its state, times, error, usage, labels, prompt and text.

    RUN is a run id, or the beginning of one: at least 8 characters, unique among the 1,000 most
    recent runs. The output is one line per field, separated by a tab from its name. Fields without
    a value are omitted. The field `prompt` has the first 256 characters of the prompt.
    """
    execute(settings, partial(_show_prompt if only_prompt else _show, run_id, as_json))


async def _show(text: str, as_json: bool, client: Client) -> int:
    run = await client.get_run(await find_run(client, text))
    if as_json:
        echo(json_line(run))
        return DONE
    for name, value in _fields(run):
        if value not in {None, ""}:
            echo(f"{name}\t{field(value)}")
    return DONE


async def _show_prompt(text: str, as_json: bool, client: Client) -> int:
    prompt = await client.get_prompt(await find_run(client, text))
    if as_json:
        echo(json_line({"text": prompt.text, "attachments": prompt.attachments}))
    else:
        echo(prompt.text)
    return DONE


def _fields(run: Run) -> Iterator[tuple[str, object]]:
    yield from (("run", run.run_id), ("session", run.session_id), ("seq", run.accept_seq))
    yield from (("state", run.state), ("when busy", run.when_busy))
    yield from (("accepted", run.accepted_at), ("started", run.started_at))
    yield from (("ended", run.ended_at), ("took", duration_text(run.started_at, run.ended_at)))
    yield "attempt", _attempt(run)
    yield "timeout", None if run.timeout is None else f"{run.timeout.total_seconds():g}s"
    yield "folded into", run.folded_into
    yield "revision", run.revision or None
    if run.run_complete is not None:
        yield from _fields_of_end(run.run_complete)
    yield from ((f"label {key}", value) for key, value in run.metadata.items())
    yield "prompt", run.prompt_excerpt
    yield "text", None if run.run_complete is None else run.run_complete.text


def _attempt(run: Run) -> str | None:
    """The number of the attempt and, unless some do not count towards it, their maximum."""
    if not run.attempt:
        return None
    more = run.retry_policy is not None or run.attempt > run.max_attempts
    return str(run.attempt) if more else f"{run.attempt} of {run.max_attempts}"


def _fields_of_end(complete: RunComplete) -> Iterator[tuple[str, object]]:
    yield "finish reason", finish_text(complete.finish_reason)
    if complete.error is not None:
        yield from (("error", complete.error.reason), ("message", complete.error.message))
    yield "cancel reason", complete.cancel_reason
    yield "result", complete.result
    if complete.usage is not None:
        yield "tokens in", complete.usage.input_tokens
        yield "tokens out", complete.usage.output_tokens
