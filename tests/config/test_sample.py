"""The sample of a TOML file: complete, and equal to the defaults."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
from click.testing import CliRunner

from runlane_server.config.sample import UNSET, sample
from runlane_server.config.settings import SETTINGS, Config
from runlane_server.config.sources import server_options

made: list[Config] = []


@click.command()
@server_options
def command(**options: Any) -> None:
    made.append(Config.from_options(**options))


def config_of(text: str, folder: Path) -> Config:
    file = folder / "runlane.toml"
    file.write_text(text)
    result = CliRunner().invoke(command, ["--config", str(file)])
    assert result.exit_code == 0, result.output
    return made[-1]


def entries(text: str) -> dict[str, str]:
    """The lines of the settings, without the `#` in front, by key."""
    lines = re.finditer(r"^#([a-z0-9-]+) = .*$", text, re.MULTILINE)
    return {line[1]: line[0][1:] for line in lines}


def test_the_sample_has_every_setting_in_order() -> None:
    assert [*entries(sample())] == [setting.key for setting in SETTINGS]


def test_the_sample_changes_nothing_as_it_stands(tmp_path: Path) -> None:
    assert config_of(sample(), tmp_path) == Config()


def test_the_values_of_the_sample_are_the_defaults(tmp_path: Path) -> None:
    lines = [line for line in entries(sample()).values() if f"  # {UNSET}" not in line]
    assert len(lines) > len(SETTINGS) / 2
    assert config_of("\n".join(lines), tmp_path) == Config()


def test_only_a_setting_without_a_default_has_an_example() -> None:
    examples = {key for key, line in entries(sample()).items() if f"  # {UNSET}" in line}
    assert examples == {
        setting.key
        for setting in SETTINGS
        if setting.default_text is None and not setting.is_switch
    }
