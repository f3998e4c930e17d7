"""The attacks. Each runs for some seconds, in a process of its own, and is bounded.

python -m proofs.attack.attacks NAME ADDRESS RUN_TOKEN READ_TOKEN SECONDS
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count

import grpc
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2  # type: ignore[import-untyped]

from proofs.attack.connection import Connection
from runlane.v1 import run_service_pb2 as runs_pb
from runlane.v1 import run_service_pb2_grpc, session_service_pb2_grpc
from runlane.v1 import session_service_pb2 as sessions_pb

RUNS = "/runlane.v1.RunService/"
SESSIONS = "/runlane.v1.SessionService/"
WATCH = "/grpc.health.v1.Health/Watch"

LARGEST = (4 << 20) - 64
"""Size of a request in bytes that gRPC just accepts."""


@dataclass(frozen=True)
class Target:
    """A server, the tokens of a noisy tenant, and the time at which the attack ends."""

    address: str
    run_token: str
    read_token: str
    end: float

    @property
    def is_on(self) -> bool:
        """Whether the attack goes on."""
        return time.monotonic() < self.end

    def wait(self) -> None:
        """Waits for the end of the attack."""
        time.sleep(max(0, self.end - time.monotonic()))


class Tenant:
    """Ordinary calls of the noisy tenant. Errors of the server are none of this proof."""

    def __init__(self, target: Target) -> None:
        self._channel = grpc.insecure_channel(
            target.address, options=(("grpc.use_local_subchannel_pool", 1),)
        )
        self._metadata = (("authorization", f"Bearer {target.run_token}"),)
        self._runs = run_service_pb2_grpc.RunServiceStub(self._channel)
        self._sessions = session_service_pb2_grpc.SessionServiceStub(self._channel)

    def accept(self, session: str, prompt: str) -> str:
        """Accepts a run; returns its id, or nothing if it was refused."""
        asked = runs_pb.RunAcceptedRequest(session_id=session, prompt=prompt, allow_missing=True)
        with suppress(grpc.RpcError):
            accepted = self._runs.RunAccepted(asked, metadata=self._metadata, timeout=5)
            return str(accepted.run.run_id)
        return ""

    def wait(self, run_id: str, seconds: float) -> None:
        """Waits for the end of a run, for some seconds at most."""
        asked = runs_pb.WaitRunRequest(run_id=run_id, timeout=_duration(seconds))
        with suppress(grpc.RpcError):
            self._runs.WaitRun(asked, metadata=self._metadata, timeout=max(0.1, seconds) + 5)

    def create(self, asked: sessions_pb.CreateSessionRequest) -> None:
        """Creates a session."""
        with suppress(grpc.RpcError):
            self._sessions.CreateSession(asked, metadata=self._metadata, timeout=5)


def half_sent_messages(target: Target) -> None:
    """A stranger sends all of 60 messages of 4 MiB but the last byte."""
    message = bytes(LARGEST)
    for connection in _reconnecting(target):
        for _ in range(60):
            if connection.is_closed or not target.is_on:
                break
            stream = connection.start(RUNS + "GetRun")
            connection.send_message(stream, message, hold_back=1, seconds=1)
        target.wait()


def large_invalid_requests(target: Target) -> None:
    """A reader sends requests of 4 MiB with two million faults each."""
    field = runs_pb.ListRunsRequest.DESCRIPTOR.fields_by_name["states"].number
    body = b"\x63" * (LARGEST - 16)
    message = bytes([field << 3 | 2]) + _varint(len(body)) + body
    for connection in _reconnecting(target):
        for number in count(1):
            if connection.is_closed or not target.is_on:
                break
            connection.call(RUNS + "ListRuns", message, target.read_token)
            connection.wait_ended(number, target.end - time.monotonic())


def endless_output(target: Target) -> None:
    """Runs whose programs write without end."""
    _runs_of(target, "endless\n")


def deep_directories(target: Target) -> None:
    """Runs whose programs leave a very deep directory."""
    _runs_of(target, "deep\n")


def unread_answers(target: Target) -> None:
    """A reader asks for 100 pages of 3 MB and reads none."""
    tenant = Tenant(target)
    for _ in range(3):
        tenant.wait(tenant.accept("large", "x " * 500_000), 5)
    message = sessions_pb.ListMessagesRequest(session_id="large", page_size=1000)
    connection = Connection(target.address, window=0)
    for _ in range(100):
        connection.call(SESSIONS + "ListMessages", message.SerializeToString(), target.read_token)
    target.wait()


def unread_streams(target: Target) -> None:
    """A reader follows a run with much output 200 times and reads nothing."""
    tenant = Tenant(target)
    run_id = tenant.accept("talks", "much\n")
    tenant.wait(run_id, 5)
    message = runs_pb.SubscribeRunRequest(run_id=run_id).SerializeToString()
    connection = Connection(target.address, window=0)
    for _ in range(200):
        connection.call(RUNS + "SubscribeRun", message, target.read_token)
    target.wait()


def scans(target: Target) -> None:
    """A reader subscribes from the beginning of a long log and leaves, 100 times a second."""
    message = runs_pb.SubscribeRunCompleteRequest(from_beginning=True).SerializeToString()
    for connection in _reconnecting(target):
        while target.is_on and not connection.is_closed:
            stream = connection.call(RUNS + "SubscribeRunComplete", message, target.read_token)
            time.sleep(0.01)
            connection.reset(stream)


def many_subscriptions(target: Target) -> None:
    """A reader holds 200 subscriptions of 2,000 ids each."""
    connection = Connection(target.address)
    for number in range(200):
        if not target.is_on:  # the server may stop to read what it refuses
            break
        ids = [f"{number}-{n}".ljust(128, "x") for n in range(1000)]
        asked = runs_pb.SubscribeRunCompleteRequest(
            session_ids=ids, run_ids=ids, from_beginning=True
        )
        connection.call(RUNS + "SubscribeRunComplete", asked.SerializeToString(), target.read_token)
    target.wait()


def refused_calls(target: Target) -> None:
    """A stranger guesses tokens, 50 at a time."""
    for connection in _reconnecting(target):
        for number in count(1):
            if connection.is_closed or not target.is_on:
                break
            for _ in range(50):
                connection.call(RUNS + "ListRuns", b"", "rl_" + "a" * 16 + "_" + "b" * 52)
            connection.wait_ended(50 * number, 5)


def malformed_paths(target: Target) -> None:
    """A stranger sends a path that is not UTF-8, seven times a second."""
    while target.is_on:
        with suppress(OSError):
            connection = Connection(target.address)
            connection.start(b"/\xff")
            time.sleep(0.15)
            connection.close()


def health_watches(target: Target) -> None:
    """A stranger watches the health of 4,000 services that do not exist."""
    connection = Connection(target.address)
    for number in range(4000):
        asked = health_pb2.HealthCheckRequest(service=f"{number}".ljust(200, "x"))
        connection.call(WATCH, asked.SerializeToString())
    target.wait()


def silent_connections(target: Target) -> None:
    """A stranger opens 300 connections and is silent."""
    kept = [Connection(target.address) for _ in range(300)]
    target.wait()
    for connection in kept:
        connection.close()


def large_labels(target: Target) -> None:
    """A tenant creates sessions with 270 kB of labels each."""
    tenant = Tenant(target)
    labels = {f"k{n}": "v" * 4096 for n in range(64)}
    for number in count():
        if not target.is_on:
            break
        tenant.create(
            sessions_pb.CreateSessionRequest(
                session_id=f"s{number}", title="t" * 1024, metadata=labels
            )
        )


def accepts(target: Target) -> None:
    """A tenant accepts runs in eight threads, as fast as it may."""

    def accept() -> None:
        tenant = Tenant(target)
        while target.is_on:
            tenant.accept(threading.current_thread().name, "hello\n")

    threads = [threading.Thread(target=accept) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


ATTACKS: dict[str, Callable[[Target], None]] = {
    attack.__name__: attack
    for attack in (
        half_sent_messages,
        large_invalid_requests,
        endless_output,
        deep_directories,
        unread_answers,
        unread_streams,
        scans,
        many_subscriptions,
        refused_calls,
        malformed_paths,
        health_watches,
        silent_connections,
        large_labels,
        accepts,
    )
}


def _reconnecting(target: Target) -> Iterator[Connection]:
    """Yields connections, one after another, until the attack ends."""
    while target.is_on:
        try:
            connection = Connection(target.address)
        except OSError:
            time.sleep(0.05)
            continue
        yield connection
        connection.close()


def _runs_of(target: Target, prompt: str) -> None:
    tenant = Tenant(target)
    for number in count():
        left = target.end - time.monotonic()
        if left <= 0:
            return
        tenant.wait(tenant.accept(f"s{number % 4}", prompt), left)


def _duration(seconds: float) -> Duration:
    found = Duration()
    found.FromMilliseconds(int(max(0.1, seconds) * 1000))
    return found


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(0x80 | (value & 0x7F))
        value >>= 7
    return bytes([*encoded, value])


if __name__ == "__main__":
    name, address, run_token, read_token, seconds = sys.argv[1:]
    ATTACKS[name](Target(address, run_token, read_token, time.monotonic() + float(seconds)))
