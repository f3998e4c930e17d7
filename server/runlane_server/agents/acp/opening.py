"""Prepares a prompt: asks the agent for its capabilities, and opens a session.

A session of ours continues one of the agent's if the agent can, and if it is known which. In a new
one the agent gets the transcript as text; in a continued one the turns that it has not seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import structlog
from acp import PROTOCOL_VERSION
from acp.schema import (
    AgentCapabilities,
    InitializeResponse,
    NewSessionResponse,
    PromptCapabilities,
    SessionModeState,
)
from pydantic import BaseModel, ValidationError

from runlane_server.agents.acp.agent_sessions import AgentSession, unseen
from runlane_server.agents.acp.connection import (
    ACP_ERROR,
    ACP_PROTOCOL,
    Connection,
    ErrorAnswer,
)
from runlane_server.agents.acp.policy import Policy
from runlane_server.agents.base import AgentError
from runlane_server.core.model import Message
from runlane_server.release import version_of_server

READY_TIMEOUT = 60.0
"""Seconds that an agent has to answer each request before the prompt."""

ACP_AUTH_REQUIRED = "ACP_AUTH_REQUIRED"
"""Reason of a failed run: the agent wants its user to authenticate."""

_AUTH_REQUIRED_CODE = -32000

_CLIENT = {"fs": {"readTextFile": False, "writeTextFile": False}, "terminal": False}
"""The server offers the agent no files and no terminals: the agent has its own."""

log = structlog.get_logger()

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class AcpSettings:
    """The settings of ACP agents.

    `policy`: the answer to their questions. `mode`: the id of the mode of each session; empty for
    the agent's own. `auth`: the id of the method with which to authenticate; empty for none.
    """

    policy: Policy = field(default_factory=Policy)
    mode: str = ""
    auth: str = ""


@dataclass(frozen=True, slots=True)
class OpenSession:
    """A session of the agent. `takes` is what its prompts may have, `unseen` what it has not seen
    of the conversation."""

    session_id: str
    is_new: bool
    takes: PromptCapabilities
    unseen: Sequence[Message]


class Opening:
    """Opens a session of an agent that has just started, in a working directory."""

    def __init__(self, connection: Connection, settings: AcpSettings, cwd: str) -> None:
        self._connection = connection
        self._settings = settings
        self._cwd = cwd

    async def open(self, known: AgentSession | None, history: Sequence[Message]) -> OpenSession:
        """Continues the session that is known, or begins one.

        Raises AgentError, and AgentExited if the agent ends.
        """
        capabilities = await self._initialize()
        if self._settings.auth:
            await self._call("authenticate", {"methodId": self._settings.auth})
        takes = capabilities.prompt_capabilities or PromptCapabilities()
        if known is not None and known.cwd == self._cwd:
            rest = unseen(history, known.last_run_id)
            session_id = known.agent_session_id
            if rest is not None and await self._continue(capabilities, session_id):
                return OpenSession(session_id, is_new=False, takes=takes, unseen=rest)
        return OpenSession(await self._begin(), is_new=True, takes=takes, unseen=history)

    async def _initialize(self) -> AgentCapabilities:
        params = {
            "protocolVersion": PROTOCOL_VERSION,
            "clientCapabilities": _CLIENT,
            "clientInfo": {"name": "runlane", "version": version_of_server()},
        }
        answer = validated(InitializeResponse, await self._call("initialize", params), "initialize")
        if answer.protocol_version != PROTOCOL_VERSION:
            raise AgentError(
                f"the agent speaks version {answer.protocol_version} of the Agent Client Protocol; "
                f"this server speaks version {PROTOCOL_VERSION}",
                reason=ACP_PROTOCOL,
            )
        return answer.agent_capabilities or AgentCapabilities()

    async def _continue(self, capabilities: AgentCapabilities, session_id: str) -> bool:
        """Continues a session; returns False if the agent cannot, or refuses what it announces, as
        some do."""
        params = {"sessionId": session_id, "cwd": self._cwd, "mcpServers": []}
        for method in _methods_to_continue(capabilities):
            try:
                result = await self._connection.call(method, params, timeout=READY_TIMEOUT)
            except ErrorAnswer as error:
                log.info("the agent does not continue its session", error=str(error))
            else:
                await self._set_mode(session_id, result.get("modes"))
                return True
        return False

    async def _begin(self) -> str:
        result = await self._call("session/new", {"cwd": self._cwd, "mcpServers": []})
        session_id = validated(NewSessionResponse, result, "session/new").session_id
        await self._set_mode(session_id, result.get("modes"))
        return session_id

    async def _set_mode(self, session_id: str, modes: object) -> None:
        """Sets the mode of the settings. Raises AgentError if the agent has no such mode."""
        mode = self._settings.mode
        if not mode:
            return
        try:
            state = SessionModeState.model_validate(modes)
        except ValidationError:
            state = SessionModeState(current_mode_id="", available_modes=[])
        if state.current_mode_id == mode:
            return
        names = [one.id for one in state.available_modes]
        if mode not in names:
            has = ", ".join(names) or "none"
            message = f"--acp-mode: the agent has no mode {mode!r}; use one of its modes: {has}"
            raise AgentError(message, reason=ACP_ERROR)
        await self._call("session/set_mode", {"sessionId": session_id, "modeId": mode})

    async def _call(self, method: str, params: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            return await self._connection.call(method, params, timeout=READY_TIMEOUT)
        except ErrorAnswer as error:
            if error.code == _AUTH_REQUIRED_CODE:
                message = f"{error.message}; pass a key with --command-env, or set --acp-auth"
                raise AgentError(message, reason=ACP_AUTH_REQUIRED) from error
            raise


def validated(kind: type[M], result: Mapping[str, Any], method: str) -> M:
    """The result of a method. Raises AgentError (ACP_PROTOCOL) if it is invalid."""
    try:
        return kind.model_validate(result)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        message = f"the agent's answer to {method} is invalid: {where}: {problem['msg']}"
        raise AgentError(message, reason=ACP_PROTOCOL) from error


def _methods_to_continue(capabilities: AgentCapabilities) -> list[str]:
    """The methods that continue a session, the better one first: `session/resume` replays no
    history."""
    sessions = capabilities.session_capabilities
    resumes = sessions is not None and sessions.resume is not None
    methods = [("session/resume", resumes), ("session/load", capabilities.load_session)]
    return [method for method, is_announced in methods if is_announced]
