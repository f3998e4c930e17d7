"""The options of `runlane-web` for A2A."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from runlane_web.a2a_options import A2AOptions, make_a2a_door
from runlane_web.cli import web
from runlane_web.serving import Address

URL = "https://agents.example.com"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--a2a-card", "card.json"], "--a2a-card: needs --a2a"),
        (["--a2a-grpc", "9000"], "--a2a-grpc: needs --a2a"),
        (["--a2a-metadata", "team"], "--a2a-metadata: needs --a2a"),
        (["--a2a", "agents.example.com"], "must be an address such as"),
        (["--a2a", f"{URL}?x=1"], "must be an address such as"),
        (["--a2a", URL, "--a2a-grpc", "0"], "the card names the port"),
        (["--a2a", URL, "--a2a-grpc", "0.0.0.0:9000"], "tokens would travel unencrypted"),
        (["--a2a", URL, "--a2a-card", "none.json"], "No such file"),
        (["--a2a", URL, "--a2a-card", "card.json"], "card.json: description is missing"),
        (["--a2a", URL, "--a2a-card", "bytes.json"], "bytes.json: is not UTF-8"),
    ],
)
def test_options_that_cannot_work_are_refused(
    arguments: list[str], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("card.json").write_text('{"name": "x"}')
    Path("bytes.json").write_bytes(b"\xff")
    result = CliRunner().invoke(web, ["--own-token", *arguments])
    assert result.exit_code == 2
    assert problem in " ".join(result.output.split())


def test_the_card_names_the_address_of_grpc_as_callers_see_it() -> None:
    options = A2AOptions(URL, None, ("::1", 0), "agents.example.com:443", "", (), 8)
    door = make_a2a_door(options, Address(), plaintext=False)
    assert door.serves("/.well-known/agent-card.json")
    assert door.serves("/a2a/tasks")
    assert not door.serves("/v1/runs")
