"""The command `runlane-conformance`."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import click

from runlane.cli.connection import read_token, warn_of_token
from runlane.cli.terminal import echo, prepare
from runlane.client import DEFAULT_TARGET, Client
from runlane.conformance import report
from runlane.conformance.rules import RULES
from runlane.conformance.runner import Result, Runner, UnsuitableServer, Verdict
from runlane.conformance.worker_stream import WorkerAgent
from runlane.errors import RunlaneError
from runlane.harness.client import Harness
from runlane.metadata import MetadataSource
from runlane.types import NO_LABELS
from runlane.wire import RetryPolicy, Wire


class RulesType(click.ParamType[tuple[int, ...]]):
    """A rule or a range of rules: `10`, `R10`, or `10-20`."""

    name = "rules"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Returns the rule numbers."""
        first, _, last = str(value).upper().replace("R", "").partition("-")
        try:
            rules = range(int(first), int(last or first) + 1)
        except ValueError:
            self.fail(f"{value!r} is not a rule such as 10, R10 or 10-20", param, ctx)
        if not rules or any(rule not in RULES for rule in rules):
            self.fail(f"{value!r} is not within R1 to R{max(RULES)}", param, ctx)
        return tuple(rules)


def _check_parent(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """Checks the path now, because the report is written only at the end."""
    if value is not None and not value.parent.is_dir():
        raise click.BadParameter(f"folder {str(value.parent)!r} does not exist", ctx, param)
    return value


@click.command(
    "runlane-conformance",
    context_settings={
        "auto_envvar_prefix": "RUNLANE",
        "show_default": True,
        "help_option_names": ["-h", "--help"],
    },
)
@click.argument("address", default=DEFAULT_TARGET)
@click.option(
    "--rule",
    "rules",
    type=RulesType(),
    multiple=True,
    help="Rules to check, such as 10, R10 or 10-20; repeatable.",
    show_default="all",
)
@click.option(
    "--worker-agent",
    metavar="NAME",
    help="Agent of the server that is declared as NAME=worker: the command executes its runs as a "
    "worker, to check R33 to R37. Other workers must not serve it.",
    show_default="those rules are skipped",
)
@click.option(
    "--junit",
    type=click.Path(path_type=Path, dir_okay=False, writable=True),
    callback=_check_parent,
    help="Write a JUnit XML report to this file.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=20.0,
    help="Maximum time to wait for an expected event, in seconds. With PostgreSQL, use more than "
    "the server's --node-lease.",
)
@click.option(
    "--token",
    hidden=True,  # for RUNLANE_TOKEN, and for those who used it before
    callback=warn_of_token,
)
@click.option(
    "--token-file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="File with the bearer token of a server with access control; it needs the role admin. "
    "RUNLANE_TOKEN may have the token itself.",
)
@click.version_option(package_name="runlane")
def command(
    address: str,
    rules: tuple[tuple[int, ...], ...],
    worker_agent: str | None,
    junit: Path | None,
    timeout: float,
    *,
    token: str | None,
    token_file: Path | None,
) -> int:
    """Check over the wire that the server at ADDRESS follows R1 to R48, R50 to R52 and R55.

    Use a dedicated test server, started with `runlane-server --harness --agent scripted`: the
    command cancels all its runs, crashes and restarts it, and advances its clock. Prints one line
    per rule. The exit code is 1 if a rule is broken, and 2 if the check could not run.
    """
    if token_file is not None:
        token = read_token(token_file)
    selected = [rule for each in rules for rule in each] or list(RULES)
    results = asyncio.run(_run(address, selected, timeout, token, worker_agent))
    echo(report.summary(results))
    if junit is not None:
        junit.write_bytes(report.junit(results))
    return int(any(result.verdict is Verdict.FAILED for result in results))


async def _run(
    address: str,
    rules: Sequence[int],
    timeout: float,
    token: str | None,
    worker_agent: str | None,
) -> list[Result]:
    connect = partial(Client, address, token=token, timeout=timeout)
    worker = None
    if worker_agent is not None:
        worker = WorkerAgent(worker_agent, partial(_wire, address, timeout, token))
    async with Harness(address, token=token, timeout=timeout) as harness:
        return await Runner(connect, harness, timeout, worker).run(rules, _print_row)


def _wire(address: str, timeout: float, token: str | None) -> Wire:
    return Wire(
        address,
        credentials=None,
        metadata=MetadataSource(NO_LABELS, token),
        options=(),
        timeout=timeout,
        retry=RetryPolicy(),
    )


def _print_row(results: Sequence[Result]) -> None:
    for line in report.row(results):
        echo(line)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; exits with its exit code, and with one line on stderr for an error."""
    prepare()
    try:
        code = command.main(arguments, standalone_mode=False)
    except click.ClickException as error:
        _fail(error.format_message(), 2)
    except UnsuitableServer as error:
        _fail(str(error), 2)
    except (RunlaneError, OSError, ValueError) as error:
        _fail(str(error), 2)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted", 130)
    sys.exit(code)


def _fail(message: str, code: int) -> NoReturn:
    echo(f"runlane-conformance: error: {' '.join(message.split())}", err=True)
    sys.exit(code)
