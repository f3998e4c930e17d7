"""The load generator in Python, for machines without Go; the jobs are those of `load/main.go`.

It uses about as much CPU as a bare server, so its figures are lower bounds.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc

from bench.wire import DIGITS

STRIDE = 7919
"""The same value as in unary.go."""

Result = dict[str, Any]


class Template:
    """A request template: the digits after the prefix are replaced by a number."""

    def __init__(self, call: dict[str, str], prefix: bytes) -> None:
        self.method = call["method"]
        parts = base64.b64decode(call["request"]).split(prefix)
        self._parts = [parts[0], *(prefix + b"%s" + part[DIGITS:] for part in parts[1:])]

    def fill(self, number: int) -> bytes:
        """The request with a number."""
        digits = b"%0*d" % (DIGITS, number)
        first, *others = self._parts
        return first + b"".join(part.replace(b"%s", digits, 1) for part in others)


@dataclass(slots=True)
class Job:
    """A job and its progress."""

    said: dict[str, Any]
    channels: Iterator[grpc.aio.Channel]
    seen: int = 0
    taken: list[float] = field(default_factory=list)
    tickets: Iterator[int] = field(default_factory=itertools.count)
    done: asyncio.Event = field(default_factory=asyncio.Event)

    def template(self, name: str) -> Template:
        """A call of the job, by its name."""
        return Template(self.said[name], self.prefix)

    @property
    def prefix(self) -> bytes:
        """The prefix before the number in a template."""
        return str(self.said["prefix"]).encode()

    @property
    def count(self) -> int:
        """The number of operations to measure; 0 measures for a time."""
        return int(self.said.get("count", 0))

    def take(self) -> tuple[int, int]:
        """The next ticket, and the number that goes into the templates."""
        ticket = next(self.tickets)
        sessions = self.said.get("sessions", 0)
        number = ticket * STRIDE % sessions if sessions else ticket
        return ticket, self.said.get("first", 0) + number

    def unary(self, template: Template) -> grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]:
        """A callable for a method, on the next connection."""
        return next(self.channels).unary_unary(template.method)

    async def window(self) -> Result:
        """Waits for the warm-up, and then measures for the time of the job, or until `done`."""
        if not self.count:
            await asyncio.sleep(self.said["warmup"])
            self.seen = 0
            self.taken.clear()
        mark("begin")
        begun = time.perf_counter()
        if self.count:
            await self.done.wait()
        else:
            await asyncio.sleep(self.said["seconds"])
        elapsed, seen = time.perf_counter() - begun, self.seen
        mark("end")
        return {"count": seen, "seconds": elapsed, "errors": 0, "latency": quantiles(self.taken)}


async def unary(job: Job) -> Result:
    """Makes calls concurrently."""
    call, rate = job.template("call"), job.said.get("rate", 0.0)
    begun = time.perf_counter()

    async def work() -> None:
        invoke = job.unary(call)
        while True:
            ticket, number = job.take()
            if job.count and ticket >= job.count:
                return
            from_ = time.perf_counter()
            if rate:
                from_ = begun + ticket / rate
                await asyncio.sleep(max(0.0, from_ - time.perf_counter()))
            await invoke(call.fill(number))
            job.seen += 1
            job.taken.append(time.perf_counter() - from_)
            if job.seen == job.count:
                job.done.set()

    return await beside(job, [work() for _ in range(job.said["concurrency"])])


async def runs(job: Job) -> Result:
    """Accepts runs as fast as they end; counts their terminal events on all streams."""
    call, watch = job.template("call"), job.template("watch")
    streams, window = job.said["streams"], asyncio.Semaphore(job.said["window"])
    opened = [await watching(job, watch, 0) for _ in range(streams)]

    async def listen(stream: AsyncIterator[bytes]) -> None:
        async for message in stream:
            if job.prefix in message:
                job.seen += 1
                ended.append(1)
                if len(ended) % streams == 0:
                    window.release()
                    if job.count == len(ended) // streams:
                        job.done.set()

    async def work() -> None:
        invoke = job.unary(call)
        while True:
            await window.acquire()
            ticket, number = job.take()
            if job.count and ticket >= job.count:
                return
            await invoke(call.fill(number))

    ended: list[int] = []
    listening = [listen(stream) for stream in opened]
    return await beside(job, [*listening, *(work() for _ in range(job.said["concurrency"]))])


async def streams(job: Job) -> Result:
    """Reads streams; with a call, those of one run after another."""
    call, watch = job.template("call"), job.template("watch")
    word = str(job.said.get("word", "")).encode()

    async def work() -> None:
        while True:
            _, number = job.take()
            if call.method:
                await job.unary(call)(call.fill(number))
            async for message in await watching(job, watch, number):
                if not word:
                    job.seen += 1
                elif job.prefix not in message:  # the terminal event repeats the text
                    job.seen += message.count(word)

    return await beside(job, [work() for _ in range(job.said["streams"])])


async def idle(job: Job) -> Result:
    """Holds idle streams; opens the next step of them at each line of stdin."""
    watch = job.template("watch")
    held: list[AsyncIterator[bytes]] = []
    for step in job.said["steps"]:
        while len(held) < step:
            held.append(await watching(job, watch, len(held)))
        mark("ready")
        await asyncio.to_thread(sys.stdin.readline)
    return {"count": len(held), "seconds": 0, "errors": 0}


async def cancel(job: Job) -> Result:
    """Starts runs and cancels one after another, each until a subscriber has its end."""
    call, stop = job.template("call"), job.template("cancel")
    stream = await watching(job, job.template("watch"), 0)
    accept, order, first = job.unary(call), job.unary(stop), job.said.get("first", 0)
    for n in range(job.count):
        await accept(call.fill(first + n))
    await asyncio.sleep(job.said["pause"])
    mark("begin")
    begun = time.perf_counter()
    for n in range(job.count):
        from_ = time.perf_counter()
        receipt = order(stop.fill(first + n))
        async for message in stream:
            if b"%s%0*d" % (job.prefix, DIGITS, first + n) in message:
                break
        job.taken.append(time.perf_counter() - from_)
        await receipt
    elapsed = time.perf_counter() - begun
    mark("end")
    return {"count": job.count, "seconds": elapsed, "errors": 0, "latency": quantiles(job.taken)}


async def burst(job: Job) -> Result:
    """Cancels many waiting runs at once; measures until all streams have all their ends."""
    call, watch, stop = job.template("call"), job.template("watch"), job.template("cancel")
    opened = [await watching(job, watch, 0) for _ in range(job.said["streams"])]
    accept = job.unary(call)
    for n in range(job.count):
        await accept(call.fill(job.said["first"] + n))

    async def listen(stream: AsyncIterator[bytes]) -> None:
        async for message in stream:
            job.seen += job.prefix in message
            if job.seen == job.count * len(opened):
                job.done.set()

    async def strike() -> None:
        await job.unary(stop)(stop.fill(0))

    return await beside(job, [strike(), *(listen(stream) for stream in opened)])


async def watching(job: Job, watch: Template, number: int) -> AsyncIterator[bytes]:
    """Opens a stream, and waits for its first message."""
    method: grpc.aio.UnaryStreamMultiCallable[bytes, bytes]
    method = next(job.channels).unary_stream(watch.method)
    messages = method(watch.fill(number)).__aiter__()
    await anext(messages)
    return messages


async def beside(job: Job, work: list[Coroutine[Any, Any, None]]) -> Result:
    """Measures while a task runs; raises the error of the task."""
    measuring = asyncio.ensure_future(job.window())
    working = {asyncio.ensure_future(one) for one in work}
    while not measuring.done():
        ended, _ = await asyncio.wait({measuring, *working}, return_when=asyncio.FIRST_COMPLETED)
        for task in ended & working:
            working.discard(task)
            task.result()
    return measuring.result()


def quantiles(seconds: list[float]) -> dict[str, float]:
    """The percentiles of the latencies."""
    ordered = sorted(seconds)
    if not ordered:
        return {}
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {name: ordered[int(share * (len(ordered) - 1))] for name, share in shares.items()}


def mark(name: str) -> None:
    """Asks the benchmark to record the CPU time of all sides."""
    write({"mark": name})


def write(what: dict[str, Any]) -> None:
    """Writes a message to the benchmark."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


KINDS: dict[str, Callable[[Job], Any]] = {
    kind.__name__: kind for kind in (unary, runs, streams, idle, cancel, burst)
}


async def main() -> None:
    """Does one job."""
    said = json.loads(sys.stdin.readline())
    empty = {"method": "", "request": ""}
    said = {"call": empty, "watch": empty, "cancel": empty, **said}
    options = (("grpc.use_local_subchannel_pool", 1),)
    channels = [
        grpc.aio.insecure_channel(said["address"], options=options)
        for _ in range(said.get("connections", 1))
    ]
    result = await KINDS[said["kind"]](Job(said, itertools.cycle(channels)))
    write({"result": result})
    # The benchmark still reads the CPU time of this process, and ends it.
    await asyncio.to_thread(sys.stdin.readline)


if __name__ == "__main__":
    asyncio.run(main())
