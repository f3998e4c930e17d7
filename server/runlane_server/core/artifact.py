"""Artifacts: what a run makes besides its text, such as a file, a table or a picture.

An agent emits an artifact in one piece or in several. The events of the run keep the pieces; the
transcript has each artifact once, as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

MAX_ARTIFACT_BYTES = 1 << 20
"""Maximum size of the content of an artifact, all pieces together, in bytes. Larger content is
passed by reference."""


class ArtifactKind(StrEnum):
    """The kind of content that an artifact has."""

    TEXT = "text"
    DATA = "data"
    JSON = "json"
    URI = "uri"


@dataclass(frozen=True, slots=True)
class ArtifactPiece:
    """A piece of an artifact, or a whole one.

    `content` is bytes if the kind is DATA. With `append` the content goes behind that of the
    earlier pieces, without it the artifact begins, again if there were pieces. `last`: the artifact
    is complete.
    """

    artifact_id: str
    name: str
    mime_type: str
    kind: ArtifactKind
    content: str | bytes
    append: bool = False
    last: bool = True

    @property
    def size(self) -> int:
        """The size of the content in bytes; text counts as UTF-8."""
        content = self.content
        return len(content) if isinstance(content, bytes) else len(content.encode())


class InvalidPiece(Exception):
    """The piece does not continue the artifact that it names; the message explains why."""


class ArtifactDraft:
    """Joins the pieces of the artifacts of one turn."""

    def __init__(self) -> None:
        self._pieces: dict[str, list[ArtifactPiece]] = {}
        self._bytes: dict[str, int] = {}

    def add(self, piece: ArtifactPiece) -> bool:
        """Adds a piece. Returns whether its artifact is new.

        Raises InvalidPiece, and then changes nothing.
        """
        key = piece.artifact_id
        known = self._pieces.get(key)
        if piece.append:
            self._check_appended(piece, known)
        size = piece.size + (self._bytes[key] if piece.append else 0)
        if size > MAX_ARTIFACT_BYTES:
            raise InvalidPiece(
                f"artifact {key!r} has more than 1 MiB; pass larger content as a `uri`"
            )
        self._bytes[key] = size
        if known is None or not piece.append:
            self._pieces[key] = [piece]
        else:
            known.append(piece)
        return known is None

    def _check_appended(self, piece: ArtifactPiece, known: list[ArtifactPiece] | None) -> None:
        key = piece.artifact_id
        if known is None:
            raise InvalidPiece(f"artifact {key!r} has no piece to append to; begin it first")
        if known[-1].last:
            raise InvalidPiece(f"artifact {key!r} is complete; begin it with `last` false")
        if known[0].kind is not piece.kind:
            raise InvalidPiece(f"artifact {key!r} began as {known[0].kind}, not as {piece.kind}")

    def whole(self, artifact_id: str) -> ArtifactPiece:
        """The artifact as far as it got: `last` is false if its last piece is missing."""
        pieces = self._pieces[artifact_id]
        first, last = pieces[0], pieces[-1]
        if len(pieces) == 1:
            return first
        joined: str | bytes
        if isinstance(first.content, bytes):
            joined = b"".join(it.content for it in pieces if isinstance(it.content, bytes))
        else:
            joined = "".join(it.content for it in pieces if isinstance(it.content, str))
        return replace(first, content=joined, last=last.last)
