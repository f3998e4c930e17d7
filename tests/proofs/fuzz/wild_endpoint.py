"""A model endpoint that answers at random: valid, odd, cut, malformed, late, or not at all.

The last message and the number of messages are the seed of an answer, so a run repeats. A request
for `CALM` is answered as it should be.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from random import Random
from typing import Any

from openai import AsyncOpenAI
from pydantic_ai import Agent as ModelAgent
from pydantic_ai import ModelRetry
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from proofs.fuzz.mutate import mutated
from proofs.fuzz.wild_agent import ARGUMENTS, CALM, COUNTS
from runlane import RunError
from runlane_server.agents.chat.agent import ChatAgent
from support.openai_server import OpenAIServer, Request, chunked, http_head
from support.strict_history import refusal

Odd = Any
"""A JSON value of any type."""

MOST_PIECES = 250
"""The most pieces of text in an answer."""

MOST_DELAY = 0.3
"""The most seconds for which an answer pauses, so that a run without a timeout ends too."""

FAILURE = "a tool that fails"

PIECES = ("a", "word ", "", " ", "\n", "é", "\U0001f600", "\ud83d", "\0", "\x1b[31m", "z" * 3_000)
IDS: Sequence[Odd] = ("a", "a", "b", "", None, "\ud800", "i" * 2_000, 7, {})
NAMES: Sequence[Odd] = (*("look",) * 6, "fail", "retry", "none", "", "two words", "n" * 300, None)
ODD: Sequence[Odd] = (
    *(None, 0, -1, 1.5, 10**30, 1e308, "", "x", "\ud83d", [], [1], [None], {}, {"a": 1}, True),
    "y" * 70_000,
)
FINISHES: Sequence[Odd] = (
    *("stop",) * 5, "length", "content_filter", "tool_calls", "error", "", None, "other", 3,
)  # fmt: skip
STATUSES = (
    204,
    301,
    304,
    400,
    401,
    402,
    403,
    404,
    408,
    413,
    422,
    429,
    500,
    502,
    503,
    529,
    599,
    999,
)
BODIES = (
    *(b"", b"no", b"\xff\xfe", b"null", b"[]", b'{"error": 7}', b'{"error": {"message": [1]}}'),
    *(b'{"error": {"message": "\\ud800", "code": "context_length_exceeded"}}', b"<html>" * 9_000),
    *(b'{"error": {"message": "long", "type": {}, "code": null}}', b"[" * 9_000),
)
EXTRAS = (
    *("", "", "Retry-After: 1", "Retry-After: -5", "Retry-After: soon", "Location: /v1/other"),
    *("Content-Encoding: gzip", "Content-Type: application/json", "Set-Cookie: \x00=\x01"),
    *("Transfer-Encoding: identity", "Content-Length: 3", "X-Long: " + "x" * 70_000),
)
"""Additional header lines."""


class WildEndpoint(OpenAIServer):
    """The endpoint. `events` counts the chunks that it sent; `invalid` has why requests were."""

    def __init__(self) -> None:
        super().__init__()
        self.events = 0
        self.invalid: list[str] = []

    async def respond(self, request: Request, writer: asyncio.StreamWriter) -> None:
        """Answers a request."""
        self.requests.clear()  # millions would not fit
        if not request.body:  # of a client that was redirected
            writer.write(http_head(404, "text/plain", 0))
            return
        if (why := refusal(request.messages)) is not None:
            self.invalid.append(why)
        prompt = _text(request.messages[-1])
        if prompt == CALM:
            self.answer(CALM)
            await super().respond(request, writer)
            return
        random = Random(f"{prompt} {len(request.messages)}")  # noqa: S311 - a seed repeats it
        try:
            pieces = random.choices(_KINDS, _WEIGHTS)[0](random)
        except Exception as error:
            self.invalid.append(f"the endpoint itself failed: {error!r}")
            raise
        for piece in pieces:
            if random.random() < 0.02 and not await _pause(request, random):
                return
            if writer.is_closing():
                return
            writer.write(piece)
            self.events += 1
        await writer.drain()

    def is_own_fault(self, error: RunError) -> bool:
        """Whether a tool failed, or a count was too large; all else has a reason of its own."""
        return FAILURE in error.message or error.message.startswith("Usage.")


def _text(message: Any) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else json.dumps(content)


async def _pause(request: Request, random: Random) -> bool:
    """Waits a moment; returns whether the client is still there."""
    try:
        async with asyncio.timeout(random.choice((0.0, 0.001, 0.02, MOST_DELAY))):
            await request.disconnected.wait()
    except TimeoutError:
        return True
    return False


def _chunks(random: Random) -> list[Odd]:
    """A valid answer, in chunks: deltas, the finish, the usage."""
    chunks = [_chunk({"role": "assistant", "content": ""})]
    for _ in range(random.randrange(MOST_PIECES)):
        key = "content" if random.random() < 0.9 else "reasoning_content"
        chunks.append(_chunk({key: random.choice(PIECES)}))
    calls = random.choice((1, 1, 2, 5)) if random.random() < 0.3 else 0
    for index in range(calls):
        chunks += _call(random, index)
    finish = "tool_calls" if calls and random.random() < 0.8 else random.choice(FINISHES)
    chunks.append(_chunk({}, finish))
    usage = {
        name: random.choice(COUNTS[:5] if random.random() < 0.8 else COUNTS[:-1])
        for name in ("prompt_tokens", "completion_tokens", "total_tokens")
    }
    chunks.append({**_chunk({}), "choices": [], "usage": usage})
    if random.random() < 0.1:  # the usage so far, with every chunk
        chunks = [{**chunk, "usage": usage} for chunk in chunks]
    return chunks


def _chunk(delta: Odd, finish: Odd = None) -> dict[str, Odd]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m",
            "choices": [choice]}  # fmt: skip


def _call(random: Random, index: int) -> list[Odd]:
    """A tool call, whose arguments come in pieces."""
    arguments = random.choice(("{}", "{}", '{"at": 1}', *ARGUMENTS[:11]))
    cut = random.randint(0, len(arguments))
    call_id = f"c{random.randrange(1 << 30)}" if random.random() < 0.8 else random.choice(IDS)
    head = {"name": random.choice(NAMES), "arguments": arguments[:cut]}
    first = {"index": index, "id": call_id, "type": "function", "function": head}
    rest = {"index": index, "function": {"arguments": arguments[cut:]}}
    return [_chunk({"tool_calls": [first]}), _chunk({"tool_calls": [rest]})]


def _stream(chunks: Sequence[Odd]) -> list[bytes]:
    lines = [chunked(b"data: " + json.dumps(chunk).encode() + b"\n\n") for chunk in chunks]
    head = http_head(200, "text/event-stream")
    return [head, *lines, chunked(b"data: [DONE]\n\n") + b"0\r\n\r\n"]


def _valid(random: Random) -> list[bytes]:
    return _stream(_chunks(random))


def _odd(random: Random) -> list[bytes]:
    """An answer with values of other types at some places."""
    chunks = _chunks(random)
    for _ in range(random.randint(1, 4)):
        _change(random, random.choice(chunks))
    if random.random() < 0.2:
        random.shuffle(chunks)
    if random.random() < 0.2:
        chunks.insert(random.randrange(len(chunks)), random.choice(ODD))
    return _stream(chunks)


def _change(random: Random, value: Odd) -> None:
    """Replaces or removes a value somewhere inside."""
    while isinstance(value, dict | list) and value:
        key: Odd = random.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if random.random() < 0.4 or not isinstance(value[key], dict | list):
            if random.random() < 0.2:
                del value[key]
            else:
                value[key] = random.choice(ODD)
            return
        value = value[key]


def _cut(random: Random) -> list[bytes]:
    """An answer that ends early: between two pieces, or within one."""
    pieces = _valid(random)
    kept = pieces[: random.randrange(len(pieces))]
    if random.random() < 0.5:
        return [*kept, pieces[len(kept)][: random.randrange(1, 9)]]
    return [*kept, b"0\r\n\r\n"]


def _malformed(random: Random) -> list[bytes]:
    """An answer that is not HTTP, no stream of events, or no JSON."""
    pieces = _valid(random)
    if random.random() < 0.3:
        return [mutated(random, b"".join(pieces[:9]), pieces[:3])]
    lines = [piece.partition(b"\r\n")[2].removesuffix(b"\r\n") for piece in pieces[1:]]
    bad = [mutated(random, line, lines[:3]) if random.random() < 0.2 else line for line in lines]
    return [pieces[0], *(chunked(line) for line in bad if line), b"0\r\n\r\n"]


def _status(random: Random) -> list[bytes]:
    """An answer with another status, a body of any kind, and odd headers."""
    body = random.choice(BODIES)
    status = random.choice(STATUSES) if random.random() < 0.9 else 200
    length = len(body) if random.random() < 0.9 else random.randrange(9)
    kind = random.choice(("application/json", "text/html", "", "text/event-stream"))
    extra = random.choice(EXTRAS)
    return [http_head(status, kind, length, *([extra] if extra else [])) + body]


def _silent(_: Random) -> list[bytes]:
    """Nothing: the connection is closed."""
    return []


_ANSWERS: Sequence[tuple[Callable[[Random], list[bytes]], int]] = (
    (_valid, 60), (_odd, 14), (_cut, 8), (_malformed, 9), (_status, 8), (_silent, 1),
)  # fmt: skip
_KINDS = [kind for kind, _ in _ANSWERS]
_WEIGHTS = [weight for _, weight in _ANSWERS]


@asynccontextmanager
async def wild_chat() -> AsyncIterator[tuple[ChatAgent, WildEndpoint]]:
    """A chat agent with tools, and the wild endpoint that it asks."""
    endpoint = WildEndpoint()
    async with (
        endpoint.serving(),
        AsyncOpenAI(base_url=endpoint.base_url, api_key="x", max_retries=0) as client,
    ):
        model = OpenAIChatModel("m", provider=OpenAIProvider(openai_client=client))
        agent: ModelAgent[None, str] = ModelAgent(model, tools=[look, fail, retry])
        yield ChatAgent(agent), endpoint


def look(at: int = 0) -> str:
    """Returns a text."""
    return f"seen {at}"


def fail() -> str:
    """Raises."""
    raise ValueError(f"{FAILURE} \ud800")


def retry() -> str:
    """Asks the model to try again."""
    raise ModelRetry("try again")
