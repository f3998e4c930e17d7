"""The API of Gemini, streamed, beside those of OpenAI: what gemini-cli speaks."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from support.openai_server import Request, chunked, http_head
from support.responses_server import ResponsesServer


class GeminiServer(ResponsesServer):
    """Answers each request with the words of its last message."""

    async def respond(self, request: Request, writer: asyncio.StreamWriter) -> None:
        """Answers a request, to any of the APIs."""
        if ":" not in request.path.rpartition("/")[2]:
            await super().respond(request, writer)
            return
        contents = request.body.get("contents", [])
        said = "".join(part.get("text", "") for part in contents[-1]["parts"]) if contents else ""
        answer = _chunk(f"you said: {said}")
        if ":streamGenerateContent" in request.path:
            writer.write(http_head(200, "text/event-stream"))
            writer.write(chunked(f"data: {json.dumps(answer)}\n\n".encode()))
        else:
            writer.write(http_head(200, "application/json"))
            writer.write(chunked(json.dumps({**answer, "totalTokens": 1}).encode()))
        writer.write(b"0\r\n\r\n")
        await writer.drain()


def _chunk(text: str) -> dict[str, Any]:
    content = {"role": "model", "parts": [{"text": text}]}
    return {
        "candidates": [{"content": content, "finishReason": "STOP", "index": 0}],
        "usageMetadata": {
            "promptTokenCount": 11,
            "candidatesTokenCount": 7,
            "totalTokenCount": 18,
        },
    }
