"""`runlane webhooks create` for single runs."""

from __future__ import annotations

import click
import pytest

from runlane.cli.webhooks import _bound
from runlane.webhooks import WebhookRun


def test_a_webhook_of_a_run_replaces_only_one_of_its_name() -> None:
    first, second = _bound("r", None), _bound("r", None)
    assert first is not None
    assert second is not None
    assert first.run_id == second.run_id == "r"
    assert first.name != second.name
    assert _bound("r", "n") == WebhookRun("r", "n")
    assert _bound(None, None) is None
    with pytest.raises(click.UsageError, match="--name needs --run"):
        _bound(None, "n")
