"""`runlane-server check-config` reports all problems that keep a server from starting."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from runlane_server.cli.main import command


def check(*flags: str, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(command, ["check-config", *flags], env=env, standalone_mode=False)


def problems(*flags: str, env: dict[str, str] | None = None) -> list[str]:
    result = check(*flags, env=env)
    assert result.exception is None, result.output
    assert result.return_value == 2
    return result.output.splitlines()


def test_valid_settings_have_no_problems() -> None:
    result = check("--max-active-runs", "3")
    assert (result.return_value, result.output) == (0, "no problems\n")


def test_every_invalid_value_of_every_source_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "runlane.toml"
    file.write_text('listen = "nowhere"\nworkers = 2\nbogus = 1\nmax-active-runs = true\n')
    env = {"RUNLANE_MAX_WAITING_RUNS": "many", "RUNLANE_CONFIG": str(file)}
    found = problems("--node-lease", "5", env=env)
    named = ("'workers'", "'bogus'", "'max-active-runs'", "--listen", "--max-waiting", "--node-le")
    assert len(found) == len(named)
    for name in named:
        assert sum(name in line for line in found) == 1, found


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--listen", "0.0.0.0:1"), "every caller in the network"),
        (("--tls-cert", "c.pem"), "--tls-cert and --tls-key must be set together"),
        (("--tls-client-ca", "c.pem"), "--tls-client-ca needs --tls-cert"),
        (("--tls-cert", "/no/c.pem", "--tls-key", "/no/k.pem"), "/no/"),
        (("--access", "/no/access.toml"), "--access /no/access.toml: No such file"),
        (("--node-tls-ca", "/no/ca.pem"), "--node-tls-ca /no/ca.pem: is not a file"),
        (("--processes", "2"), "--processes needs a store that nodes can share"),
        (("--store", "mysql://x"), "--store"),
        (("--agent", "no_such_module:agent"), "no_such_module"),
        (("--agent", "command:/no/such/program"), "/no/such/program"),
        (("--harness", "--event-loop", "uvloop"), "--event-loop asyncio"),
        (("--config", "/no/file.toml"), "/no/file.toml"),
    ],
)
def test_a_problem_of_what_a_setting_names_is_reported(
    flags: tuple[str, ...], expected: str
) -> None:
    assert any(expected in line for line in problems(*flags))


def test_an_invalid_access_file_is_reported_with_its_entry(tmp_path: Path) -> None:
    access = tmp_path / "access.toml"
    access.write_text("[[token]]\n")
    (line,) = problems("--access", str(access))
    assert str(access) in line


def test_independent_problems_are_reported_together() -> None:
    found = problems("--agent", "nope", "--access", "/no/file", "--harness", "--processes", "2")
    assert len(found) == 4, found


def test_nothing_is_created(tmp_path: Path) -> None:
    assert check("--store", f"sqlite:///{tmp_path}/runlane.db").return_value == 0
    assert [*tmp_path.iterdir()] == []


def test_a_server_still_refuses_the_first_invalid_value(tmp_path: Path) -> None:
    result = CliRunner().invoke(command, ["--listen", "nowhere", "--node-lease", "5"])
    assert result.exit_code == 2
    assert "'--listen'" in result.output
