"""A small server that speaks the chat completions API of OpenAI, streamed.

`answer` queues its answers. In a process of its own, where nothing can be queued, the last message
determines the answer: a JSON object is the answer itself (see `Answer`), any other text is echoed.
Run it with `python tests/support/openai_server.py --port 0`; it prints its port.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

_CHUNK_HEAD = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "small-1"}


@dataclass
class Answer:
    """An answer, in the order of its fields.

    `hold` keeps the stream open after the content, until `OpenAIServer.release` or until the
    client leaves. `drop` closes the connection there instead. `cut` ends the stream there in good
    order, without a finish reason. With `counting`, every chunk has the usage so far. `chunks` are
    sent as they are, in place of everything else.
    """

    reasoning: Sequence[str] = ()
    text: Sequence[str] = ()
    tool_calls: Sequence[tuple[str, str, str]] = ()
    """The id, name and arguments of each tool call."""
    hold: bool = False
    drop: bool = False
    cut: bool = False
    chunks: Sequence[Any] | None = None
    counting: bool = False
    finish: str = ""
    status: int = 200
    error: str = "no"
    code: str = "some_code"
    retry_after: str = ""
    failure: int = 0
    """The status of an error within the stream, after the content; 0 for none."""

    def deltas(self) -> list[dict[str, Any]]:
        """The pieces of content to stream."""
        calls = [
            {"index": n, "id": i, "type": "function", "function": {"name": name, "arguments": args}}
            for n, (i, name, args) in enumerate(self.tool_calls)
        ]
        return [
            {"role": "assistant", "content": None},
            *({"reasoning_content": piece} for piece in self.reasoning),
            *({"content": piece} for piece in self.text),
            *({"tool_calls": [call]} for call in calls),
        ]

    @property
    def finish_reason(self) -> str:
        """The finish reason: the given one, or the one that fits the answer."""
        return self.finish or ("tool_calls" if self.tool_calls else "stop")


@dataclass
class Request:
    """A request of a client."""

    path: str
    headers: Mapping[str, str]
    body: dict[str, Any]
    disconnected: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The messages in the request."""
        messages: list[dict[str, Any]] = self.body["messages"]
        return messages


