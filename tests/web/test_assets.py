"""The files of the console: served as what they are, and complete."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

import pytest

from runlane_server.testing import LocalServer
from runlane_web import assets
from support.door import Door, door

UNSAFE = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|localStorage"
    r"|style=|<script>|\son\w+=\"|https?://(?!www\.w3\.org/2000/svg)"
)
"""Names that make code or HTML of text, keep a token too long, or load from elsewhere."""


@pytest.fixture
async def opened() -> AsyncIterator[Door]:
    async with LocalServer() as server, door(server.address) as found:
        yield found


async def test_the_console_is_served_without_a_token_under_a_strict_policy(opened: Door) -> None:
    for path in assets.paths():
        got = await opened.http.get(path, headers={"Authorization": ""})
        assert got.status_code == 200, path
        policy = got.headers["content-security-policy"].split("; ")
        assert policy[0] == "default-src 'self'"
        assert {"frame-ancestors 'none'", "require-trusted-types-for 'script'"} <= set(policy)
        assert "unsafe" not in got.headers["content-security-policy"]
        assert got.headers["cross-origin-opener-policy"] == "same-origin"
    kinds = {
        path.rpartition(".")[2]: (await opened.http.get(path)).headers["content-type"]
        for path in assets.paths()
    }
    assert kinds["/"].startswith("text/html")
    assert kinds["js"].startswith("text/javascript")
    assert kinds["css"].startswith("text/css")


@pytest.mark.parametrize(
    "path", ["/console/", "/console/index.html", "/console/../gateway.py", "/console/none.js"]
)
async def test_other_files_are_not_served(opened: Door, path: str) -> None:
    assert (await opened.http.get(path)).status_code == 404


async def test_the_console_only_reads(opened: Door) -> None:
    assert (await opened.http.post("/")).status_code == 404
    assert (await opened.http.head("/")).status_code == 200


async def test_every_file_that_a_file_names_is_served(opened: Door) -> None:
    named = {"/"}
    for path in assets.paths():
        text = (await opened.http.get(path)).text
        named |= set(re.findall(r"\"(/console/[\w.]+)\"", text))
        assert UNSAFE.search(text) is None, (path, UNSAFE.search(text))
    assert named == set(assets.paths())
