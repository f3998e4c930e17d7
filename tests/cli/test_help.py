"""Every command shows its help with -h and --help."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from runlane.cli.app import runlane
from runlane.conformance.app import command as conformance
from runlane_server.cli.main import command as server

COMMANDS: list[tuple[click.Command, list[str]]] = [
    (server, []),
    *((server, [name]) for name in server.commands),
    *((server, ["token", name]) for name in ("new", "list", "revoke")),
    (runlane, []),
    *((runlane, [name]) for name in runlane.commands),
    *((runlane, ["sessions", name]) for name in ("create", "delete")),
]


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_every_command_has_a_help(flag: str) -> None:
    for command, arguments in COMMANDS:
        result = CliRunner().invoke(command, [*arguments, flag])
        assert (result.exit_code, result.stdout[:7]) == (0, "Usage: "), arguments
    assert CliRunner().invoke(conformance, [flag]).stdout.startswith("Usage: ")
