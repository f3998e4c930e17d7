"""What tenants and callers may be called."""

from __future__ import annotations

import re

_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")

TENANT_FORM = "1 to 64 letters, digits, '.', '_' or '-', and begins with a letter or a digit"
NAME_FORM = "1 to 64 letters, digits, '.', '_', '@' or '-', and begins with a letter or a digit"


def is_tenant(text: str) -> bool:
    """Whether a tenant may be called that."""
    return _TENANT.fullmatch(text) is not None


def is_name(text: str) -> bool:
    """Whether a token may be called that."""
    return _NAME.fullmatch(text) is not None
