"""`runlane-server --help` lists every setting below the heading of its topic."""

from __future__ import annotations

import re

from click.testing import CliRunner

from runlane_server.cli.main import command
from runlane_server.config.settings import SETTINGS


def test_help_lists_every_setting_under_its_topic() -> None:
    result = CliRunner().invoke(command, ["--help"])
    assert result.exit_code == 0
    topic = ""
    found: dict[str, str] = {}
    for line in result.output.splitlines():
        if line.endswith(":") and not line.startswith(" "):
            topic = line.removesuffix(":")
        elif flag := re.match(r"  (?:-h, )?(--[\w-]+)", line):
            found[flag[1]] = topic
    for name in ("--config", "--version", "--help"):
        assert found.pop(name) == "Options"
    assert found == {setting.flag: setting.topic.value for setting in SETTINGS}
