"""A real browser, for tests of the console."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

from playwright.async_api import Browser, Page, ViewportSize, async_playwright

from support.door import OWN, Door

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
"""The browser of the system; none is downloaded."""

MISSING = "chromium is not installed; run: apt-get install chromium"

WIDE, NARROW = ViewportSize(width=1600, height=900), ViewportSize(width=390, height=844)

AWAY = ("net::ERR_", "Failed to load resource")
"""Messages that a browser logs by itself about a request that failed."""


@asynccontextmanager
async def browser() -> AsyncIterator[Browser]:
    """Starts the browser."""
    assert CHROMIUM is not None, MISSING
    async with async_playwright() as playwright:
        # Without the sandbox it also runs as root.
        opened = await playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        try:
            yield opened
        finally:
            await opened.close()


class Tab:
    """A tab of its own, with what its page logged.

    Attributes:
        page: The page.
        errors: Errors of its code, and everything that its Content-Security-Policy refused.
        hosts: The hosts that it asked.
    """

    def __init__(self, page: Page, opened: Door) -> None:
        self.page = page
        self.errors: list[str] = []
        self.hosts: set[str] = set()
        self._opened = opened
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", self._log)
        page.on("request", lambda request: self.hosts.add(request.url.split("/")[2]))

    def _log(self, message: Any) -> None:
        if message.type == "error" and not any(word in message.text for word in AWAY):
            self.errors.append(message.text)

    @property
    def url(self) -> str:
        """The address of the console."""
        return f"http://{self._opened.host}:{self._opened.port}/"

    async def open(self, where: str = "") -> None:
        """Signs in by the address, and shows a view."""
        await self.page.goto(f"{self.url}#token={OWN.token}")
        await self.page.get_by_role("heading", name="Sessions").wait_for()
        if where:
            await self.page.evaluate("where => { location.hash = where }", where)

    async def picture(self, folder: Path, name: str) -> None:
        """Saves what is seen, once all of it is drawn."""
        await self.page.evaluate(
            "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
        )
        await self.page.screenshot(path=folder / f"{name}.png")


@asynccontextmanager
async def tab(
    browser: Browser,
    opened: Door,
    size: ViewportSize = WIDE,
    scheme: Literal["light", "dark"] = "light",
) -> AsyncIterator[Tab]:
    """Opens a tab before a door; at its end its code must have made no error."""
    context = await browser.new_context(viewport=size, color_scheme=scheme, locale="en-GB")
    context.set_default_timeout(20_000)
    try:
        found = Tab(await context.new_page(), opened)
        yield found
        assert found.errors == []
        assert found.hosts <= {f"{opened.host}:{opened.port}"}
    finally:
        await context.close()
