"""The echo agent."""

from __future__ import annotations

import pytest

from runlane_server.agents.echo import EchoAgent
from runlane_server.core.model import Attachment
from support.turns import Working, ask, collect, texts


@pytest.mark.parametrize(
    "text", ["hello", "two words", "  lead and trail \n", "a\n\n b\tc", "   ", "\u00a0x é 漢字 🙂"]
)
async def test_the_deltas_joined_are_exactly_the_prompt(text: str) -> None:
    deltas = texts(await collect(EchoAgent(), ask(text)))
    assert "".join(deltas) == text
    assert len(deltas) == max(len(text.split()), 1)


async def test_without_a_prompt_the_answer_is_the_text_attachments() -> None:
    attachments = (
        Attachment("a", "text/plain", "one two"),
        Attachment("b", "image/png", b"\x00"),
        Attachment("c", "text/plain", "three"),
    )
    assert "".join(texts(await collect(EchoAgent(), ask("", *attachments)))) == "one two\n\nthree"
    assert texts(await collect(EchoAgent(), ask("only", *attachments))) == ["only"]


async def test_folded_prompts_are_answered_after_the_first_answer() -> None:
    turn = ask("first", waiting=["second one", "third"])
    assert "".join(texts(await collect(EchoAgent(), turn))) == "firstsecond one\nthird"
    assert turn.waiting == []


async def test_prompts_folded_in_during_the_second_answer_are_answered_too() -> None:
    turn = ask("first", waiting=["second"])
    events = []
    async for event in EchoAgent().run(turn):
        events.append(event)
        if len(events) == 2:
            turn.waiting.append("third")
    assert texts(events) == ["first", "second", "third"]


async def test_a_cancel_between_two_words_ends_the_answer() -> None:
    working = Working(EchoAgent(delay=3600), ask("one two"))
    await working.said("one ")
    await working.cancel()
    assert working.text == "one "


async def test_a_cancel_ends_a_long_answer_without_a_delay() -> None:
    working = Working(EchoAgent(), ask("word " * 100_000))
    await working.said("word ")
    await working.cancel()
    assert 0 < len(working.events) < 100_000
