"""Text with NUL characters, which callers may send and PostgreSQL cannot store.

A NUL is stored as two characters, and so is U+0001, which marks them. JSON needs none of this: it
has its own escape.
"""

from __future__ import annotations

_MARK = "\x01"
_MARKED_MARK = "\x01\x02"
_MARKED_NUL = "\x01\x03"


def escape(text: str) -> str:
    """The stored form of a text. Different texts have different stored forms."""
    if "\0" not in text and _MARK not in text:
        return text
    return text.replace(_MARK, _MARKED_MARK).replace("\0", _MARKED_NUL)


def unescape(text: str) -> str:
    """The text of a stored form."""
    if _MARK not in text:
        return text
    # After the first step every mark left stands for itself.
    return text.replace(_MARKED_NUL, "\0").replace(_MARKED_MARK, _MARK)
