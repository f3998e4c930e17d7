"""Input requests for tests of a lane and of the stores."""

from __future__ import annotations

from typing import Any

from runlane_server.core import lane as rules
from runlane_server.core.input import (
    Answer,
    InputKind,
    InputRequest,
    InputState,
    Park,
    Question,
)
from support.story import Story

DAY = 86_400_000_000


def question(key: str = "k", **changes: Any) -> Question:
    """A question for a text; NUL and characters of every size are in it."""
    asked = Question(key, InputKind.TEXT, "why\x00 \U0001f600?")
    return asked._replace(**changes)


def reply_of(value_json: str = '"because"', *, at: int = 0) -> Answer:
    """An answer."""
    return Answer("a1", value_json, "ann", "token", "127.0.0.1:9", "d", at)


async def ask(
    story: Story, *questions: Question, park: bool = False, resumable: bool = False
) -> list[str]:
    """The active run asks; returns the ids of its requests."""
    active = story.lane.active
    assert active is not None
    at = story.tick()
    requests = tuple(
        InputRequest(
            f"{active.run_id}-{one.key}-{at}",
            story.session_id,
            active.run_id,
            one,
            InputState.OPEN,
            at,
            None if one.timeout is None else at + one.timeout,
        )
        for one in questions
    )
    return list(
        await story.commit(
            rules.ask(
                story.lane,
                active.run_id,
                active.attempt,
                requests,
                at=at,
                events=active.events,
                number=active.asking.asks + 1,
                resumable=resumable,
                park=Park("state", 7) if park else None,
            )
        )
    )


async def answer(story: Story, run_id: str, name: str, given: Answer | None = None) -> None:
    """A person answers."""
    given = given or reply_of()
    await story.commit(rules.answer(story.lane, run_id, name, given, at=story.tick()))


async def expire(story: Story, run_id: str, name: str) -> None:
    """A request expires."""
    await story.commit(rules.expire(story.lane, run_id, name, at=story.tick()))


async def resume(story: Story, host: str = "") -> None:
    """The active run goes on."""
    await story.commit(rules.resume(story.lane, at=story.tick(), host=host))
