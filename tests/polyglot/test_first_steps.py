"""The first-steps pages show what happens: a walk runs their commands in order."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from polyglot.checkout import checkout, free_port
from polyglot.languages import LANGUAGES, ROOT, Tool
from polyglot.pages import Expected, File, Samples, found_in_order, steps_of
from polyglot.walk import Walk

PROGRAMS = ROOT / ".cache" / "polyglot" / "bin"
"""The folder for programs that a page installs into the reader's PATH."""

WALK_SECONDS = 600.0
"""Limit for a walk; the first one fetches libraries."""

MAKE = Tool(("make", "--version"), (3, 81))
GO = Tool(("go", "version"), (1, 25))
OPENSSL = Tool(("openssl", "version"), (1, 1))


@dataclass(frozen=True, slots=True)
class Page:
    """A page: its name, its languages, and the tools that its reader needs."""

    name: str
    languages: tuple[str, ...]
    tools: tuple[Tool, ...] = ()

    @property
    def text(self) -> str:
        """Its content."""
        return (ROOT / "docs" / f"first-steps-{self.name}.md").read_text()

    def missing(self) -> str:
        """The reason why it cannot be walked here; empty if it can."""
        return "; ".join(reason for tool in (MAKE, *self.tools) if (reason := tool.missing()))


PAGES = (
    Page("go", ("go",), (GO,)),
    Page("worker", ("go",), (GO,)),
    Page("typescript", ("typescript",), LANGUAGES["typescript"].tools),
    Page("subscriber", ("python",)),
    Page("harness", ("python", "go"), (GO,)),
    Page("grpcurl", ("go",), (GO, OPENSSL)),
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`--language` chooses pages as it does examples."""
    if "page" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--language", None) or list(LANGUAGES)
        pages = [page for page in PAGES if set(chosen) & set(page.languages)]
        metafunc.parametrize("page", pages, ids=[page.name for page in pages])


@pytest.mark.timeout(WALK_SECONDS)
async def test_a_page_shows_what_happens(page: Page, tmp_path: Path) -> None:
    if reason := page.missing():
        if os.environ.get("RUNLANE_POLYGLOT_ALL") == "1":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    port = free_port()
    checkout(tmp_path / "runlane", port)
    PROGRAMS.mkdir(parents=True, exist_ok=True)
    path = f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}"
    env = {"GOBIN": str(PROGRAMS), "PATH": path}
    async with Walk(page.text, tmp_path, port, env) as walk:
        await walk.walk()


# --- The walk itself ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shown", "said", "well"),
    [
        (["a 0.02s"], ["a 1.3s"], True),
        (["a"], ["a", "b"], False),
        (["a", "b"], ["a"], False),
        (["a", "..."], ["a", "b"], True),
        (["...", "b"], ["a", "b"], True),
        (["a", "...", "c"], ["a", "b", "b", "c"], True),
        (["a", "...", "c"], ["a", "b"], False),
        (["...", "a", "c"], ["a", "b", "a", "c"], True),
        (["a ... c"], ["a b c"], True),
        (["RUN_STATE_ACTIVE"], ["RUN_STATE_ACCEPTED"], False),
    ],
)
def test_output_matches_apart_from_ids_times_and_numbers(
    shown: Sequence[str], said: Sequence[str], well: bool
) -> None:
    assert Samples().learn(shown, said) is well


def test_other_lines_are_skipped_only_in_the_output_of_a_running_program() -> None:
    shown = ["reconnecting", "mark", "mark", "ended: 1"]
    expected = ["reconnecting", "reconnecting", "mark", "ended: 1"]
    assert found_in_order(expected, shown, Samples()) == len(shown)
    assert found_in_order(["ended: 1", "mark"], shown, Samples()) is None


def test_ids_of_the_page_are_replaced_by_those_of_the_walk() -> None:
    samples = Samples()
    page, own = f"A{'c' * 26}", f"A{'d' * 26}"
    assert samples.learn([f'"cursor": "{page}"'], [f'"cursor":  "{own}"'])
    assert samples.exchanged(f"resume {page}") == f"resume {own}"


def test_a_block_without_an_instruction_is_refused() -> None:
    with pytest.raises(AssertionError, match="does not say what to do"):
        list(steps_of("```python\npass\n```\n"))


def test_every_file_to_write_is_found() -> None:
    for page in PAGES:
        steps = list(steps_of(page.text))
        files = [step for step in steps if isinstance(step, File)]
        assert len(files) == page.text.count("Write this to `")
        assert any(isinstance(step, Expected) for step in steps)


@pytest.mark.parametrize(
    ("text", "well"),
    [
        ("```sh\ntrue\n```\nIt is so.\n", True),
        ("```sh\nfalse\ntrue\n```\nIt is so.\n", False),
        ("```sh\necho a\n```\n```text\na\n```\n", True),
        ("```sh\necho a\n```\n```text\nb\n```\n", False),
        ("```sh\necho a\nfalse\n```\n```text\na\n```\n", False),
        ("```sh\necho Error: a\nfalse\n```\n```text\nError: a\n```\n", True),
        ("```sh\necho Error: a\nfalse\n```\n```text\nError: b\n```\n", False),
        ("```sh\necho Error: a\n```\n```text\nError: a\n```\n", False),
        ("```text\na\n```\n", False),
        ("<!-- not run: too long -->\n\n```sh\nfalse\n```\n```text\nb\n```\n", True),
        ("<!-- not run: too long -->\n\n```sh\nfalse\n```\n```sh\nfalse\n```\n", False),
        ("```mermaid\nflowchart LR\n```\n", True),
        ("Write this to `a/b`:\n\n```x\na\n```\n```sh\ncat a/b\n```\n```text\na\n```\n", True),
        ("```sh\nmkdir a; cd a; export b=c\n```\n```sh\ncd ../a; [ $b = c ]\n```\n", True),
    ],
)
async def test_a_wrong_page_fails_the_walk(tmp_path: Path, text: str, well: bool) -> None:
    (tmp_path / "runlane").mkdir()
    async with Walk(text, tmp_path, 1, {}) as walk:
        if well:
            await walk.walk()
        else:
            with pytest.raises(AssertionError):
                await walk.walk()
