"""JSON-RPC 2.0 over the pipes of a program, one message a line, in one task.

The program may write anything: lines that are no message are ignored up to a limit, as agents
print notes to stdout. Nothing is read ahead, so a program that writes faster than its events are
stored waits in its pipe.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import structlog

from runlane_server.agents.base import AgentError
from runlane_server.agents.command.program import Program

ACP_PROTOCOL = "ACP_PROTOCOL"
"""Reason of a failed run: the agent does not keep to the protocol."""

ACP_ERROR = "ACP_ERROR"
"""Reason of a failed run: the agent answered with an error."""

ACP_TIMEOUT = "ACP_TIMEOUT"
"""Reason of a failed run: the agent did not get ready in time."""

MAX_LINE = 4 << 20
"""Maximum size of a message of the agent, in bytes."""

MAX_PARTS = 200_000
"""Number of brackets in a message of the agent. The time to parse it, in which nothing else runs in
the server, depends on them more than on its size."""

MAX_NOISE = 1 << 20
"""Number of bytes of a turn that may be no messages. A line counts as `NOISE_LINE` at least."""

NOISE_LINE = 128

MAX_UNREAD = 1 << 20
"""Number of bytes of answers that wait for the agent to read them."""

MAX_ID = 1024
"""Length of the id of an agent's request, which its answer repeats."""

MAX_METHOD = 100
"""Length of the method's name that a refusal repeats."""

PAUSE_LINES = 50
PAUSE_BYTES = 1 << 16
"""After so many lines, or so many bytes of them, others use the event loop."""

METHOD_NOT_FOUND = -32601
INVALID_PARAMS = -32602

RequestId: TypeAlias = str | int | None

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Notification:
    """A message of the agent that needs no answer."""

    method: str
    params: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Request:
    """A message of the agent that must be answered."""

    request_id: RequestId
    method: str
    params: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """The agent's answer to the request in progress."""

    result: Mapping[str, Any]


class ErrorAnswer(AgentError):
    """The agent answered a request with an error."""

    def __init__(self, method: str, code: int, message: str) -> None:
        super().__init__(f"the agent answered {method} with an error: {message}", reason=ACP_ERROR)
        self.code = code


class AgentExited(Exception):
    """The agent closed its output before it answered."""


