"""Text with a NUL in it, which callers may send and a text of PostgreSQL cannot have.

It is kept as two characters; U+0001, which announces them, is kept as two for that. JSON needs
nothing of this: it has an escape of its own.
"""

from __future__ import annotations

_MARK = "\x01"
_MARKED_MARK = "\x01\x02"
_MARKED_NUL = "\x01\x03"


def escape(text: str) -> str:
    """The text as it is kept. Two texts are kept alike only if they are the same."""
    if "\0" not in text and _MARK not in text:
        return text
    return text.replace(_MARK, _MARKED_MARK).replace("\0", _MARKED_NUL)


def unescape(text: str) -> str:
    """What `escape` was given."""
    if _MARK not in text:
        return text
    # The first step leaves no mark but those that stand for themselves.
    return text.replace(_MARKED_NUL, "\0").replace(_MARKED_MARK, _MARK)
