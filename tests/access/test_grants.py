"""Standing approvals: what they cover, how they are read, and the commands that edit them."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from runlane_server.access import editing
from runlane_server.access.access_file import AccessFile
from runlane_server.access.caller import Role
from runlane_server.access.entries import BadEntry, parse
from runlane_server.access.grants import Grant, GrantBook
from runlane_server.cli.main import command

ENTRY = """
[[grant]]
name = "staging"
tenant = "acme"
agent = "releaser"
tool = "deploy"
set_by = "ann"
set_at = 2026-11-30T00:00:00Z
expires = 2026-12-07T00:00:00Z
"""

GRANT = Grant("staging", "acme", "releaser", "deploy", "ann", 1000.0, 2000.0, {"to": '"staging"'})

CALL = ("acme", "releaser", "deploy", '{"to": "staging", "fast": true}')


def found(*call: str, now: float = 1500.0, grant: Grant = GRANT) -> Grant | None:
    return GrantBook([grant]).find(*call, now=now)


def test_a_grant_covers_its_calls_until_it_expires() -> None:
    assert found(*CALL) is GRANT
    assert found(*CALL, now=1000.0) is GRANT
    assert found(*CALL, now=2000.0) is None
    assert found(*CALL, now=999.0) is None
    assert GrantBook().find(*CALL, now=1500.0) is None


@pytest.mark.parametrize(
    "call",
    [
        ("other", *CALL[1:]),
        ("acme", "other", *CALL[2:]),
        ("acme", "releaser", "Deploy", CALL[3]),
        (*CALL[:3], '{"to": "production"}'),
        (*CALL[:3], '{"to": ["staging"]}'),
        (*CALL[:3], "{}"),
        (*CALL[:3], "[]"),
        (*CALL[:3], "7"),
        (*CALL[:3], "{"),
        (*CALL[:3], ""),
        (*CALL[:3], '{"to": "production", "to": "staging"}'),
        (*CALL[:3], '{"to": "staging", "to": "staging"}'),
        (*CALL[:3], '{"to": "staging", "o": [{"a": 1, "a": 2}]}'),
        (*CALL[:3], '{"to": "staging", "To": "production"}'),
        (*CALL[:3], '{"TO": "staging"}'),
    ],
)
def test_a_grant_covers_nothing_else(call: tuple[str, ...]) -> None:
    assert found(*call) is None


@pytest.mark.parametrize("name", ["key", "KEY", "\u212aey"])  # the sign of Kelvin
def test_a_name_that_differs_in_case_only_is_taken_for_none(name: str) -> None:
    grant = GRANT._replace(arguments={"Key": "1", "kEy": "2"})
    given = {"Key": 1, "kEy": 2, "other": 3}
    assert found(*CALL[:3], json.dumps(given), grant=grant) is grant
    assert found(*CALL[:3], json.dumps(given | {name: 1}), grant=grant) is None


@pytest.mark.parametrize(("granted", "given"), [("1", "true"), ("1", "1.0"), ("true", "1")])
def test_equal_values_of_other_types_are_not_equal(granted: str, given: str) -> None:
    grant = GRANT._replace(arguments={"n": granted})
    assert found(*CALL[:3], f'{{"n": {granted}}}', grant=grant) is grant
    assert found(*CALL[:3], f'{{"n": {given}}}', grant=grant) is None


def test_an_entry_is_read() -> None:
    (grant,) = parse(ENTRY + 'arguments = { to = "staging", n = 1 }\n').grants
    assert (grant.name, grant.tenant, grant.agent, grant.tool) == ("staging", *CALL[:3])
    assert grant.arguments == {"to": '"staging"', "n": "1"}
    assert grant.expires - grant.set_at == 7 * 86400
    assert grant.reason == (
        "standing approval 'staging', set by ann at 2026-11-30T00:00:00+00:00,"
        " until 2026-12-07T00:00:00+00:00"
    )


@pytest.mark.parametrize(
    ("before", "after", "error"),
    [
        ('name = "staging"\n', "", "'name' is missing"),
        ('tool = "deploy"\n', "", "'tool' is missing"),
        ('tool = "deploy"', 'tool = "de\\u202eploy"', "'tool' must be a name of printable"),
        ('tenant = "acme"', 'tenant = "*"', "'tenant' must be"),
        ('agent = "releaser"', 'agent = "*"', "'agent' must be"),
        ('set_by = "ann"\n', "", "'set_by' is missing"),
        ("expires = 2026-12-07T00:00:00Z\n", "", "line 2: 'expires' is missing"),
        ("expires = 2026-12-07T00:00:00Z", "expires = 2026-12-07", "must be a date with a time"),
        ("2026-12-07T00:00:00Z", "2026-12-07T00:00:00", "has no time zone"),
        ("2026-12-07T00:00:00Z", "2026-11-30T00:00:00Z", "must be after set_at"),
        ("2026-12-07T00:00:00Z", "2027-12-07T00:00:00Z", "by at most 366 days"),
        ('agent = "releaser"', 'agent = "releaser"\nfor = "me"', "'for' is not a known key"),
        ("set_by", "arguments = { n = nan }\nset_by", "JSON has no form for"),
        ("set_by", "arguments = { n = 2026-12-07 }\nset_by", "JSON has no form for"),
        (ENTRY, ENTRY + ENTRY, "'name' 'staging' is used twice"),
    ],
)
def test_an_invalid_entry_is_refused(before: str, after: str, error: str) -> None:
    assert before in ENTRY
    with pytest.raises(BadEntry, match=error):
        parse(ENTRY.replace(before, after))


def run(path: Path, *arguments: str) -> tuple[int, str]:
    flags = ["grant", *arguments, "--access", str(path)]
    result = CliRunner().invoke(command, flags)
    return result.exit_code, result.output


NEW = ("new", "staging", "--tool", "deploy", "--set-by", "ann", "--expires", "7d")


def test_the_commands_create_list_and_remove(tmp_path: Path) -> None:
    path = tmp_path / "access.toml"
    editing.add(path, "ci", tenant="acme", role=Role.RUN)
    access, before = AccessFile(path), path.read_text()
    values = ("--argument", "to=staging \U0001f600", "--argument", "n=1", "--argument", 'l=["a"]')
    assert run(path, *NEW, *values) == (0, "")
    assert access.refresh()
    (grant,) = access.grants
    assert grant.covers(
        "default", "default", "deploy", '{"to": "staging \U0001f600", "n": 1, "l": ["a"]}'
    )
    assert grant.set_at <= time.time() < grant.expires
    code, listed = run(path, "list")
    assert code == 0
    assert listed.split("\t")[:4] == ["staging", "default", "default", "deploy"]
    assert "already exists; remove it first" in run(path, *NEW)[1]
    assert run(path, "remove", "staging") == (0, "")
    assert access.refresh()
    assert access.grants == []
    assert path.read_text().strip() == before.strip()
    assert "there is no grant 'staging'" in run(path, "remove", "staging")[1]


@pytest.mark.parametrize("text", ["\x7f", "a\u2028b", "\x85[[token]]", "\\\x7f", "\n", '"', "NaN"])
def test_any_text_is_the_value_of_an_argument(tmp_path: Path, text: str) -> None:
    path = tmp_path / "access.toml"
    assert run(path, *NEW, "--argument", f"x={text}", "--argument", f"{text}=1") == (0, "")
    (grant,) = editing.grants(path)
    assert grant.covers("default", "default", "deploy", json.dumps({"x": text, text: 1}))
    assert run(path, "remove", "staging") == (0, "")
    assert not path.read_text().strip()


BAD_VALUES = (
    *("null", '{"a": 1}', "[null]", '[{"a": 1}]', "\udc80", r'"\ud800"', r'["\udfff"]'),
    *(9 * "[" + 9 * "]", 5_000 * "["),
    5_000 * "[" + 5_000 * "]",
)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        (("--expires", "400d"), "'--expires': must be at most 366d"),
        (("--expires", "500ms"), "'--expires': must be at least 1s"),
        (("--tenant", "/"), "--tenant must be"),
        (("--agent", "A"), "--agent must be"),
        (("--tool", ""), "--tool must be"),
        (("--set-by", "a b"), "--set-by must be"),
        (("--argument", "x"), "must be NAME=VALUE"),
        (("--argument", "\udc80=1"), "--argument '\\udc80' must have"),
        *((("--argument", f"x={value}"), "--argument 'x' must have") for value in BAD_VALUES),
        (("--argument", "x=1", "--argument", "x=2"), "--argument 'x' is given twice"),
    ],
)
def test_an_invalid_grant_is_not_written(
    tmp_path: Path, changes: tuple[str, ...], error: str
) -> None:
    path = tmp_path / "access.toml"
    code, output = run(path, *NEW, *changes)
    assert code in {1, 2}
    assert error in output
    assert "Traceback" not in output
    assert not path.exists()
