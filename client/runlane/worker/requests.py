"""The requests of an agent that the server has not answered yet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from runlane.worker.v1 import worker_service_pb2 as pb

MAX_QUESTIONS = 16
"""Questions of one message."""

QUESTIONS_BYTES = 1 << 20
"""Size of the questions of one message, unless a single one is larger."""


@dataclass(slots=True)
class _Request:
    message: pb.WorkRequest
    answer: asyncio.Future[Any]
    is_sent: bool = False


class Requests:
    """The open requests of an attempt, by name. Each new connection sends them again."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._open: dict[str, _Request] = {}
        self._is_closed = False

    async def ask(self, name: str, message: pb.WorkRequest) -> Any:
        """Sends a message and waits for its answer. A request that is open is not sent twice.

        Raises CancelledError once the attempt has ended.
        """
        if self._is_closed:
            raise asyncio.CancelledError
        found = self._open.get(name)
        if found is None:
            answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            found = self._open[name] = _Request(message, answer)
            self._wake()
        # Another call may wait for the same answer.
        return await asyncio.shield(found.answer)

    def answer(self, name: str, value: Any = None) -> None:
        """Takes the answer to a request."""
        found = self._open.pop(name, None)
        if found is not None and not found.answer.done():
            found.answer.set_result(value)

    def close(self) -> None:
        """Ends all waiting: a thread could not be cancelled otherwise."""
        self._is_closed = True
        for one in self._open.values():
            one.answer.cancel()
        self._open.clear()

    def send_again(self) -> None:
        """The connection is new."""
        for one in self._open.values():
            one.is_sent = False

    @property
    def has_unsent(self) -> bool:
        """Whether there is something to send."""
        return any(not one.is_sent for one in self._open.values())

    def next_message(self) -> pb.WorkRequest | None:
        """The next message to send, if there is one. Questions that wait share one message, so that
        people see them all."""
        unsent = [one for one in self._open.values() if not one.is_sent]
        if not unsent:
            return None
        first = unsent[0].message
        if first.WhichOneof("message") != "ask" or first.ask.checkpoint:
            unsent[0].is_sent = True
            return first
        questions: list[pb.Question] = []
        size = 0
        for one in unsent:
            size += one.message.ByteSize()
            if questions and (size > QUESTIONS_BYTES or len(questions) == MAX_QUESTIONS):
                break
            questions += one.message.ask.questions
            one.is_sent = one.message.WhichOneof("message") == "ask"
        return pb.WorkRequest(ask=pb.WorkRequest.Ask(questions=questions))
