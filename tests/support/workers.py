"""Workers for tests: their agents, and a stream that a test drives message by message."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

import grpc.aio

from runlane import (
    Client,
    InputRequest,
    InputRequested,
    RunComplete,
    RunEvent,
    RunHandle,
    TextDelta,
)
from runlane.worker import Worker
from runlane.worker.v1 import worker_service_pb2 as pb
from runlane.worker.v1.worker_service_pb2_grpc import WorkerServiceStub
from runlane_server.agents.worker.workers import MAX_REFUSALS
from support.staging import SECONDS

WORDS_PER_SECOND = 50


class Counter:
    """An agent that counts, at the pace of a language model, until a test ends it.

    `said` is what it has emitted, by run: a second execution of a run would say everything again.
    """

    def __init__(self, words_per_second: float = WORDS_PER_SECOND) -> None:
        self._pause = 1 / words_per_second
        self.may_end = asyncio.Event()
        self.said: dict[str, str] = {}

    async def run(self, turn: Any) -> str:
        """Counts."""
        number = 0
        self.said.setdefault(turn.run_id, "")
        while not self.may_end.is_set():
            await turn.emit(f"{number} ")
            self.said[turn.run_id] += f"{number} "
            number += 1
            await asyncio.sleep(self._pause)
        self.said[turn.run_id] += "end"
        return "end"


@asynccontextmanager
async def working(
    targets: str | Sequence[str], agents: Mapping[str, Callable[[Any], Any]], **options: Any
) -> AsyncIterator[Worker]:
    """A worker of the SDK in this process; it drains at the end."""
    worker = Worker(targets, agents, **options)
    serving = asyncio.create_task(worker.serve())
    try:
        yield worker
    finally:
        worker.stop()
        async with asyncio.timeout(SECONDS):
            await serving


class RawWorker:
    """A stream of `Work` whose messages the test sends and expects one by one."""

    def __init__(self, address: str, *, token: str = "") -> None:
        self._channel = grpc.aio.insecure_channel(address)
        metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._call: Any = WorkerServiceStub(self._channel).Work(metadata=metadata)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.drop()
        await self._channel.close()

    def drop(self) -> None:
        """Loses the connection."""
        self._call.cancel()

    async def send(self, **message: Any) -> None:
        """Sends a message."""
        await self._call.write(pb.WorkRequest(**message))

    async def offer(self, *agents: str, **given: Any) -> None:
        """Offers the slot for agents, by default for `default`."""
        fields: dict[str, Any] = {"worker_id": "raw", "protocol_version": 1, **given}
        await self.send(offer=pb.WorkRequest.Offer(agents=agents or ("default",), **fields))

    async def emit(self, number: int, *texts: str) -> None:
        """Emits texts, the first with a number."""
        events = [pb.Event(text_delta=text) for text in texts]
        await self.send(emit=pb.WorkRequest.Emit(number=number, events=events))

    async def finish(self, number: int) -> None:
        """Ends the turn, whose last event has a number."""
        await self.send(finish=pb.WorkRequest.Finish(number=number))

    async def read(self) -> Any:
        """The next message."""
        async with asyncio.timeout(SECONDS):
            response = await self._call.read()
        assert response is not grpc.aio.EOF, f"{await self._call.code()}: {await self.details()}"
        return response

    async def expect(self, kind: str) -> Any:
        """The next message, which must be of a kind."""
        response = await self.read()
        assert response.WhichOneof("message") == kind, response
        return getattr(response, kind)

    async def acked(self, number: int) -> None:
        """Waits until a number is acknowledged."""
        while (await self.expect("acked")).number < number:
            pass

    async def turn(self, *agents: str) -> pb.WorkResponse.Turn:
        """Offers the slot, and waits for a turn."""
        await self.offer(*agents)
        given = await self.expect("turn")
        assert isinstance(given, pb.WorkResponse.Turn)
        await self.send(begun=pb.WorkRequest.Begun())
        return given

    async def end(self) -> grpc.StatusCode:
        """Reads until the server ends the stream; returns the status."""
        async with asyncio.timeout(SECONDS):
            with suppress(grpc.aio.AioRpcError):
                while await self._call.read() is not grpc.aio.EOF:
                    pass
            code: grpc.StatusCode = await self._call.code()
            return code

    async def details(self) -> str:
        """The message of the status."""
        return str(await self._call.details())


def resume_of(turn: pb.WorkResponse.Turn, **changes: Any) -> pb.WorkRequest.Resume:
    """How a worker continues a turn."""
    fields = {"run_id": turn.run_id, "attempt": turn.attempt, "fence": turn.fence}
    return pb.WorkRequest.Resume(**{**fields, **changes})


async def accept(client: Client, session_id: str, prompt: str, **options: Any) -> RunHandle:
    """Accepts a run; creates the session if it does not exist."""
    return await client.run_accepted(session_id, prompt, allow_missing=True, **options)


async def be_refused(address: str, client: Client, session_id: str = "s") -> RunHandle:
    """Sends a mistake in one attempt until it is lost: as many faults in a row as bring the worker
    `raw` its first backoff."""
    handle = await accept(client, session_id, "hello")
    resume: dict[str, Any] = {}
    for _ in range(MAX_REFUSALS):
        async with RawWorker(address) as worker:
            if resume:
                await worker.offer(**resume)
                await worker.expect("acked")
            else:
                resume = {"resume": resume_of(await worker.turn())}
            await worker.emit(3, "after a gap")
            assert await worker.end() is grpc.StatusCode.INVALID_ARGUMENT
    await handle.completed(SECONDS)
    return handle


async def requested(client: Client, run_id: str, key: str = "") -> InputRequest:
    """Waits until a run has asked, with a key if one is given."""
    async with asyncio.timeout(SECONDS):
        async for event in client.subscribe_run(run_id):
            if isinstance(event.body, InputRequested):
                found = event.body.input_request
                if key in {"", found.key}:
                    return found
    raise AssertionError("the run ended without a question")


async def until_streaming(client: Client, handles: Sequence[RunHandle]) -> None:
    """Waits until every run has stored a text that is newer than this call."""
    began = datetime.now(UTC)
    async with asyncio.timeout(SECONDS):
        for handle in handles:
            async for event in client.subscribe_run(handle.run_id):
                assert not isinstance(event.body, RunComplete), event.body
                if event.time > began and isinstance(event.body, TextDelta):
                    break


async def followed(handle: RunHandle) -> list[RunEvent]:
    """All events of a run, as a subscriber sees them across lost connections."""
    return [event async for event in handle.events()]


def check_whole(events: Sequence[RunEvent], text: str, *, attempt: int = 1) -> RunComplete:
    """Checks that every event came once and in order, that the run completed in an attempt, and
    that the text is whole; returns its end."""
    assert [event.index for event in events] == list(range(1, len(events) + 1))
    deltas = [event.body.text for event in events if isinstance(event.body, TextDelta)]
    assert "".join(deltas) == text
    end = events[-1].body
    assert isinstance(end, RunComplete)
    assert (end.state, end.error, end.attempt) == ("completed", None, attempt)
    assert end.text == text
    return end
