"""The plain text of a prompt."""

from __future__ import annotations

from runlane_server.core.model import Prompt


def attached_texts(prompt: Prompt) -> list[str]:
    """The contents of the text attachments, in order."""
    return [a.content for a in prompt.attachments if isinstance(a.content, str)]


def whole_text(prompt: Prompt) -> str:
    """The text and then the text attachments, separated by blank lines."""
    texts = [prompt.text] if prompt.text else []
    return "\n\n".join([*texts, *attached_texts(prompt)])
