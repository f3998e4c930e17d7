"""Agents that put pipes and links where the server reads and writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from runlane_server.agents.acp.agent_sessions import AgentSession, read_record
from runlane_server.core.model import Attachment, Prompt
from support.acp import agent, events
from support.turns import LocalTurn, ask, texts

TRAP = """
def trap(path):
    if os.path.lexists(path):
        os.unlink(path)
    {plant}

"""

PLANTS = {
    "pipe": "os.mkfifo(path)",
    "link": "os.symlink({victim!r}, path)",
    "dangling link": "os.symlink({victim!r} + '-created', path)",
}

FILES = (Attachment("a.png", "image/png", b"\x01"), Attachment("b.pdf", "x/pdf", b"\x02"))


def trap(tmp_path: Path, what: str) -> str:
    """The source of a function that sets a trap."""
    victim = tmp_path / "victim"
    victim.write_text("kept")
    return TRAP.format(plant=PLANTS[what].format(victim=str(victim)))


def assert_untouched(tmp_path: Path) -> None:
    """Nothing was written through a link."""
    assert (tmp_path / "victim").read_text() == "kept"
    assert not (tmp_path / "victim-created").exists()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("what", PLANTS)
async def test_traps_for_attachments_catch_nothing(tmp_path: Path, what: str) -> None:
    code = f"""
{trap(tmp_path, what)}
from urllib.parse import unquote, urlparse
for one in ("attachment-1-a.png", "attachment-2-b.pdf"):
    trap(os.path.join(os.environ["TMPDIR"], one))
p = prompt()
for block in p["params"]["prompt"]:
    if block["type"] == "resource_link":
        say(open(unquote(urlparse(block["uri"]).path), "rb").read().hex() + ";")
done(p)
"""
    assert "".join(texts(await events(agent(code), ask("", *FILES)))) == "01;02;"
    assert_untouched(tmp_path)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("what", PLANTS)
async def test_a_trap_in_the_attachments_own_place_fails_the_run_at_most(
    tmp_path: Path, what: str
) -> None:
    code = f"""
{trap(tmp_path, what)}
import glob
for one in glob.glob(os.path.join(os.environ["TMPDIR"], "*", "")):
    for name in ("attachment-1-a.png", "attachment-2-b.pdf"):
        trap(one + name)
p = prompt()
"""
    with pytest.raises(Exception, match="cannot write an attachment for the agent"):
        await events(agent(code), ask("", *FILES))
    assert_untouched(tmp_path)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("what", PLANTS)
@pytest.mark.parametrize("suffix", ["json", "new"])
async def test_traps_for_the_record_catch_nothing(tmp_path: Path, suffix: str, what: str) -> None:
    state = tmp_path / "state"
    code = f"""
{trap(tmp_path, what)}
import glob
p = prompt({{"session/load": answer}}, loadSession=True)
for one in glob.glob("../acp-*.json") or ["../acp-first.json"]:
    trap(one[:-4] + {suffix!r})
done(p)
"""
    for number in (1, 2, 3):
        turn = LocalTurn(Prompt("x"), run_id=f"r{number}")
        await events(agent(code, state=state), turn)
        assert_untouched(tmp_path)
    (home,) = state.glob("*/*/home")
    found = [read_record(one) for one in state.glob("*/*/acp-*.json")]
    assert AgentSession("session-1", "r3", str(home)) in found


@pytest.mark.timeout(20)
@pytest.mark.parametrize("what", PLANTS)
async def test_a_trap_for_the_next_turn_is_no_record(tmp_path: Path, what: str) -> None:
    state = tmp_path / "state"
    # A process that stays behind could set it after the server has written.
    await events(agent("p = prompt(); done(p)", state=state), LocalTurn())
    (record,) = state.glob("*/*/acp-*.json")
    planting: dict[str, object] = {}
    exec("import os\n" + trap(tmp_path, what), planting)  # noqa: S102 - our own text
    planting["trap"](str(record))  # type: ignore[operator]
    assert read_record(record) is None
    await events(agent("p = prompt(); done(p)", state=state), LocalTurn(run_id="r2"))
    assert read_record(record) is not None
    assert_untouched(tmp_path)
