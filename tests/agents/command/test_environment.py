"""What a program finds in its environment: what is listed, and nothing else."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from runlane_server.agents.command.environment import build_environment, parse_variables
from support.programs import answer, program
from support.turns import LocalTurn

TOLD = {"RUNLANE_SESSION_ID": "s9", "RUNLANE_RUN_ID": "r9", "RUNLANE_ATTEMPT": "3"}
TURN = LocalTurn(session_id="s9", run_id="r9", attempt=3)

SECRETS = {
    "RUNLANE_STORE": "postgresql://runlane:secret@db/runlane",
    "OPENAI_API_KEY": "sk-secret",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "LD_LIBRARY_PATH": "/opt/lib",
    "LC_": "is no locale",
    "PATH_TO_KEY": "/etc/key",
    "MY_PATH": "/opt",
    "HOME": "/nowhere/home",
    "TMPDIR": "/srv/tmp",
}


async def of_a_program(
    monkeypatch: pytest.MonkeyPatch, server: Mapping[str, str], *env: str
) -> dict[str, str]:
    """What a program finds of the environment of a server, without the names of its directory."""
    for name in os.environ.keys() - {"PYTEST_CURRENT_TEST"}:
        monkeypatch.delenv(name)
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    # Byte for byte what was there when it began.
    found = await answer(program("cat", "/proc/self/environ", env=env), TURN)
    variables = dict(pair.split("=", 1) for pair in found.removesuffix("\0").split("\0"))
    home = variables.pop("HOME")
    assert Path(home).name.startswith("run-")
    assert variables.pop("TMPDIR") == home
    return variables


@pytest.mark.parametrize(
    "passed",
    [
        {"PATH": os.environ["PATH"]},  # where an interpreter would set LC_CTYPE by itself
        {"PATH": os.environ["PATH"], "LC_CTYPE": "C"},
        {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "LC_TIME": "C", "TZ": "Europe/Berlin"},
    ],
)
async def test_a_program_has_what_every_program_needs_and_no_secrets(
    monkeypatch: pytest.MonkeyPatch, passed: dict[str, str]
) -> None:
    assert await of_a_program(monkeypatch, SECRETS | passed) == passed | TOLD


async def test_what_is_listed_is_there_too(monkeypatch: pytest.MonkeyPatch) -> None:
    path = {"PATH": os.environ["PATH"]}
    server = {**path, **SECRETS, "WANTED": "w"}
    env = ("WANTED, OPENAI_API_KEY", "NOT_THERE", "GIVEN=a=b, c", "EMPTY=")
    assert await of_a_program(monkeypatch, server, *env) == {
        **path,
        **TOLD,
        "WANTED": "w",
        "OPENAI_API_KEY": "sk-secret",
        "GIVEN": "a=b, c",
        "EMPTY": "",
    }


def test_what_is_listed_goes_before_what_is_passed() -> None:
    server = {"PATH": "/bin", "HOME": "/nowhere/home", "TZ": "UTC"}
    found = build_environment(server, ["HOME,TMPDIR", "TZ=Europe/Berlin"], TOLD, Path("/run/1"))
    assert found == {
        "PATH": "/bin",
        "HOME": "/nowhere/home",
        "TMPDIR": "/run/1",  # the server has none
        "TZ": "Europe/Berlin",
        **TOLD,
    }


@pytest.mark.parametrize(
    ("text", "variables"),
    [
        ("A", {"A": None}),
        ("A, b_2 ,_", {"A": None, "b_2": None, "_": None}),
        ("A=", {"A": ""}),
        ("A= x,B=y ", {"A": " x,B=y "}),
        ("RUNLANE_SERVER=127.0.0.1:50051", {"RUNLANE_SERVER": "127.0.0.1:50051"}),
    ],
)
def test_names_and_values(text: str, variables: dict[str, str | None]) -> None:
    assert parse_variables(text) == variables


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "'' is not the name"),
        ("A,", "'' is not the name"),
        ("2A", "'2A' is not the name"),
        ("A,B=1", "'A,B' is not the name"),
        ("=1", "'' is not the name"),
        ("A=\0", "the value of A has a NUL in it"),
        ("RUNLANE_STORE", "is for the server; to set it for programs write RUNLANE_STORE=VALUE"),
        ("A,RUNLANE_ACCESS", "RUNLANE_ACCESS is for the server"),
        ("RUNLANE_RUN_ID=r", "RUNLANE_RUN_ID is what a program is told of its run"),
        ("RUNLANE_ATTEMPT", "RUNLANE_ATTEMPT is what a program is told of its run"),
    ],
)
def test_what_must_not_be_listed(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)):
        parse_variables(text)
