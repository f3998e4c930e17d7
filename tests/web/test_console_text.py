"""The console shows what others wrote as it is: nothing reordered, hidden or rounded."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Locator, Page, expect

from runlane.cli.terminal import unsafe_text
from runlane_server.testing import LocalServer
from support.browser import CHROMIUM, MISSING, browser, tab
from support.door import Door, door

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason=MISSING),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(180),
]

expect.set_options(timeout=20_000)

BIG = 9007199254740993  # 2^53 + 1, which JavaScript rounds

HIDDEN = "pay\u202e\u200b\u2066\ufeff\U000e0041 \u2028x"
"""A name of which a browser hides or reorders parts."""

IMPORT = "const { visible, prose, isVisible, json, isRounded, jsonNumber } = "
IMPORT += "await import('/console/text.js');"

FIND_UNSAFE = """() => {
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) found.push(walker.currentNode.data);
  for (const each of document.querySelectorAll("*")) {
    for (const name of ["aria-label", "title", "placeholder"]) {
      if (each.hasAttribute(name)) found.push(each.getAttribute(name));
    }
    if ("value" in each && each.tagName !== "OPTION") found.push(String(each.value));
  }
  return [...found, document.title];
}"""


@pytest_asyncio.fixture(scope="module", loop_scope="module", name="chromium")
async def _chromium() -> AsyncIterator[Browser]:
    async with browser() as opened:
        yield opened


class Seen:
    """A page of the console before a server with the scripted agent."""

    def __init__(self, server: LocalServer, page: Page, opened: Door, show: Any) -> None:
        self.server = server
        self.page = page
        self.door = opened
        self.show = show

    async def ask(self, **question: Any) -> str:
        """Starts a run that asks this; returns its id."""
        return await self.accept(json.dumps([{"ask": question}]))

    async def accept(self, prompt: str) -> str:
        body = {"sessionId": "s", "prompt": prompt, "allowMissing": True}
        got = await self.door.http.post("/v1/runs", json=body)
        assert got.status_code == 200, got.text
        return str(got.json()["run"]["runId"])

    async def end(self, run_id: str) -> str:
        """The state in which a run ended, or the one that it has after 20 s."""
        got = await self.door.http.get(f"/v1/runs/{run_id}:wait", params={"timeout": "20s"})
        return str(got.json()["run"]["state"])

    async def answer(self, run_id: str) -> dict[str, Any]:
        """The answer that the run's question got."""
        assert await self.end(run_id) == "RUN_STATE_COMPLETED"
        got = await self.door.http.get("/v1/input-requests", params={"run_id": run_id})
        (found,) = got.json()["inputRequests"]
        answer: dict[str, Any] = found["answer"]
        return answer

    def question(self, text: str) -> Locator:
        return self.page.get_by_label(f"Question: {text}")


@asynccontextmanager
async def console(chromium: Browser, tmp_path: Path) -> AsyncIterator[Seen]:
    store = f"sqlite:///{tmp_path}/runlane.db"
    async with (
        LocalServer("scripted", store=store) as server,
        door(server.address) as opened,
        tab(chromium, opened) as first,
    ):
        await first.open()
        yield Seen(server, first.page, opened, first.open)


async def test_the_console_escapes_what_the_command_line_escapes(
    chromium: Browser, tmp_path: Path
) -> None:
    code = """() => {
      const found = [];
      for (let code = 0; code <= 0x10ffff; code += 1) {
        if (code >= 0xd800 && code < 0xe000) continue;
        if (!isVisible(String.fromCodePoint(code))) found.push(code);
      }
      return found;
    }"""
    async with console(chromium, tmp_path) as here:
        got = await here.page.evaluate(f"async () => {{ {IMPORT} return ({code})(); }}")
        surrogates = range(0xD800, 0xE000)
        wanted = [n for n in range(sys.maxunicode + 1) if unsafe_text(chr(n))]
        assert got == [n for n in wanted if n not in surrogates]
        shown = f"async text => {{ {IMPORT} return [visible(text), prose(text)]; }}"
        text = "a\u202eb\u200d\U000e0041\n\té👍\ufe0f"
        assert await here.page.evaluate(shown, text) == [
            "a\\u202eb\\u200d\\u{e0041}\n\té👍\ufe0f",
            "a\\u202eb\u200d\\u{e0041}\n\té👍\ufe0f",
        ]


