"""Converts a transcript to messages of pydantic-ai that every provider accepts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from pydantic_ai.messages import (
    BinaryContent,
    ModelMessage,
    ModelRequest,
    ModelResponse,
    ModelResponsePart,
    TextPart,
    ToolCallPart,
    ToolReturnPart,
    UserContent,
    UserPromptPart,
)

from runlane_server.core.model import (
    Attachment,
    Message,
    Part,
    Prompt,
    Role,
    Text,
    ToolCall,
    ToolResult,
)


def user_content(prompt: Prompt) -> str | list[UserContent]:
    """The content of a user message: the text, then the attachments in order."""
    return _user_content([Text(prompt.text), *prompt.attachments])


def model_messages(history: Iterable[Message]) -> list[ModelMessage]:
    """Converts a transcript.

    Reasoning is left out: providers accept it only with their own signature. A prompt without an
    answer (its turn was cancelled or failed first) is left out too: the model would answer it now,
    and a prompt that the provider rejects would make every later turn fail.
    """
    ids = CallIds()
    messages: list[ModelMessage] = []
    for _, turn in groupby(history, key=lambda message: message.turn):
        messages += _without_unanswered(_convert(turn, ids))
    return messages


def _convert(turn: Iterable[Message], ids: CallIds) -> list[ModelMessage]:
    converted = (_model_message(message, ids) for message in turn)
    return [message for message in converted if message is not None]


def _without_unanswered(turn: list[ModelMessage]) -> list[ModelMessage]:
    """Removes the prompts at the end of a turn that no answer follows."""
    while turn and isinstance(turn[-1], ModelRequest) and _is_prompt(turn[-1]):
        turn.pop()
    return turn


def _is_prompt(request: ModelRequest) -> bool:
    return any(isinstance(part, UserPromptPart) for part in request.parts)


def _model_message(message: Message, ids: CallIds) -> ModelMessage | None:
    """Converts a message; None if it has nothing for the model."""
    match message.role:
        case Role.USER:
            content = _user_content(message.parts)
            return ModelRequest(parts=[UserPromptPart(content=content)]) if content else None
        case Role.ASSISTANT:
            parts = _response_parts(message.parts, ids)
            return ModelResponse(parts=parts, model_name=message.model or None) if parts else None
        case Role.TOOL:
            results = _tool_returns(message.parts, ids)
            return ModelRequest(parts=results) if results else None


def _user_content(parts: Sequence[Part]) -> str | list[UserContent]:
    content: list[UserContent] = []
    for part in parts:
        match part:
            case Text(text) if text:
                content.append(text)
            case Attachment(name, _, str(text)):
                content.append(f"{name}:\n{text}" if name else text)
            case Attachment(_, mime_type, bytes(data)):
                content.append(BinaryContent(data=data, media_type=mime_type))
            case _:
                pass
    texts = [item for item in content if isinstance(item, str)]
    # Not every endpoint accepts a list, so text alone stays a string.
    return "\n\n".join(texts) if len(texts) == len(content) else content


def _response_parts(parts: Sequence[Part], ids: CallIds) -> list[ModelResponsePart]:
    converted: list[ModelResponsePart] = []
    for part in parts:
        match part:
            case Text(text) if text:
                converted.append(TextPart(content=text))
            case ToolCall():
                call_id = ids.open(part.tool_call_id)
                converted.append(
                    ToolCallPart(
                        tool_name=part.name, args=part.arguments_json, tool_call_id=call_id
                    )
                )
            case _:
                pass
    return converted


def _tool_returns(parts: Sequence[Part], ids: CallIds) -> list[ToolReturnPart]:
    """Converts tool results; a result without a call before it is left out, as providers reject
    it."""
    return [
        ToolReturnPart(
            tool_name=part.name,
            content=part.content,
            tool_call_id=call_id,
            outcome="failed" if part.is_error else "success",
        )
        for part in parts
        if isinstance(part, ToolResult) and (call_id := ids.close(part.tool_call_id)) is not None
    ]


class CallIds:
    """Makes the ids of tool calls unique within a turn or a conversation, and pairs the results.

    An id that is used for the first time stays the same: providers use ids as cache keys.
    """

    def __init__(self) -> None:
        self._used: set[str] = set()
        self._open: dict[str, str] = {}

    def open(self, call_id: str) -> str:
        """Returns a unique id for a new call."""
        unique = call_id
        while unique in self._used:
            unique = f"{call_id}_{len(self._used)}"
        self._used.add(unique)
        self._open[call_id] = unique
        return unique

    def close(self, call_id: str) -> str | None:
        """Returns the unique id for the result of a call; None if no such call is open."""
        return self._open.pop(call_id, None)
