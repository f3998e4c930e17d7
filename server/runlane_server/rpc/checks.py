"""Limits of request fields, and the collection of their violations."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

from google.protobuf.duration_pb2 import Duration

from runlane_server.core.agents import NAME_FORM, is_agent_name
from runlane_server.core.errors import InvalidArgument, RunMissing, SessionMissing, Violation
from runlane_server.core.model import Micros, utf8_size
from runlane_server.rpc import convert

MAX_ID_BYTES = 128
MAX_TITLE_BYTES = 1 << 10
MAX_REASON_BYTES = 1 << 10
MAX_NAME_BYTES = 255
MAX_LABELS = 64
MAX_LABEL_KEY_BYTES = 128
MAX_LABEL_VALUE_BYTES = 4 << 10
MAX_ATTEMPTS = 100
MAX_RETRY_REASONS = 20
MAX_RETRY_REASON_BYTES = 128
MAX_CANCELLED = 4000
"""Runs of one page of CancelAll. The receipt of a run takes up to 430 bytes, and a page may exceed
this by one session; together they stay below gRPC's 4 MiB."""

MAX_ITEMS = 1000
"""Maximum length of a list in a request, and of a page."""
MAX_DAYS = 7
"""Maximum duration in a request."""

MAX_VIOLATIONS = 20
"""Violations in one error; the check of a request stops there."""

DEFAULT_PAGE_SIZE = 50

_NANOS = 1_000_000_000
_MAX_INT64 = (1 << 63) - 1

# RFC 6838, with loosely checked parameters of RFC 9110: `text/plain; charset=utf-8`.
_TOKEN = r"[A-Za-z0-9!#$&^_.+-]+"  # noqa: S105 - a word of the grammar, not a secret
_MIME_TYPE = re.compile(rf"{_TOKEN}/{_TOKEN}(?:\s*;[ -~]*)?")

# Nearly all ids match this, which is a fast check.
_PLAIN_ID = re.compile(r"[A-Za-z0-9_.:-]*")

EnumT = TypeVar("EnumT")
ReadT = TypeVar("ReadT")


