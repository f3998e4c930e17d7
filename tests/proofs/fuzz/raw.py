"""Invalid connections: their bytes, and the way in which they are sent."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Mapping
from random import Random

from proofs.fuzz import frames
from proofs.fuzz.frames import (
    CONTINUATION,
    END_HEADERS,
    HEADERS,
    OPENING,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    WINDOW,
    call,
    frame,
    settings,
)
from proofs.fuzz.mutate import mutated

LISTENED = 0.05
"""Seconds for which an answer is read; some attacks get none."""

LONGEST = 1 << 20
"""Maximum size of an answer in bytes; no real answer is so large."""

Attack = Callable[[Random], bytes]


def _garbage(random: Random) -> bytes:
    return OPENING + b"".join(
        frame(
            random.randrange(12),
            random.randbytes(random.randrange(64)),
            flags=random.randrange(256),
            stream=random.choice((0, 1, 3, 2, 0x7FFFFFFF)),
        )
        for _ in range(random.randint(1, 20))
    )


def _wrong_sizes(random: Random) -> bytes:
    kind = random.choice((RST_STREAM, SETTINGS, PING, WINDOW, HEADERS, 0))
    size = random.choice((0, 1, 3, 5, 7, 9))
    stated = random.choice((size, 0, size + 1, 16_385, 0xFFFFFF))
    return OPENING + frame(kind, bytes(size), stream=random.randrange(2), length=stated)


def _headers(random: Random) -> bytes:
    wrong: list[Mapping[str, str | None]] = [
        {"content_type": "text/html"},
        {"content_type": None},
        {"te": None},
        {"h_method": "GET"},
        {"h_method": "BREW"},
        {"h_path": ""},
        {"h_path": None},
        {"h_path": "/" + "x" * 5000},
        {"h_scheme": "ftp"},
        {"grpc_timeout": "99999999999H"},
        {"grpc_timeout": "-1S"},
        {"grpc_encoding": "gzip"},
        {"grpc_encoding": "nonsense"},
        {"Upper": "case"},
        {"connection": "close"},
        {"x_bin": "not base64 !"},
        {"big": "x" * 60_000},
        {"authorization": "Bearer \x01\x7f"},
        {"traceparent": "00-" + "g" * 32},
    ]
    return OPENING + call(1, b"\x0a\x01r", **random.choice(wrong))


def _message_lengths(random: Random) -> bytes:
    stated = random.choice((0, 1, 4 << 20, (4 << 20) + 1, 0x7FFFFFFF, 0xFFFFFFFF))
    data = bytes([random.choice((0, 1, 2, 255))]) + struct.pack(">I", stated) + random.randbytes(20)
    return (
        OPENING
        + frame(HEADERS, frames.block(frames.CALL), flags=END_HEADERS, stream=1)
        + frame(0, data, flags=random.randrange(2), stream=1)
    )


def _continuations(random: Random) -> bytes:
    piece = frames.block({f"x{random.randrange(1000)}": "y" * random.choice((0, 10, 1000))})
    return (
        OPENING
        + frame(HEADERS, frames.block(frames.CALL), stream=1)
        + frame(CONTINUATION, piece, stream=1) * random.choice((1, 100, 500))
    )


def _odd_settings(random: Random) -> bytes:
    values = (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
    return PREFACE + b"".join(
        settings((random.randrange(9), random.choice(values)))
        for _ in range(random.choice((1, 10, 300)))
    )


def _rapid_reset(random: Random) -> bytes:
    return OPENING + b"".join(
        call(stream, b"\x0a\x01r") + frame(RST_STREAM, b"\0\0\0\x08", stream=stream)
        for stream in range(1, 2 * random.choice((1, 50, 300)), 2)
    )


def _pings(random: Random) -> bytes:
    return OPENING + frame(PING, random.randbytes(8)) * random.choice((1, 100, 500))


def _windows(random: Random) -> bytes:
    step = struct.pack(">I", random.choice((0, 1, 0x7FFFFFFF)))
    return OPENING + call() + frame(WINDOW, step, stream=random.randrange(2)) * random.randint(1, 9)


def _hpack(random: Random) -> bytes:
    return OPENING + frame(HEADERS, random.randbytes(40), flags=END_HEADERS, stream=1)


def _mutated(random: Random) -> bytes:
    return mutated(random, OPENING + call(1, b"\x0a\x01r") + call(3, b"\x0a\x01r"))


def _truncated(random: Random) -> bytes:
    whole = OPENING + call(1, b"\x0a\x01r")
    return whole[: random.randrange(len(whole))]


def _http1(random: Random) -> bytes:
    line = random.choice((b"GET / HTTP/1.1", b"POST /x HTTP/1.0", b"PRI * HTTP/1.1", b"X"))
    return line + b"\r\nHost: a\r\n" + b"A: b\r\n" * random.choice((0, 1, 1000)) + b"\r\n"


def _client_hello(random: Random) -> bytes:
    body = b"\x03\x03" + random.randbytes(32) + b"\0\0\x02\x13\x01\x01\0"
    hello = b"\x01" + struct.pack(">I", len(body))[1:] + body
    return b"\x16\x03\x01" + struct.pack(">H", len(hello)) + hello


ATTACKS: Mapping[str, Attack] = {
    "says nothing": lambda _: b"",
    "noise": lambda random: random.randbytes(random.randint(1, 5000)),
    "garbage frames": _garbage,
    "frames of wrong sizes": _wrong_sizes,
    "wrong headers": _headers,
    "lengths of messages": _message_lengths,
    "CONTINUATION flood": _continuations,
    "odd settings": _odd_settings,
    "rapid reset": _rapid_reset,
    "pings": _pings,
    "windows": _windows,
    "HPACK": _hpack,
    "mutated call": _mutated,
    "truncated call": _truncated,
    "HTTP/1": _http1,
    "TLS to a plaintext port": _client_hello,
}


def attack(address: str, data: bytes) -> bytes:
    """Sends bytes over a new connection; returns the answer within `LISTENED` seconds."""
    host, port = address.rsplit(":", 1)
    answer = b""
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        try:
            connection.sendall(data)
            connection.settimeout(LISTENED)
            while len(answer) < LONGEST and (piece := connection.recv(65_536)):
                answer += piece
        except OSError:
            pass  # a server may hang up on this
    return answer
