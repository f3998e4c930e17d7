"""Nearly valid bytes: most parser bugs are there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

LONGEST = 1 << 16
"""Maximum size in bytes; longer inputs would only cost time."""

_TOKENS = (
    b"\0", b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\n", b'"', b"'", b"\\", b"[", b"]", b"{", b"}",
    b"=", b":", b",", b"-1", b"0", b"9" * 400, b"9" * 5000, b"NaN", b"Infinity", b"1e999", b"null",
    b"true", b"\\ud800", b"%", b"[[", b"\xd9\xa3", b"-" * 64, b"65536", b"\x7f" * 9, b"\x0a\x00",
)  # fmt: skip
_DEPTHS = (2, 16, 100, 500, 900, 960, 990, 2000, 10_000)

Mutation = Callable[[Random, bytes, Sequence[bytes]], bytes]


def mutated(random: Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """Applies one to four changes; parts of `others` may be spliced in."""
    for _ in range(random.randint(1, 4)):
        data = random.choice(_MUTATIONS)(random, data, others)[:LONGEST]
    return data


def _span(random: Random, data: bytes) -> tuple[int, int]:
    first = random.randint(0, len(data))
    return first, min(len(data), first + random.choice((1, 1, 2, 4, 8, 32)))


def _flip(random: Random, data: bytes, _: Sequence[bytes]) -> bytes:
    if not data:
        return random.randbytes(4)
    at = random.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << random.randrange(8))]) + data[at + 1 :]


def _cut(random: Random, data: bytes, _: Sequence[bytes]) -> bytes:
    return data[: random.randint(0, len(data))]


def _remove(random: Random, data: bytes, _: Sequence[bytes]) -> bytes:
    first, last = _span(random, data)
    return data[:first] + data[last:]


def _repeat(random: Random, data: bytes, _: Sequence[bytes]) -> bytes:
    first, last = _span(random, data)
    return data[:first] + data[first:last] * random.choice(_DEPTHS) + data[last:]


def _insert(random: Random, data: bytes, _: Sequence[bytes]) -> bytes:
    first, last = _span(random, data)
    token = random.choice(_TOKENS)
    return data[:first] + token + data[first if random.random() < 0.5 else last :]


def _noise(random: Random, data: bytes, _: Sequence[bytes]) -> bytes:
    first, last = _span(random, data)
    return data[:first] + random.randbytes(random.randint(1, 16)) + data[last:]


def _splice(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    other = random.choice(others) if others else data
    return data[: random.randint(0, len(data))] + other[random.randint(0, len(other)) :]


_MUTATIONS: Sequence[Mutation] = (_flip, _cut, _remove, _repeat, _insert, _noise, _splice)
