"""How many bytes runs, messages and terminal events count as, in quotas and in retention."""

from __future__ import annotations

from collections.abc import Iterable

from runlane_server.core.model import RunRequest, utf8_size

RUN_BYTES = 500
"""The assumed size of a run besides its prompt: its row, and its keys in the indexes. The number
also stands in `sqlite/sql/0003_stored_bytes.sql` and in `sqlite/sql/checks.sql`."""

MESSAGE_BYTES = 200
"""The same for a message."""

LOGGED_EVENT_BYTES = 500
"""The assumed size of a terminal event besides its body: its keys, three times."""


def run_weight(request: RunRequest) -> int:
    """The bytes of a run: its prompt with the attachments, and its row."""
    prompt = request.prompt
    size = RUN_BYTES + utf8_size(prompt.text)
    for attachment in prompt.attachments:
        size += attachment.size
    return size


def message_weight(parts: Iterable[str | None]) -> int:
    """The bytes of messages, from their encoded parts; None means no parts."""
    return sum(MESSAGE_BYTES + utf8_size(it or "") for it in parts)


def logged_event_weight(body: str) -> int:
    """The bytes of a terminal event in the log, from its encoded body."""
    return LOGGED_EVENT_BYTES + utf8_size(body)
