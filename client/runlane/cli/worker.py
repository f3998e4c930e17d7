"""`runlane worker`: executes runs of the server in this process."""

from __future__ import annotations

import asyncio
import importlib
import sys
from pathlib import Path
from typing import Any

import click

from runlane.cli.command import Command
from runlane.cli.connection import Settings
from runlane.cli.terminal import echo
from runlane.errors import RunlaneError
from runlane.worker.reload import Code, ReloadingFunction


@click.command(cls=Command)
@click.option(
    "--name",
    "names",
    multiple=True,
    metavar="NAME",
    help="Agent to execute, as the server declares it; may be repeated. Default: default.",
)
@click.option(
    "--slots",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Number of runs to execute at a time.",
)
@click.option("--worker-id", default="", help="Name in the logs of the server. Default: HOST:PID.")
@click.option(
    "--drain-timeout",
    type=click.FloatRange(min=0),
    default=10.0,
    show_default=True,
    help="Seconds that active runs may go on after SIGTERM before they are handed back.",
)
@click.option(
    "--reload",
    is_flag=True,
    help="Load the function again when its files change, for development.",
)
@click.argument("agent", metavar="MODULE:ATTRIBUTE")
@click.pass_obj
def worker(
    settings: Settings,
    *,
    names: tuple[str, ...],
    slots: int,
    worker_id: str,
    drain_timeout: float,
    reload: bool,
    agent: str,
) -> None:
    """Execute runs with the function MODULE:ATTRIBUTE until SIGTERM or Ctrl-C.

    The server declares the agent with `--agent worker`. The function is one that a server takes as
    `--agent MODULE:ATTRIBUTE`; the current directory comes first on the import path.

    \b
    Examples:
      runlane worker agents:answer
      runlane worker agents:answer --name coder --slots 8
    """
    function = _import(agent, reload=reload)
    try:
        made = settings.worker(
            dict.fromkeys(names or ("default",), function),
            slots=slots,
            worker_id=worker_id,
            drain_timeout=drain_timeout,
        )
        echo(f"worker for {', '.join(names or ('default',))}: {slots} slots")
        asyncio.run(made.serve())
    except RunlaneError as error:
        raise click.ClickException(str(error)) from None


def _import(name: str, *, reload: bool) -> Any:
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise click.UsageError(f"{name!r} is not MODULE:ATTRIBUTE")
    sys.path.insert(0, str(Path.cwd()))
    try:
        if reload:
            return ReloadingFunction(Code(module, attribute))
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise click.UsageError(f"{name}: cannot import: {error}") from None
    if not callable(found):
        raise click.UsageError(f"{name}: a {type(found).__name__} is not a function")
    return found
