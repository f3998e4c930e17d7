"""The output of the command: in any encoding, and nothing that steers a terminal."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE
from collections.abc import Mapping
from pathlib import Path

import pytest

from runlane.cli import terminal
from runlane.cli.output import field, json_line
from runlane.v1 import run_pb2
from support.command import START
from support.peer import Peer, accepted, complete, event, says
from support.terminal import at_terminal

CLI = Path(terminal.__file__).parent

HARMLESS = "a\nb\tc é 漢字 🙂\ufe0f עברית [bold]x[/]"

UNSAFE = {
    "a control character": "\x1b\x07\x08\r\x7f\x9b",
    "the order of the text": "\u202a\u202e\u2066\u2069\u200f\u061c",
    "hidden": "\u200b\u200d\ufeff\u2060\u00ad\u3164\U000e0041",
    "a line of its own": "\u2028\u2029\x85\x0b\x0c",
    "no character": "\udce9",
}


@pytest.mark.parametrize("kind", UNSAFE)
def test_unsafe_characters_are_removed_or_escaped(kind: str) -> None:
    for character in UNSAFE[kind]:
        assert terminal.unsafe_text(character)
        assert terminal.for_terminal(f"a{character}b") == "ab"
        assert field(f"a{character}b") == f"a{ascii(character)[1:-1]}b".replace("\\r", "\\x0d")


def test_harmless_text_is_unchanged() -> None:
    assert not terminal.unsafe_text(HARMLESS)
    assert terminal.for_terminal(HARMLESS) == terminal.escaped(HARMLESS) == HARMLESS


def test_json_keeps_the_value_and_has_no_unsafe_character() -> None:
    text = HARMLESS + "".join(UNSAFE.values())
    line = json_line({"text": text})
    assert not terminal.unsafe_text(line)
    assert json.loads(line) == {"text": text}


def test_only_one_module_writes_to_the_terminal() -> None:
    for path in CLI.glob("*.py"):
        if path.name != "terminal.py":
            assert "click.echo(" not in path.read_text(), path.name
            assert "import Console" not in path.read_text(), path.name


async def run_command(
    peer: Peer, *arguments: str | bytes, env: Mapping[str, str] | None = None
) -> tuple[int | None, bytes, bytes]:
    """Runs the command in pipes."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *START, *arguments),
        stdin=PIPE,
        stdout=PIPE,
        stderr=PIPE,
        env={**os.environ, "RUNLANE_SERVER": peer.target, **(env or {})},
    )
    out, err = await process.communicate()
    return process.returncode, out, err


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-16", "utf-8"])
@pytest.mark.parametrize("arguments", [("run", "-s", "s", "p"), ("run", "--json", "p")])
async def test_a_completed_run_exits_with_0_in_any_encoding(
    peer: Peer, encoding: str, arguments: tuple[str, ...]
) -> None:
    peer.scripts["RunAccepted"] = [(accepted(),)]
    end = complete("r", run_pb2.RUN_STATE_COMPLETED, text="")
    peer.scripts["SubscribeRun"] = [(says(1, "café → 🙂"), event(2, run_complete=end))]
    code, out, _ = await run_command(peer, *arguments, env={"PYTHONIOENCODING": encoding})
    assert code == 0
    text = out.decode(encoding)
    if "--json" in arguments:
        assert json.loads(text.splitlines()[0])["text"] == "café → 🙂"
    else:
        assert "caf" in text


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["run", b"caf\xe9"], "[PROMPT]"),
        (["run", "-s", b"\xe9", "p"], "--session"),
        (["cancel", b"\xe9"], "[SESSION]"),
        (["sessions", "delete", "a", b"\xe9"], "SESSION..."),
        (["--server", b"\xe9:1", "runs"], "--server"),
        (["watch", "-s", b"\xe9"], "--session"),
    ],
)
async def test_an_argument_that_is_not_utf8_is_a_usage_error(
    peer: Peer, arguments: list[str | bytes], name: str
) -> None:
    code, out, err = await run_command(peer, *arguments)
    assert (code, out) == (2, b"")
    assert name in err.decode()
    assert "is not valid UTF-8" in err.decode()


async def test_a_file_whose_name_is_not_utf8_is_attached(peer: Peer, tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("content")
    peer.scripts["RunAccepted"] = [(accepted(),)]
    code, out, err = await run_command(peer, "run", "--detach", "--attach", path, "p")
    assert (code, out) == (0, b"r\n"), err
    (attachment,) = peer.requests["RunAccepted"][0].attachments
    assert attachment.name == "caf\N{REPLACEMENT CHARACTER}.txt"


async def test_a_full_disk_is_an_error_of_the_output(
    peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With it, nothing would be left in a buffer at the end of the process.
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    peer.scripts["RunAccepted"] = [(accepted(),)]
    peer.scripts["SubscribeRun"] = [(says(1, "a"), event(2, run_complete=complete("r")))]
    with Path("/dev/full").open("wb") as full:  # noqa: ASYNC230 - opens at once
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, *START, "run", "p"),
            stdin=PIPE,
            stdout=full,
            stderr=PIPE,
            env={**os.environ, "RUNLANE_SERVER": peer.target},
        )
        _, err = await process.communicate()
    assert process.returncode == 1
    assert err.decode().endswith("Error: cannot write the output: No space left on device\n")


async def test_nothing_of_others_steers_the_terminal(peer: Peer) -> None:
    evil = "A\x1b]0;x\x07\x9b2J\r\x08\u202eB\u2066\u200b\ufeff[bold]C[/]"
    peer.scripts["RunAccepted"] = [(accepted(),)] * 2
    end = complete("r", run_pb2.RUN_STATE_FAILED, text=evil)
    end.error.message = evil
    one = (says(1, evil), event(2, run_complete=end))
    peer.scripts["SubscribeRun"] = [one, one]
    for arguments in (["run", "p"], ["run", "--json", "p"]):
        environment = {**os.environ, "RUNLANE_SERVER": peer.target}
        async with at_terminal([sys.executable, *START, *arguments], environment) as screen:
            assert await screen.wait() == 1
            own = screen.screen.replace("\r\n", "\n")
            for unsafe in (
                "\x1b]0",
                "\x07",
                "\x9b",
                "\x08",
                "\u202e",
                "\u2066",
                "\u200b",
                "\ufeff",
            ):
                assert unsafe not in own, (arguments, unsafe)
            assert "[bold]C[/]" in own
