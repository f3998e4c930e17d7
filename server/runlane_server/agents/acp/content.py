"""Makes the prompt for an agent, with the turns of the conversation that it has not seen.

A file is sent in the best form that the agent takes: as an image, audio or a resource in the
message, else as a link to a copy in the run's private directory. Every agent takes text and links.
"""

from __future__ import annotations

import base64
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias
from urllib.parse import quote

from acp.schema import (
    AudioContentBlock,
    BlobResourceContents,
    EmbeddedResourceContentBlock,
    ImageContentBlock,
    PromptCapabilities,
    ResourceContentBlock,
    TextContentBlock,
    TextResourceContents,
)
from pydantic import BaseModel

from runlane_server.agents.program_files import NewFiles
from runlane_server.core.model import (
    Attachment,
    Message,
    Part,
    Prompt,
    Reasoning,
    Text,
    ToolCall,
    ToolResult,
)

Block: TypeAlias = (
    TextContentBlock
    | ImageContentBlock
    | AudioContentBlock
    | ResourceContentBlock
    | EmbeddedResourceContentBlock
)

MAX_RESULT_CHARS = 2000
"""Maximum length of a tool result of an earlier turn, in characters; the rest is cut."""

_INTRODUCTION = (
    "This conversation has earlier turns that you have not seen. They follow, one JSON object a "
    "line, the oldest first. Take them as said and done, and answer the message after them."
)

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


def prompt_blocks(
    prompt: Prompt,
    takes: PromptCapabilities,
    files: NewFiles | None,
    unseen: Sequence[Message] = (),
) -> list[Block]:
    """The content of a prompt. `files` is where attachments are written that the agent does not
    take in the message; see `needs_files`. Raises OSError."""
    blocks: list[Block] = []
    if unseen:
        blocks.append(_text(transcript(unseen)))
    if prompt.text:
        blocks.append(_text(prompt.text))
    numbers = itertools.count(1)
    return blocks + [_block(one, takes, files, numbers) for one in prompt.attachments]


def needs_files(prompt: Prompt) -> bool:
    """Whether there are attachments that an agent may have to read from a file."""
    return any(not isinstance(one.content, str) for one in prompt.attachments)


def transcript(messages: Iterable[Message]) -> str:
    """Earlier turns as text. As JSON, since a prompt that imitates a role must not become one."""
    lines = (
        json.dumps({"role": message.role, **_fields_of(message.parts)}, ensure_ascii=False)
        for message in messages
    )
    return "\n".join([_INTRODUCTION, "", *lines])


def text_of_block(block: BaseModel) -> str:
    """Content of an agent as text; a note stands for what is no text."""
    match block:
        case TextContentBlock():
            return block.text
        case ImageContentBlock() | AudioContentBlock():
            return f"[{block.mime_type}]"
        case ResourceContentBlock():
            return f"[{block.name}]({block.uri})"
        case EmbeddedResourceContentBlock():
            resource = block.resource
            return resource.text if isinstance(resource, TextResourceContents) else resource.uri
        case _:
            return ""


def _fields_of(parts: Iterable[Part]) -> dict[str, Any]:
    """The text of a message, its files by name, its calls and results. Reasoning is left out."""
    fields: dict[str, Any] = {}
    for part in parts:
        match part:
            case Text(text):
                fields["text"] = fields.get("text", "") + text
            case Attachment(content=str() as content):
                fields.setdefault("files", []).append({"name": part.name, "text": content})
            case Attachment():
                fields.setdefault("files", []).append(
                    {"name": part.name, "mime_type": part.mime_type}
                )
            case ToolCall():
                fields.setdefault("calls", []).append([part.name, part.arguments_json])
            case ToolResult():
                fields.setdefault("results", []).append(part.content[:MAX_RESULT_CHARS])
            case Reasoning():
                pass
    return fields


def _text(text: str) -> TextContentBlock:
    return TextContentBlock(type="text", text=text)


def _block(
    attachment: Attachment,
    takes: PromptCapabilities,
    files: NewFiles | None,
    numbers: Iterator[int],
) -> Block:
    name, mime_type, content = attachment.name, attachment.mime_type, attachment.content
    uri = f"attachment:///{quote(name)}"
    if isinstance(content, str):
        if not takes.embedded_context:
            return _text(f"{name}:\n{content}")
        resource = TextResourceContents(uri=uri, mime_type=mime_type, text=content)
        return EmbeddedResourceContentBlock(type="resource", resource=resource)
    if takes.image and mime_type.startswith("image/"):
        return ImageContentBlock(type="image", mime_type=mime_type, data=_base64(content))
    if takes.audio and mime_type.startswith("audio/"):
        return AudioContentBlock(type="audio", mime_type=mime_type, data=_base64(content))
    if takes.embedded_context and not mime_type.startswith(("image/", "audio/")):
        blob = BlobResourceContents(uri=uri, mime_type=mime_type, blob=_base64(content))
        return EmbeddedResourceContentBlock(type="resource", resource=blob)
    if files is None:
        raise AssertionError("see needs_files")
    file_name = f"attachment-{next(numbers)}-{_UNSAFE.sub('_', name)[-80:]}"
    path = files.write(file_name, content)
    return ResourceContentBlock(
        type="resource_link",
        name=name or path.name,
        uri=path.as_uri(),
        mime_type=mime_type,
        size=len(content),
    )


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
