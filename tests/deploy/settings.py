"""What is in deploy/, and what a server makes of the settings there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from runlane_server.cli.main import command
from runlane_server.config import Config
from runlane_server.process.child import LAST_SECONDS

DEPLOY = Path(__file__).parents[2] / "deploy"


def settings(flags: Sequence[str]) -> Config:
    """What a server is set to by those flags; fails where it would refuse them."""
    with command.make_context("runlane-server", [*flags]) as context:
        return Config.of(**context.params)


def variables() -> set[str]:
    """The environment variables that are settings."""
    return {f"RUNLANE_{option.name}".upper() for option in command.params}


def longest_stop(config: Config) -> float:
    """The seconds within which a server that is told to stop has gone."""
    return config.drain_timeout + config.limits.cancel_grace + LAST_SECONDS
