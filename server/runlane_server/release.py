"""The version of the installed package."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def version_of_server() -> str:
    """The version of Runlane; `unknown` if the package is not installed."""
    try:
        return version("runlane")
    except PackageNotFoundError:
        return "unknown"
