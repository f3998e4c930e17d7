"""HTTP/2 frames (RFC 9113), valid or not. Header fields are literals without indexing."""

from __future__ import annotations

import struct
from collections.abc import Mapping

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH, PING, GOAWAY, WINDOW, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED = 0x1, 0x1, 0x4, 0x8

CALL: Mapping[str, str] = {
    ":method": "POST",
    ":scheme": "http",
    ":path": "/runlane.v1.RunService/GetRun",
    ":authority": "localhost",
    "te": "trailers",
    "content-type": "application/grpc",
}


def frame(
    kind: int, payload: bytes = b"", *, flags: int = 0, stream: int = 0, length: int | None = None
) -> bytes:
    """A frame. `length` replaces the true length of the payload."""
    size = len(payload) if length is None else length
    return struct.pack(">I", size)[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def block(fields: Mapping[str, str]) -> bytes:
    """A header block (RFC 7541, 6.2.2)."""
    return b"".join(
        b"\0" + _string(name.encode()) + _string(value.encode()) for name, value in fields.items()
    )


def _string(text: bytes) -> bytes:
    if len(text) < 127:
        return bytes([len(text)]) + text
    rest, encoded = len(text) - 127, bytearray([127])
    while rest > 127:
        encoded.append(0x80 | (rest & 0x7F))
        rest >>= 7
    return bytes([*encoded, rest]) + text


def settings(*pairs: tuple[int, int]) -> bytes:
    """A SETTINGS frame."""
    return frame(SETTINGS, b"".join(struct.pack(">HI", key, value) for key, value in pairs))


def call(stream: int = 1, message: bytes = b"", **changes: str | None) -> bytes:
    """A call of GetRun. `changes` replace header fields; None removes one.

    In a name, `_` stands for `-`, and a leading `h_` for a colon.
    """
    fields: dict[str, str] = dict(CALL)
    for name, value in changes.items():
        key = name.replace("h_", ":", 1) if name.startswith("h_") else name.replace("_", "-")
        fields.pop(key, None)
        if value is not None:
            fields[key] = value
    data = b"\0" + struct.pack(">I", len(message)) + message
    return frame(HEADERS, block(fields), flags=END_HEADERS, stream=stream) + frame(
        DATA, data, flags=END_STREAM, stream=stream
    )


OPENING = PREFACE + settings()
"""The preface that every valid client sends first."""
