"""What holds for every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import structlog


@pytest.fixture(autouse=True)
def _log_as_by_default() -> Iterator[None]:
    """What a test does to the log of this process ends with it."""
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
