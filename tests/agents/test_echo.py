"""The echo agent."""

from __future__ import annotations

import pytest

from runlane_server.agents.echo import EchoAgent
from runlane_server.core.model import Attachment
from support.turns import Working, ask, collect, texts


@pytest.mark.parametrize(
    "text", ["hello", "two words", "  lead and trail \n", "a\n\n b\tc", "   ", "\u00a0x é 漢字 🙂"]
)
async def test_the_words_make_exactly_the_prompt(text: str) -> None:
    said = texts(await collect(EchoAgent(), ask(text)))
    assert "".join(said) == text
    assert len(said) == max(len(text.split()), 1)


async def test_answers_with_text_attachments_where_there_is_no_prompt() -> None:
    attachments = (
        Attachment("a", "text/plain", "one two"),
        Attachment("b", "image/png", b"\x00"),
        Attachment("c", "text/plain", "three"),
    )
    assert "".join(texts(await collect(EchoAgent(), ask("", *attachments)))) == "one two\n\nthree"
    assert texts(await collect(EchoAgent(), ask("only", *attachments))) == ["only"]


async def test_answers_what_is_folded_in_after_its_answer() -> None:
    turn = ask("first", waiting=["second one", "third"])
    assert "".join(texts(await collect(EchoAgent(), turn))) == "firstsecond one\nthird"
    assert turn.waiting == []


async def test_looks_again_for_what_was_folded_in_meanwhile() -> None:
    turn = ask("first", waiting=["second"])
    said = []
    async for event in EchoAgent().run(turn):
        said.append(event)
        if len(said) == 2:
            turn.waiting.append("third")
    assert texts(said) == ["first", "second", "third"]


async def test_can_be_cancelled_between_two_words() -> None:
    working = Working(EchoAgent(delay=3600), ask("one two"))
    await working.said("one ")
    await working.cancel()
    assert working.text == "one "


async def test_a_long_prompt_can_be_cancelled_without_a_delay() -> None:
    working = Working(EchoAgent(), ask("word " * 100_000))
    await working.said("word ")
    await working.cancel()
    assert 0 < len(working.events) < 100_000
