"""The README and the pages of docs/ show what happens: a walk runs their commands in order.

The first-steps pages need more tools and have their own walks (tests/polyglot, and
test_pytest_plugin for pytest). A block that is not run says why right above it, in a comment.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from polyglot.checkout import checkout, free_port
from polyglot.languages import ROOT
from polyglot.pages import Expected, Shown, steps_of
from polyglot.walk import Walk, on_screen
from support.openai_server import OpenAIServer

pytestmark = pytest.mark.sqlite("the pages name their stores")

WALK_SECONDS = 90.0

MODEL, METRICS, HTTP = "127.0.0.1:8000", "9464", ("8080", "8081", "9080")
"""The addresses of a model, of the metrics and of HTTP on the pages; each walk has its own."""

DOCUMENTS = sorted(
    page.relative_to(ROOT).as_posix()
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"))
)

PAGES = [page for page in DOCUMENTS if not page.startswith("docs/first-steps-")]

WALKED = [page for page in PAGES if "\n```sh\n" in (ROOT / page).read_text()]

REASONS = {
    "installs from the package index",
    "needs a database server",
    "needs a cluster",
    "needs root",
    "needs a container engine",
    "takes minutes, and has tests of its own",
    "an excerpt",
    "needs a damaged database",
    "needs a person at the keyboard",
    "runs until it is stopped, and has tests of its own",
}
"""The permitted reasons not to run a block."""


@asynccontextmanager
async def reachable(page: str) -> AsyncIterator[str]:
    """The page, with ports of this walk for the metrics, HTTP and a model."""
    for port in (METRICS, *HTTP):
        page = page.replace(port, str(free_port()))
    if MODEL not in page:
        yield page
        return
    async with OpenAIServer().serving() as model:
        yield page.replace(MODEL, f"127.0.0.1:{model.port}")


@pytest.mark.timeout(WALK_SECONDS)
@pytest.mark.parametrize("page", WALKED)
async def test_a_page_shows_what_happens(page: str, tmp_path: Path) -> None:
    text = (ROOT / page).read_text()
    missing = [tool for tool in ("make", "openssl", "curl") if shutil.which(tool) is None]
    if needed := [tool for tool in missing if re.search(rf"^{tool} ", text, re.MULTILINE)]:
        pytest.skip(f"{needed[0]} is not installed")
    port = free_port()
    checkout(tmp_path / "runlane", port)
    async with (
        reachable(text) as reader_page,
        Walk(reader_page, tmp_path, port, {}, screen=True) as walk,
    ):
        await walk.walk()


def test_the_pages_with_commands_are_walked() -> None:
    assert {"README.md", "docs/agents.md", "docs/operate.md", "docs/security.md"} <= set(WALKED)


@pytest.mark.parametrize("page", PAGES)
def test_a_block_that_is_not_run_says_why(page: str) -> None:
    steps = list(steps_of((ROOT / page).read_text()))
    reasons = Counter(step.reason for step in steps if isinstance(step, Shown))
    assert set(reasons) <= REASONS | {"a picture"}


@pytest.mark.parametrize("page", DOCUMENTS)
def test_a_link_leads_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            assert anchor in {_anchor(title) for title in titles}, target


def _anchor(title: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("a\r\nb\r\n\r\n", "a\nb\n"),
        ("\x1b[1ma\x1b[0m\n", "a\n"),
        ("wait\r\x1b[2Kdone\n", "done\n"),
        ("first\nwait\n\x1b[1A\x1b[2Kdone\n", "first\ndone\n"),
        ("\x1b[?25l\x1b[1A\x1b[2Ka", "a\n"),
        ("wait\r\x1b[2K", ""),
    ],
)
def test_the_screen_shows_what_is_not_overwritten(written: str, shown: str) -> None:
    assert on_screen(written) == shown


def test_an_output_belongs_to_a_command() -> None:
    for page in WALKED:
        steps = list(steps_of((ROOT / page).read_text()))
        assert not isinstance(steps[0], Expected)
