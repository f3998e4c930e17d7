"""A commented TOML file with all settings at their defaults."""

from __future__ import annotations

import json
import textwrap

import click

from runlane_server.config.declaration import Setting, Topic
from runlane_server.config.option_types import Ratio
from runlane_server.config.settings import SETTINGS

_WIDTH = 100

_HEAD = """\
# Settings of runlane-server, for --config FILE. Every setting has its default, or an example if it
# has none. To change one, remove the "#" in front of its line. A flag or an environment variable
# overrides this file.
"""

UNSET = "unset"
"""Begins the comment on an example."""


def sample() -> str:
    """The text of the file, which changes nothing as it stands."""
    parts = [_HEAD]
    for topic in Topic:
        parts.append(f"# --- {topic}\n")
        parts.extend(_entry(setting) for setting in SETTINGS if setting.topic is topic)
    return "\n".join(parts)


def _entry(setting: Setting) -> str:
    comment = textwrap.fill(
        setting.help, _WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False
    )
    choices = ""
    if isinstance(setting.type, click.Choice):
        choices = f"# One of: {', '.join(map(str, setting.type.choices))}.\n"
    return f"{comment}\n{choices}#{setting.key} = {_value(setting)}\n"


def _value(setting: Setting) -> str:
    """The default as TOML; for a setting without one, an example and what applies without it."""
    if setting.is_switch:
        return "true" if setting.default else "false"
    text = setting.default_text
    if text is None:
        return f"{json.dumps(setting.metavar)}  # {UNSET}: {setting.without or 'none'}"
    value = text if isinstance(setting.type, click.IntRange | Ratio) else json.dumps(text)
    return value if setting.without is None else f"{value}  # {setting.without}"
