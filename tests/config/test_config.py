"""Settings: a flag overrides the environment, that the file, that the default; errors name them."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import pytest
import uvloop
from click.testing import CliRunner, Result

from runlane_server.config.option_types import Duration, format_duration, format_size
from runlane_server.config.settings import RENAMED, SETTINGS, Config
from runlane_server.config.sources import server_options, store_options
from runlane_server.core.errors import StartError
from runlane_server.core.limits import Limits
from runlane_server.net.addresses import Address
from runlane_server.process.app import event_loop_kind

made: list[Config] = []


@click.command(context_settings={"auto_envvar_prefix": "RUNLANE", "show_default": True})
@server_options
def command(**options: Any) -> None:
    made.append(Config.from_options(**options))


def invoke(*flags: str, env: Mapping[str, str] | None = None) -> Result:
    made.clear()
    return CliRunner().invoke(command, flags, env=env or {})


def config(*flags: str, env: Mapping[str, str] | None = None) -> Config:
    result = invoke(*flags, env=env)
    assert result.exit_code == 0, result.output
    return made[0]


def test_without_options_the_configuration_has_the_defaults_of_the_record() -> None:
    assert config() == Config()
    assert Config().limits == Limits()


def test_a_flag_overrides_the_environment_which_overrides_the_file(tmp_path: Path) -> None:
    file = tmp_path / "runlane.toml"
    file.write_text('agent = "file"\nstore = "file"\nlisten = "file:1"\nmax-active-runs = 7\n')
    env = {"RUNLANE_CONFIG": str(file), "RUNLANE_STORE": "env", "RUNLANE_LISTEN": "env:1"}
    found = config("--listen", "flag:1", env=env)
    assert (found.listen, found.store, found.agent) == (Address("flag", 1), "env", ("file",))
    assert found.limits.max_active_runs == 7
    assert found.limits.max_waiting_runs == Limits().max_waiting_runs


VALUES: list[tuple[str, str, Any]] = [
    ("listen", "[::1]:0", Address("::1", 0)),
    ("listen", "unix:/run/x.sock", Address(path="/run/x.sock")),
    ("socket-mode", "0660", "0660"),
    ("max-connections-per-address", "50", 50),
    ("processes", "3", 3),
    ("agent-processes", "2", 2),
    ("node-address", "10.0.0.7:0", Address("10.0.0.7", 0)),
    ("metrics-listen", "[::1]:9464", Address("::1", 9464)),
    ("http", "8080", Address("127.0.0.1", 8080)),
    ("a2a", "http://127.0.0.1:8080", "http://127.0.0.1:8080"),
    ("metrics-listen", "9464", Address("127.0.0.1", 9464)),
    ("otlp-endpoint", "http://collector:4318/", "http://collector:4318"),
    ("trace-ratio", "0.25", 0.25),
    ("access", "access.toml", "access.toml"),
    ("webhook-allow-network", "10.0.0.0/8", ("10.0.0.0/8",)),
    ("webhook-keys", "hooks.keys", "hooks.keys"),
    ("tls-cert", "server.pem", "server.pem"),
    ("tls-key", "server.key", "server.key"),
    ("tls-client-ca", "clients.pem", "clients.pem"),
    ("node-tls-ca", "nodes.pem", "nodes.pem"),
    ("store", "memory:", "memory:"),
    ("agent", "command:cat -", ("command:cat -",)),
    ("agent", "coder=command:env A=b cat", ("coder=command:env A=b cat",)),
    ("agent-slots", "default=2", ("default=2",)),
    ("command-env", "HOME, LANG", ("HOME, LANG",)),
    ("command-env", "GREETING=a, b=c", ("GREETING=a, b=c",)),
    ("command-env-file", "env", "env"),
    ("command-dir", "runs", "runs"),
    ("command-cwd", "/", "/"),
    ("command-cpu", "2m", 120.0),
    ("command-memory", "2GiB", 2 << 30),
    ("command-memory", "65536", 65536),
    ("command-memory", "0" * 5_000 + "1KiB", 1024),
    ("command-files", "64", 64),
    ("command-processes", "100", 100),
    ("command-file-size", "512MiB", 512 << 20),
    ("agent-state-dir", "states", "states"),
    ("acp-permissions", "deny, read=allow", "deny, read=allow"),
    ("acp-mode", "code", "code"),
    ("acp-auth", "api-key", "api-key"),
    ("chat-instructions", "Be kind.", "Be kind."),
    ("max-active-runs", "0", 0),
    ("max-waiting-runs", "1", 1),
    ("max-waiting-total", "2", 2),
    ("max-prompt-bytes", "3", 3),
    ("max-attachment-bytes", "0", 0),
    ("max-run-output", "1MiB", 1 << 20),
    ("max-history", "64KiB", 1 << 16),
    ("default-run-timeout", "90m", 5400.0),
    ("max-run-time", "0", 0.0),
    ("cancel-grace", "1500ms", 1.5),
    ("ready-timeout", "2m", 120.0),
    ("progress-interval", "0.5s", 0.5),
    ("drain-timeout", "0", 0.0),
    ("event-retention", "7d", 7 * 86400.0),
    ("event-retention", "12h", 12 * 3600.0),
    ("event-retention-bytes", "0", 0),
    ("session-retention", "90d", 90 * 86400.0),
    ("node-lease", "3s", 3.0),
    ("worker-lease", "45s", 45.0),
    ("event-loop", "uvloop", "uvloop"),
    ("log-format", "json", "json"),
    ("log-level", "debug", "debug"),
]


@pytest.mark.parametrize(("name", "text", "value"), VALUES)
def test_a_setting_is_read_from_flag_environment_and_file(
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


SWITCHES = [
    "chat-lenient-end",
    "insecure-anywhere",
    "log-content",
    "harness",
    "reload",
    "require-question-digest",
    "webhook-unconfirmed",
]


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_is_read_from_flag_environment_and_file(name: str, tmp_path: Path) -> None:
    field = name.replace("-", "_")
    assert getattr(config(), field) is False
    file = tmp_path / "runlane.toml"
    for content, value in (("true", True), ("false", False)):
        file.write_text(f"{name} = {content}\n")
        assert getattr(config("--config", str(file)), field) is value
        assert getattr(config(env={f"RUNLANE_{field.upper()}": content}), field) is value
    assert getattr(config(f"--{name}"), field) is True


def test_the_two_tests_above_cover_every_setting() -> None:
    keys = {setting.key for setting in SETTINGS}
    assert {*(name for name, _, _ in VALUES), *SWITCHES} == keys
    flags = {option.opts[0] for option in command.params if not getattr(option, "hidden", False)}
    assert flags == {"--config", *(setting.flag for setting in SETTINGS)}


def test_every_limit_is_a_setting_with_the_default_of_the_engine() -> None:
    defaults = {setting.name: setting.default for setting in SETTINGS}
    for name in Limits.__slots__:
        assert defaults[name] == getattr(Limits(), name)


def test_help_shows_the_default_of_a_setting_as_a_flag_takes_it() -> None:
    shown = " ".join(invoke("--help").output.split())
    for flag, default in (
        ("--drain-timeout", "30s"),
        ("--event-retention", "7d"),
        ("--session-retention", "0"),
        ("--listen", "127.0.0.1:50051"),
        ("--command-memory", "(the server's own limit)"),
    ):
        _, _, behind = shown.partition(f" {flag} ")
        assert f"[default: {default}" in behind.partition(" --")[0]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0"),
        (0.25, "250ms"),
        (1.5, "1.5s"),
        (90.0, "90s"),
        (60.0, "1m"),
        (5400.0, "90m"),
        (86400.0, "1d"),
        (36_500 * 86400.0, "36500d"),
    ],
)
def test_a_duration_is_shown_as_a_text_that_is_read_as_the_same_duration(
    seconds: float, text: str
) -> None:
    assert format_duration(seconds) == text
    assert Duration().convert(text, None, None) == seconds


def test_help_texts_are_sentences_and_name_the_default_last() -> None:
    for setting in SETTINGS:
        assert setting.help[0].isupper()
        assert setting.help.endswith(".")
        assert "default:" not in setting.help


@pytest.mark.parametrize("former", RENAMED)
def test_a_former_name_is_refused_with_the_name_of_today(former: str, tmp_path: Path) -> None:
    file = tmp_path / "runlane.toml"
    file.write_text(f"{former} = 2\n")
    name = RENAMED[former]
    for result, told in (
        (invoke(f"--{former}", "2"), f"--{former} is now --{name}"),
        (invoke(env={f"RUNLANE_{former.upper()}": "2"}), f"is now RUNLANE_{name.upper()}"),
        (invoke("--config", str(file)), f"'{former}' is now '{name}'"),
    ):
        assert result.exit_code == 2
        assert told in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("listen", "localhost"),
        ("listen", "localhost:99999"),
        ("listen", "unix:"),
        ("listen", "::1:50051"),
        ("processes", "0"),
        ("processes", "many"),
        ("agent-processes", "-1"),
        ("agent-processes", "65"),
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
        ("command-memory", "9" * 5_000),
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
def test_an_invalid_value_is_refused_with_the_name_of_its_flag(
    name: str, text: str, tmp_path: Path
) -> None:
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
        ('listen = ["a:1"]', "'listen' must be a string or a number"),
        ("max-active-runs = true", "'max-active-runs' must be a string or a number"),
        ('insecure-anywhere = "yes"', "'insecure-anywhere' must be true or false"),
        ("listen = ", "Invalid value"),
    ],
)
def test_an_invalid_file_is_refused_with_its_path_and_the_reason(
    content: str, why: str, tmp_path: Path
) -> None:
    file = tmp_path / "runlane.toml"
    file.write_text(content)
    result = invoke("--config", str(file))
    assert result.exit_code == 2
    output = " ".join(result.output.split())
    assert str(file) in output
    assert why in output


def test_a_missing_file_is_refused() -> None:
    result = invoke("--config", "/nowhere/runlane.toml")
    assert result.exit_code == 2
    assert "No such file" in result.output


@pytest.mark.parametrize("text", ["a = " + "[" * 100_000, "a = " + "1" * 5_000, "a = ="])
def test_a_file_that_is_not_toml_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "runlane.toml"
    file.write_text(text)
    result = invoke("--config", str(file))
    assert result.exit_code == 2
    assert f"{file}:" in "".join(result.output.split("\n"))


def test_a_command_that_needs_only_the_store_reads_the_file_of_the_server(tmp_path: Path) -> None:
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


def test_a_secret_is_refused_on_the_command_line_and_nowhere_else(tmp_path: Path) -> None:
    secrets = {"command-env": "API_KEY=SECRET", "store": "postgresql://u:SECRET@h/db"}
    for key, text in secrets.items():
        refused = invoke(f"--{key}", text)
        assert refused.exit_code == 2
        assert "visible to all users of this machine" in refused.output
        assert "SECRET" not in refused.output
        file = tmp_path / "runlane.toml"
        file.write_text(f'{key} = "{text}"\n')
        config("--config", str(file))
        config(env={f"RUNLANE_{key.upper().replace('-', '_')}": text})
    config("--command-env", "GREETING=hello", "--command-env", "API_KEY", "--command-env", "KEY=")
    config("--store", "postgresql://u:@/db?host=/run/postgresql")


def test_variables_of_programs_are_a_list(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--command-env", "A", "--command-env", "B=1", "--command-memory", "1GiB"),
        ("--listen", "[::1]:0", "--node-address", "h:1", "--metrics-listen", "9464", "--harness"),
        ("--listen", "unix:x", "--max-active-runs", "0", "--cancel-grace", "1500ms"),
    ],
)
def test_a_configuration_written_as_json_is_read_back_unchanged(flags: tuple[str, ...]) -> None:
    sent = config(*flags)
    assert "\n" not in sent.to_json()
    assert Config.from_json(sent.to_json()) == sent


def test_a_number_and_an_underscore_in_a_file_are_accepted(tmp_path: Path) -> None:
    file = tmp_path / "runlane.toml"
    file.write_text("max_waiting_runs = 3\ndrain-timeout = 0\n")
    found = config("--config", str(file))
    assert (found.limits.max_waiting_runs, found.drain_timeout) == (3, 0.0)


def test_the_event_loop_is_uvloop_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert Config().event_loop == "auto"
    assert event_loop_kind("asyncio") is asyncio.SelectorEventLoop
    assert event_loop_kind("auto") is event_loop_kind("uvloop") is uvloop.Loop
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert event_loop_kind("auto") is asyncio.SelectorEventLoop
    with pytest.raises(StartError, match=r"run: pip install 'runlane\[server,uvloop\]'"):
        event_loop_kind("uvloop")


@pytest.mark.parametrize("size", ["0", "129MiB", "1TiB"])
def test_an_output_limit_that_no_database_can_hold_is_refused(size: str) -> None:
    result = invoke("--max-run-output", size)
    assert result.exit_code == 2
    assert "Invalid value for '--max-run-output'" in result.output


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (1, "1"), (1023, "1023"), (1024, "1KiB"), (1536, "1536"), (3 << 20, "3MiB")],
)
def test_a_size_is_shown_as_it_is_read(count: int, text: str) -> None:
    assert format_size(count) == text
    assert config("--command-memory", text).command_memory == count
