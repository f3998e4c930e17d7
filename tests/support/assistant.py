"""An assistant: the client of the package `mcp`, and an MCP server for it in this process."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from mcp import Client as Assistant
from mcp.client import ClientExtension
from mcp.types import CallToolResult, TextContent

from runlane.cli.mcp_server.server import build
from runlane_server.testing import LocalServer
from support.staging import script


@asynccontextmanager
async def connected(
    server: LocalServer,
    *,
    allow_answers: bool = False,
    extensions: Sequence[ClientExtension] = (),
) -> AsyncIterator[Assistant]:
    """An assistant whose MCP server is in this process."""
    async with (
        server.client() as client,
        Assistant(
            build(client, allow_answers=allow_answers, max_text=1000), extensions=extensions
        ) as assistant,
    ):
        yield assistant


async def call(assistant: Assistant, tool: str, **arguments: Any) -> dict[str, Any]:
    """Calls a tool that succeeds; returns its result."""
    result = await assistant.call_tool(tool, arguments)
    assert not result.is_error, result.content
    assert result.structured_content is not None
    # Clients that know no structured results read the same as text.
    found: dict[str, Any] = result.structured_content
    assert json.loads(text_of(result)) == found
    return found


async def refused(assistant: Assistant, tool: str, **arguments: Any) -> str:
    """Calls a tool that fails; returns its error."""
    result = await assistant.call_tool(tool, arguments)
    assert result.is_error
    return text_of(result)


def text_of(result: CallToolResult) -> str:
    (content,) = result.content
    assert isinstance(content, TextContent)
    return content.text


async def accept(assistant: Assistant, *steps: Any, session: str = "s") -> str:
    accepted = await call(assistant, "accept_run", session_id=session, prompt=script(*steps))
    run_id: str = accepted["run"]["run_id"]
    return run_id
