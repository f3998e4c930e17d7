"""Which release this is."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def version_of_server() -> str:
    """The version of the package; `unknown` where it runs without having been installed."""
    try:
        return version("runlane")
    except PackageNotFoundError:
        return "unknown"
