"""A model over HTTP, and the chat agent that uses it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from runlane_server.agents.loader import AgentSettings, load_agent
from support.models import KEY
from support.openai_server import OpenAIServer
from support.turns import started


@pytest.fixture
async def server(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[OpenAIServer]:
    async with OpenAIServer().serving() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        yield server


@pytest.fixture
async def chat(server: OpenAIServer) -> AsyncIterator[Any]:
    settings = AgentSettings(chat_instructions="be kind", chat_max_retries=0)
    async with started(load_agent("chat:openai:small", settings)) as agent:
        yield agent
