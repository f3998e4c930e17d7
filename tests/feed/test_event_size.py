"""The size of events in the memory budgets of the feed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import is_dataclass, replace
from typing import Any, get_args, get_type_hints

import pytest

from runlane_server.core.artifact import ArtifactKind
from runlane_server.core.model import (
    CustomEvent,
    EventBody,
    FinishReason,
    RunError,
    RunKey,
    RunState,
    Usage,
)
from runlane_server.feed import feed as feed_module
from runlane_server.feed import session_topics
from runlane_server.feed.event_size import event_size
from runlane_server.feed.feed import Feed
from runlane_server.store.base import Store
from support.session_reader import drain, streaming
from support.story import TENANT, Story, answer

LARGE = 1 << 20

# The values of the other fields, by their type.
SMALL: dict[Any, object] = {
    str: "",
    int: 1,
    int | None: None,
    bool: True,
    str | bytes: b"",
    ArtifactKind: ArtifactKind.DATA,
    FinishReason: FinishReason.STOP,
    RunError | None: RunError("", ""),
    RunState: RunState.COMPLETED,
    Usage: Usage(),
}


def enlarged(kind: type[Any]) -> Iterator[tuple[str, Any]]:
    """Records of a kind, each with one large field, and the name of that."""
    hints = get_type_hints(kind)
    small = {name: SMALL[hint] for name, hint in hints.items()}
    for name, hint in hints.items():
        for large in ("x" * LARGE, b"x" * LARGE):
            if type(large) in (hint, *get_args(hint)):
                yield name, kind(**small | {name: large})
        for nested in (hint, *get_args(hint)):
            if is_dataclass(nested):
                for inner, value in enlarged(nested):  # type: ignore[arg-type]
                    yield f"{name}.{inner}", kind(**small | {name: value})


LARGE_EVENTS = [
    pytest.param(event, id=f"{kind.__name__}.{name}")
    for kind in get_args(EventBody)
    for name, event in enlarged(kind)
]


@pytest.mark.parametrize("event", LARGE_EVENTS)
def test_every_text_of_every_kind_of_event_counts(event: EventBody) -> None:
    assert LARGE <= event_size(event) < LARGE + 4096


def test_the_parameters_include_the_large_fields() -> None:
    names = {param.id for param in LARGE_EVENTS}
    assert names >= {
        "RunComplete.result",
        "RunComplete.error.message",
        "CustomEvent.json",
        "StepResult.json",
        "ToolCall.arguments_json",
        "ArtifactPiece.content",
        "InputRequested.schema_json",
    }


def test_a_text_counts_as_it_is_in_memory() -> None:
    assert event_size(CustomEvent("c", "x" * LARGE + "\N{GRINNING FACE}")) >= 4 * LARGE


BUDGET = 100_000


@pytest.mark.stores("memory")
async def test_large_results_stay_within_the_budgets_of_all_tails(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in (
        (feed_module, "LOG_TAIL_BYTES"),
        (feed_module, "RUN_TAIL_BYTES"),
        (session_topics, "LANE_TAIL_BYTES"),
    ):
        monkeypatch.setattr(module, name, BUDGET)
    feed, story = Feed(store), Story(store)
    with streaming(feed, "session") as stream:
        await drain(stream)
        followers = []
        for n in range(30):
            await story.accept(f"r{n}")
            followers.append(feed.follow(RunKey(TENANT, f"r{n}"), 0))
            await story.start()
            await story.append(CustomEvent("c", "x" * 10_000))
            await story.finish(replace(answer("done"), result="x" * 10_000))
        lane = feed.sessions._tails.get(story.key)
        log = feed._tails.get(TENANT)
        runs = [feed._run_tails.get(RunKey(TENANT, f"r{n}")) for n in range(30)]
        assert lane is not None
        assert log is not None
        held = [entry.event.body for entry in lane._entries]
        assert 0 < sum(map(content, held)) <= BUDGET
        assert 0 < sum(content(entry.complete) for entry in log._entries) <= BUDGET
        bodies = [event.body for tail in runs if tail for event in tail._entries]
        assert 0 < sum(map(content, bodies)) <= BUDGET
        for follower in followers:
            follower.close()


def content(body: EventBody) -> int:
    """The large content of an event."""
    return len(getattr(body, "result", "")) + len(getattr(body, "json", ""))
