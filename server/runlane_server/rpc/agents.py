"""AgentService: decode, call, encode."""

# ruff: noqa: N802 - a method is named for its rpc
from __future__ import annotations

from typing import Any, TypeAlias

import grpc

from runlane.v1 import agent_service_pb2 as pb
from runlane.v1 import agent_service_pb2_grpc
from runlane_server.access.caller import CALLER
from runlane_server.engine.agent_table import AgentState
from runlane_server.engine.coordinator import Coordinator
from runlane_server.release import version_of_server

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class AgentService(agent_service_pb2_grpc.AgentServiceServicer):
    """Describes the agents of this node."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    async def ListAgents(
        self, request: pb.ListAgentsRequest, context: Context
    ) -> pb.ListAgentsResponse:
        """Lists the agents that the caller may use."""
        allowed = CALLER.get().agents
        return pb.ListAgentsResponse(
            agents=[
                _agent(state)
                for state in self._coordinator.agents
                if allowed is None or state.name in allowed
            ],
            server_version=version_of_server(),
        )


def _agent(state: AgentState) -> pb.Agent:
    return pb.Agent(
        name=state.name,
        kind=state.kind,
        ready=state.is_ready,
        is_default=state.is_default,
        slots_in_use=state.slots_in_use,
        slots_limit=state.slots_limit,
        can=[pb.AgentAbility.Value(f"AGENT_ABILITY_{each.name}") for each in state.can],
    )
