"""The environment of a program has a fixed list of variables and the operator's, no others."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from runlane_server.agents.command.environment import (
    build_environment,
    has_secret,
    parse_variables,
    read_variables,
)
from runlane_server.core.errors import SettingsError
from support.programs import answer, program
from support.turns import LocalTurn

RUN = {
    "RUNLANE_TENANT": "t9",
    "RUNLANE_SESSION_ID": "s9",
    "RUNLANE_RUN_ID": "r9",
    "RUNLANE_ATTEMPT": "3",
}
TURN = LocalTurn(tenant="t9", session_id="s9", run_id="r9", attempt=3)

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


async def environment_of_a_program(
    monkeypatch: pytest.MonkeyPatch, server: Mapping[str, str], *env: str
) -> dict[str, str]:
    """The variables of a program of this server, without those that name its directory."""
    for name in os.environ.keys() - {"PYTEST_CURRENT_TEST"}:
        monkeypatch.delenv(name)
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    # The exact environment at the start of the process.
    found = await answer(program("cat", "/proc/self/environ", env=env), TURN)
    variables = dict(pair.split("=", 1) for pair in found.removesuffix("\0").split("\0"))
    home = variables.pop("HOME")
    assert Path(home).name.startswith("run-")
    assert variables.pop("TMPDIR") == home
    assert variables.pop("PYTHONUNBUFFERED") == "1"
    return variables


@pytest.mark.parametrize(
    "passed",
    [
        {"PATH": os.environ["PATH"]},  # an interpreter alone would set LC_CTYPE
        {"PATH": os.environ["PATH"], "LC_CTYPE": "C"},
        {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "LC_TIME": "C", "TZ": "Europe/Berlin"},
    ],
)
async def test_a_program_inherits_path_and_locale_but_no_secrets(
    monkeypatch: pytest.MonkeyPatch, passed: dict[str, str]
) -> None:
    assert await environment_of_a_program(monkeypatch, SECRETS | passed) == passed | RUN


async def test_the_operator_s_variables_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    path = {"PATH": os.environ["PATH"]}
    server = {**path, **SECRETS, "WANTED": "w"}
    env = ("WANTED, OPENAI_API_KEY", "NOT_THERE", "GIVEN=a=b, c", "EMPTY=")
    assert await environment_of_a_program(monkeypatch, server, *env) == {
        **path,
        **RUN,
        "WANTED": "w",
        "OPENAI_API_KEY": "sk-secret",
        "GIVEN": "a=b, c",
        "EMPTY": "",
    }


def test_the_operator_s_variables_override_the_inherited_ones() -> None:
    server = {"PATH": "/bin", "HOME": "/nowhere/home", "TZ": "UTC"}
    found = build_environment(server, ["HOME,TMPDIR", "TZ=Europe/Berlin"], RUN, Path("/run/1"))
    assert found == {
        "PATH": "/bin",
        "HOME": "/nowhere/home",
        "TMPDIR": "/run/1",  # the server has none
        "PYTHONUNBUFFERED": "1",
        "TZ": "Europe/Berlin",
        **RUN,
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
def test_a_text_is_a_list_of_names_or_one_name_with_a_value(
    text: str, variables: dict[str, str | None]
) -> None:
    assert parse_variables(text) == variables


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "'' is not a valid variable name"),
        ("A,", "'' is not a valid variable name"),
        ("2A", "'2A' is not a valid variable name"),
        ("A,B=1", "'A,B' is not a valid variable name"),
        ("=1", "'' is not a valid variable name"),
        ("A=\0", "the value of A contains a NUL character"),
        (
            "RUNLANE_STORE",
            "is a setting of the server; to set it for programs, write RUNLANE_STORE=VALUE",
        ),
        ("A,RUNLANE_ACCESS", "RUNLANE_ACCESS is a setting of the server"),
        ("RUNLANE_RUN_ID=r", "RUNLANE_RUN_ID is reserved: it identifies the run"),
        ("RUNLANE_ATTEMPT", "RUNLANE_ATTEMPT is reserved: it identifies the run"),
        ("RUNLANE_STATE_DIR", "RUNLANE_STATE_DIR is reserved: it identifies the run"),
    ],
)
def test_invalid_and_reserved_variables_are_rejected(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)):
        parse_variables(text)


def file_of(folder: Path, content: str, mode: int = 0o600) -> Path:
    path = folder / "env"
    path.write_bytes(content.encode("latin-1"))
    path.chmod(mode)
    return path


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640])
def test_a_file_has_one_variable_a_line(mode: int, tmp_path: Path) -> None:
    content = '# keys\nOPENAI_API_KEY=sk-a=b, c\n\nQUOTED="x"\nEMPTY='
    assert read_variables(file_of(tmp_path, content, mode)) == (
        "OPENAI_API_KEY=sk-a=b, c",
        'QUOTED="x"',
        "EMPTY=",
    )


@pytest.mark.parametrize("mode", [0o604, 0o601, 0o660, 0o602, 0o644])
def test_a_file_to_which_others_have_access_is_refused(mode: int, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="chmod 600"):
        read_variables(file_of(tmp_path, "A=1", mode))


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("SECRET", "line 2: is not NAME=VALUE"),
        ("SE-CRET=", "line 2: is not NAME=VALUE"),
        ("RUNLANE_RUN_ID=SECRET", "line 2: RUNLANE_RUN_ID is reserved"),
        ("A=SECRET\0", "line 2: the value of A contains a NUL character"),
        ("A=\xff", "is not UTF-8 text"),
    ],
)
def test_a_wrong_line_is_named_and_not_shown(line: str, why: str, tmp_path: Path) -> None:
    path = file_of(tmp_path, f"B=1\n{line}\n")
    with pytest.raises(SettingsError, match=re.escape(why)) as raised:
        read_variables(path)
    assert "SECRET" not in str(raised.value).replace(str(path), "")
    assert "SE-CRET" not in str(raised.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="No such file"):
        read_variables(tmp_path / "none")


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        *((f"{name}=x", True) for name in ("OPENAI_API_KEY", "KEY", "apikey", "GITHUB_TOKEN")),
        *((f"{name}=x", True) for name in ("AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "DB_PASS")),
        *((f"{name}=x", False) for name in ("MONKEY", "GREETING", "TOKENIZERS_PARALLELISM")),
        ("GOOGLE_APPLICATION_CREDENTIALS=/path", False),
        ("OPENAI_API_KEY", False),
        ("OPENAI_API_KEY=", False),
    ],
)
def test_a_secret_is_known_by_its_name(text: str, secret: bool) -> None:
    assert has_secret(text) is secret
