"""Converts a transcript to messages of pydantic-ai.

This module decides which content of earlier turns the model sees again; `grammar` decides the form.
"""

from __future__ import annotations

import re
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

from runlane_server.agents.chat.grammar import valid
from runlane_server.core.model import (
    Attachment,
    FinishReason,
    Message,
    Part,
    Prompt,
    Role,
    Text,
    ToolCall,
    ToolResult,
    clean_text,
)

_TEXT_TYPES = {
    "application/json",
    "application/toml",
    "application/xml",
    "application/x-yaml",
    "application/yaml",
}

_CHARSET = re.compile(r";\s*charset=\"?([\w.:-]+)", re.IGNORECASE)


def user_content(prompt: Prompt) -> str | list[UserContent]:
    """The content of a user message: the text, then the attachments in order."""
    return _user_content([Text(prompt.text), *prompt.attachments])


def model_messages(history: Iterable[Message]) -> list[ModelMessage]:
    """Converts a transcript to a valid history.

    Reasoning is left out: providers accept it only with their own signature. A prompt without an
    answer (its turn was cancelled or failed first) is left out too: the model would answer it now,
    and a prompt that the provider rejects would make every later turn fail. For the same reason a
    note stands for each file of a turn that failed.
    """
    messages: list[ModelMessage] = []
    for _, turn in groupby(history, key=lambda message: message.turn):
        parts = list(turn)
        if _has_failed(parts):
            parts = [_without_files(message) for message in parts]
        messages += _without_unanswered(_convert(parts))
    return valid(messages)


def texts_only(history: Iterable[Message]) -> list[Message] | None:
    """The part of a transcript that every provider accepts: the texts of the turns that did not
    fail; None if the model sees nothing else anyway.

    A provider may reject content that an earlier one accepted: a kind of file, the call of a tool
    that is gone, or a text. A session must not end by that.
    """
    kept: list[Message] = []
    is_less = False
    for _, messages in groupby(history, key=lambda message: message.turn):
        turn = list(messages)
        if model_messages(turn):
            plain = [] if _has_failed(turn) else [_with_texts_only(message) for message in turn]
            is_less = is_less or plain != turn
            kept += plain
    return kept if is_less else None


def _has_failed(turn: Sequence[Message]) -> bool:
    return any(
        message.finish_reason in {FinishReason.ERROR, FinishReason.CONTENT_FILTER}
        for message in turn
    )


def _without_files(message: Message) -> Message:
    if not any(_is_file(part) for part in message.parts):
        return message
    return message._replace(parts=tuple(_note(part) for part in message.parts))


def _with_texts_only(message: Message) -> Message:
    kept = tuple(
        part for part in _without_files(message).parts if isinstance(part, Text | Attachment)
    )
    return message if kept == message.parts else message._replace(parts=kept)


def _is_file(part: Part) -> bool:
    return isinstance(part, Attachment) and _text_of(part) is None


def _note(part: Part) -> Part:
    if isinstance(part, Attachment) and _is_file(part):
        return Text(f"(the file {part.name!r} of type {part.mime_type} is not shown again)")
    return part


def _text_of(attachment: Attachment) -> str | None:
    """The text of an attachment; None for a file of another kind.

    Bytes that are not in the character set of their type are replaced: the model sees the rest.
    """
    if isinstance(attachment.content, str):
        return attachment.content
    kind = attachment.mime_type.partition(";")[0].strip().lower()
    if not (kind.startswith("text/") or kind in _TEXT_TYPES or kind.endswith(("+json", "+xml"))):
        return None
    charset = _CHARSET.search(attachment.mime_type)
    try:
        return clean_text(attachment.content.decode(charset[1] if charset else "utf-8", "replace"))
    except (LookupError, UnicodeError):  # no such character set, or none that decodes text
        return attachment.content.decode("utf-8", "replace")


def _convert(turn: Iterable[Message]) -> list[ModelMessage]:
    converted = (_model_message(message) for message in turn)
    return [message for message in converted if message is not None]


def _without_unanswered(turn: list[ModelMessage]) -> list[ModelMessage]:
    """Removes the prompts at the end of a turn that no answer follows."""
    while turn and isinstance(turn[-1], ModelRequest) and _is_prompt(turn[-1]):
        turn.pop()
    return turn


def _is_prompt(request: ModelRequest) -> bool:
    return any(isinstance(part, UserPromptPart) for part in request.parts)


def _model_message(message: Message) -> ModelMessage | None:
    """Converts a message; None if it has nothing for the model."""
    match message.role:
        case Role.USER:
            content = _user_content(message.parts)
            return ModelRequest(parts=[UserPromptPart(content=content)]) if content else None
        case Role.ASSISTANT:
            parts = _response_parts(message.parts)
            return ModelResponse(parts=parts, model_name=message.model or None) if parts else None
        case Role.TOOL:
            results = _tool_returns(message.parts)
            return ModelRequest(parts=results) if results else None


def _user_content(parts: Sequence[Part]) -> str | list[UserContent]:
    content: list[UserContent] = []
    for part in parts:
        match part:
            case Text(text) if text:
                content.append(text)
            case Attachment(name, mime_type, data):
                if (text_ := _text_of(part)) is not None:
                    content.append(f"{name}:\n{text_}" if name else text_)
                elif isinstance(data, bytes):
                    content.append(BinaryContent(data=data, media_type=mime_type))
            case _:
                pass
    texts = [item for item in content if isinstance(item, str)]
    # Not every endpoint accepts a list, so text alone stays a string.
    return "\n\n".join(texts) if len(texts) == len(content) else content


def _response_parts(parts: Sequence[Part]) -> list[ModelResponsePart]:
    converted: list[ModelResponsePart] = []
    for part in parts:
        match part:
            case Text(text) if text.strip():  # blank text is no answer
                converted.append(TextPart(content=text))
            case ToolCall(call_id, name, arguments):
                converted.append(ToolCallPart(tool_name=name, args=arguments, tool_call_id=call_id))
            case _:
                pass
    return converted


def _tool_returns(parts: Sequence[Part]) -> list[ToolReturnPart]:
    return [
        ToolReturnPart(
            tool_name=part.name,
            content=part.content,
            tool_call_id=part.tool_call_id,
            outcome="failed" if part.is_error else "success",
        )
        for part in parts
        if isinstance(part, ToolResult)
    ]
