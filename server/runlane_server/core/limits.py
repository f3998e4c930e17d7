"""The limits of one node, and the check of a prompt against them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from runlane_server.core.errors import EmptyPrompt, InvalidArgument, PromptTooLarge
from runlane_server.core.model import Prompt, utf8_size

RETRY_PAUSE = 1.0
"""Seconds between retries while the store is unavailable."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one node. Sizes are in bytes of UTF-8, times in seconds.

    `max_waiting_runs` applies to each session, `max_waiting_total` to the node;
    `max_attachment_bytes` is for all attachments of a run together.
    """

    max_active_runs: int = 256
    max_waiting_runs: int = 64
    max_waiting_total: int = 200_000
    max_prompt_bytes: int = 1 << 20
    max_attachment_bytes: int = 2 << 20
    cancel_grace: float = 5.0
    ready_timeout: float = 60.0


def prompt_errors(prompt: Prompt, limits: Limits) -> Iterator[InvalidArgument]:
    """Yields an EmptyPrompt (R2) or a PromptTooLarge for each problem with a prompt."""
    if not (_has_text(prompt.text) or any(_has_text(it.content) for it in prompt.attachments)):
        yield EmptyPrompt.of("prompt", "is empty, and there is no text attachment")
    size, limit = utf8_size(prompt.text), limits.max_prompt_bytes
    if size > limit:
        yield PromptTooLarge.of("prompt", f"has {size} bytes; {limit} is the limit")
    size = sum(attachment.size for attachment in prompt.attachments)
    limit = limits.max_attachment_bytes
    if size > limit:
        yield PromptTooLarge.of("attachments", f"have {size} bytes together; {limit} is the limit")


def _has_text(content: str | bytes) -> bool:
    return isinstance(content, str) and bool(content) and not content.isspace()
