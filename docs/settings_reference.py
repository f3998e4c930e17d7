#!/usr/bin/env python3
"""Writes settings.md, the reference of all settings, from their declaration in the server.

python docs/settings_reference.py            writes the page
python docs/settings_reference.py --check    only reports whether it is fresh: exit code 1 if not
"""

from __future__ import annotations

from pathlib import Path

import click
from generated import main

from runlane_server.config.declaration import Setting, Topic
from runlane_server.config.option_types import Duration, Ratio
from runlane_server.config.settings import SETTINGS

PAGE = Path(__file__).with_name("settings.md")

HEAD = """\
# Settings

For operators: which settings does `runlane-server` have, what are their defaults, and how are they
set?

<!-- not run: two ways to start the same server -->
```
runlane-server --listen 127.0.0.1:0 --max-active-runs 8
RUNLANE_MAX_ACTIVE_RUNS=8 runlane-server --listen 127.0.0.1:0
```

Each setting is a flag, an environment variable, and a key of the TOML file that `--config FILE` or
`RUNLANE_CONFIG` names. The key is the flag without its dashes in front: `max-active-runs = 8`. A
flag overrides the environment, the environment overrides the file, and the file overrides the
default.

Durations have a unit: `500ms`, `30s`, `2m`, `12h`, `7d`; `0` needs none. A size is a number of
bytes, or has a unit: `512MiB`, `2GiB`. A switch has no value as a flag; in the environment and in
the file it is `true` or `false`.

This page is generated: `make docs` writes it.
"""


def value(setting: Setting) -> str:
    """The kind of value that a setting takes."""
    kind = setting.type
    if setting.is_switch:
        return "switch"
    if isinstance(kind, click.Choice):
        return ", ".join(f"`{one}`" for one in kind.choices)
    if isinstance(kind, Ratio):
        return "number from 0 to 1"
    if isinstance(kind, click.IntRange):
        return f"from {kind.min}" if kind.max is None else f"from {kind.min} to {kind.max}"
    if isinstance(kind, Duration):
        return "duration"
    return f"`{setting.metavar}`" if setting.metavar else kind.name


def default(setting: Setting) -> str:
    """The default, or a description of what applies without a value."""
    if setting.without is not None:
        return setting.without
    if setting.is_switch:
        return "off"
    return "none" if setting.default_text is None else f"`{setting.default_text}`"


def row(setting: Setting) -> str:
    """The line of a setting."""
    cells = (
        f"`{setting.flag}`<br>`{setting.variable}`",
        value(setting).replace("|", "\\|"),
        default(setting),
        setting.help,
    )
    return f"| {' | '.join(cells)} |"


def written(_: str) -> str:
    """The page."""
    parts = [HEAD]
    for topic in Topic:
        rows = [row(setting) for setting in SETTINGS if setting.topic is topic]
        table = ["| setting | value | default | meaning |", "|---|---|---|---|", *rows]
        parts.append("\n".join([f"## {topic}", "", *table, ""]))
    return "\n".join(parts)


if __name__ == "__main__":
    main(PAGE, written, "The reference of the settings")
