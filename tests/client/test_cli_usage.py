"""Usage errors: the command line refuses them before it calls a server."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations

import click
import pytest
from click.testing import CliRunner

from runlane.cli.app import runlane

NOWHERE = ("-S", "127.0.0.1:1")


def commands(
    command: click.Command = runlane, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command with the words that name it."""
    yield path, command
    if isinstance(command, click.Group):
        for name, each in command.commands.items():
            yield from commands(each, (*path, name))


PAIRS = [
    (path, option.opts[0], option.secondary_opts[0])
    for path, command in commands()
    for option in command.params
    if isinstance(option, click.Option) and option.secondary_opts
]


def refused(*arguments: str) -> str:
    """The error of the command line for wrong usage."""
    told = CliRunner().invoke(runlane, [*NOWHERE, *arguments])
    assert (told.exit_code, told.stdout) == (2, ""), told.output
    return told.stderr


def test_pairs_of_flags_are_found() -> None:
    assert {one for _, one, _ in PAIRS} >= {"--yes", "--busy", "--full", "--enable"}


@pytest.mark.parametrize(("path", "one", "other"), PAIRS)
def test_flags_that_contradict_each_other_are_wrong_usage(
    path: tuple[str, ...], one: str, other: str
) -> None:
    for flags in permutations((one, other)):
        assert f"{one} and {other} exclude each other" in refused(*path, *flags, "x")


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        (("--yes", "--text", "no"), "one of --yes, --no, --text and --form"),
        (("--no", "--form", "{}"), "one of --yes, --no, --text and --form"),
        (("--text", "", "--form", "{}"), "one of --yes, --no, --text and --form"),
        (("--no", "--arguments", "{}"), "--arguments: needs --yes"),
        (("--text", "x", "--arguments", "{}"), "--arguments: needs --yes"),
        (("--arguments", "{}"), "--arguments: needs --yes"),
        (("--text", "x", "--reason", "why"), "--reason: needs --yes or --no"),
    ],
)
def test_answer_of_two_kinds_is_wrong_usage(options: tuple[str, ...], remedy: str) -> None:
    assert remedy in refused("answer", "q", *options)


def test_filter_of_everything_and_of_something_is_wrong_usage() -> None:
    assert "--everything" in refused("webhooks", "update", "w", "--everything", "--agent", "a")


@pytest.mark.parametrize("option", ["--token-file", "--tls-ca"])
def test_missing_file_is_wrong_usage_of_its_option(option: str) -> None:
    assert f"{option}: absent: No such file or directory" in refused(option, "absent", "runs")


@pytest.mark.parametrize(
    ("name", "problem"), [("absent", "No such file or directory"), ("/dev/null", "is empty")]
)
def test_file_without_a_token_of_its_own_is_wrong_usage(name: str, problem: str) -> None:
    told = refused("mcp", "--http", "127.0.0.1:1", "--own-token-file", name)
    assert "--own-token-file: " in told
    assert problem in told


def test_edit_without_a_terminal_says_that_the_editor_needs_one() -> None:
    assert "the editor needs a terminal; give --prompt" in refused("queue", "edit", "r")
