"""A server under attack, and checks that it stays healthy."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from random import Random

import grpc
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from proofs.fuzz import messages, raw
from proofs.fuzz.tries import Broken, Tries
from runlane.v1 import run_service_pb2, run_service_pb2_grpc
from support.processes import open_descriptors, resident_bytes
from support.server import ServerProcess, serving_blocking

BOUND = 10.0
"""Seconds in which a valid call has to be answered."""

GROWTH_KIB = 200 << 10
"""KiB by which the server may grow: accepted runs, and memory that gRPC keeps."""

MORE_DESCRIPTORS = 8

BATCH = 25


class FuzzedServer:
    """A server, a valid channel to it, and its footprint at the start."""

    def __init__(self, running: ServerProcess) -> None:
        self._server = running
        self._channel = grpc.insecure_channel(
            running.address, options=(("grpc.use_local_subchannel_pool", 1),)
        )
        self._log_read = 0
        self.check()
        self._rss = resident_bytes(running.pid) >> 10
        self._descriptors = open_descriptors(running.pid)

    @property
    def address(self) -> str:
        """The address at which the server listens."""
        return self._server.address

    def check(self) -> None:
        """Raises Broken if the server has ended, fails a valid call, or logged an error."""
        if self._server.has_ended:
            raise Broken(f"the server ended with {self._server.process.returncode}")
        self._works_soon()
        lines = self._server.log.splitlines()
        fresh, self._log_read = lines[self._log_read :], len(lines)
        for line in fresh:
            if not line.startswith("{") or json.loads(line)["level"] == "error":
                raise Broken(f"the log says: {line[:3000]}")

    def _works_soon(self) -> None:
        """Repeats a valid call while its connection is lost, as a client would."""
        end = time.monotonic() + BOUND
        while True:
            try:
                self._works()
            except grpc.RpcError as error:
                lost = error.code() is grpc.StatusCode.UNAVAILABLE
                if not lost or time.monotonic() > end:
                    raise Broken(f"a valid call failed: {error}") from error
            else:
                return

    def _works(self) -> None:
        health = health_pb2_grpc.HealthStub(self._channel)
        answer = health.Check(health_pb2.HealthCheckRequest(), timeout=BOUND, wait_for_ready=True)
        if answer.status != health_pb2.HealthCheckResponse.SERVING:
            raise Broken("the server is not healthy")
        runs = run_service_pb2_grpc.RunServiceStub(self._channel)
        accepted = runs.RunAccepted(
            run_service_pb2.RunAcceptedRequest(
                session_id="good", prompt="well?", allow_missing=True
            ),
            timeout=BOUND,
        )
        waited = runs.WaitRun(
            run_service_pb2.WaitRunRequest(
                run_id=accepted.run.run_id, timeout=Duration(seconds=int(BOUND))
            ),
            timeout=BOUND,
        )
        if waited.run.run_complete.text != "well?":
            raise Broken(f"a valid run ended with {waited}")

    def check_sizes(self) -> None:
        """Raises Broken if the server has grown too much once the attackers are gone."""
        pid = self._server.pid
        end = time.monotonic() + BOUND + 10  # the server closes a silent connection after 10 s
        while open_descriptors(pid) > self._descriptors + MORE_DESCRIPTORS:
            if time.monotonic() > end:
                raise Broken(
                    f"{open_descriptors(pid)} descriptors; {self._descriptors} at the start"
                )
            self._works_soon()
        if (grown := (resident_bytes(pid) >> 10) - self._rss) > GROWTH_KIB:
            raise Broken(f"the server grew by {grown} KiB")

    def close(self) -> None:
        """Closes the channel."""
        self._channel.close()


@contextmanager
def fuzzed_server(folder: Path, store: str) -> Iterator[FuzzedServer]:
    """A server with a scripted agent over `memory` or `sqlite`."""
    url = "memory:" if store == "memory" else f"sqlite:///{folder}/runlane.db"
    flags = ("--store", url, "--agent", "scripted", "--log-format", "json")
    with serving_blocking(folder, *flags) as running:
        attacked = FuzzedServer(running)
        try:
            yield attacked
        finally:
            attacked.close()


def send_messages(attacked: FuzzedServer, tries: Tries, random: Random, count: int) -> None:
    """Sends a batch of invalid messages, and checks the server."""
    channel = grpc.insecure_channel(
        attacked.address, options=(("grpc.use_local_subchannel_pool", 1),)
    )
    whole = b""
    with channel:
        for _ in range(count):
            sent = messages.some(random)
            whole = f"{sent[0]}\n{sent[2]}\n".encode() + sent[1]
            tries.take(partial(_send, channel, sent), whole)
    _check_after(attacked, tries, whole)


def _send(channel: grpc.Channel, sent: messages.Sent, _: bytes) -> None:
    messages.send(channel, *sent)


def send_raw(attacked: FuzzedServer, tries: Tries, random: Random, names: list[str]) -> None:
    """Opens a batch of invalid connections, and checks the server."""
    data = b""
    for name in names:
        data = raw.ATTACKS[name](random)
        tries.take(lambda sent: raw.attack(attacked.address, sent), data)
    _check_after(attacked, tries, data)


def _check_after(attacked: FuzzedServer, tries: Tries, last: bytes) -> None:
    try:
        attacked.check()
    except Broken as error:
        tries.crashed(last, error)
