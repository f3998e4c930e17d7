"""Reads the answers that nearly all endpoints send: text, reasoning, a finish reason, a usage.

It costs a twentieth of what the SDK and pydantic-ai need for a chunk. It reads nothing else: of
everything that has a second meaning, or another type, it says `Odd`, and pydantic-ai then reads the
answer again from its beginning (see `replay`). So each oddity is handled at one place only.

The chunks of most endpoints differ only in the text, so a chunk that is an earlier one with another
text is not parsed (see `_Frame`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pydantic_ai.messages import ModelResponse, ModelResponsePart, TextPart, ThinkingPart

from runlane_server.core.model import FinishReason, ReasoningDelta, TextDelta, Usage

MAX_EVENT_BYTES = 1 << 20
"""A longer event of a stream is odd: joining its pieces would take too long here."""

_REASONING = ("reasoning", "reasoning_content")
"""The fields of a delta with reasoning, in the order in which pydantic-ai looks for it."""

_OTHER_CONTENT = ("tool_calls", "function_call", "refusal", "annotations", "audio")

_FINISH_REASONS = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "content_filter": FinishReason.CONTENT_FILTER,
}

_COUNTS = {"prompt_tokens", "completion_tokens", "total_tokens"}
_DETAILS = {"prompt_tokens_details", "completion_tokens_details"}


class Odd(Exception):
    """Something in an answer that only pydantic-ai reads."""


class EventStream:
    """Splits the bytes of a body into server-sent events."""

    def __init__(self) -> None:
        self._rest = b""

    def events(self, data: bytes) -> list[bytes]:
        """The events that are complete with these bytes. Raises Odd for one without an end."""
        self._rest = (self._rest + data).replace(b"\r\n", b"\n")
        *events, rest = self._rest.split(b"\n\n")
        if len(rest) > MAX_EVENT_BYTES:
            raise Odd
        self._rest = rest
        return events

    def give_back(self, events: list[bytes]) -> None:
        """Puts events back before the rest."""
        self._rest = b"\n\n".join([*events, self._rest])

    @property
    def rest(self) -> bytes:
        """The text that belongs to no event yet."""
        return self._rest


def data_of(event: bytes) -> str:
    """The data of an event; empty if it only has comments. Raises Odd if it has anything else."""
    try:
        if event.startswith(b"data: ") and b"\n" not in event:
            return event[6:].decode()
        lines = event.decode().split("\n")
    except UnicodeDecodeError as exc:
        raise Odd from exc
    fields = [line.partition(":") for line in lines if line and not line.startswith(":")]
    data = [value.removeprefix(" ") for name, _, value in fields if name == "data"]
    if fields and not data:
        raise Odd
    return "\n".join(data)


@dataclass(slots=True)
class _Segment:
    """Adjacent pieces of one kind, from one field of the deltas."""

    name: str
    kind: type[TextDelta | ReasoningDelta] | None
    """None for a tag around reasoning."""
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.pieces)


_CONTENT = re.compile(r'"content"\s*:\s*"')

MAX_FRAMES = 16
"""Some endpoints pad each chunk with noise: no more frames are tried in one answer."""


class _Frame(NamedTuple):
    """A chunk without the text that it adds.

    A chunk with the same frame and a text without quotes, escapes and control characters is the
    same JSON but for that text.
    """

    head: str
    tail: str

    @classmethod
    def of(cls, data: str, text: str) -> _Frame | None:
        """The frame of a chunk whose only piece is this content; None if it is not certain which
        part of the chunk the content is."""
        found = _CONTENT.search(data)
        if found is None or data.count('"content"') > 1 or "\\" in data or not _is_literal(text):
            return None
        head, rest = data[: found.end()], data[found.end() :]
        return cls(head, rest[len(text) :]) if rest.startswith(f'{text}"') else None

    def text(self, data: str) -> str:
        """The text of a chunk; empty if the chunk has another frame."""
        head, tail = self
        if not (data.startswith(head) and data.endswith(tail)):
            return ""
        text = data[len(head) : len(data) - len(tail)]
        return text if _is_literal(text) else ""


def _is_literal(text: str) -> bool:
    """Whether JSON has the text as it is, within quotes."""
    return text.isprintable() and '"' not in text and "\\" not in text


class PlainAnswer:
    """An answer as far as it was read.

    `tags` mark reasoning within the content; each of them is a piece of its own.
    """

    def __init__(self, tags: tuple[str, str]) -> None:
        self.model = ""
        self.usage = Usage(requests=1)
        self.finish_reason: FinishReason | None = None
        self._tags = tags
        self._is_in_tags = False
        self._segments: list[_Segment] = []
        self._has_begun = False
        self._created = 0
        self._finish = ""
        self._usage: Mapping[str, Any] | None = None
        self._frame: _Frame | None = None
        self._frames = 0

    def take(self, data: str) -> list[TextDelta | ReasoningDelta]:
        """Reads the data of an event. Raises Odd, and then has read nothing of it."""
        if self._frame is not None and (text := self._frame.text(data)):
            # All that it says besides was said before, and nothing else since.
            delta = self._add("content", text)
            return [] if delta is None else [delta]
        return self._parse(data)

    def _parse(self, data: str) -> list[TextDelta | ReasoningDelta]:
        try:
            chunk = json.loads(data)
        except (ValueError, RecursionError) as exc:
            raise Odd from exc
        if type(chunk) is not dict or chunk.get("error") or chunk.get("moderation"):
            raise Odd
        model = _text(chunk.get("model"))
        created = self._created or _count(chunk.get("created"))
        usage = self.usage if (given := chunk.get("usage")) is None else _plain_usage(given)
        said = self.model, self._finish
        pieces = self._pieces(chunk.get("choices"))
        self._has_begun = True
        self.model, self._created = model or self.model, created
        if given is not None:
            self._usage, self.usage = given, usage
        if given is not None or said != (self.model, self._finish):
            self._frame = None
        self._find_frame(data, pieces)
        return [delta for name, text in pieces if (delta := self._add(name, text)) is not None]

    def _find_frame(self, data: str, pieces: list[tuple[str, str]]) -> None:
        """Keeps the frame of this chunk, or the one before if this has none: one with a line break
        or a quote."""
        match pieces:
            case [("content", text)] if self._frames < MAX_FRAMES:
                if frame := _Frame.of(data, text):
                    self._frames += 1
                    self._frame = frame

    def _pieces(self, choices: object) -> list[tuple[str, str]]:
        """The fields with text in the first choice."""
        if not choices:
            return []
        if type(choices) is not list or type(choice := choices[0]) is not dict:
            raise Odd
        delta, finish = choice.get("delta"), _text(choice.get("finish_reason"))
        if choice.get("logprobs") or (finish and finish not in _FINISH_REASONS):
            raise Odd
        if delta is None and not finish:
            return []
        if type(delta) is not dict or any(map(delta.get, _OTHER_CONTENT)):
            raise Odd
        pieces = [(name, text) for name in _REASONING if (text := _text(delta.get(name)))][:1]
        if pieces and self._is_in_tags:
            raise Odd
        if text := _text(delta.get("content")):
            pieces.append(("content", text))
        if finish:
            self._finish, self.finish_reason = finish, _FINISH_REASONS[finish]
        return pieces

    def _add(self, name: str, text: str) -> TextDelta | ReasoningDelta | None:
        kind: type[TextDelta | ReasoningDelta] | None = ReasoningDelta
        if name == "content":
            if text == self._tags[self._is_in_tags]:
                self._is_in_tags = not self._is_in_tags
                kind = None
            elif not self._is_in_tags:
                kind = TextDelta
        last = self._segments[-1] if self._segments else None
        if last is None or last.name != name or last.kind is not kind:
            last = _Segment(name, kind)
            self._segments.append(last)
        last.pieces.append(text)
        return None if kind is None else kind(text)

    @property
    def has_text(self) -> bool:
        """Whether it has an answer for the user."""
        return any(s.kind is TextDelta and not s.text.isspace() for s in self._segments)

    @property
    def deltas(self) -> int:
        """The number of deltas in `replayed`."""
        return sum(segment.kind is not None for segment in self._segments)

    def replayed(self) -> bytes:
        """A stream of as few events as possible with all that was read."""
        choices = [_choice({segment.name: segment.text}) for segment in self._segments]
        if self._finish:
            choices.append({**_choice({}), "finish_reason": self._finish})
        events: list[dict[str, Any]] = [{"choices": [choice]} for choice in choices]
        if self._has_begun:
            events.insert(0, {"choices": [], "created": self._created})
        if self._usage is not None:
            events.append({"choices": [], "usage": self._usage})
        return b"".join(
            b"data: %s\n\n" % json.dumps({"model": self.model, **event}).encode()
            for event in events
        )

    def response(self, provider: str) -> ModelResponse:
        """The answer as a message of a conversation."""
        return ModelResponse(
            parts=list(self._parts(provider)), model_name=self.model, provider_name=provider
        )

    def _parts(self, provider: str) -> Iterator[ModelResponsePart]:
        for segment in self._segments:
            if segment.kind is TextDelta:
                yield TextPart(content=segment.text)
            elif segment.kind is ReasoningDelta:
                yield ThinkingPart(content=segment.text, id=segment.name, provider_name=provider)


def _count(value: object) -> int:
    """A number that every part of the SDK takes; 0 for none."""
    if value is None:
        return 0
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise Odd
    return value


def _text(value: object) -> str:
    if not value:
        return ""
    if type(value) is not str:
        raise Odd
    return value


def _choice(delta: Mapping[str, str]) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "finish_reason": None}


def _plain_usage(usage: object) -> Usage:
    """A usage of whole numbers under the names of OpenAI."""
    if type(usage) is not dict:
        raise Odd
    inner: dict[str, Any] = {}
    for name in _DETAILS:
        if (found := usage.get(name)) is not None:
            if type(found) is not dict:
                raise Odd
            inner |= found
    if usage.keys() - _COUNTS - _DETAILS:
        raise Odd
    counts = {name: _count(n) for name, n in (usage | inner).items() if name not in _DETAILS}
    if None in (usage.get("prompt_tokens"), usage.get("completion_tokens")):
        raise Odd
    return Usage(
        input_tokens=counts["prompt_tokens"],
        output_tokens=counts["completion_tokens"],
        cache_read_tokens=counts.get("cached_tokens", 0),
        cache_write_tokens=counts.get("cache_write_tokens", 0),
        requests=1,
    )
