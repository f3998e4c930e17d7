"""The limits of one node, and the check of a prompt against them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from runlane_server.core.errors import EmptyPrompt, InvalidArgument, PromptTooLarge
from runlane_server.core.model import Attachment, Micros, Prompt, utf8_size

MAX_INPUT_BYTES = (4 << 20) - (384 << 10)
"""Maximum size of a prompt together with its attachments: a message of 4 MiB has to hold both, with
the labels of the run. Only settings above the defaults reach it."""

RETRY_PAUSE = 1.0
"""Seconds between retries while the store is unavailable."""


class RunTimeout(NamedTuple):
    """The time an attempt may be active, in seconds, and the name of what limits it."""

    seconds: float
    source: str


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one node. Sizes are in bytes of UTF-8, times in seconds.

    `max_waiting_runs` applies to each session, `max_waiting_total` to the node;
    `max_attachment_bytes` is for all attachments of a run together, `max_run_output` for everything
    that the agent emits in one attempt, `max_history` for the transcript that it is given.
    `default_run_timeout` and `max_run_time` are for one attempt; 0 is no limit.
    """

    max_active_runs: int = 256
    max_waiting_runs: int = 64
    max_waiting_total: int = 200_000
    max_prompt_bytes: int = 1 << 20
    max_attachment_bytes: int = 2 << 20
    max_run_output: int = 16 << 20
    max_history: int = 32 << 20
    default_run_timeout: float = 6 * 3600.0
    max_run_time: float = 7 * 86400.0
    cancel_grace: float = 5.0
    ready_timeout: float = 60.0

    def run_timeout(self, requested: Micros | None) -> RunTimeout | None:
        """How long an attempt may be active that has this timeout; None without a limit.

        It applies when the run becomes active, so waiting runs of an earlier start are covered.
        """
        if requested is not None:
            found = RunTimeout(requested / 1e6, "its timeout")
        elif self.default_run_timeout:
            found = RunTimeout(self.default_run_timeout, "--default-run-timeout")
        else:
            found = None
        if self.max_run_time and (found is None or found.seconds > self.max_run_time):
            return RunTimeout(self.max_run_time, "--max-run-time")
        return found


def prompt_errors(prompt: Prompt, limits: Limits) -> Iterator[InvalidArgument]:
    """Yields an EmptyPrompt (R2) or a PromptTooLarge for each problem with a prompt."""
    if not (_has_text(prompt.text) or any(_has_text(it.content) for it in prompt.attachments)):
        yield EmptyPrompt.of("prompt", "is empty, and there is no text attachment")
    size, limit = utf8_size(prompt.text), limits.max_prompt_bytes
    if size > limit:
        yield PromptTooLarge.of("prompt", f"has {size} bytes; {limit} is the limit")
    if not prompt.attachments:
        return
    attached = sum(attachment.size for attachment in prompt.attachments)
    limit = limits.max_attachment_bytes
    if attached > limit:
        problem = f"have {attached} bytes together; {limit} is the limit"
        yield PromptTooLarge.of("attachments", problem)
    total = size + sum(map(_message_size, prompt.attachments))
    if attached <= limit and size <= limits.max_prompt_bytes and total > MAX_INPUT_BYTES:
        problem = f"have {total} bytes with names and prompt; {MAX_INPUT_BYTES} is the limit"
        yield PromptTooLarge.of("attachments", problem)


def _message_size(attachment: Attachment) -> int:
    """An upper bound of the size of an attachment in a message."""
    return attachment.size + utf8_size(attachment.name) + utf8_size(attachment.mime_type) + 24


def _has_text(content: str | bytes) -> bool:
    return isinstance(content, str) and bool(content) and not content.isspace()
