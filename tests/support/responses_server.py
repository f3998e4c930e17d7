"""The responses API of OpenAI, streamed, beside chat completions: what codex speaks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from support.openai_server import OpenAIServer, Request, chunked, http_head


class ResponsesServer(OpenAIServer):
    """Answers each request with the words of its last user message, or with a tool call.

    A message `run: COMMAND` gets a call of the first shell tool that the client offers; the output
    of the call is then the answer.
    """

    async def respond(self, request: Request, writer: asyncio.StreamWriter) -> None:
        """Answers a request, to either API."""
        if not request.path.endswith("/responses"):
            await super().respond(request, writer)
            return
        items = request.body["input"]
        writer.write(http_head(200, "text/event-stream"))
        await _send(writer, "response.created", response={"id": "r1"})
        last = items[-1]
        if last.get("type") in {"function_call_output", "local_shell_call_output"}:
            await _say(writer, f"output: {last['output']}")
        elif (text := text_of(last)).startswith("run: "):
            await _send(writer, "response.output_item.done", item=_call(request, text[5:]))
        elif text.startswith("hold"):
            await _send(writer, "response.output_item.added", item=_message("", "in_progress"))
            await _send(writer, "response.output_text.delta", delta="holding ", item_id="m1")
            await request.disconnected.wait()
            return
        else:
            await _say(writer, f"you said: {text}")
        usage = {
            "input_tokens": 11,
            "input_tokens_details": {"cached_tokens": 3},
            "output_tokens": 7,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 18,
        }
        await _send(writer, "response.completed", response={"id": "r1", "usage": usage})
        writer.write(b"0\r\n\r\n")
        await writer.drain()


def text_of(item: Mapping[str, Any]) -> str:
    """The text of an item of the input."""
    content = item.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


def _message(text: str, status: str) -> dict[str, Any]:
    content = [{"type": "output_text", "text": text, "annotations": []}] if text else []
    return {
        "id": "m1",
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": content,
    }


def _call(request: Request, command: str) -> dict[str, Any]:
    names = [tool.get("name", "") for tool in request.body.get("tools", [])]
    name = next(one for one in names if "shell" in one or "exec" in one)
    fields: dict[str, Any] = {
        "exec_command": {"cmd": command, "justification": "test"},
        "shell_command": {"command": command},
    }.get(name, {"command": ["sh", "-c", command]})
    return {
        "id": "f1",
        "type": "function_call",
        "call_id": "call-1",
        "name": name,
        "arguments": json.dumps(fields),
    }


async def _say(writer: asyncio.StreamWriter, text: str) -> None:
    await _send(writer, "response.output_item.added", item=_message("", "in_progress"))
    for word in text.split(" "):
        await _send(writer, "response.output_text.delta", delta=f"{word} ", item_id="m1")
    await _send(writer, "response.output_item.done", item=_message(text, "completed"))


async def _send(writer: asyncio.StreamWriter, event: str, **fields: Any) -> None:
    data = json.dumps({"type": event, **fields})
    writer.write(chunked(f"event: {event}\ndata: {data}\n\n".encode()))
    await writer.drain()
