"""The limits that fields have, and how what is wrong with a request is collected."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

from google.protobuf.duration_pb2 import Duration

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
MAX_ITEMS = 1000
"""How many entries a list in a request has at the most, and a page."""
MAX_DAYS = 7
"""How long a length of time in a request may be."""

DEFAULT_PAGE_SIZE = 50

_NANOS = 1_000_000_000
_MAX_INT64 = (1 << 63) - 1

# RFC 6838, with parameters as RFC 9110 has them, loosely: `text/plain; charset=utf-8`.
_TOKEN = r"[A-Za-z0-9!#$&^_.+-]+"  # noqa: S105 - a word of the grammar, not a secret
_MIME_TYPE = re.compile(rf"{_TOKEN}/{_TOKEN}(?:\s*;[ -~]*)?")

# Nearly all ids are of this kind, and it is quickly seen.
_PLAIN_ID = re.compile(r"[A-Za-z0-9_.:-]*")

Known = TypeVar("Known")
Read = TypeVar("Read")


class Checks:
    """Collects what is wrong with a request, so that the caller is told all of it at once."""

    def __init__(self) -> None:
        self._violations: list[Violation] = []
        self._kind: type[InvalidArgument] = InvalidArgument

    def done(self) -> None:
        """Raises InvalidArgument, or the first more specific error, if anything is wrong."""
        if self._violations:
            message = "; ".join(f"{wrong.field}: {wrong.description}" for wrong in self._violations)
            raise self._kind(message, violations=self._violations)

    def done_with(self, read: Callable[[], Read]) -> Read:
        """What `read` makes of the rest of the request; raises what it refuses along with the
        violations that there are."""
        try:
            value = read()
        except InvalidArgument as error:
            self.include(error)
            self.done()
            raise
        self.done()
        return value

    def wrong(
        self, field: str, description: str, kind: type[InvalidArgument] = InvalidArgument
    ) -> None:
        """Notes a violation; `kind` is the error that says it best."""
        self._violations.append(Violation(field, description))
        if self._kind is InvalidArgument:
            self._kind = kind

    def include(self, error: InvalidArgument) -> None:
        """Adds the violations of an error."""
        for violation in error.violations:
            self.wrong(violation.field, violation.description, type(error))

    # Text

    def size(self, field: str, text: str, limit: int) -> None:
        """A text of `limit` bytes of UTF-8 at the most."""
        if utf8_size(text) > limit:
            self.wrong(field, f"has {utf8_size(text)} bytes; {limit} is the limit")

    def identifier(self, field: str, value: str) -> None:
        """An id, or an empty text where one may be left out."""
        if len(value) <= MAX_ID_BYTES and _PLAIN_ID.fullmatch(value):
            return
        self.size(field, value, MAX_ID_BYTES)
        if value != value.strip():
            self.wrong(field, "begins or ends with whitespace")
        elif any(unicodedata.category(character) == "Cc" for character in value):
            self.wrong(field, "contains a control character")

    def session_id(self, value: str) -> None:
        """The id of a session, which has to be there."""
        if not value:
            self.wrong("session_id", "is missing", SessionMissing)
        self.identifier("session_id", value)

    def run_id(self, value: str) -> None:
        """The id of a run, which has to be there."""
        if not value:
            self.wrong("run_id", "is missing", RunMissing)
        self.identifier("run_id", value)

    def mime_type(self, field: str, value: str) -> None:
        """A media type, or an empty text."""
        self.size(field, value, MAX_NAME_BYTES)
        if value and not _MIME_TYPE.fullmatch(value):
            self.wrong(field, "is not a media type of the form type/subtype")

    def labels(self, field: str, labels: Mapping[str, str]) -> None:
        """The caller's own labels."""
        self.count(field, labels, MAX_LABELS)
        for key, value in labels.items():
            shown = key if utf8_size(key) <= MAX_LABEL_KEY_BYTES else f"{key[:32]}..."
            self.size(f'{field}["{shown}"] (key)', key, MAX_LABEL_KEY_BYTES)
            self.size(f'{field}["{shown}"]', value, MAX_LABEL_VALUE_BYTES)

    # Lists

    def count(self, field: str, items: Collection[object], limit: int = MAX_ITEMS) -> None:
        """A list of `limit` entries at the most."""
        if len(items) > limit:
            self.wrong(field, f"has {len(items)} entries; {limit} is the limit")

    def identifiers(self, field: str, values: Sequence[str]) -> None:
        """A list of ids."""
        self.count(field, values)
        for n, value in enumerate(values[:MAX_ITEMS]):
            if not value:
                self.wrong(f"{field}[{n}]", "is empty")
            self.identifier(f"{field}[{n}]", value)

    # Numbers and enums

    def page_size(self, value: int) -> int:
        """How many items to put on a page."""
        if value < 0:
            self.wrong("page_size", "is negative")
        return min(value, MAX_ITEMS) or DEFAULT_PAGE_SIZE

    def between(self, field: str, value: int, low: int, high: int = _MAX_INT64) -> None:
        """A number within bounds."""
        if value < low:
            self.wrong(field, f"is {value}; it is {low} at the least")
        elif value > high:
            self.wrong(field, f"is {value}; it is {high} at the most")

    def duration(self, field: str, value: Duration, *, zero: bool, days: int = MAX_DAYS) -> Micros:
        """A length of time of up to so many days; `zero` says whether it may be none at all."""
        whole = value.seconds * _NANOS + value.nanos
        if not 0 <= abs(value.nanos) < _NANOS or value.seconds * value.nanos < 0:
            self.wrong(field, "is not a duration: nanos are out of range or of the other sign")
        elif whole < 0 or (whole == 0 and not zero):
            self.wrong(field, "is negative" if zero else "is not more than 0")
        elif whole > days * 86400 * _NANOS:
            self.wrong(field, f"is more than {days} days")
        return convert.micros(value)

    def known(
        self, field: str, value: int, lookup: Callable[[int], Known | None], fallback: Known
    ) -> Known:
        """A value of an enum. proto3 lets any number through, so they are looked up."""
        found = lookup(value)
        if found is None:
            self.wrong(field, f"{value} is not a value of the enum")
        return fallback if found is None else found