class Connection:
    """The server's side of the conversation with one program. One request at a time."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._buffer = bytearray()
        self._scanned = 0
        self._noise = 0
        self._last_id = 0
        self._request_size = 0
        self._lines = self._line_bytes = 0
        self._method = ""

    def send(self, method: str, params: Mapping[str, Any]) -> None:
        """Sends a request. Its answer is among the following `receive`s."""
        self._last_id += 1
        self._method = method
        self._request_size = self._write({"id": self._last_id, "method": method, "params": params})

    def notify(self, method: str, params: Mapping[str, Any]) -> None:
        """Sends a message that needs no answer."""
        self._write({"method": method, "params": params})

    def reply(self, request: Request, result: Mapping[str, Any]) -> None:
        """Answers a request of the agent."""
        self._write({"id": request.request_id, "result": result})

    def refuse(self, request: Request, code: int, message: str) -> None:
        """Answers a request of the agent with an error."""
        self._write({"id": request.request_id, "error": {"code": code, "message": message}})

    async def call(
        self, method: str, params: Mapping[str, Any], *, timeout: float
    ) -> Mapping[str, Any]:
        """Sends a request; returns the result. Notifications before it are dropped.

        Raises AgentError, ErrorAnswer if the agent answers with an error, and AgentExited.
        """
        self.send(method, params)
        try:
            async with asyncio.timeout(timeout):
                while not isinstance(message := await self.receive(), Answer):
                    if isinstance(message, Request):
                        self.refuse_method(message)
        except TimeoutError:
            text = f"the agent did not answer {method} within {timeout:g} s"
            raise AgentError(text, reason=ACP_TIMEOUT) from None
        return message.result

    def refuse_method(self, request: Request) -> None:
        """Answers a request for something that was not offered."""
        self.refuse(request, METHOD_NOT_FOUND, f"{request.method[:MAX_METHOD]} is not available")

    async def receive(self) -> Notification | Request | Answer:
        """Waits for the next message of the agent. Cancelling it loses nothing.

        Raises ErrorAnswer if the request in progress was answered with an error, AgentExited, and
        AgentError (ACP_PROTOCOL).
        """
        while True:
            line = await self._line()
            message = self._parse(line)
            if message is not None:
                return message
            self._ignore(line)

    async def _line(self) -> bytes:
        await self._pause()
        while (end := self._buffer.find(b"\n", self._scanned)) < 0:
            self._scanned = len(self._buffer)
            if self._scanned > MAX_LINE:
                raise _broken(f"wrote a line of more than {MAX_LINE >> 20} MiB")
            # `read` returns at once while there is output: others use the event loop too.
            await asyncio.sleep(0)
            data = await self._program.read()
            if not data:
                raise AgentExited
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        self._scanned = 0
        self._lines += 1
        self._line_bytes += len(line)
        return line

    async def _pause(self) -> None:
        if self._lines >= PAUSE_LINES or self._line_bytes >= PAUSE_BYTES:
            self._lines = self._line_bytes = 0
            await asyncio.sleep(0)

    def _parse(self, line: bytes) -> Notification | Request | Answer | None:
        if line.count(b"[") + line.count(b"{") > MAX_PARTS:
            raise _broken(f"wrote a message of more than {MAX_PARTS} objects and lists")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            return None
        if not isinstance(message, dict):
            return None
        method, params = message.get("method"), message.get("params")
        if isinstance(method, str):
            return _call_of(message, method, params if isinstance(params, dict) else {})
        if message.get("id") != self._last_id or isinstance(message.get("id"), bool):
            return None  # an answer to nothing, or to an earlier request
        if "error" in message:
            raise _error_answer(self._method, message["error"])
        result = message.get("result")
        return Answer(result if isinstance(result, dict) else {})

    def _ignore(self, line: bytes) -> None:
        if not self._noise:
            log.warning("a line of an agent is no message for us; ignored", line=repr(line[:200]))
        self._noise += max(len(line) + 1, NOISE_LINE)
        if self._noise > MAX_NOISE:
            raise _broken("writes lines that are no messages of the protocol")

    def _write(self, message: Mapping[str, Any]) -> int:
        """Returns the size. A request of ours, which may be large, is not counted as an answer."""
        if self._program.unwritten > MAX_UNREAD + self._request_size:
            raise _broken("asks, but does not read the answers")
        data = json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n"
        self._program.write(data)
        return len(data)


def _call_of(
    message: Mapping[str, Any], method: str, params: Mapping[str, Any]
) -> Notification | Request | None:
    if "id" not in message:
        return Notification(method, params)
    request_id = message["id"]
    if request_id is not None and not isinstance(request_id, str | int):
        return None
    if isinstance(request_id, str) and len(request_id) > MAX_ID:
        return None
    return Request(request_id, method, params)


def _error_answer(method: str, error: object) -> ErrorAnswer:
    fields = error if isinstance(error, dict) else {}
    code, text, data = (fields.get(name) for name in ("code", "message", "data"))
    message = text if isinstance(text, str) else "no message"
    details = data if isinstance(data, str) else _details(data)
    if details and details not in message:
        message = f"{message}: {details}"
    return ErrorAnswer(method, code if isinstance(code, int) else 0, message[:1000])


def _details(data: object) -> str:
    """The words in the data of an error, at any depth."""
    if isinstance(data, dict):
        return next((one for one in data.values() if isinstance(one, str) and one), "")
    return ""


def _broken(what: str) -> AgentError:
    return AgentError(f"the agent {what}", reason=ACP_PROTOCOL)
