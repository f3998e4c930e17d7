"""The Unix socket at which the processes of this server's agents connect."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Mapping
from hmac import compare_digest
from typing import Any

import grpc

from runlane.worker.v1 import worker_service_pb2 as pb
from runlane.worker.v1 import worker_service_pb2_grpc
from runlane_server.agents.processes.protocol import SECRET_KEY
from runlane_server.agents.worker.messages import Downstream
from runlane_server.agents.worker.slot import Slot
from runlane_server.agents.worker.workers import Workers
from runlane_server.core.errors import RunlaneError, Unauthenticated
from runlane_server.rpc import worker_messages
from runlane_server.rpc.errors import wire_error
from runlane_server.rpc.grpc_server import make_server
from runlane_server.rpc.worker import Context, serve_slot

MAX_STREAMS = (1 << 31) - 1
"""Each slot of a process is a stream."""

MAX_MESSAGE = 64 << 20
"""Bytes of a message: a checkpoint of 3 MiB, as JSON up to six times that, and the questions."""

_OPTIONS = (
    ("grpc.max_concurrent_streams", MAX_STREAMS),
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.max_connection_idle_ms", MAX_STREAMS),
)

STOP_GRACE = 0.5
"""Seconds that streams have to end; no run is active any more."""


class AgentSocket:
    """Serves the WorkerService at `path`, to processes that send the secret of an agent."""

    def __init__(self, path: str) -> None:
        self.address = f"unix:{path}"
        self._workers: dict[str, Workers] = {}
        self._server = make_server(_OPTIONS)
        worker_service_pb2_grpc.add_WorkerServiceServicer_to_server(
            _Service(self._workers), self._server
        )

    @staticmethod
    def new_secret() -> str:
        """A secret for the processes of an agent."""
        return secrets.token_urlsafe(32)

    def admit(self, secret: str, workers: Workers) -> None:
        """Admits the processes that have this secret to the turns of an agent."""
        self._workers[secret] = workers

    async def start(self) -> None:
        """Starts serving."""
        self._server.add_insecure_port(self.address)
        await self._server.start()

    async def stop(self) -> None:
        """Stops serving."""
        await self._server.stop(STOP_GRACE)


class _Service(worker_service_pb2_grpc.WorkerServiceServicer):
    def __init__(self, workers: Mapping[str, Workers]) -> None:
        self._workers = workers

    async def Work(  # noqa: N802 - it is named for its rpc
        self, requests: AsyncIterator[pb.WorkRequest], context: Context
    ) -> AsyncIterator[pb.WorkResponse]:
        """Serves a slot of a process. It executes runs of all tenants, as an agent does within the
        server."""
        try:
            workers = self._workers_of(context)
            down = Downstream()
            slot = Slot(None, down)
            workers.connect(slot)

            async def take(slot: Slot, offer: pb.WorkRequest.Offer) -> None:
                worker_messages.check_offer(offer)
                workers.check(offer.agents)
                slot.begin_offer(offer.agents, offer.worker_id)
                if offer.HasField("resume"):
                    slot.fence("the attempt ended with the connection")
                else:
                    workers.offer(slot)

            try:
                async for response in serve_slot(requests, slot, down, take, workers):
                    yield response
            finally:
                workers.disconnect(slot)
        except RunlaneError as error:
            wire = wire_error(error)
            await context.abort(wire.code, wire.message, wire.trailing_metadata)

    def _workers_of(self, context: grpc.aio.ServicerContext[Any, Any]) -> Workers:
        given = dict(context.invocation_metadata() or ()).get(SECRET_KEY, "")
        for secret, workers in self._workers.items():
            if compare_digest(secret.encode(), str(given).encode()):
                return workers
        raise Unauthenticated("only processes of this server's agents may connect here")
