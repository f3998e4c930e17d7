"""Leads the conversation with an ACP agent: one process for each turn.

A process that stays would answer the next prompt faster, but agents answer it with what a cancel
left over, and hold hundreds of megabytes. A turn goes through these steps: the process starts, a
session is opened, the prompt is sent, and everything that the agent reports until it answers is the
output of the turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import structlog
from acp.schema import PromptResponse, RequestPermissionRequest
from acp.schema import Usage as AcpUsage
from pydantic import ValidationError

from runlane_server.agents.abilities import Ability
from runlane_server.agents.acp.agent_sessions import (
    AgentSession,
    read_record,
    record_path,
    write_record,
)
from runlane_server.agents.acp.connection import (
    INVALID_PARAMS,
    AgentExited,
    Answer,
    Connection,
    Notification,
    Request,
)
from runlane_server.agents.acp.content import needs_files, prompt_blocks
from runlane_server.agents.acp.opening import AcpSettings, Opening, OpenSession, validated
from runlane_server.agents.acp.permissions import Answers, PolicyAnswers
from runlane_server.agents.acp.updates import Updates
from runlane_server.agents.base import AgentError, AgentEvent, Report, Turn
from runlane_server.agents.command.program import Program
from runlane_server.agents.command.programs import (
    COMMAND_FAILED,
    DEFAULTS,
    CommandSettings,
    Place,
    Programs,
    exit_code,
)
from runlane_server.agents.program_files import NewFiles
from runlane_server.core.model import FinishReason, SessionKey, Usage

EXIT_GRACE = 1.0
"""Seconds between SIGTERM and SIGKILL for an agent that has answered."""

_CANCELLED = {"outcome": "cancelled"}

_FINISH = {
    "end_turn": FinishReason.STOP,
    "max_tokens": FinishReason.LENGTH,
    "max_turn_requests": FinishReason.LENGTH,
    "refusal": FinishReason.CONTENT_FILTER,
    # Without a cancel of ours: the agent gave up after a rejected permission.
    "cancelled": FinishReason.STOP,
}

_DEFAULTS = AcpSettings()

log = structlog.get_logger()


class AcpAgent:
    """Runs a program that speaks the protocol for each turn.

    `kill_grace` is the time in seconds that a cancelled agent has: half of it to answer
    `session/cancel`, and half between SIGTERM and SIGKILL.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        kill_grace: float,
        settings: AcpSettings = _DEFAULTS,
        command: CommandSettings = DEFAULTS,
    ) -> None:
        """Raises StartError if there is no such program, or no directory can be created."""
        self.programs = Programs(argv, kind="acp", kill_grace=kill_grace, settings=command)
        self._settings = settings
        self._answers = PolicyAnswers(settings.policy)

    @property
    def abilities(self) -> frozenset[Ability]:
        """It asks people if the policy leaves anything to them."""
        policy = self._settings.policy
        asks = "ask" in {policy.default, *policy.kinds.values()}
        return frozenset({Ability.ASK} if asks else ())

    async def start(self) -> None:
        """Starts the guardian, and removes the directories that a killed server left behind."""
        await self.programs.start()

    async def run(self, turn: Turn) -> AsyncGenerator[AgentEvent, None]:
        """Runs the agent. Raises AgentError (ACP_*, COMMAND_FAILED or COMMAND_LIMIT)."""
        async with self.programs.place(turn) as place:
            files = await _new_files(turn, place)
            program = await self.programs.launch(turn, place, stdin=None)
            grace = self.programs.kill_grace / 2
            talk = _Talk(turn, files, Connection(program), self._answers)
            try:
                session = await self._open(talk, turn, place)
                async with aclosing(talk.prompt(session)) as events:
                    async for event in events:
                        yield event
                grace = min(grace, EXIT_GRACE)
            except AgentExited:
                raise await self._exit_failure(program) from None
            finally:
                try:
                    await talk.cancel(grace)
                    await self._remember(talk, turn, place)
                finally:
                    await program.end(grace)

    def session_deleted(self, key: SessionKey) -> None:
        """Removes what was kept for a session."""
        self.programs.session_deleted(key)

    async def close(self) -> None:
        """Stops the guardian and removes this server's directory."""
        await self.programs.close()

    async def _open(self, talk: _Talk, turn: Turn, place: Place) -> OpenSession:
        known = None
        if place.state is not None:
            path = record_path(place.state, self.programs.argv)
            known = await asyncio.to_thread(read_record, path)
        opening = Opening(talk.connection, self._settings, str(place.cwd))
        return await opening.open(known, await turn.history())

    async def _remember(self, talk: _Talk, turn: Turn, place: Place) -> None:
        """Records that the agent's session has seen this turn, if the agent has answered."""
        if place.state is None or not talk.answered_in:
            return
        path = record_path(place.state, self.programs.argv)
        try:
            record = AgentSession(talk.answered_in, turn.run_id, str(place.cwd))
            await asyncio.to_thread(write_record, path, record)
        except OSError as exc:
            log.warning("session of the agent not recorded; next turn begins one", error=str(exc))

    async def _exit_failure(self, program: Program) -> AgentError:
        """The error of an agent that closed its output, and perhaps has not exited."""
        try:
            async with asyncio.timeout(EXIT_GRACE):
                code = await exit_code(program)
        except TimeoutError:
            message = "the agent closed its output before it answered"
            return AgentError(message, reason=COMMAND_FAILED)
        if code:
            return self.programs.failure(code, program.error_tail)
        return AgentError("the agent exited before it answered", reason=COMMAND_FAILED)


