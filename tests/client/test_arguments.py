"""An argument of a wrong type is named, by every call and before anything is sent."""

from __future__ import annotations

import re
from typing import Any

import pytest

from runlane import Attachment, Client
from support.peer import Peer

WRONG: list[tuple[str, tuple[Any, ...], dict[str, Any], str]] = [
    ("run_accepted", ("s", 7), {}, "prompt: expected a str, not int"),
    ("run_accepted", (7, "p"), {}, "session_id: expected a str, not int"),
    ("run_accepted", ("s", "p"), {"run_id": 7}, "run_id: expected a str, not int"),
    ("run_accepted", ("s", "p"), {"metadata": {"n": 1}}, "metadata['n']: expected a str, not int"),
    ("run_accepted", ("s", "p"), {"metadata": {1: "n"}}, "a key of metadata: expected a str"),
    ("run_accepted", ("s", "p"), {"metadata": ["n"]}, "metadata: expected a mapping of str to str"),
    ("run_accepted", ("s", "p"), {"timeout": "30s"}, "timeout: expected seconds or a timedelta"),
    ("run_accepted", ("s", "p"), {"max_attempts": "2"}, "max_attempts: expected an int, not str"),
    ("run_accepted", ("s", "p"), {"attachments": ["a.txt"]}, "attachments: expected an Attachment"),
    ("run_accepted", ("s", "p"), {"attachments": [Attachment("a", 7)]}, "expected str or bytes"),  # type: ignore[arg-type]
    ("create_session", (7,), {}, "session_id: expected a str, not int"),
    ("create_session", ("s",), {"title": 7}, "title: expected a str, not int"),
    (
        "create_session",
        ("s",),
        {"metadata": {"n": 1.5}},
        "metadata['n']: expected a str, not float",
    ),
    ("cancel", ("s",), {"reason": 7}, "reason: expected a str, not int"),
    ("cancel_all", (7,), {}, "reason: expected a str, not int"),
    ("get_run", (7,), {}, "run_id: expected a str, not int"),
    ("wait_run", (7,), {}, "run_id: expected a str, not int"),
    ("wait_run", ("r",), {"timeout": "x"}, "timeout: expected seconds or a timedelta, not str"),
    ("get_session", (7,), {}, "session_id: expected a str, not int"),
    ("delete_session", (7,), {}, "session_id: expected a str, not int"),
]


@pytest.mark.parametrize(("call", "arguments", "options", "message"), WRONG)
async def test_a_wrong_type_names_the_argument(
    peer: Peer, call: str, arguments: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    async with peer.client() as client:
        with pytest.raises(TypeError, match=re.escape(message)):
            await getattr(client, call)(*arguments, **options)
    assert not any(peer.requests.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "\ud800"}, "prompt: contains a lone surrogate"),
        ({"prompt": "p", "metadata": {"k": "\udfff"}}, "metadata['k']: contains a lone surrogate"),
        ({"prompt": "p", "max_attempts": 1 << 40}, "max_attempts: 1099511627776 is out of range"),
    ],
)
async def test_a_value_that_no_message_can_hold_names_the_argument(
    client: Client, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        await client.run_accepted("s", **options)
