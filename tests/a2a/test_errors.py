"""Errors of the server, and those that nobody expects."""

from __future__ import annotations

from datetime import timedelta

import pytest

from runlane.errors import Overloaded, Violation
from runlane_a2a.errors import rest_body, to_failure


def test_the_details_of_the_server_stay_and_its_fields_are_named_as_in_a2a() -> None:
    error = Overloaded("full", retry_after=timedelta(seconds=1.5))
    failure = to_failure(error)
    assert (failure.http, failure.json_rpc, failure.retry_after) == (429, -32000, 2)
    error.violations = (Violation("run_id", "x"),)
    details = rest_body(to_failure(error))["error"]["details"]
    assert [each["@type"].rpartition(".")[2] for each in details] == [
        "ErrorInfo",
        "BadRequest",
        "RetryInfo",
    ]


def test_an_unexpected_error_keeps_its_text_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    failure = to_failure(RuntimeError("secret"))
    assert "secret" not in str(rest_body(failure))
    assert failure.http == 500
    assert "secret" in caplog.text