class _Talk:
    """The conversation of one turn."""

    def __init__(
        self, turn: Turn, files: NewFiles | None, connection: Connection, answers: Answers
    ) -> None:
        self.connection = connection
        self._turn = turn
        self._files = files
        self._answers = answers
        self.answered_in = ""
        """The session in which the agent has answered the prompt."""
        self._at_work = ""
        """The session in which it has not."""

    async def prompt(self, session: OpenSession) -> AsyncGenerator[AgentEvent, None]:
        """The events of the turn, until the agent has answered. Raises AgentError and
        AgentExited."""
        updates = Updates(session.session_id)
        await self._send(session)
        while not isinstance(received := await self.connection.receive(), Answer):
            for event in _events_of(received, updates):
                yield event
            if isinstance(received, Request):
                await self._answer(received, updates)
        self._set_answered()
        for event in updates.calls.rest():
            yield event
        response = validated(PromptResponse, received.result, "session/prompt")
        # In a continued session the usage may count earlier turns too.
        usage = _usage(response.usage) if session.is_new else None
        yield Report(usage=usage, finish_reason=_FINISH[response.stop_reason])

    async def cancel(self, grace: float) -> None:
        """Cancels the prompt of an agent at work, and waits at most `grace` seconds for the
        answer."""
        if not self._at_work:
            return
        try:
            async with asyncio.timeout(grace):
                self.connection.notify("session/cancel", {"sessionId": self._at_work})
                while not isinstance(received := await self.connection.receive(), Answer):
                    if isinstance(received, Request):
                        self.connection.reply(received, {"outcome": _CANCELLED})
            self._set_answered()
        except (AgentError, AgentExited, TimeoutError):
            pass  # it is ended in any case

    def _set_answered(self) -> None:
        self.answered_in, self._at_work = self._at_work, ""

    async def _send(self, session: OpenSession) -> None:
        try:
            blocks = await asyncio.to_thread(
                prompt_blocks, self._turn.prompt, session.takes, self._files, session.unseen
            )
        except OSError as exc:
            raise _not_written(exc) from exc
        prompt = [one.model_dump(mode="json", by_alias=True, exclude_none=True) for one in blocks]
        self.connection.send("session/prompt", {"sessionId": session.session_id, "prompt": prompt})
        self._at_work = session.session_id

    async def _answer(self, request: Request, updates: Updates) -> None:
        """Answers a request of the agent. The events that belong to it were yielded before."""
        match request.method:
            case "session/request_permission":
                await self._answer_permission(request, updates)
            case "elicitation/create":
                result = await self._answers.elicitation(self._turn, request.params)
                self.connection.reply(request, result)
            case _:
                self.connection.refuse_method(request)

    async def _answer_permission(self, request: Request, updates: Updates) -> None:
        try:
            asked = RequestPermissionRequest.model_validate(request.params)
        except ValidationError as error:
            self.connection.refuse(request, INVALID_PARAMS, str(error)[:500])
            return
        call = updates.calls.asked(asked.tool_call)
        chosen = await self._answers.permission(self._turn, asked.options, call)
        log.info("permission answered", kind=call.kind, option=chosen or "none")
        outcome = {"outcome": "selected", "optionId": chosen} if chosen else _CANCELLED
        self.connection.reply(request, {"outcome": outcome})


async def _new_files(turn: Turn, place: Place) -> NewFiles | None:
    """The directory for attachments; None if no attachment needs a file."""
    if not needs_files(turn.prompt):
        return None
    try:
        return await asyncio.to_thread(NewFiles, place.temp)
    except OSError as exc:
        raise _not_written(exc) from exc


def _not_written(error: OSError) -> AgentError:
    message = f"cannot write an attachment for the agent: {error}"
    return AgentError(message, reason=COMMAND_FAILED)


def _events_of(received: Notification | Request, updates: Updates) -> list[AgentEvent]:
    match received:
        case Notification("session/update", params):
            return updates.take(params)
        case Request(_, "session/request_permission", params):
            return updates.asked(params)
    return []


def _usage(usage: AcpUsage | None) -> Usage | None:
    if usage is None:
        return None
    return Usage(
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        cache_read_tokens=usage.cached_read_tokens or 0,
        cache_write_tokens=usage.cached_write_tokens or 0,
    )
