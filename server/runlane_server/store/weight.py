"""What counts as stored by a tenant: what stays until the session is deleted."""

from __future__ import annotations

from collections.abc import Iterable

from runlane_server.core.model import RunRequest, utf8_size

RUN_BYTES = 500
"""What a run is taken to weigh beside its prompt: its row, and its keys in the indexes. The number
is in `sql/sqlite/0003_stored_bytes.sql`, too, and in the checks."""

MESSAGE_BYTES = 200
"""The same for a message."""


def run_weight(request: RunRequest) -> int:
    """What a run weighs: its prompt with the attachments, and its row."""
    prompt = request.prompt
    size = RUN_BYTES + utf8_size(prompt.text)
    for attachment in prompt.attachments:
        size += attachment.size
    return size


def message_weight(parts: Iterable[str | None]) -> int:
    """What messages weigh, by their encoded parts; None stands for none."""
    return sum(MESSAGE_BYTES + utf8_size(it or "") for it in parts)
