"""The plain text of a prompt, and of what a program wrote for a terminal."""

from __future__ import annotations

import re

from runlane_server.core.model import Prompt


def attached_texts(prompt: Prompt) -> list[str]:
    """The contents of the text attachments, in order."""
    return [a.content for a in prompt.attachments if isinstance(a.content, str)]


def whole_text(prompt: Prompt) -> str:
    """The text and then the text attachments, separated by blank lines."""
    texts = [prompt.text] if prompt.text else []
    return "\n\n".join([*texts, *attached_texts(prompt)])


# Operating system commands, control sequences, and two-character escapes, each also in its 8-bit
# form. The last may be incomplete.
_TERMINAL_CODES = re.compile(
    r"(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c|\Z)"
    r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"
    r"|\x1b[ -/]*(?:[0-~]|\Z)"
)
_CONTROLS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff]"
)


def without_terminal_codes(text: str) -> str:
    """The words of a text that was written for a terminal.

    It has no escape sequences, control or invisible characters, no frames (lines without a letter
    or digit), and of a line that was overwritten only the last state.
    """
    text = _TERMINAL_CODES.sub("", text).replace("\r\n", "\n")
    lines = (line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
    words = (_CONTROLS.sub("", line).rstrip() for line in lines)
    return "\n".join(line for line in words if any(map(str.isalnum, line)))
