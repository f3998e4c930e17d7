"""How many bytes runs, messages and terminal events count as, in quotas and in retention."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from runlane_server.core.model import KeptPart, Message, RunRequest, Session, utf8_size
from runlane_server.core.update import RunContent

RUN_BYTES = 500
"""The assumed size of a run besides its prompt: its row, and its keys in the indexes. The number
also stands in `sqlite/sql/0003_stored_bytes.sql` and in `sqlite/sql/checks.sql`."""

MESSAGE_BYTES = 200
"""The same for a message."""

SESSION_BYTES = 200
"""The same for a session. It is added when sessions are counted, and not part of what they say. The
number also stands in `postgres/sql/statements.sql`."""

LOGGED_EVENT_BYTES = 500
"""The assumed size of a terminal event besides its body: its keys, three times."""


def run_weight(request: RunRequest) -> int:
    """The bytes of a run: its prompt with the attachments, its labels, and its row."""
    return RUN_BYTES + _content_size(RunContent(request.prompt, request.metadata))


def content_growth(before: RunContent, after: RunContent) -> int:
    """The bytes by which an edit makes a run larger."""
    return _content_size(after) - _content_size(before)


def session_weight(title: str, labels: Mapping[str, str]) -> int:
    """The bytes that a new session says it has: its title and its labels."""
    return utf8_size(title) + _labels_size(labels)


def session_growth(before: Session, after: Session) -> int:
    """The bytes by which an edit makes a session larger."""
    weights = [session_weight(it.title, it.metadata) for it in (before, after)]
    return weights[1] - weights[0]


def message_weight(parts: Iterable[str | None]) -> int:
    """The bytes of messages, from their encoded parts; None means no parts."""
    return sum(MESSAGE_BYTES + utf8_size(it or "") for it in parts)


def kept_weight(messages: Iterable[Message]) -> int:
    """The bytes of the parts that were stored before their messages."""
    return sum(
        part.size for message in messages for part in message.parts if isinstance(part, KeptPart)
    )


def logged_event_weight(body: str) -> int:
    """The bytes of a terminal event in the log, from its encoded body."""
    return LOGGED_EVENT_BYTES + utf8_size(body)


def _content_size(content: RunContent) -> int:
    prompt, labels = content
    files = sum(attachment.size for attachment in prompt.attachments)
    return utf8_size(prompt.text) + files + _labels_size(labels)


def _labels_size(labels: Mapping[str, str]) -> int:
    return sum(utf8_size(key) + utf8_size(value) for key, value in labels.items())
