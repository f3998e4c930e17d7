"""The console in a real browser: every view, two tabs at once, restarts under it, hostile text."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Locator, Page, ViewportSize, expect

from runlane_server.agents.base import AgentEvent, Turn
from runlane_server.agents.text import whole_text
from runlane_server.core.model import ReasoningDelta, TextDelta, ToolCall, ToolResult
from runlane_server.testing import LocalServer
from support.browser import CHROMIUM, MISSING, NARROW, WIDE, Tab, browser, tab
from support.door import Door, door
from support.endpoint import endpoint
from support.server import serving

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason=MISSING),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(180),
]

expect.set_options(timeout=20_000)

HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"

STEPS: Sequence[dict[str, Any]] = (
    {"reasoning": "The user greets me."},
    {"text": "I look "},
    {"tool_call": {"id": "1", "name": "look", "arguments": {"at": "the sky"}}},
    {"tool_result": {"id": "1", "name": "look", "content": "blue", "is_error": False}},
    {"text": "It is "},
    {"wait": "g"},
    {"text": "blue."},
)


@pytest_asyncio.fixture(scope="module", loop_scope="module", name="chromium")
async def _chromium() -> AsyncIterator[Browser]:
    async with browser() as opened:
        yield opened


@dataclass
class World:
    """A server with a door, and a tab before it."""

    server: LocalServer
    door: Door
    tab: Tab
    browser: Browser

    @property
    def page(self) -> Page:
        return self.tab.page

    async def accept(self, session_id: str, prompt: str, **more: Any) -> str:
        body = {"sessionId": session_id, "prompt": prompt, "allowMissing": True, **more}
        got = await self.door.http.post("/v1/runs", json=body)
        assert got.status_code == 200, got.text
        return str(got.json()["run"]["runId"])

    async def state(self, run_id: str) -> str:
        got = await self.door.http.get(f"/v1/runs/{run_id}:wait", params={"timeout": "20s"})
        return str(got.json()["run"]["state"])

    def button(self, name: str, *, exact: bool = True) -> Locator:
        return self.page.get_by_role("button", name=name, exact=exact)


@asynccontextmanager
async def world(
    chromium: Browser, tmp_path: Path, agent: Any = "scripted", **look: Any
) -> AsyncIterator[World]:
    store = f"sqlite:///{tmp_path}/runlane.db"
    async with (
        LocalServer(agent, store=store) as server,
        door(server.address) as opened,
        tab(chromium, opened, **look) as first,
    ):
        yield World(server, opened, first, chromium)


async def test_the_token_leaves_the_address_and_opens_the_console(
    chromium: Browser, tmp_path: Path
) -> None:
    async with world(chromium, tmp_path) as here:
        await here.tab.open()
        assert "token" not in here.page.url
        await here.page.reload()
        await expect(here.page.get_by_role("heading", name="Sessions")).to_be_visible()
        await here.button("Sign out").click()
        await expect(here.page.get_by_role("heading", name="Sign in")).to_be_visible()
        assert await here.page.evaluate("sessionStorage.length") == 0


async def test_a_typed_token_signs_in_and_a_wrong_one_says_why(
    chromium: Browser, tmp_path: Path
) -> None:
    async with world(chromium, tmp_path) as here:
        await here.page.goto(here.tab.url)
        box = here.page.get_by_label("Token")
        await expect(box).to_be_focused()
        await box.fill("wrong")
        await here.page.keyboard.press("Enter")
        await expect(here.page.get_by_role("alert")).to_contain_text("is not the one")
        await box.fill("with spaces é")
        await here.page.keyboard.press("Enter")
        await expect(here.page.get_by_role("alert")).to_contain_text("beyond ASCII")
        await box.fill(str(here.door.http.headers["authorization"]).removeprefix("Bearer "))
        await here.page.keyboard.press("Enter")
        await expect(here.page.get_by_role("heading", name="Sessions")).to_be_visible()


async def test_a_session_streams_its_turn_and_folds_reasoning_and_tools(
    chromium: Browser, tmp_path: Path
) -> None:
    async with world(chromium, tmp_path) as here:
        await here.accept("s", json.dumps(STEPS))
        await here.tab.open("#/sessions/s")
        live = here.page.locator(".live")
        await expect(live).to_contain_text("It is")
        await expect(live.get_by_text("The user greets me.")).to_be_hidden()
        await live.get_by_text("Reasoning").click()
        await expect(live.get_by_text("The user greets me.")).to_be_visible()
        await live.get_by_text("Tool call: look").click()
        await expect(live.get_by_text('"at": "the sky"')).to_be_visible()
        await expect(live.get_by_text("blue", exact=True)).to_be_hidden()
        here.server.gates.open("g")
        last = here.page.locator("article.agent").last
        await expect(here.page.locator(".live")).to_have_count(0)
        await expect(last).to_contain_text("It is blue.")
        # Not from the stream and from the transcript both.
        await expect(here.page.get_by_text("It is", exact=False)).to_have_count(2)


async def test_a_prompt_is_sent_by_keyboard_and_answered(chromium: Browser, tmp_path: Path) -> None:
    async with world(chromium, tmp_path, "echo") as here:
        await here.door.http.post("/v1/sessions", json={"sessionId": "s"})
        await here.tab.open("#/sessions/s")
        await here.page.get_by_label("Prompt").fill("good morning")
        await here.page.keyboard.press("Control+Enter")
        await expect(here.page.locator("article.agent")).to_contain_text("good morning")
        await expect(here.page.get_by_label("Prompt")).to_have_value("")


async def test_r20_a_cancel_shows_its_receipt(chromium: Browser, tmp_path: Path) -> None:
    async with world(chromium, tmp_path) as here:
        ids = [await here.accept("s", json.dumps(STEPS)), await here.accept("s", "second")]
        await here.tab.open("#/sessions/s")
        await expect(here.page.get_by_role("heading", name="Queue (1)")).to_be_visible()
        await here.button("Cancel all runs").click()
        receipt = here.page.get_by_label("Receipt of the cancel")
        await expect(receipt).to_contain_text("Cancelled 2; the fence is 2.")
        await expect(receipt.locator("tbody tr")).to_contain_text([ids[0], ids[1]])
        await expect(receipt.locator("tbody tr")).to_contain_text(["active", "queued"])
        assert [await here.state(each) for each in ids] == ["RUN_STATE_CANCELLED"] * 2
        await here.button("Cancel all runs").click()
        await expect(receipt).to_contain_text("There was nothing to cancel.")


async def test_r18_one_waiting_run_is_cancelled_and_the_active_one_continues(
    chromium: Browser, tmp_path: Path
) -> None:
    async with world(chromium, tmp_path) as here:
        first, second = await here.accept("s", json.dumps(STEPS)), await here.accept("s", "two")
        third = await here.accept("s", "three")
        await here.tab.open("#/sessions/s")
        await here.button("Cancel run 2").click()
        await expect(here.page.get_by_role("heading", name="Queue (1)")).to_be_visible()
        assert await here.state(second) == "RUN_STATE_CANCELLED"
        await here.button("Clear the queue").click()
        await expect(here.page.get_by_role("heading", name="Queue")).to_be_hidden()
        assert await here.state(third) == "RUN_STATE_CANCELLED"
        here.server.gates.open("g")
        assert await here.state(first) == "RUN_STATE_COMPLETED"


async def queue_of(here: World, *prompts: str) -> Locator:
    """A session whose active run waits, with runs behind it; their rows in the console."""
    await here.accept("s", json.dumps(STEPS))
    for prompt in prompts:
        await here.accept("s", json.dumps([{"text": prompt}]))
    await here.tab.open("#/sessions/s")
    rows = here.page.locator(".queue li")
    await expect(rows).to_contain_text(list(prompts))
    return rows


async def test_r47_waiting_runs_are_moved_by_keyboard_and_by_mouse(
    chromium: Browser, tmp_path: Path
) -> None:
    async with world(chromium, tmp_path) as here:
        rows = await queue_of(here, "two", "three", "four")
        await here.button("Move up run 4").focus()
        await here.page.keyboard.press("Enter")
        await expect(rows).to_contain_text(["two", "four", "three"])
        # The focus stays on the row that was moved.
        await expect(here.button("Move up run 4")).to_be_focused()
        await here.page.keyboard.press("Enter")
        await expect(rows).to_contain_text(["four", "two", "three"])
        # Its first control is disabled now.
        await expect(here.button("Move down run 4")).to_be_focused()
        await here.button("Move down run 2").click()
        await expect(rows).to_contain_text(["four", "three", "two"])
        await rows.nth(2).drag_to(rows.nth(0))
        await expect(rows).to_contain_text(["two", "four", "three"])
        await expect(here.button("Move up run 2")).to_be_disabled()
        await expect(here.button("Move down run 3")).to_be_disabled()


async def test_r46_a_waiting_run_is_edited_and_another_edit_is_not_overwritten(
    chromium: Browser, tmp_path: Path
) -> None:
    async with world(chromium, tmp_path) as here:
        rows = await queue_of(here, "two")
        await here.button("Edit run 2").click()
        box = here.page.get_by_label("Prompt of run 2")
        await expect(box).to_be_focused()
        await box.fill(json.dumps([{"text": "new"}]))
        await here.page.keyboard.press("Control+Enter")
        await expect(rows).to_contain_text(["new"])
        await expect(box).to_be_hidden()
        await here.button("Edit run 2").click()
        await expect(box).to_be_focused()
        run_id = (await here.page.locator(".queue a").get_attribute("href") or "").split("/")[-1]
        body = {"prompt": json.dumps([{"text": "theirs"}]), "updateMask": "prompt"}
        got = await here.door.http.patch(f"/v1/runs/{run_id}", json=body)
        assert got.status_code == 200, got.text
        await box.fill("mine")
        await here.button("Save").click()
        await expect(here.page.get_by_role("alert")).to_contain_text("revision")
        await here.page.keyboard.press("Escape")
        await expect(rows).to_contain_text(["theirs"])


async def test_r46_the_form_has_the_whole_prompt_of_a_waiting_run(
    chromium: Browser, tmp_path: Path
) -> None:
    async with world(chromium, tmp_path) as here:
        await here.accept("s", json.dumps(STEPS))
        await here.accept("s", json.dumps([{"text": "x" * 1_000}]))
        await here.tab.open("#/sessions/s")
        rows = here.page.locator(".queue li")
        await here.button("Edit run 2").click()
        box = here.page.get_by_label("Prompt of run 2")
        await expect(box).to_have_value(json.dumps([{"text": "x" * 1_000}]))
        await box.press("Control+End")
        await box.press("End")
        await here.page.keyboard.type(" ")
        await here.button("Save").click()
        await expect(box).to_be_hidden()
        run_id = (await rows.locator("a").get_attribute("href") or "").split("/")[-1]
        got = await here.door.http.get(f"/v1/runs/{run_id}", params={"withPrompt": "true"})
        assert got.json()["prompt"] == {"text": json.dumps([{"text": "x" * 1_000}]) + " "}


async def test_r46_a_waiting_run_is_sent_now(chromium: Browser, tmp_path: Path) -> None:
    async with world(chromium, tmp_path) as here:
        rows = await queue_of(here, "two", "three")
        await here.button("Fold into the active turn run 2").click()
        await expect(rows.nth(0)).to_contain_text("fold")
        await here.button("Interrupt the active run with run 3").click()
        said = here.page.locator("article.agent").filter(has_text="three")
        await expect(said).to_be_visible()
        got = await here.door.http.get("/v1/sessions/s/runs")
        states = {run["acceptSeq"]: run["state"] for run in got.json()["runs"]}
        assert states["1"] == "RUN_STATE_CANCELLED"


async def test_two_tabs_see_the_same_session(chromium: Browser, tmp_path: Path) -> None:
    async with world(chromium, tmp_path) as here, tab(chromium, here.door) as other:
        await here.accept("s", json.dumps(STEPS))
        await here.tab.open("#/sessions/s")
        await other.open("#/sessions/s")
        for page in (here.page, other.page):
            await expect(page.locator(".live")).to_contain_text("It is")
        await other.page.get_by_label("Prompt").fill("after that")
        await other.page.get_by_role("button", name="Send").click()
        await expect(here.page.get_by_role("heading", name="Queue (1)")).to_be_visible()
        await here.button("Cancel run 2").click()
        await expect(other.page.get_by_role("heading", name="Queue")).to_be_hidden()
        here.server.gates.open("g")
        for page in (here.page, other.page):
            await expect(page.locator("article.agent").nth(1)).to_contain_text("It is blue.")


async def test_r25_the_console_reconnects_and_loses_nothing_when_the_gateway_restarts(
    chromium: Browser, tmp_path: Path
) -> None:
    async with (
        LocalServer("scripted") as server,
        AsyncExitStack() as first_door,
    ):
        opened = await first_door.enter_async_context(door(server.address))
        async with tab(chromium, opened) as first, tab(chromium, opened) as other:
            here = World(server, opened, first, chromium)
            words = [{"text": f"w{n} "} for n in range(20)]
            script = [*words[:10], {"wait": "g"}, *words[10:], {"wait": "h"}]
            run_id = await here.accept("s", json.dumps(script))
            await first.open("#/sessions/s")
            await other.open(f"#/runs/{run_id}")
            entries = other.page.locator(".timeline li")
            await expect(entries).to_have_count(3)
            live, connection = here.page.locator(".live"), here.page.locator("#connection")
            await expect(live).to_contain_text("w9")
            await first_door.aclose()
            await expect(connection).to_have_text("Reconnecting…")
            server.gates.open("g")
            async with door(server.address, port=opened.port):
                await expect(connection).to_have_text("Connected")
                await expect(live).to_contain_text("w19")
                text = await live.locator(".text").inner_text()
                assert text.split() == [f"w{n}" for n in range(20)]
                server.gates.open("h")
                await expect(entries).to_have_count(4)
                await expect(entries.nth(2)).to_contain_text("70 characters")
                await expect(live).to_have_count(0)
                await expect(here.page.locator("article.agent")).to_contain_text("w19")


async def test_a_tab_in_the_background_holds_no_stream_and_catches_up(
    chromium: Browser, tmp_path: Path
) -> None:
    """A browser has six connections for all tabs of a site."""
    async with world(chromium, tmp_path) as here:
        await here.accept("s", json.dumps(STEPS))
        await here.tab.open("#/sessions/s")
        await expect(here.page.locator(".live")).to_contain_text("It is")
        async with here.page.expect_event("requestfailed") as ended:
            await here.page.evaluate(SHOW_TAB, False)
        assert (await ended.value).url.endswith("/events")
        here.server.gates.open("g")
        await here.page.evaluate(SHOW_TAB, True)
        await expect(here.page.locator("article.agent").last).to_contain_text("It is blue.")


SHOW_TAB = """(isShown) => {
    Object.defineProperty(document, "hidden", { value: !isShown, configurable: true });
    document.dispatchEvent(new Event("visibilitychange"));
}"""


async def test_the_console_survives_restarts_of_the_server(
    chromium: Browser, tmp_path: Path
) -> None:
    async with world(chromium, tmp_path, "echo") as here:
        await here.accept("s", "before")
        await here.tab.open("#/sessions/s")
        await expect(here.page.locator("article.agent")).to_contain_text("before")
        await here.server.stop()
        await expect(here.page.locator("#connection")).to_have_text("Reconnecting…")
        await here.page.get_by_label("Prompt").fill("meanwhile")
        await here.button("Send").click()
        # It is kept for another try, whose key is the same.
        await expect(here.page.get_by_role("alert").first).to_be_visible()
        await expect(here.page.get_by_label("Prompt")).to_have_value("meanwhile")
        await here.server.start()
        await expect(here.page.locator("#connection")).to_have_text("Connected")
        await here.button("Send").click()
        await expect(here.page.locator("article.agent").nth(1)).to_contain_text("meanwhile")


async def test_text_that_tries_to_be_html_stays_text(chromium: Browser, tmp_path: Path) -> None:
    steps = [
        {"reasoning": HOSTILE},
        {"tool_call": {"id": "1", "name": HOSTILE, "arguments": {"a": HOSTILE}}},
        {"tool_result": {"id": "1", "name": HOSTILE, "content": HOSTILE, "is_error": True}},
        {"text": HOSTILE},
        {"fail": HOSTILE, "reason": "BAD"},
    ]
    labels = {"metadata": {"label": HOSTILE}}
    async with world(chromium, tmp_path) as here:
        session = {"sessionId": HOSTILE[:80], "title": HOSTILE}
        got = await here.door.http.post("/v1/sessions", json=session)
        session_id = got.json()["session"]["sessionId"] if got.status_code == 200 else "s"
        run_id = await here.accept(session_id, json.dumps(steps), **labels)
        await here.accept(session_id, HOSTILE, **labels)
        await here.state(run_id)
        await here.tab.open()
        await here.page.get_by_role("link", name=session_id).click()
        await expect(here.page.locator("article.agent").last).to_contain_text(HOSTILE)
        await here.tab.open(f"#/runs/{run_id}")
        await expect(here.page.locator("dd").get_by_text(HOSTILE).first).to_be_visible()
        await expect(here.page.locator(".timeline .runComplete")).to_contain_text(HOSTILE)
        await here.tab.open("#/runs")
        await expect(here.page.locator("tbody tr")).to_have_count(2)
        assert await here.page.locator("img, main script").count() == 0
        assert "owned" not in await here.page.title()


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("document.body.innerHTML = 'x'", "TypeError"),
        ("document.write('x')", "TypeError"),
        ("document.createElement('script').text = 'x'", "TypeError"),
        ("fetch('https://example.com/')", "TypeError"),
    ],
)
async def test_code_that_makes_html_or_asks_elsewhere_is_stopped(
    chromium: Browser, tmp_path: Path, code: str, error: str
) -> None:
    """The policy that keeps data from being code, should the console ever try."""
    async with world(chromium, tmp_path) as here:
        await here.tab.open()
        caught = "async () => { try { await " + code + " } catch (error) { return error.name } }"
        if "=" in code:
            caught = caught.replace("await ", "")
        assert await here.page.evaluate(caught) == error
        here.tab.errors.clear()


async def test_runs_are_filtered_by_state_and_session(chromium: Browser, tmp_path: Path) -> None:
    async with world(chromium, tmp_path) as here:
        await here.state(await here.accept("one", "done"))
        await here.state(await here.accept("two", json.dumps([{"fail": "no"}])))
        await here.accept("three", json.dumps(STEPS))
        await here.tab.open("#/runs")
        rows = here.page.locator("tbody tr")
        await expect(rows).to_have_count(3)
        for choice, session in (("failed", "two"), ("not ended", "three"), ("completed", "one")):
            await here.page.get_by_label("State").select_option(choice)
            await expect(rows).to_have_count(1)
            await expect(rows).to_contain_text(session)
        await here.page.get_by_label("State").select_option("all")
        await here.page.get_by_label("Session id").fill("two")
        await here.page.keyboard.press("Enter")
        await expect(rows).to_have_count(1)
        assert "session=two" in here.page.url
        await here.page.reload()
        await expect(rows).to_contain_text("two")


async def test_a_run_shows_its_events_attempts_and_error(chromium: Browser, tmp_path: Path) -> None:
    async with world(chromium, tmp_path) as here:
        steps = [*STEPS, {"fail": "it broke", "reason": "BROKEN"}]
        run_id = await here.accept("s", json.dumps(steps), metadata={"customer": "c1"})
        await here.tab.open(f"#/runs/{run_id}")
        rows = here.page.locator(".timeline li")
        await expect(rows.nth(0)).to_contain_text("number 1 of the session")
        await expect(rows.nth(1)).to_contain_text("attempt 1")
        await expect(here.page.locator("dl")).to_contain_text("active")
        here.server.gates.open("g")
        await expect(rows.last).to_contain_text("failed; BROKEN: it broke")
        # `It is ` and `blue.` follow each other.
        await expect(rows.nth(6)).to_contain_text("11 characters in 2 pieces")
        await expect(here.page.locator("dl")).to_contain_text("BROKEN: it broke")
        await expect(here.page.locator("dl")).to_contain_text("customer")
        await expect(here.button("Cancel the run")).to_be_hidden()


async def test_r42_a_cancel_takes_the_question_away(chromium: Browser, tmp_path: Path) -> None:
    async with world(chromium, tmp_path) as here:
        await here.accept("s", json.dumps([{"ask": {"text": "Why?"}}]))
        await here.tab.open("#/sessions/s")
        question = here.page.get_by_label("Question: Why?")
        await expect(question).to_be_visible()
        await here.button("Cancel the active run").click()
        receipt = here.page.get_by_label("Receipt of the cancel")
        await expect(receipt.locator("tbody")).to_contain_text("input required")
        await expect(question).to_have_count(0)


async def test_artifacts_steps_and_results_are_folded(chromium: Browser, tmp_path: Path) -> None:
    steps = [
        {"artifact": {"id": "a", "name": "plan", "text": "one ", "last": False}},
        {"artifact": {"id": "a", "text": "two", "append": True, "last": True}},
        {"artifact": {"id": "b", "name": "site", "uri": "javascript:alert(1)", "last": True}},
        {"custom": {"type": "weather", "json": {"sky": "blue"}}},
        {"once": "look-up"},
        {"wait": "g"},
        {"result": {"total": 1}},
    ]
    async with world(chromium, tmp_path) as here:
        run_id = await here.accept("s", json.dumps(steps))
        await here.tab.open("#/sessions/s")
        live = here.page.locator(".live")
        await live.get_by_text("Artifact: plan").click()
        await expect(live.get_by_text("one two", exact=True)).to_be_visible()
        await live.get_by_text("weather").click()
        await expect(live.get_by_text('"sky": "blue"')).to_be_visible()
        await expect(live).to_contain_text("Step: look-up")
        here.server.gates.open("g")
        await expect(live).to_have_count(0)
        for text in ("Artifact: plan", "Artifact: site", "Result"):
            await expect(here.page.locator("summary").filter(has_text=text)).to_be_visible()
        assert await here.page.locator("a[href^=javascript]").count() == 0
        await here.tab.open(f"#/runs/{run_id}")
        await here.page.get_by_text("Structured result").click()
        await expect(here.page.get_by_text('"total": 1').first).to_be_visible()


async def test_r38_each_attempt_is_shown_and_the_transcript_has_the_last(
    chromium: Browser, tmp_path: Path
) -> None:
    steps = [{"say": "attempt"}, {"fail": "no", "reason": "BUSY", "attempts": 1}, {"wait": "g"}]
    policy = {"reasons": ["BUSY"], "maxAttempts": 2, "initialBackoff": "0.01s", "afterOutput": True}
    async with world(chromium, tmp_path) as here:
        run_id = await here.accept("s", json.dumps(steps), retryPolicy=policy)
        await here.tab.open("#/sessions/s")
        await expect(here.page.locator(".live .note")).to_have_text("Attempt 2")
        await expect(here.page.locator(".live .text")).to_have_text("2")
        await here.tab.open(f"#/runs/{run_id}")
        await expect(here.page.locator(".timeline .started")).to_have_count(2)
        here.server.gates.open("g")
        await expect(here.page.locator("dl")).to_contain_text("completed")


async def test_r41_a_tool_call_is_approved_with_other_arguments(
    chromium: Browser, tmp_path: Path
) -> None:
    ask = {"text": "May I?", "tool_name": "pay", "arguments": {"amount": 7}}
    async with world(chromium, tmp_path) as here:
        run_id = await here.accept("s", json.dumps([{"ask": ask}]))
        await here.tab.open("#/sessions/s")
        question = here.page.get_by_label("Question: May I?")
        await expect(question).to_contain_text("pay")
        arguments = question.get_by_label("Arguments")
        await expect(arguments).to_have_value('{\n  "amount": 7\n}')
        await arguments.fill('{"amount": 5}')
        await question.get_by_role("button", name="Approve").click()
        assert await here.state(run_id) == "RUN_STATE_COMPLETED"
        await expect(here.page.locator("article.agent")).to_contain_text("5")
        await expect(question).to_have_count(0)


async def test_r41_questions_of_every_kind_are_answered(chromium: Browser, tmp_path: Path) -> None:
    schema = {
        "type": "object",
        "properties": {
            "city": {"type": "string", "title": "City"},
            "nights": {"type": "integer"},
            "meal": {"enum": ["none", "half"]},
            "pets": {"type": "boolean"},
        },
        "required": ["city", "nights", "meal"],
    }
    nested = {"type": "object", "properties": {"a": {"type": "array"}}}
    asks = [
        {"text": "Which?", "choices": ["red", "blue"]},
        {"text": "Why?"},
        {"text": "Where?", "schema": schema},
        {"text": "What?", "schema": nested},
    ]
    async with world(chromium, tmp_path) as here:
        run_id = await here.accept("s", json.dumps([{"ask": each} for each in asks]))
        await here.tab.open("#/questions")
        await here.button("blue").click()
        await here.page.get_by_label("Answer").fill("because")
        await here.button("Answer").click()
        where = here.page.get_by_label("Question: Where?")
        await where.get_by_label("City").fill("Rome")
        await where.get_by_label("nights").fill("3")
        await where.get_by_label("meal").select_option("half")
        await where.get_by_label("pets").check()
        await here.button("Answer").click()
        await here.page.get_by_label("Answer as JSON").fill("{")
        await here.button("Answer").click()
        await expect(here.page.get_by_role("alert")).to_have_text("The answer is not JSON.")
        await here.page.get_by_label("Answer as JSON").fill('{"a": [1]}')
        await here.button("Answer").click()
        assert await here.state(run_id) == "RUN_STATE_COMPLETED"
        got = await here.door.http.get("/v1/input-requests", params={"run_id": run_id})
        answers = [each["answer"] for each in reversed(got.json()["inputRequests"])]
        assert answers[0]["choice"] == "blue"
        assert answers[1]["text"] == "because"
        assert json.loads(answers[2]["formJson"]) == {
            "city": "Rome",
            "nights": 3,
            "meal": "half",
            "pets": True,
        }
        assert json.loads(answers[3]["formJson"]) == {"a": [1]}


async def test_r41_of_two_answers_in_two_tabs_the_second_is_told(
    chromium: Browser, tmp_path: Path
) -> None:
    async with world(chromium, tmp_path) as here, tab(chromium, here.door) as other:
        ask = {"text": "Which?", "choices": ["red", "blue"]}
        run_id = await here.accept("s", json.dumps([{"ask": ask}]))
        for each in (here.tab, other):
            await each.open("#/questions")
            await expect(each.page.get_by_label("Question: Which?")).to_be_visible()
        # The list of the second tab stays as it is.
        await other.page.route("**/v1/input-requests?*", lambda route: route.abort())
        await here.button("red").click()
        assert await here.state(run_id) == "RUN_STATE_COMPLETED"
        await other.page.get_by_role("button", name="blue").click()
        said = other.page.get_by_role("alert")
        await expect(said).to_contain_text("does not count: the question was answered")


async def test_agents_are_shown(chromium: Browser, tmp_path: Path) -> None:
    async with world(chromium, tmp_path, "echo") as here:
        await here.tab.open("#/agents")
        await expect(here.page.locator("tbody tr")).to_contain_text("ready")


async def test_webhooks_are_managed(chromium: Browser, tmp_path: Path) -> None:
    async with (
        serving(tmp_path, "--webhook-allow-network", "127.0.0.0/8") as server,
        door(server.address) as opened,
        tab(chromium, opened) as first,
        endpoint() as served,
    ):
        page = first.page
        await first.open("#/webhooks")
        await expect(page.get_by_text("There are no webhooks.")).to_be_visible()
        await page.get_by_text("New webhook").click()
        await page.get_by_label("URL", exact=True).fill("http://10.0.0.1/")
        await page.get_by_role("button", name="Create").click()
        await expect(page.get_by_role("alert")).to_contain_text("not a global one")
        await page.get_by_label("URL", exact=True).fill(served.url)
        await page.get_by_role("button", name="Create").click()
        secret = await page.locator("pre.secret").text_content()
        row = page.locator("tbody tr")
        await expect(row).to_contain_text("delivering")
        body = {"sessionId": "s", "prompt": "hello", "allowMissing": True}
        assert (await opened.http.post("/v1/runs", json=body)).status_code == 200
        await served.until(lambda: len(served.accepted) == 1)
        served.accepted[0].verify(str(secret))
        await page.get_by_role("button", name="Disable").click()
        await expect(row).to_contain_text("disabled")
        await expect(page.locator("pre.secret")).to_have_count(0)
        await page.get_by_role("button", name="Enable").click()
        await expect(row).to_contain_text("delivering")
        await page.get_by_role("button", name="Redeliver").click()
        await served.until(lambda: len(served.accepted) == 2)
        await page.get_by_role("button", name="Rotate secret").click()
        await expect(page.locator("pre.secret")).to_contain_text("whsec_")
        assert await page.locator("pre.secret").text_content() != secret
        await page.get_by_role("button", name="Hide").click()
        await expect(page.locator("pre.secret")).to_have_count(0)
        assert await page.evaluate(NAMELESS) == []
        page.once("dialog", lambda dialog: dialog.accept())
        await page.get_by_role("button", name="Delete").click()
        await expect(page.get_by_text("There are no webhooks.")).to_be_visible()


async def test_a_new_session_is_made_and_opened(chromium: Browser, tmp_path: Path) -> None:
    async with world(chromium, tmp_path, "echo") as here:
        await here.tab.open()
        await here.page.get_by_text("New session").click()
        await here.page.get_by_label("Title", exact=True).fill("My session")
        await here.button("Create").click()
        await expect(here.page.get_by_role("heading", name="My session")).to_be_visible()


async def test_a_session_that_does_not_exist_says_so(chromium: Browser, tmp_path: Path) -> None:
    async with world(chromium, tmp_path, "echo") as here:
        await here.tab.open("#/sessions/none")
        await expect(here.page.get_by_role("alert")).to_contain_text("none")


async def test_ten_thousand_sessions_are_paged_and_searched(
    chromium: Browser, tmp_path: Path
) -> None:
    async with world(chromium, tmp_path, "echo") as here:
        for n in range(10_000):
            await here.server.coordinator.sessions.create(f"session-{n:05}", title=f"title {n}")
        await here.tab.open()
        rows = here.page.locator("tbody tr")
        await expect(rows).to_have_count(100)
        await expect(rows.first).to_contain_text("session-09999")
        await here.button("Next page").click()
        await expect(rows.first).to_contain_text("session-09899")
        await here.button("Previous page").click()
        await expect(rows.first).to_contain_text("session-09999")
        await here.page.get_by_label("Search").fill("TITLE 123")
        await expect(here.page.get_by_text("11 sessions found.")).to_be_visible()
        await expect(rows).to_have_count(11)
        # The focus stays where the reader types while the list is refreshed.
        await here.page.keyboard.type("4")
        await expect(rows).to_have_count(1)
        await here.page.get_by_label("Search").fill("")
        await here.accept("newest", "hello")
        await expect(rows.first).to_contain_text("newest")


async def test_ten_thousand_messages_are_read_page_by_page(
    chromium: Browser, tmp_path: Path
) -> None:
    pair: Sequence[dict[str, dict[str, Any]]] = [
        {"tool_call": {"id": "1", "name": "look", "arguments": {}}},
        {"tool_result": {"id": "1", "name": "look", "content": "x", "is_error": False}},
    ]
    async with world(chromium, tmp_path) as here:
        for _ in range(50):
            calls = [
                {kind: each[kind] | {"id": f"{n}"} for kind in each}
                for n in range(99)
                for each in pair
            ]
            run_id = await here.accept("s", json.dumps([*calls, {"text": "end"}]))
            assert await here.state(run_id) == "RUN_STATE_COMPLETED"
        await here.tab.open("#/sessions/s")
        articles = here.page.locator("article")
        await expect(articles.last).to_contain_text("end")
        shown = await articles.count()
        assert 100 <= shown <= 400
        await here.button("Earlier messages").click()
        await expect(articles).to_have_count(shown + 200)


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["1600", "390"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_every_view_fits_its_screen_and_its_controls_have_names(
    chromium: Browser, tmp_path: Path, size: Any, scheme: Any
) -> None:
    async with world(chromium, tmp_path, size=size, scheme=scheme) as here:
        await here.state(await here.accept("holiday", "Hello"))
        run_id = await here.accept("holiday", json.dumps(STEPS))
        await here.accept("holiday", "And tomorrow?")
        hook = {"url": "https://example.org/" + "long-path/" * 20, "disabled": True}
        assert (await here.door.http.post("/v1/webhooks", json=hook)).status_code == 200
        views = ("sessions", "sessions/holiday", "runs", f"runs/{run_id}", "agents", "webhooks")
        for where in (f"#/{view}" for view in views):
            await here.tab.open(where)
            ready = ".live, tbody tr, .timeline li"
            await here.page.locator(ready).first.wait_for()
            wide = await here.page.evaluate("document.documentElement.scrollWidth")
            assert wide <= size["width"], where
            assert await here.page.evaluate(NAMELESS) == [], where


NAMELESS = """() => [...document.querySelectorAll("a, button, input, select, textarea")]
    .filter((each) => !(each.textContent.trim() || each.ariaLabel || each.labels?.length))
    .map((each) => each.outerHTML)"""
"""The controls that a screen reader could not name."""


async def test_everything_is_reached_by_keyboard(chromium: Browser, tmp_path: Path) -> None:
    async with world(chromium, tmp_path, "echo") as here:
        await here.accept("s", "hello")
        await here.tab.open()
        await here.page.reload()
        await here.page.locator("tbody a").wait_for()
        seen = []
        for _ in range(20):
            await here.page.keyboard.press("Tab")
            seen.append(await here.page.evaluate("document.activeElement.textContent"))
            if seen[-1] == "s":
                break
        assert seen[-1] == "s", seen
        await here.page.keyboard.press("Enter")
        await expect(here.page.get_by_role("heading", name="s", exact=True)).to_be_visible()


async def travel_agent(turn: Turn) -> AsyncGenerator[AgentEvent, None]:
    """Plays what the pictures of the docs show."""
    if "Lisbon" not in whole_text(turn.prompt):
        yield TextDelta("Lisbon is mild in March: 18 °C, and the trams are not full yet.")
        return
    yield ReasoningDelta("Two travellers, three nights. The centre justifies the price.")
    yield TextDelta("I look for rooms in the centre.")
    yield ToolCall("1", "find_hotel", json.dumps({"city": "Lisbon", "nights": 3}))
    yield ToolResult("1", "find_hotel", "Casa do Rio, 412 EUR")
    yield TextDelta("Casa do Rio has a room with a view of the river, 412 EUR for three nights.")
    await turn.ask(
        "Book this room?", tool_name="book", arguments={"hotel": "Casa do Rio", "price": 412}
    )


@pytest.mark.parametrize(
    ("name", "size", "scheme"),
    [
        ("console", ViewportSize(width=1280, height=1150), "light"),
        ("console-narrow", NARROW, "dark"),
    ],
)
async def test_the_pictures_of_the_docs_are_made(
    chromium: Browser, tmp_path: Path, name: str, size: Any, scheme: Any
) -> None:
    """With RUNLANE_PICTURES they are kept."""
    folder = Path(os.environ.get("RUNLANE_PICTURES", tmp_path))
    async with world(chromium, tmp_path, travel_agent, size=size, scheme=scheme) as here:
        session = {"sessionId": "holiday", "title": "Holiday in March"}
        await here.door.http.post("/v1/sessions", json=session)
        await here.state(await here.accept("holiday", "Where is it warm in March?"))
        await here.accept("holiday", "Find a room in Lisbon for two, three nights")
        await here.accept("holiday", "And how do we get there?")
        await here.tab.open("#/sessions/holiday")
        await expect(here.page.get_by_label("Question: Book this room?")).to_be_visible()
        await expect(here.page.get_by_role("heading", name="Queue (1)")).to_be_visible()
        await here.tab.picture(folder, name)
    assert (folder / f"{name}.png").stat().st_size < 200_000