class Checks:
    """Collects the violations of a request, so that one error reports up to `MAX_VIOLATIONS`."""

    def __init__(self) -> None:
        self._violations: list[Violation] = []
        self._kind: type[InvalidArgument] = InvalidArgument

    def finish(self) -> None:
        """Raises all violations as InvalidArgument, or as the first more specific error."""
        if self._violations:
            message = "; ".join(f"{wrong.field}: {wrong.description}" for wrong in self._violations)
            raise self._kind(message, violations=self._violations)

    def finish_with(self, read: Callable[[], ReadT]) -> ReadT:
        """Returns the value of `read`; raises its violations together with those collected."""
        try:
            value = read()
        except InvalidArgument as error:
            self.include(error)
            self.finish()
            raise
        self.finish()
        return value

    def reject(
        self, field: str, description: str, kind: type[InvalidArgument] = InvalidArgument
    ) -> None:
        """Adds a violation; `kind` is the most specific error for it. The last one raises."""
        self._violations.append(Violation(field, description))
        if self._kind is InvalidArgument:
            self._kind = kind
        if len(self._violations) >= MAX_VIOLATIONS:
            self.finish()

    def agent(self, field: str, name: str) -> None:
        """Requires the form of a name of an agent, or nothing."""
        if name and not is_agent_name(name):
            self.reject(field, f"is not a name of an agent: use {NAME_FORM}")

    def include(self, error: InvalidArgument) -> None:
        """Adds the violations of an error."""
        for violation in error.violations:
            self.reject(violation.field, violation.description, type(error))

    # Text

    def size(self, field: str, text: str, limit: int) -> None:
        """A string of at most `limit` bytes in UTF-8."""
        if utf8_size(text) > limit:
            self.reject(field, f"has {utf8_size(text)} bytes; the limit is {limit}")

    def identifier(self, field: str, value: str) -> None:
        """An id; empty is allowed."""
        if len(value) <= MAX_ID_BYTES and _PLAIN_ID.fullmatch(value):
            return
        self.size(field, value, MAX_ID_BYTES)
        if len(value) > MAX_ID_BYTES:
            return  # each further check takes time for each character
        if value != value.strip():
            self.reject(field, "starts or ends with whitespace")
        elif any(unicodedata.category(character) == "Cc" for character in value):
            self.reject(field, "contains a control character")

    def session_id(self, value: str) -> None:
        """A required id of a session."""
        if not value:
            self.reject("session_id", "is missing", SessionMissing)
        self.identifier("session_id", value)

    def run_id(self, value: str) -> None:
        """A required id of a run."""
        if not value:
            self.reject("run_id", "is missing", RunMissing)
        self.identifier("run_id", value)

    def mime_type(self, field: str, value: str) -> None:
        """A media type; empty is allowed."""
        self.size(field, value, MAX_NAME_BYTES)
        if 0 < len(value) <= MAX_NAME_BYTES and not _MIME_TYPE.fullmatch(value):
            self.reject(field, "is not a media type of the form type/subtype")

    def labels(self, field: str, labels: Mapping[str, str]) -> None:
        """Metadata of the caller."""
        self.count(field, labels, MAX_LABELS)
        for key, value in labels.items():
            shown = key if utf8_size(key) <= MAX_LABEL_KEY_BYTES else f"{key[:32]}..."
            self.size(f'{field}["{shown}"] (key)', key, MAX_LABEL_KEY_BYTES)
            self.size(f'{field}["{shown}"]', value, MAX_LABEL_VALUE_BYTES)

    # Lists

    def count(self, field: str, items: Collection[object], limit: int = MAX_ITEMS) -> None:
        """A list of at most `limit` entries. A longer one raises, so that nobody walks it."""
        if len(items) > limit:
            self.reject(field, f"has {len(items)} entries; the limit is {limit}")
            self.finish()

    def identifiers(self, field: str, values: Sequence[str]) -> None:
        """A list of ids."""
        self.count(field, values)
        for n, value in enumerate(values):
            if not value:
                self.reject(f"{field}[{n}]", "is empty")
            self.identifier(f"{field}[{n}]", value)

    # Numbers and enums

    def page_size(self, value: int) -> int:
        """A page size, clamped to `MAX_ITEMS`; 0 means the default."""
        if value < 0:
            self.reject("page_size", "is negative")
        return min(value, MAX_ITEMS) or DEFAULT_PAGE_SIZE

    def between(self, field: str, value: int, low: int, high: int = _MAX_INT64) -> None:
        """A number from `low` to `high`."""
        if value < low:
            self.reject(field, f"is {value}; the minimum is {low}")
        elif value > high:
            self.reject(field, f"is {value}; the maximum is {high}")

    def duration(self, field: str, value: Duration, *, zero: bool, days: int = MAX_DAYS) -> Micros:
        """A duration of up to `days`; `zero` allows 0."""
        whole = value.seconds * _NANOS + value.nanos
        if not 0 <= abs(value.nanos) < _NANOS or value.seconds * value.nanos < 0:
            self.reject(
                field,
                "is not a valid duration: nanos are out of range or differ in sign from seconds",
            )
        elif whole < 0 or (whole == 0 and not zero):
            self.reject(field, "is negative" if zero else "must be positive")
        elif whole > days * 86400 * _NANOS:
            self.reject(field, f"is more than {days} days")
        return convert.micros(value)

    def enum(
        self, field: str, value: int, lookup: Callable[[int], EnumT | None], fallback: EnumT
    ) -> EnumT:
        """A value of an enum. It is looked up because proto3 passes any number."""
        found = lookup(value)
        if found is None:
            self.reject(field, f"{value} is not a value of this enum")
        return fallback if found is None else found
