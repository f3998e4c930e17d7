"""A peer: the same work by the SDK of the A2A protocol. Run it as `python -m bench.a2a_peer STORE`.

SendMessage creates a task, lets an agent echo the message, and answers when the task has ended: the
equivalent of `RunAccepted` and its `RunComplete`. STORE is `memory`, or the path of a SQLite file.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import Any

import grpc
from a2a.helpers import new_task_from_user_message, new_text_part
from a2a.server.agent_execution import AgentExecutor, RequestContext
from a2a.server.events import EventQueue
from a2a.server.request_handlers import DefaultRequestHandler
from a2a.server.request_handlers.grpc_handler import GrpcHandler
from a2a.server.tasks import InMemoryTaskStore, TaskUpdater
from a2a.server.tasks.task_store import TaskStore
from a2a.types import a2a_pb2, a2a_pb2_grpc


class Echo(AgentExecutor):
    """An agent that echoes the message."""

    async def execute(self, context: RequestContext, event_queue: EventQueue) -> None:
        """Emits the task, its one artifact, and its end."""
        assert context.message is not None
        assert context.task_id is not None
        assert context.context_id is not None
        await event_queue.enqueue_event(new_task_from_user_message(context.message))
        updater = TaskUpdater(event_queue, context.task_id, context.context_id)
        await updater.add_artifact([new_text_part(context.get_user_input())])
        await updater.complete()

    async def cancel(self, context: RequestContext, event_queue: EventQueue) -> None:
        """Does nothing: an echo cannot be cancelled."""


async def store_of(name: str) -> TaskStore:
    """The task store for the argument STORE."""
    if name == "memory":
        return InMemoryTaskStore()
    # Needs SQLAlchemy.
    from a2a.server.tasks import DatabaseTaskStore  # noqa: PLC0415
    from sqlalchemy.ext.asyncio import create_async_engine  # noqa: PLC0415

    # By default a task fails after 5 seconds of waiting for the others.
    engine = create_async_engine(f"sqlite+aiosqlite:///{name}", connect_args={"timeout": 60})
    store = DatabaseTaskStore(engine)
    await store.initialize()
    return store


async def main() -> None:
    """Serves until it is killed."""
    logging.disable(logging.CRITICAL)
    card = a2a_pb2.AgentCard(
        name="echo",
        version="1",
        capabilities=a2a_pb2.AgentCapabilities(streaming=True),
        default_input_modes=["text/plain"],
        default_output_modes=["text/plain"],
    )
    handler: Any = DefaultRequestHandler(Echo(), await store_of(sys.argv[1]), card)
    server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    add: Any = a2a_pb2_grpc.add_A2AServiceServicer_to_server
    add(GrpcHandler(handler), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    sys.stdout.write(f"a2a listening on 127.0.0.1:{port}\n")
    sys.stdout.flush()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main())
