"""Every list of the roles that people read has all of them."""

from __future__ import annotations

import re
from pathlib import Path

from click.testing import CliRunner

from runlane_server.access.caller import Role
from runlane_server.access.entries import ROLE_FORM
from runlane_server.cli.main import command

SECURITY = Path(__file__).parents[2] / "docs" / "security.md"

NAMES = [role.value for role in Role]


def test_the_error_of_a_wrong_role_names_every_role() -> None:
    assert re.split(", | or ", ROLE_FORM) == NAMES


def test_the_help_of_token_new_explains_every_role() -> None:
    text = CliRunner().invoke(command, ["token", "new", "--help"]).output
    _, _, rights = " ".join(text.split()).partition(" --role ")
    assert re.findall(r"(\w+): ", rights.partition(" --expires ")[0]) == NAMES


def test_the_security_page_explains_every_role() -> None:
    _, _, table = SECURITY.read_text().partition("| role | permissions |\n")
    rows = table.partition("\n\n")[0].splitlines()[1:]
    assert [row.split("`")[1] for row in rows] == NAMES