async def test_json_keeps_numbers_names_and_order(chromium: Browser, tmp_path: Path) -> None:
    texts = [
        f'{{"id":{BIG},"b":[1,2.50,{{}},[ ],-0.10e+400],"a":{{"x":null}}}}',
        '{"to":"me","to":"you"}',
        '{"t":"\\u202e\\"{[,:]}\\\\"}',
        json.dumps({HIDDEN: HIDDEN}, ensure_ascii=False),
        '"\\ud800"',
        "[]",
        "true",
        "12345678901234567890",
    ]
    code = f"async texts => {{ {IMPORT} return texts.map(each => json(each)); }}"
    async with console(chromium, tmp_path) as here:
        for text, shown in zip(texts, await here.page.evaluate(code, texts), strict=True):
            assert exactly(shown) == exactly(text)
            assert not unsafe_text(shown)
        given = '{"a":[1,{}],"b":{"c":"d"}}'
        assert await here.page.evaluate(code, [given, "no\u202eJSON"]) == [
            json.dumps(json.loads(given), indent=2),
            "no\\u202eJSON",
        ]
        numbers = f"async texts => {{ {IMPORT} return texts.map(jsonNumber); }}"
        written = [str(BIG), "-007", ".5", "1.10", "2e3", "0.12345678901234567890"]
        wanted = [str(BIG), "-7", "0.5", "1.10", "2e3", "0.12345678901234567890"]
        assert await here.page.evaluate(numbers, written) == wanted


def exactly(text: str) -> Any:
    """The value of JSON, with numbers as they are written and all members of an object."""
    return json.loads(text, parse_int=str, parse_float=str, object_pairs_hook=list)


async def test_no_view_hides_or_reorders_what_others_wrote(
    chromium: Browser, tmp_path: Path
) -> None:
    steps = [
        {"reasoning": HIDDEN},
        {"reasoning": HIDDEN},
        {"text": HIDDEN},
        {"text": HIDDEN},
        {"tool_call": {"id": "1", "name": HIDDEN, "arguments": {HIDDEN: HIDDEN}}},
        {"tool_result": {"id": "1", "name": HIDDEN, "content": HIDDEN, "is_error": True}},
        {"artifact": {"id": "a", "name": HIDDEN, "text": HIDDEN, "last": False}},
        {"artifact": {"id": "a", "text": HIDDEN, "append": True, "last": True}},
        {"custom": {"type": "x", "json": {HIDDEN: HIDDEN}}},
        {"ask": {"text": HIDDEN, "tool_name": HIDDEN, "arguments": {HIDDEN: HIDDEN}}},
        {"ask": {"text": f"Which? {HIDDEN}", "choices": [HIDDEN, "other"]}},
        {"ask": {"text": f"Where? {HIDDEN}", "schema": hidden_schema()}},
        {"result": {HIDDEN: HIDDEN}},
        {"fail": HIDDEN, "reason": "BAD"},
    ]
    async with console(chromium, tmp_path) as here:
        await here.door.http.post("/v1/sessions", json={"sessionId": "s", "title": HIDDEN})
        run_id = await here.accept(json.dumps(steps))
        await here.show("#/sessions/s")
        approval = here.page.get_by_role("button", name="Approve")
        await expect(approval).to_be_visible()
        await expect(here.page.locator(".question")).to_contain_text("pay\\u202e\\u200b\\u2066")
        await assert_visible(here.page)
        await here.show("#/questions")
        await approval.click()
        await here.page.get_by_role("button", name="pay").wait_for()
        await assert_visible(here.page)
        await here.page.get_by_role("button", name="pay").click()
        await here.page.get_by_label("City").wait_for()
        await assert_visible(here.page)
        # A proposal that nobody sees as it is would be sent unseen.
        assert await here.page.get_by_label("City").input_value() == ""
        await here.page.get_by_label("City").fill("Rome")
        await here.page.get_by_role("button", name="Answer").click()
        assert await here.end(run_id) == "RUN_STATE_FAILED"
        for where in ("#/sessions", "#/sessions/s", "#/runs", f"#/runs/{run_id}"):
            await here.show(where)
            await expect(here.page.locator("main")).to_contain_text("pay\\u202e")
            await assert_visible(here.page)


