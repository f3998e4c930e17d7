"""Hostile schemas and answers hold up nothing but their own check."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Iterator
from typing import Any

import pytest

from runlane_server.agents import form_checks, form_rules
from runlane_server.agents.base import AgentError
from runlane_server.agents.form_checks import CheckFailed, FormChecks
from runlane_server.agents.form_rules import is_cheap
from runlane_server.agents.questions import Asked, check_question, question_of

LEVELS = 26
EXPONENTIAL = {
    "$defs": {
        **{f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(LEVELS)},
        f"d{LEVELS}": {},
    },
    "$ref": "#/$defs/d0",
}
HOSTILE: dict[str, tuple[dict[str, Any], Any]] = {
    "pattern": ({"type": "string", "pattern": "^(a+)+$"}, "a" * 60 + "!"),
    "pattern of names": ({"patternProperties": {"^(a+)+$": {}}}, {"a" * 60 + "!": 1}),
    "references": (EXPONENTIAL, 1),
    "equal items": ({"uniqueItems": True}, [{"a": n} for n in range(5_000)]),
    "many alternatives": ({"items": {"anyOf": [{"type": "null"}] * 9_000}}, list(range(9_000))),
}


@pytest.fixture
def checks() -> Iterator[FormChecks]:
    checks = FormChecks()
    yield checks
    checks.close()


async def longest_pause(work: Awaitable[Any]) -> float:
    """The longest time for which other work had to wait, in seconds."""
    task = asyncio.ensure_future(work)
    longest, before = 0.0, time.thread_time()
    while not task.done():
        await asyncio.sleep(0.001)
        # The CPU of this thread: time that other processes took is not ours.
        now = time.thread_time()
        longest, before = max(longest, now - before), now
    await task
    return longest


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_form_is_refused_and_holds_up_nothing(
    checks: FormChecks, name: str
) -> None:
    schema, value = HOSTILE[name]

    async def check() -> None:
        with pytest.raises(CheckFailed, match="takes more than 1 s"):
            await checks.violations("t", json.dumps(schema), json.dumps(value))

    assert await longest_pause(check()) < 0.1
    assert await checks.violations("t", '{"pattern": "^b$"}', '"c"')


async def test_a_large_schema_holds_up_nothing(checks: FormChecks) -> None:
    schema = json.dumps({"properties": {f"p{n}": {} for n in range(18_000)}})
    task = asyncio.ensure_future(checks.schema_problem("t", schema))
    assert await longest_pause(asyncio.wait([task])) < 0.1
    assert isinstance(task.exception(), CheckFailed)


async def test_a_hostile_tenant_takes_turns_with_others(
    checks: FormChecks, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema, value = map(json.dumps, HOSTILE["pattern"])
    hostile = [asyncio.create_task(checks.violations("bad", schema, value)) for _ in range(20)]
    await asyncio.sleep(0)
    assert await checks.violations("good", '{"pattern": "^b$"}', '"b"') == []
    assert sum(task.done() for task in hostile) < 10
    for task in hostile:
        task.cancel()
    await asyncio.gather(*hostile, return_exceptions=True)
    assert checks._slots._free == form_checks.PROCESSES


SCHEMAS = [
    {"type": "object", "properties": {"a": {"type": "integer", "minimum": 3}}, "required": ["a"]},
    {"items": {"enum": [1, "b"]}, "maxItems": 3},
    {"oneOf": [{"type": "string"}, {"type": "object", "additionalProperties": {"const": 1}}]},
    True,
]
VALUES = [{"a": 3}, {"a": "x"}, {}, [1, "b"], [2] * 5, "text", {"z": 2}, None]


@pytest.mark.parametrize("schema", SCHEMAS)
async def test_a_process_finds_what_a_cheap_check_finds(
    checks: FormChecks, schema: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = json.dumps(schema)
    cheap = [await checks.violations("t", text, json.dumps(value)) for value in VALUES]
    assert is_cheap(text, json.dumps(VALUES[0]))
    monkeypatch.setattr(form_rules, "is_cheap", lambda *_: False)
    assert [await checks.violations("t", text, json.dumps(value)) for value in VALUES] == cheap
    assert await checks.schema_problem("t", text) == ""


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"pattern": "a"}, "a"),
        ({"$ref": "#"}, 1),
        ({"items": {"uniqueItems": True}}, []),
        ({"properties": {"a": {"unevaluatedItems": {}}}}, {}),
        ({"anyOf": [{"if": {}, "then": {}}]}, 1),
        ({"title": "x" * 2_000}, 1),
        ({"type": "array"}, ["x" * 10_000]),
    ],
)
def test_what_may_take_long_is_not_cheap(schema: Any, value: Any) -> None:
    assert not is_cheap(json.dumps(schema), json.dumps(value))


async def test_a_check_of_a_caller_who_is_gone_ends(checks: FormChecks) -> None:
    schema, value = map(json.dumps, HOSTILE["pattern"])
    task = asyncio.create_task(checks.violations("t", schema, value))
    done, _ = await asyncio.wait([task], timeout=0.4)
    assert not done
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert checks._idle == []
    assert checks._slots._free == form_checks.PROCESSES


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        (Asked("x", schema={"type": 7}), "schema is no JSON Schema"),
        (Asked("x", schema={"$ref": "http://elsewhere/"}), "only its own parts are possible"),
        (Asked("x", schema={"$dynamicRef": "file:///etc/passwd"}), "only its own parts"),
        (Asked("x", schema={"type": "object"}, timeout=9, default=[]), "default is no answer"),
        (
            Asked("x", schema=HOSTILE["pattern"][0], timeout=9, default="a" * 60 + "!"),
            "takes more than 1 s to check",
        ),
    ],
)
async def test_a_question_that_nobody_can_answer_is_refused(asked: Asked, problem: str) -> None:
    with pytest.raises(AgentError, match=problem) as raised:
        await check_question(question_of(asked), "t")
    assert raised.value.reason == "QUESTION_INVALID"
