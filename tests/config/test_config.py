"""Settings: flag before environment before file before default; a bad one is one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import pytest
import uvloop
from click.testing import CliRunner, Result

from runlane_server.config.settings import Config, options, store_options
from runlane_server.core.errors import StartError
from runlane_server.core.limits import Limits
from runlane_server.process import processes
from runlane_server.process.app import event_loop_factory

seen: list[Config] = []


@click.command(context_settings={"auto_envvar_prefix": "RUNLANE"})
@options
def command(**settings: Any) -> None:
    seen.append(Config.of(**settings))


def invoke(*flags: str, env: Mapping[str, str] | None = None) -> Result:
    seen.clear()
    return CliRunner().invoke(command, flags, env=env or {})


def config(*flags: str, env: Mapping[str, str] | None = None) -> Config:
    result = invoke(*flags, env=env)
    assert result.exit_code == 0, result.output
    return seen[0]


def test_the_defaults() -> None:
    assert config() == Config()
    assert Config().limits == Limits()


def test_flag_before_environment_before_file_before_default(tmp_path: Path) -> None:
    file = tmp_path / "runlane.toml"
    file.write_text('agent = "file"\nstore = "file"\nlisten = "file:1"\nmax-active-runs = 7\n')
    env = {"RUNLANE_CONFIG": str(file), "RUNLANE_STORE": "env", "RUNLANE_LISTEN": "env:1"}
    found = config("--listen", "flag:1", env=env)
    assert (found.listen, found.store, found.agent) == ("flag:1", "env", "file")
    assert found.limits.max_active_runs == 7
    assert found.limits.max_waiting_runs == Limits().max_waiting_runs


SETTINGS: list[tuple[str, str, Any]] = [
    ("listen", "[::1]:0", "[::1]:0"),
    ("listen", "unix:/run/x.sock", "unix:/run/x.sock"),
    ("processes", "3", 3),
    ("node-address", "10.0.0.7:0", "10.0.0.7:0"),
    ("metrics-listen", "[::1]:9464", "[::1]:9464"),
    ("metrics-listen", "9464", "127.0.0.1:9464"),
    ("otlp-endpoint", "http://collector:4318/", "http://collector:4318"),
    ("trace-ratio", "0.25", 0.25),
    ("access", "access.toml", "access.toml"),
    ("tls-cert", "server.pem", "server.pem"),
    ("tls-key", "server.key", "server.key"),
    ("tls-client-ca", "clients.pem", "clients.pem"),
    ("node-tls-ca", "nodes.pem", "nodes.pem"),
    ("store", "memory:", "memory:"),
    ("agent", "command:cat -", "command:cat -"),
    ("command-env", "HOME, LANG", ("HOME, LANG",)),
    ("command-env", "GREETING=a, b=c", ("GREETING=a, b=c",)),
    ("command-dir", "runs", "runs"),
    ("command-cwd", "/", "/"),
    ("command-cpu", "2m", 120.0),
    ("command-memory", "2GiB", 2 << 30),
    ("command-memory", "65536", 65536),
    ("command-files", "64", 64),
    ("command-processes", "100", 100),
    ("command-file-size", "512MiB", 512 << 20),
    ("chat-instructions", "Be kind.", "Be kind."),
    ("max-active-runs", "0", 0),
    ("max-waiting-runs", "1", 1),
    ("max-waiting-total", "2", 2),
    ("max-prompt-bytes", "3", 3),
    ("max-attachment-bytes", "0", 0),
    ("cancel-grace", "1500ms", 1.5),
    ("ready-timeout", "2m", 120.0),
    ("progress-interval", "0.5s", 0.5),
    ("drain-timeout", "0", 0.0),
    ("event-retention", "7d", 7 * 86400.0),
    ("event-retention", "12h", 12 * 3600.0),
    ("event-retention-bytes", "0", 0),
    ("session-retention", "90d", 90 * 86400.0),
    ("node-lease", "3s", 3.0),
    ("event-loop", "uvloop", "uvloop"),
    ("log-format", "json", "json"),
    ("log-level", "debug", "debug"),
]


@pytest.mark.parametrize(("name", "text", "value"), SETTINGS)
def test_every_setting_by_flag_environment_and_file(
    name: str, text: str, value: object, tmp_path: Path
) -> None:
    field = name.replace("-", "_")
    file = tmp_path / "runlane.toml"
    file.write_text(f'{name} = "{text}"\n')
    for found in (
        config(f"--{name}", text),
        config(env={f"RUNLANE_{field.upper()}": text}),
        config("--config", str(file)),
    ):
        holder = found if hasattr(found, field) else found.limits
        assert getattr(holder, field) == value


SWITCHES = ["insecure-anywhere", "log-content", "harness"]


@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch_by_flag_environment_and_file(name: str, tmp_path: Path) -> None:
    field = name.replace("-", "_")
    assert getattr(config(), field) is False
    file = tmp_path / "runlane.toml"
    for content, value in (("true", True), ("false", False)):
        file.write_text(f"{name} = {content}\n")
        assert getattr(config("--config", str(file)), field) is value
        assert getattr(config(env={f"RUNLANE_{field.upper()}": content}), field) is value
    assert getattr(config(f"--{name}"), field) is True


def test_every_setting_is_among_those() -> None:
    flags = {parameter.name for parameter in command.params} - {"config"}
    named = [*(name for name, _, _ in SETTINGS), *SWITCHES]
    assert {name.replace("-", "_") for name in named} == flags


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("listen", "localhost"),
        ("listen", "localhost:99999"),
        ("listen", "unix:"),
        ("listen", "::1:50051"),
        ("processes", "0"),
        ("processes", "many"),
        ("node-address", "10.0.0.7"),
        ("node-address", "unix:/run/x.sock"),
        ("otlp-endpoint", "collector:4318"),
        ("otlp-endpoint", "http://user:secret@collector:4318"),
        ("trace-ratio", "1.1"),
        ("trace-ratio", "some"),
        ("trace-ratio", "nan"),
        ("command-env", "RUNLANE_STORE"),
        ("command-env", "RUNLANE_RUN_ID=x"),
        ("command-env", "a-b"),
        ("command-cwd", "/no/such/directory"),
        ("command-cpu", "10"),
        ("command-memory", "2GB"),
        ("command-memory", "-1"),
        ("command-memory", "9999999TiB"),
        ("command-files", "-1"),
        ("command-processes", "all"),
        ("command-file-size", "1.5GiB"),
        ("max-active-runs", "-1"),
        ("max-active-runs", "many"),
        ("max-waiting-total", "0"),
        ("max-prompt-bytes", "0"),
        ("max-prompt-bytes", "4000000"),
        ("max-attachment-bytes", "4000000"),
        ("drain-timeout", "30"),
        ("drain-timeout", "-1s"),
        ("drain-timeout", "1w"),
        ("progress-interval", "0"),
        ("progress-interval", "31s"),
        ("ready-timeout", "0s"),
        ("event-retention-bytes", "-1"),
        ("event-retention-bytes", "1GiB"),
        ("session-retention", "90"),
        ("session-retention", "36501d"),
        ("log-format", "xml"),
        ("log-level", "loud"),
    ],
)
def test_a_bad_value_is_named(name: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / "runlane.toml"
    file.write_text(f'{name} = "{text}"\n')
    for result in (invoke(f"--{name}={text}"), invoke("--config", str(file))):
        assert result.exit_code == 2
        assert f"--{name}" in result.output


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ('adress = "x"', "there is no setting 'adress'"),
        ('config = "x"', "there is no setting 'config'"),
        ("[limits]\nmax-active-runs = 1", "there is no setting 'limits'"),
        ('listen = ["a:1"]', "'listen' has to be"),
        ("max-active-runs = true", "'max-active-runs' has to be"),
        ('insecure-anywhere = "yes"', "'insecure-anywhere' has to be true or false"),
        ("listen = ", "Invalid value"),
    ],
)
def test_a_bad_file_says_what_is_wrong(content: str, why: str, tmp_path: Path) -> None:
    file = tmp_path / "runlane.toml"
    file.write_text(content)
    result = invoke("--config", str(file))
    assert result.exit_code == 2
    assert str(file) in result.output
    assert why in result.output


def test_a_file_that_is_not_there() -> None:
    result = invoke("--config", "/nowhere/runlane.toml")
    assert result.exit_code == 2
    assert "No such file" in result.output


@pytest.mark.parametrize("text", ["a = " + "[" * 100_000, "a = " + "1" * 5_000, "a = ="])
def test_a_file_that_cannot_be_read_is_told_of(tmp_path: Path, text: str) -> None:
    file = tmp_path / "runlane.toml"
    file.write_text(text)
    result = invoke("--config", str(file))
    assert result.exit_code == 2
    assert f"{file}:" in "".join(result.output.split("\n"))


def test_a_command_that_only_names_a_store_reads_the_file_of_the_server(tmp_path: Path) -> None:
    named: list[str] = []

    @click.command(context_settings={"auto_envvar_prefix": "RUNLANE"})
    @store_options
    def only_store(store: str) -> None:
        named.append(store)

    file = tmp_path / "runlane.toml"
    file.write_text('store = "file"\nlisten = "here:1"\nmax-active-runs = 7\n')
    for flags, env in (
        ([], {}),
        (["--config", str(file)], {}),
        ([], {"RUNLANE_CONFIG": str(file)}),
        (["--config", str(file)], {"RUNLANE_STORE": "env"}),
        (["--config", str(file), "--store", "flag"], {"RUNLANE_STORE": "env"}),
    ):
        assert CliRunner().invoke(only_store, flags, env=env).exit_code == 0
    assert named == [Config().store, "file", "file", "env", "flag"]
    file.write_text('agnet = "echo"\n')
    result = CliRunner().invoke(only_store, ["--config", str(file)])
    assert "there is no setting 'agnet'" in result.output


def test_variables_of_programs_may_be_many(tmp_path: Path) -> None:
    file = tmp_path / "runlane.toml"
    file.write_text('command-env = """\nA,B\nC=1 2\n"""\n')
    wanted = ("A,B", "C=1 2")
    for found in (
        config("--command-env", "A,B", "--command-env", "C=1 2"),
        config(env={"RUNLANE_COMMAND_ENV": "A,B\nC=1 2\n"}),
        config("--config", str(file)),
    ):
        assert tuple(text for text in found.command_env if text) == wanted
    assert config("--command-env", "D", "--config", str(file)).command_env == ("D",)
    assert config(env={"RUNLANE_COMMAND_ENV": ""}).command_env == ()


def test_settings_survive_the_way_to_a_child_process() -> None:
    sent = config("--command-env", "A", "--command-env", "B=1", "--command-memory", "1GiB")
    assert Config.of(**json.loads(processes._settings(sent))) == sent


def test_numbers_in_a_file_are_numbers(tmp_path: Path) -> None:
    file = tmp_path / "runlane.toml"
    file.write_text("max_waiting_runs = 3\ndrain-timeout = 0\n")
    found = config("--config", str(file))
    assert (found.limits.max_waiting_runs, found.drain_timeout) == (3, 0.0)


def test_the_event_loop_is_the_quicker_one_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert Config().event_loop == "auto"
    assert event_loop_factory("asyncio") is None
    assert event_loop_factory("auto") is event_loop_factory("uvloop") is uvloop.new_event_loop
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert event_loop_factory("auto") is None
    with pytest.raises(StartError, match=r"pip install 'runlane\[uvloop\]'"):
        event_loop_factory("uvloop")
