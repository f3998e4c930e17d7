"""Changes of a waiting run by callers: its content, its behaviour, its place (R46, R47)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import NamedTuple

from runlane_server.core.errors import InvalidArgument
from runlane_server.core.model import Attachment, Prompt, WhenBusy

REMEMBERED = 8
"""Number of updates with an id that a run remembers."""


class Place(StrEnum):
    """The new place of a run in its queue."""

    FIRST = "first"
    LAST = "last"
    BEFORE = "before"
    AFTER = "after"


class Move(NamedTuple):
    """A new place in the queue; `anchor` is the run that BEFORE and AFTER refer to."""

    place: Place
    anchor: str = ""


class RunContent(NamedTuple):
    """The content of a run: its prompt and its labels."""

    prompt: Prompt
    metadata: Mapping[str, str]


class RunPatch(NamedTuple):
    """The changes that a caller asks for; None leaves what there is.

    They apply only to the run at `revision`, if one is given. `update_id` is the caller's
    idempotency key, and no part of the digest.
    """

    text: str | None = None
    attachments: tuple[Attachment, ...] | None = None
    metadata: Mapping[str, str] | None = None
    when_busy: WhenBusy | None = None
    move: Move | None = None
    revision: int | None = None
    update_id: str = ""

    @property
    def has_content(self) -> bool:
        """Whether it changes what the run says."""
        return not (self.text is None and self.attachments is None and self.metadata is None)

    def applied_to(self, content: RunContent) -> RunContent:
        """The changed content."""
        prompt, metadata = content
        return RunContent(
            Prompt(
                prompt.text if self.text is None else self.text,
                prompt.attachments if self.attachments is None else self.attachments,
            ),
            metadata if self.metadata is None else self.metadata,
        )

    @property
    def digest(self) -> str:
        """A digest that is equal for two patches exactly if they are equal."""
        labels = None if self.metadata is None else sorted(self.metadata.items())
        files = None if self.attachments is None else Prompt("", self.attachments).fingerprint
        parts = (self.text, files, labels, self.when_busy, self.move, self.revision)
        return hashlib.blake2b(repr(parts).encode(), digest_size=12).hexdigest()


class RunUpdate(NamedTuple):
    """A patch as a lane decides it: `content` is the new content, None if it stays.

    `excerpt` is that of the prompt after it. `growth` is by how many bytes the content makes the
    session larger. `digest` recognizes a repeated patch, also when the run has started.
    """

    run_id: str
    digest: str
    excerpt: str = ""
    content: RunContent | None = None
    when_busy: WhenBusy | None = None
    move: Move | None = None
    revision: int | None = None
    growth: int = 0
    update_id: str = ""


class RunEdit(NamedTuple):
    """The part of an update that a store writes besides the run of the lane."""

    content: RunContent | None = None
    growth: int = 0

    def then(self, later: RunEdit | None) -> RunEdit:
        """Merges this edit with the next one."""
        if later is None:
            return self
        return RunEdit(later.content or self.content, self.growth + later.growth)


def is_repeated(
    wanted: RunPatch | RunUpdate, last_update: str, revision: int, *, has_begun: bool
) -> bool:
    """Whether a run at a revision has this update already.

    An update with an id is one of those that the run remembers, also after later changes. Without
    an id and a revision, it is applied again unless the run has begun its turn. Raises
    InvalidArgument if another update has the same id.
    """
    entries = last_update.split(",")
    if wanted.update_id:
        mark = _mark(wanted.update_id)
        known = next((entry for entry in entries if entry.startswith(mark)), None)
        if known is not None:
            if known != mark + wanted.digest:
                raise InvalidArgument.of("update_id", "is that of another update; use a new id")
            return True
    if entries[-1].rpartition(":")[2] != wanted.digest:
        return False
    if wanted.revision is None:
        return has_begun and not wanted.update_id
    return revision == wanted.revision + 1


def remembered(wanted: RunUpdate, last_update: str) -> str:
    """The memory of a run after one more update: the latest ones with an id, and the last one."""
    with_id = [entry for entry in last_update.split(",") if ":" in entry]
    mark = _mark(wanted.update_id) if wanted.update_id else ""
    return ",".join([*with_id[1 - REMEMBERED :], mark + wanted.digest])


def _mark(update_id: str) -> str:
    return hashlib.blake2b(update_id.encode(), digest_size=12).hexdigest() + ":"


def patch_errors(run_id: str, patch: RunPatch) -> Iterator[InvalidArgument]:
    """Yields an InvalidArgument for each reason why no run can have a patch."""
    if not patch.has_content and patch.when_busy is None and patch.move is None:
        yield InvalidArgument.of("update_mask", "is missing; it names the fields to change")
    if patch.when_busy is WhenBusy.REJECT:
        yield InvalidArgument.of("when_busy", "REJECT is only for a run that is accepted")
    move = patch.move
    if move is None:
        return
    if patch.when_busy is WhenBusy.INTERRUPT:
        yield InvalidArgument.of("position", "INTERRUPT moves the run to the head; leave it out")
    if move.place in {Place.BEFORE, Place.AFTER} and move.anchor in {"", run_id}:
        problem = "is the run itself" if move.anchor else "is missing"
        yield InvalidArgument.of(f"position.{move.place}_run_id", problem)
