"""An HTTP/2 connection without conventions: its test decides what it reads and sends."""

from __future__ import annotations

import socket
import struct
import threading
import time
from contextlib import suppress

from proofs.fuzz.frames import (
    ACK,
    CALL,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    WINDOW,
    block,
    frame,
    settings,
)

INITIAL_WINDOW = 4
CHUNK = 16_384
CANCEL = struct.pack(">I", 8)


class Connection:
    """A connection. A thread reads its frames, counts the streams that end, and answers pings.

    `window` is how much of each stream the server may send before it is asked for more.
    """

    def __init__(self, address: str, *, window: int = 65_535) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), 5)
        self._socket.settimeout(None)
        self._next = 1
        self._changed = threading.Condition()
        self._room = 65_535
        self._first_room = 65_535
        self._rooms: dict[int, int] = {}
        self.ended: set[int] = set()
        self.is_closed = False
        self._send(PREFACE + settings((INITIAL_WINDOW, window)))
        threading.Thread(target=self._read, daemon=True).start()

    def start(self, path: str | bytes, token: str = "") -> int:
        """Starts a call and returns its stream."""
        stream, self._next = self._next, self._next + 2
        name = path if isinstance(path, bytes) else path.encode()
        fields = {key: value for key, value in CALL.items() if key != ":path"}
        if token:
            fields["authorization"] = f"Bearer {token}"
        # Written here, since it need not be text.
        header = b"\0\x05:path" + bytes([len(name)]) + name + block(fields)
        self._send(frame(HEADERS, header, flags=END_HEADERS, stream=stream))
        return stream

    def call(self, path: str, message: bytes = b"", token: str = "") -> int:
        """Makes a call with one message and returns its stream."""
        stream = self.start(path, token)
        self.send_message(stream, message)
        return stream

    def send_message(
        self, stream: int, message: bytes, *, hold_back: int = 0, seconds: float = 5
    ) -> None:
        """Sends a message as flow control allows, for some seconds at most.

        The last `hold_back` bytes are not sent, so that the message stays incomplete.
        """
        data = b"\0" + struct.pack(">I", len(message)) + message
        data = data[: len(data) - hold_back]
        end = time.monotonic() + seconds
        sent = 0
        while sent < len(data):
            with self._changed:
                while not (room := self._room_of(stream)) and not self.is_closed:
                    if not self._changed.wait(end - time.monotonic()):
                        return
                if self.is_closed or stream in self.ended:
                    return
                size = min(room, CHUNK, len(data) - sent)
                self._room -= size
                self._rooms[stream] = self._rooms.get(stream, 0) - size
            is_last = sent + size == len(data) and not hold_back
            flags = END_STREAM if is_last else 0
            self._send(frame(DATA, data[sent : sent + size], flags=flags, stream=stream))
            sent += size

    def reset(self, stream: int) -> None:
        """Cancels a call."""
        self._send(frame(RST_STREAM, CANCEL, stream=stream))

    def wait_ended(self, streams: int, seconds: float) -> None:
        """Waits until so many streams have ended, for some seconds at most."""
        with self._changed:
            self._changed.wait_for(
                lambda: len(self.ended) >= streams or self.is_closed, max(0, seconds)
            )

    def close(self) -> None:
        """Drops the connection."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _room_of(self, stream: int) -> int:
        return max(0, min(self._room, self._first_room + self._rooms.get(stream, 0)))

    def _send(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except OSError:
            self._mark_closed()

    def _mark_closed(self) -> None:
        with self._changed:
            self.is_closed = True
            self._changed.notify_all()

    def _read(self) -> None:
        with suppress(OSError, EOFError, struct.error):
            reader = self._socket.makefile("rb")
            while header := reader.read(9):
                size = int.from_bytes(header[:3], "big")
                kind, flags, stream = struct.unpack(">BBI", header[3:])
                self._take(kind, flags, stream, reader.read(size))
        self._mark_closed()

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        with self._changed:
            if kind == WINDOW:
                (more,) = struct.unpack(">I", payload)
                if stream:
                    self._rooms[stream] = self._rooms.get(stream, 0) + more
                else:
                    self._room += more
            elif kind == SETTINGS and not flags & ACK:
                for key, value in struct.iter_unpack(">HI", payload):
                    if key == INITIAL_WINDOW:
                        self._first_room = value
            if kind == RST_STREAM or (kind == HEADERS and flags & END_STREAM):
                self.ended.add(stream)
            self._changed.notify_all()
        if kind == SETTINGS and not flags & ACK:
            self._send(frame(SETTINGS, flags=ACK))
        elif kind == PING and not flags & ACK:
            self._send(frame(PING, payload, flags=ACK))