class OpenAIServer:
    """The server. `requests` are in the order in which they arrived.

    `refusal` returns why a request is refused with status 400, or None; `refused` has what it
    returned.
    """

    def __init__(self, refusal: Callable[[list[dict[str, Any]]], str | None] | None = None) -> None:
        self.requests: list[Request] = []
        self.refused: list[str] = []
        self._refusal = refusal
        self.port = 0
        self._answers: deque[Answer] = deque()
        self._release = asyncio.Event()
        self._arrival = asyncio.Event()

    @property
    def base_url(self) -> str:
        """The value for OPENAI_BASE_URL."""
        return f"http://127.0.0.1:{self.port}/v1"

    def answer(self, *answers: Answer | str) -> None:
        """Queues answers. A text stands for the answer with that content."""
        self._answers += (Answer(text=[a]) if isinstance(a, str) else a for a in answers)

    def forget(self) -> None:
        """Forgets the requests, and the answers that none of them has asked for."""
        self.requests.clear()
        self.refused.clear()
        self._answers.clear()
        self._release.clear()

    async def arrived(self, count: int) -> None:
        """Returns when as many requests have arrived."""
        while len(self.requests) < count:
            self._arrival.clear()
            await self._arrival.wait()

    def release(self) -> None:
        """Ends the hold of all answers."""
        self._release.set()

    @contextlib.asynccontextmanager
    async def serving(self, port: int = 0) -> AsyncGenerator[OpenAIServer, None]:
        """Serves until the context exits."""
        server = await asyncio.start_server(self._client, "127.0.0.1", port)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            request = await _read(reader)
            self.requests.append(request)
            self._arrival.set()
            left = asyncio.create_task(reader.read())  # ends when the client leaves
            left.add_done_callback(lambda _: request.disconnected.set())
            try:
                await self.respond(request, writer)
            finally:
                left.cancel()
                await asyncio.wait({left})
                writer.close()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    def _next_answer(self, request: Request) -> Answer:
        if self._refusal is not None and (why := self._refusal(request.messages)) is not None:
            self.refused.append(why)
            return Answer(status=400, error=why)
        return self._answers.popleft() if self._answers else _answer_in(request.messages[-1])

    async def respond(self, request: Request, writer: asyncio.StreamWriter) -> None:
        """Answers a request. A subclass may answer otherwise."""
        answer = self._next_answer(request)
        if answer.status != 200:
            await _send_error(writer, answer)
            return
        writer.write(http_head(200, "text/event-stream"))
        if answer.chunks is not None:
            lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in answer.chunks]
            data = "".join([*lines, "data: [DONE]\n\n"]).encode()
            writer.write(chunked(data) + b"0\r\n\r\n")
            await writer.drain()
            return
        so_far = {"usage": _usage(request)} if answer.counting else {}
        for delta in answer.deltas():
            choice = {"index": 0, "delta": delta, "finish_reason": None}
            await _send(writer, choices=[choice], **so_far)
        if answer.hold:
            go_on = {asyncio.create_task(e.wait()) for e in (self._release, request.disconnected)}
            await asyncio.wait(go_on, return_when=asyncio.FIRST_COMPLETED)
            for waiting in go_on:
                waiting.cancel()
        if answer.drop or request.disconnected.is_set():
            return
        if answer.failure:
            await _send(writer, error={"message": answer.error, "code": answer.failure})
        if answer.cut or answer.failure:
            writer.write(b"0\r\n\r\n")
            await writer.drain()
            return
        end = {"index": 0, "delta": {}, "finish_reason": answer.finish_reason}
        await _send(writer, choices=[end])
        await _send(writer, choices=[], usage=_usage(request))
        writer.write(chunked(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        await writer.drain()


async def _send_error(writer: asyncio.StreamWriter, answer: Answer) -> None:
    error = {"message": answer.error, "code": answer.code, "type": "some_type"}
    # A 204 has no body; a strict client refuses one that has.
    body = b"" if answer.status == 204 else json.dumps({"error": error}).encode()
    more = [f"Retry-After: {answer.retry_after}"] if answer.retry_after else []
    writer.write(http_head(answer.status, "application/json", len(body), *more) + body)
    await writer.drain()


def _usage(request: Request) -> dict[str, Any]:
    """The usage: ten tokens for each message, and five for the answer."""
    count = 10 * len(request.messages)
    return {"prompt_tokens": count, "completion_tokens": 5, "total_tokens": count + 5}


def _answer_in(message: Mapping[str, Any]) -> Answer:
    content = message.get("content") or ""
    text = content if isinstance(content, str) else json.dumps(content)
    try:
        given = json.loads(text)
    except ValueError:
        given = None
    if isinstance(given, dict) and given.keys() <= {f.name for f in fields(Answer)}:
        return Answer(**given)
    return Answer(text=[word + " " for word in text.split(" ")])


async def _read(reader: asyncio.StreamReader) -> Request:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    first, *lines = head.rstrip().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Request(first.split()[1], headers, json.loads(body or b"{}"))


def http_head(status: int, kind: str, length: int | None = None, *more: str) -> bytes:
    """The head of an answer, whose body is chunked if it has no length."""
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    first = f"HTTP/1.1 {status} X"
    lines = [first, f"Content-Type: {kind}", size, "Connection: close", *more, "", ""]
    return "\r\n".join(lines).encode()


def chunked(data: bytes) -> bytes:
    """A chunk of a body."""
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


async def _send(writer: asyncio.StreamWriter, **event: Any) -> None:
    data = json.dumps({**_CHUNK_HEAD, **event})
    writer.write(chunked(f"data: {data}\n\n".encode()))
    await writer.drain()


async def _serve(port: int) -> None:
    async with OpenAIServer().serving(port) as server:
        print(server.port, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(parser.parse_args().port))
