"""The files of deploy/, and how a server reads the settings in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from runlane_server.cli.main import command
from runlane_server.config import Config
from runlane_server.config.settings import SETTINGS
from runlane_server.process.child import ORPHAN_GRACE

DEPLOY = Path(__file__).parents[2] / "deploy"


def settings(flags: Sequence[str]) -> Config:
    """The configuration that flags make; fails where a server would refuse them."""
    with command.make_context("runlane-server", [*flags]) as context:
        return Config.from_options(**context.params)


def variables() -> set[str]:
    """The environment variables that are settings."""
    return {setting.variable for setting in SETTINGS}


def longest_stop(config: Config) -> float:
    """The seconds within which a server exits after a signal to stop."""
    return config.drain_timeout + config.limits.cancel_grace + ORPHAN_GRACE
