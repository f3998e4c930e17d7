"""The parts of messages and artifacts: what an agent gets of them, and what callers see."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from a2a.types import a2a_pb2 as pb
from a2a.utils.errors import ContentTypeNotSupportedError, InvalidParamsError
from google.protobuf import json_format
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Value

from runlane.types import Artifact, ArtifactKind, Attachment
from runlane_a2a.errors import refuse

TEXT, JSON, BYTES = "text/plain", "application/json", "application/octet-stream"

DEFAULT_MODES = (TEXT, JSON)
"""The media types that a card names, unless its file names others."""

_MAX_EXACT = 1 << 53


@dataclass(frozen=True, slots=True)
class Content:
    """The content of a message: the prompt of a run, and its attachments."""

    text: str
    attachments: tuple[Attachment, ...]


def read_parts(parts: Sequence[pb.Part], modes: Iterable[str]) -> Content:
    """Reads the parts of a message.

    Args:
        parts: The parts. Text without a file name is the prompt; all else is attached.
        modes: The media types that the agent takes, such as `image/*`.

    Raises:
        A2AError: A part is empty, of a media type that the agent does not take, or an address: what
            others keep is not fetched.
    """
    accepted = tuple(modes)
    texts: list[str] = []
    attachments: list[Attachment] = []
    for n, part in enumerate(parts):
        field = f"message.parts[{n}]"
        kind = part.WhichOneof("content")
        if kind is None:
            raise refuse(InvalidParamsError, "must have one of text, raw and data", field=field)
        if kind == "url":
            raise refuse(
                ContentTypeNotSupportedError,
                "addresses are not fetched; send the content as raw or text",
                field=f"{field}.url",
                reason="URL_NOT_FETCHED",
            )
        _check_mode(part.media_type or _default(kind), accepted, field)
        if kind == "text" and not part.filename:
            texts.append(part.text)
        else:
            attachments.append(_attachment(part, kind, n, field))
    return Content("\n\n".join(texts), tuple(attachments))


def data_of(parts: Iterable[pb.Part]) -> dict[str, Any] | None:
    """The first data part that is an object; None if there is none."""
    for part in parts:
        if part.WhichOneof("content") == "data":
            value = plain(part.data)
            if isinstance(value, dict):
                return value
    return None


def plain(value: Message) -> Any:
    """The JSON of a `Value` or `Struct`, which have floats only: whole numbers lose their `.0`."""
    return json.loads(json.dumps(json_format.MessageToDict(value)), parse_float=_number)


def _number(digits: str) -> int | float:
    number = float(digits)
    return int(number) if number.is_integer() and abs(number) <= _MAX_EXACT else number


def text_part(text: str) -> pb.Part:
    """A part with text."""
    return pb.Part(text=text)


def data_part(value: Any) -> pb.Part:
    """A part with JSON. Raises ValueError if it is none that protobuf can hold."""
    try:
        return pb.Part(data=json_format.ParseDict(value, Value()), media_type=JSON)
    except (json_format.ParseError, RecursionError) as error:
        raise ValueError(str(error)) from None


def attachment_part(attachment: Attachment) -> pb.Part:
    """The part of an attachment of a prompt."""
    part = pb.Part(filename=attachment.name, media_type=attachment.mime_type)
    if isinstance(attachment.content, str):
        part.text = attachment.content
    else:
        part.raw = attachment.content
    return part


def artifact_part(artifact: Artifact) -> pb.Part:
    """The part of an artifact, or of a piece of it; JSON must be whole."""
    content = artifact.content
    if artifact.kind is ArtifactKind.JSON and isinstance(content, str):
        part = json_part(content)
    elif isinstance(content, bytes):
        part = pb.Part(raw=content)
    elif artifact.kind is ArtifactKind.URI:
        part = pb.Part(url=content)
    else:
        part = pb.Part(text=content)
    part.filename = artifact.name
    part.media_type = artifact.mime_type
    return part


def json_part(text: str) -> pb.Part:
    """The part of a JSON text; as text, if protobuf cannot hold it."""
    try:
        return data_part(json.loads(text, parse_int=_exact))
    except (ValueError, RecursionError):
        return pb.Part(text=text, media_type=JSON)


def _exact(digits: str) -> int:
    """A number that protobuf's JSON value, which has floats only, keeps all digits of."""
    number = int(digits)
    if abs(number) > _MAX_EXACT:
        raise ValueError("is too large")
    return number


def _default(kind: str) -> str:
    return {"text": TEXT, "data": JSON}.get(kind, BYTES)


def _check_mode(media_type: str, accepted: Sequence[str], field: str) -> None:
    name = media_type.partition(";")[0].strip().lower()
    if not any(fnmatchcase(name, pattern) for pattern in accepted):
        raise refuse(
            ContentTypeNotSupportedError,
            f"must be one of {', '.join(accepted)}",
            field=f"{field}.mediaType",
            reason="MEDIA_TYPE_NOT_SUPPORTED",
        )


def _attachment(part: pb.Part, kind: str, n: int, field: str) -> Attachment:
    media_type = part.media_type
    if kind == "data":
        try:
            # Protobuf has no order of keys, and the same message must be the same prompt.
            text = json.dumps(plain(part.data), ensure_ascii=False, sort_keys=True)
        except (ValueError, json_format.SerializeToJsonError):
            raise refuse(
                InvalidParamsError, "has a number that JSON cannot hold", field=f"{field}.data"
            ) from None
        return Attachment(part.filename or f"data-{n + 1}.json", text, media_type or JSON)
    name = part.filename or f"file-{n + 1}"
    if kind == "text":
        return Attachment(name, part.text, media_type or TEXT)
    content: str | bytes = part.raw
    if media_type.startswith("text/"):
        try:
            content = part.raw.decode()
        except UnicodeDecodeError:
            content = part.raw  # text in another encoding is bytes to an agent
    return Attachment(name, content, media_type or BYTES)
