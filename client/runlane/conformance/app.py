"""The command `runlane-conformance`."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import click

from runlane.client import DEFAULT_TARGET, Client
from runlane.conformance import report
from runlane.conformance.play import NotSuited, Player, Result, Verdict
from runlane.conformance.rules import RULES
from runlane.errors import RunlaneError
from runlane.harness.client import Harness


class Rules(click.ParamType[tuple[int, ...]]):
    """Some of the rules: `10`, `R10`, or `10-20`."""

    name = "rules"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """The numbers."""
        first, _, last = str(value).upper().replace("R", "").partition("-")
        try:
            rules = range(int(first), int(last or first) + 1)
        except ValueError:
            self.fail(f"{value!r} is not of the form 10, R10 or 10-20", param, ctx)
        if not rules or any(rule not in RULES for rule in rules):
            self.fail(f"{value!r}: the rules are R1 to R{max(RULES)}", param, ctx)
        return tuple(rules)


def _in_a_folder(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """It is written at the end, and should not fail then."""
    if value is not None and not value.parent.is_dir():
        raise click.BadParameter(f"there is no folder {str(value.parent)!r}", ctx, param)
    return value


@click.command(
    "runlane-conformance",
    context_settings={"auto_envvar_prefix": "RUNLANE", "show_default": True},
)
@click.argument("address", default=DEFAULT_TARGET)
@click.option(
    "--rule",
    "rules",
    type=Rules(),
    multiple=True,
    help="Only these: 10, R10, or 10-20; may be repeated.",
    show_default="all",
)
@click.option(
    "--junit",
    type=click.Path(path_type=Path, dir_okay=False, writable=True),
    callback=_in_a_folder,
    help="Writes JUnit XML.",
)
@click.option(
    "--patience",
    type=click.FloatRange(0, min_open=True),
    default=20.0,
    help="Seconds to wait for what has to happen: more than the --node-lease of a server over "
    "PostgreSQL.",
)
@click.option("--token", help="Says who calls: an admin, where the server knows its callers.")
@click.version_option(package_name="runlane")
def command(
    address: str,
    rules: tuple[tuple[int, ...], ...],
    junit: Path | None,
    patience: float,
    token: str | None,
) -> int:
    """Finds out over the wire whether the server at ADDRESS keeps the rules R1 to R30.

    The server is one for tests: `runlane-server --harness --agent scripted`. It is cancelled,
    crashed, drained and moved ahead in time, so nobody else should use it meanwhile. Prints a line
    for each rule. The exit code is 1 if a rule is broken, 2 if that could not be found out.
    """
    wanted = [rule for some in rules for rule in some] or list(RULES)
    results = asyncio.run(_play(address, wanted, patience, token))
    click.echo(report.summary(results))
    if junit is not None:
        junit.write_bytes(report.junit(results))
    return int(any(result.verdict is Verdict.FAILED for result in results))


async def _play(
    address: str, rules: Sequence[int], patience: float, token: str | None
) -> list[Result]:
    connect = partial(Client, address, token=token, timeout=patience)
    async with Harness(address, token=token, timeout=patience) as harness:
        return await Player(connect, harness, patience).play(rules, _show)


def _show(results: Sequence[Result]) -> None:
    for line in report.row(results):
        click.echo(line)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; why it cannot is one line on stderr."""
    try:
        code = command.main(arguments, standalone_mode=False)
    except click.ClickException as error:
        _fail(error.format_message(), 2)
    except NotSuited as error:
        _fail(str(error), 2)
    except (RunlaneError, OSError, ValueError) as error:
        _fail(str(error), 2)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted", 130)
    sys.exit(code)


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"runlane-conformance: error: {' '.join(message.split())}", err=True)
    sys.exit(code)
