"""The access file that docs/security.md shows is a valid one."""

from __future__ import annotations

from pathlib import Path

from polyglot.languages import ROOT
from polyglot.pages import File, steps_of
from runlane_server.access.caller import Caller, Role
from runlane_server.access.entries import parse

SECURITY: Path = ROOT / "docs" / "security.md"


def test_the_access_file_on_the_security_page_is_valid() -> None:
    files = [step for step in steps_of(SECURITY.read_text()) if isinstance(step, File)]
    (shown,) = (file.text for file in files if file.path == "example.toml")
    found = parse(shown)
    limited = Caller("acme", Role.RUN, "ci", agents=frozenset({"coder", "reviewer"}))
    assert [token.caller for token in found.tokens] == [limited]
    assert found.certificates["uri=spiffe://acme/job"].role is Role.READ
    assert found.jwt is not None
    assert found.jwt.roles == {"runlane-admins": Role.ADMIN, "developers": Role.RUN}
