"""The transcript as the messages of pydantic-ai, always valid for a provider."""

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
    """What the user says: the text, and the attachments in order."""
    return _user_content([Text(prompt.text), *prompt.attachments])


def model_messages(history: Iterable[Message]) -> list[ModelMessage]:
    """The messages for the model.

    Reasoning is left out, as providers take it back only with their own signature. A prompt that
    got no answer (its turn was cancelled or failed first) is left out too: the model would answer
    it now, and one that the provider refuses would have every later turn refused.
    """
    ids = CallIds()
    messages: list[ModelMessage] = []
    for _, turn in groupby(history, key=lambda message: message.turn):
        messages += _answered(_converted(turn, ids))
    return messages


def _converted(turn: Iterable[Message], ids: CallIds) -> list[ModelMessage]:
    converted = (_model_message(message, ids) for message in turn)
    return [message for message in converted if message is not None]


def _answered(turn: list[ModelMessage]) -> list[ModelMessage]:
    """Without the prompts at the end that no answer follows."""
    while turn and isinstance(turn[-1], ModelRequest) and _is_prompt(turn[-1]):
        turn.pop()
    return turn


def _is_prompt(request: ModelRequest) -> bool:
    return any(isinstance(part, UserPromptPart) for part in request.parts)


def _model_message(message: Message, ids: CallIds) -> ModelMessage | None:
    """The message, or None where nothing of it is for the model."""
    match message.role:
        case Role.USER:
            content = _user_content(message.parts)
            return ModelRequest(parts=[UserPromptPart(content=content)]) if content else None
        case Role.ASSISTANT:
            said = _said(message.parts, ids)
            return ModelResponse(parts=said, model_name=message.model or None) if said else None
        case Role.TOOL:
            returned = _returned(message.parts, ids)
            return ModelRequest(parts=returned) if returned else None


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
    # Not every endpoint takes a list, so it is one only where it has to be.
    return "\n\n".join(texts) if len(texts) == len(content) else content


def _said(parts: Sequence[Part], ids: CallIds) -> list[ModelResponsePart]:
    said: list[ModelResponsePart] = []
    for part in parts:
        match part:
            case Text(text) if text:
                said.append(TextPart(content=text))
            case ToolCall():
                call_id = ids.opened(part.tool_call_id)
                said.append(
                    ToolCallPart(
                        tool_name=part.name, args=part.arguments_json, tool_call_id=call_id
                    )
                )
            case _:
                pass
    return said


def _returned(parts: Sequence[Part], ids: CallIds) -> list[ToolReturnPart]:
    """The results; one without a call before it is left out, as providers refuse it."""
    return [
        ToolReturnPart(
            tool_name=part.name,
            content=part.content,
            tool_call_id=call_id,
            outcome="failed" if part.is_error else "success",
        )
        for part in parts
        if isinstance(part, ToolResult) and (call_id := ids.closed(part.tool_call_id)) is not None
    ]


class CallIds:
    """Makes the ids of tool calls unique, over a turn or over a chat, and pairs the results.

    An id that was not used before stays as it is: providers find what they cached by it.
    """

    def __init__(self) -> None:
        self._used: set[str] = set()
        self._open: dict[str, str] = {}

    def opened(self, call_id: str) -> str:
        """The id to use for a new call."""
        unique = call_id
        while unique in self._used:
            unique = f"{call_id}_{len(self._used)}"
        self._used.add(unique)
        self._open[call_id] = unique
        return unique

    def closed(self, call_id: str) -> str | None:
        """The id to use for the result of an open call, or None where no call is open."""
        return self._open.pop(call_id, None)
