"""A limit of JSON that is checked before it is parsed.

Each list and object takes memory and time of the event loop, even if it is empty: a MiB of them
45 ms.
"""

from __future__ import annotations

import re

MAX_JSON_PARTS = 1 << 16
"""Lists and objects of a JSON text."""

TOO_MANY_PARTS = f"more than {MAX_JSON_PARTS} lists and objects"

_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)


def has_too_many_parts(text: str) -> bool:
    """Whether a JSON text has more than `MAX_JSON_PARTS` lists and objects."""
    if len(text) <= MAX_JSON_PARTS:
        return False
    bare = _STRING.sub("", text)
    return bare.count("[") + bare.count("{") > MAX_JSON_PARTS
