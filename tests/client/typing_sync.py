"""Types of the synchronous client: mypy and pyright check this file; nothing runs it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import assert_type

from runlane import CancelReceipt, Message, Page, Progress, Run, RunComplete, RunEvent, Session
from runlane.sync import Client, Pager, RunEvents, RunHandle, Subscription


def typed(client: Client) -> None:
    """Every kind of call."""
    with client as entered:
        assert_type(entered, Client)
    handle = client.run_accepted("s", "hi", allow_missing=True)
    assert_type(handle, RunHandle)
    assert_type(handle.run, Run)
    assert_type(handle.cursor, str | None)
    assert_type(handle.completed(1.0), RunComplete)
    assert_type(handle.cancel(), CancelReceipt)
    assert_type(handle.events(), RunEvents)
    for event in handle.events():
        assert_type(event, RunEvent)
    with client.subscribe_run_complete(session_ids=["s"]) as subscription:
        assert_type(subscription, Subscription)
        for complete in subscription:
            assert_type(complete, RunComplete)
        assert_type(subscription.with_progress(), Iterator[RunComplete | Progress])
        assert_type(subscription.next_item(), RunComplete | Progress)
    assert_type(client.list_runs(), Pager[Run])
    assert_type(client.list_runs().page(), Page[Run])
    assert_type(client.list_sessions().pages(), Iterator[Page[Session]])
    for message in client.list_messages("s"):
        assert_type(message, Message)
    assert_type(client.wait_run("r", timeout=1), Run)
    assert_type(client.cancel_all(), tuple[CancelReceipt, ...])