async def test_text_that_comes_later_is_escaped_too(chromium: Browser, tmp_path: Path) -> None:
    pieces = [{"text": HIDDEN}, {"wait": "g"}, {"text": HIDDEN}, {"wait": "h"}]
    thoughts = [{"reasoning": HIDDEN}, {"wait": "i"}, {"reasoning": HIDDEN}, {"wait": "j"}]
    plan = {"artifact": {"id": "a", "text": HIDDEN, "last": False}}
    more = {"artifact": {"id": "a", "text": HIDDEN, "append": True, "last": True}}
    steps = [*pieces, *thoughts, plan, {"wait": "k"}, more, {"wait": "l"}]
    async with console(chromium, tmp_path) as here:
        run_id = await here.accept(json.dumps(steps))
        await here.show("#/sessions/s")
        live = here.page.locator(".live")
        for pieces_shown, gate in enumerate("ghijkl", start=1):
            # Two pieces each of text, of reasoning, and of an artifact.
            await expect(live).to_contain_text(re.compile(rf"(pay.*){{{pieces_shown}}}", re.DOTALL))
            await assert_visible(here.page)
            here.server.gates.open(gate)
        assert await here.end(run_id) == "RUN_STATE_COMPLETED"
        await here.show(f"#/runs/{run_id}")
        await expect(here.page.locator(".timeline")).to_contain_text(
            re.compile("(pay.*){4}", re.DOTALL)
        )
        await expect(here.page.locator(".timeline")).to_contain_text("2 pieces")
        await assert_visible(here.page)


def hidden_schema() -> dict[str, Any]:
    city = {"type": "string", "title": f"City {HIDDEN}", "default": HIDDEN}
    return {"type": "object", "properties": {"city": city}, "required": ["city"]}


async def assert_visible(page: Page) -> None:
    texts = await page.evaluate(FIND_UNSAFE)
    assert [each for each in texts if unsafe_text(each)] == []


async def test_r41_arguments_keep_their_digits_untouched_and_edited(
    chromium: Browser, tmp_path: Path
) -> None:
    async with console(chromium, tmp_path) as here:
        given = {"to": BIG, "amount": 7}
        await here.show("#/questions")
        run_id = await here.ask(text="One?", tool_name="pay", arguments=given)
        box = here.question("One?").get_by_label("Arguments")
        await expect(box).to_have_value(json.dumps(given, indent=2))
        await here.page.get_by_role("button", name="Approve").click()
        assert "argumentsJson" not in (await here.answer(run_id))["approval"]

        run_id = await here.ask(text="Two?", tool_name="pay", arguments=given)
        box = here.question("Two?").get_by_label("Arguments")
        shown = await box.input_value()
        await box.fill(shown.replace(": 7", ": 5,"))
        await here.page.get_by_role("button", name="Approve").click()
        await expect(here.page.get_by_role("alert")).to_have_text("The arguments are not JSON.")
        await box.fill(shown.replace(": 7", ": 5"))
        await here.page.get_by_role("button", name="Approve").click()
        approval = (await here.answer(run_id))["approval"]
        assert json.loads(approval["argumentsJson"]) == {"to": BIG, "amount": 5}


async def test_r41_forms_keep_the_digits_of_numbers(chromium: Browser, tmp_path: Path) -> None:
    number = {"type": "object", "properties": {"account": {"type": "integer"}}}
    listed = {"type": "object", "properties": {"account": {"enum": [BIG, 1]}}}
    async with console(chromium, tmp_path) as here:
        await here.show("#/questions")
        run_id = await here.ask(text="One?", schema=number)
        await here.page.get_by_label("account").fill(str(BIG))
        await here.page.get_by_role("button", name="Answer").click()
        assert json.loads((await here.answer(run_id))["formJson"]) == {"account": BIG}
        # A choice among numbers that JavaScript rounds is written as JSON.
        run_id = await here.ask(text="Two?", schema=listed)
        await here.page.get_by_label("Answer as JSON").fill(f'{{"account": {BIG}}}')
        await here.page.get_by_role("button", name="Answer").click()
        assert json.loads((await here.answer(run_id))["formJson"]) == {"account": BIG}
