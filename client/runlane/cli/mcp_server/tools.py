"""The tools: each is one call of the client, with bounded results and errors that name a field."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable
from functools import wraps
from typing import Annotated, Any, Literal, ParamSpec, TypeAlias

from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from pydantic import Field

from runlane.cli.mcp_server.following import Following, follow
from runlane.cli.mcp_server.records import (
    Record,
    cut,
    error_text,
    is_whole,
    record,
    run_record,
    text_fields,
)
from runlane.cli.run_ids import check_session
from runlane.client import Client
from runlane.errors import InputNotFound, RunlaneError
from runlane.inputs import Answer, Approval, InputKind, InputRequest, InputState
from runlane.types import CancelScope, Role, Run, RunState, WhenBusy

REFUSED = (
    "answer_input: not allowed: a person answers, with `runlane answer` or another client; "
    "`runlane mcp --allow-answers` allows it"
)

SEARCHED = 1000
"""Number of input requests, the newest first, among which one is looked for."""

P = ParamSpec("P")

SessionId = Annotated[str, Field(description="Session id.")]
RunId = Annotated[str, Field(description="Run id.")]
Limit = Annotated[int, Field(ge=1, le=100, description="Maximum number of records.")]
PageToken = Annotated[str, Field(description="next_page_token of the previous page.")]

AnyContext: TypeAlias = Context[Any, Any]


def reported(tool: Callable[P, Awaitable[Record]]) -> Callable[P, Awaitable[Record]]:
    """Makes a tool report refused calls to the assistant, with their reason and field."""

    @wraps(tool)
    async def call(*args: P.args, **kwargs: P.kwargs) -> Record:
        try:
            return await tool(*args, **kwargs)
        except RunlaneError as error:
            raise ToolError(error_text(error)) from error
        except ValueError as error:  # an argument that no call can carry
            raise ToolError(f"INVALID_ARGUMENT: {cut(str(error), 500)}") from error

    return call


class Tools:
    """The tools of one server."""

    def __init__(self, client: Client, *, allow_answers: bool, max_text: int) -> None:
        self._client = client
        self._allow_answers = allow_answers
        self._max_text = max_text

    # --- Runs ------------------------------------------------------------------------------------

    @reported
    async def accept_run(
        self,
        *,
        session_id: SessionId,
        prompt: Annotated[str, Field(description="The prompt for the agent.")],
        agent: Annotated[str, Field(description="Agent; empty: the default one.")] = "",
        when_busy: Annotated[
            Literal["queue", "fold", "reject", "interrupt"],
            Field(description="Behaviour if the session has work already."),
        ] = "queue",
        run_id: Annotated[
            str, Field(description="Idempotency key; empty: a new one. Repeat it in retries.")
        ] = "",
        timeout_seconds: Annotated[
            float | None,
            Field(gt=0, le=604_800, description="Limit of one attempt of the run; null: none."),
        ] = None,
        labels: Annotated[
            dict[str, str] | None, Field(description="Labels to find the run by.")
        ] = None,
        create_session: Annotated[
            bool, Field(description="Create the session if it does not exist.")
        ] = True,
    ) -> Record:
        """Submit a prompt to a session. Returns at once: the run is durable, and not ended.

        Call follow_run next to get the outcome.
        """
        handle = await self._client.run_accepted(
            session_id,
            prompt,
            run_id=run_id or None,
            agent=agent,
            when_busy=WhenBusy(when_busy),
            timeout=timeout_seconds,
            metadata=labels or {},
            allow_missing=create_session,
        )
        return {"run": run_record(handle.run)}

    @reported
    async def follow_run(
        self,
        *,
        run_id: RunId,
        ctx: AnyContext,
        after_index: Annotated[
            int, Field(ge=0, description="last_event_index of an earlier call; 0: from the start.")
        ] = 0,
        timeout_seconds: Annotated[
            float, Field(ge=0, le=3600, description="When to return if the run has not ended.")
        ] = 50,
    ) -> Record:
        """Wait until a run ends, asks people, or the time is up; reports progress meanwhile.

        `ended` says whether `text` is the final output, or only what came after `after_index`.
        The run goes on in any case. For clients with the tasks extension of MCP, the call returns
        a task.
        """

        async def report(index: int, message: str) -> None:
            await ctx.report_progress(index, None, message)

        following = Following(after_index, self._max_text)
        limit = asyncio.timeout(timeout_seconds)
        try:
            async with limit:
                await follow(self._client, run_id, following, report)
        except TimeoutError:
            # A call that exceeded its own deadline is a TimeoutError too.
            if not limit.expired():
                raise
        run = await self._client.get_run(run_id)
        if run.state.terminal:
            return await self.outcome(run)
        return {
            **await self._state(run),
            **text_fields(following.text, self._max_text),
            "text_length": following.length,
            "last_event_index": following.last_index,
        }

    @reported
    async def show_run(
        self,
        *,
        run_id: RunId,
        text_offset: Annotated[
            int, Field(ge=0, description="next_text_offset of an earlier call.")
        ] = 0,
    ) -> Record:
        """Show a run: state, times, error, usage, open questions, and the output once it ended."""
        run = await self._client.get_run(run_id)
        return await (self.outcome(run, text_offset) if run.state.terminal else self._state(run))

    async def outcome(self, run: Run, text_offset: int = 0) -> Record:
        """Returns a run that has ended, with a piece of its output. Raises RunlaneError."""
        text = await self._final_text(run)
        return {
            **await self._state(run),
            **text_fields(text, self._max_text, text_offset),
            "last_event_index": run.last_event_index,
        }

    async def _state(self, run: Run) -> Record:
        questions: list[InputRequest] = []
        if run.state is RunState.INPUT_REQUIRED:
            pager = self._client.list_input_requests(run_id=run.run_id, states=[InputState.OPEN])
            questions.extend((await pager.page()).items)
        state = {"run": run_record(run), "ended": run.state.terminal}
        return state | {"input_requests": self._questions(questions)}

    def _questions(self, requests: Iterable[InputRequest]) -> list[Record]:
        return [record(each, self._max_text) for each in requests]

    async def _final_text(self, run: Run) -> str:
        """The whole output: RunComplete carries only its beginning if it is long."""
        complete = run.run_complete
        if complete is None or not complete.text_truncated:
            return "" if complete is None else complete.text
        of_run = run.folded_into or run.run_id
        messages = self._client.list_messages(run.session_id, run_id=of_run)
        texts = [each.text async for each in messages if each.role is Role.ASSISTANT]
        return "".join(texts)

    @reported
    async def cancel_runs(
        self,
        *,
        session_id: Annotated[
            str, Field(description="Cancel runs of this session; optional with run_id.")
        ] = "",
        run_id: Annotated[str, Field(description="Cancel only this run.")] = "",
        scope: Annotated[
            Literal["session", "active", "waiting"],
            Field(description="Runs of the session to cancel: all, the active one, the waiting."),
        ] = "session",
        reason: Annotated[str, Field(description="Recorded with every cancelled run.")] = "",
    ) -> Record:
        """Cancel runs that are accepted and have not ended. Returns the receipt.

        The receipt names every run that was cancelled, with its state before. Runs with an
        accept_seq above fence_accept_seq are not affected. An empty receipt: nothing to cancel.
        """
        receipt = await self._client.cancel(
            session_id, run_id=run_id or None, scope=CancelScope(scope), reason=reason
        )
        return {"receipt": record(receipt)}

    @reported
    async def list_runs(
        self,
        *,
        session_id: Annotated[str, Field(description="Only runs of this session.")] = "",
        states: Annotated[
            list[RunState] | None, Field(description="Only runs in these states.")
        ] = None,
        agent: Annotated[str, Field(description="Only runs of this agent.")] = "",
        labels: Annotated[
            dict[str, str] | None, Field(description="Only runs with these labels.")
        ] = None,
        limit: Limit = 20,
        page_token: PageToken = "",
    ) -> Record:
        """List runs without their output, most recently accepted first."""
        pager = self._client.list_runs(
            session_id or None,
            states=states or (),
            agent=agent,
            metadata=labels,
            page_size=limit,
        )
        page = await pager.page(page_token)
        if session_id and not page.items:
            await check_session(self._client, session_id)
        runs = [run_record(each) for each in page.items]
        return {"runs": runs, "next_page_token": page.next_page_token}

    # --- Sessions and agents ---------------------------------------------------------------------

    @reported
    async def list_sessions(
        self,
        *,
        agent: Annotated[str, Field(description="Only sessions with this agent.")] = "",
        busy: Annotated[
            bool | None, Field(description="Only busy ones, or only idle ones; null: both.")
        ] = None,
        limit: Limit = 20,
        page_token: PageToken = "",
    ) -> Record:
        """List sessions, most recently created first."""
        pager = self._client.list_sessions(agent=agent, busy=busy, page_size=limit)
        page = await pager.page(page_token)
        sessions = [record(each) for each in page.items]
        return {"sessions": sessions, "next_page_token": page.next_page_token}

    @reported
    async def list_agents(self) -> Record:
        """List the agents of the server."""
        return {"agents": [record(each) for each in await self._client.list_agents()]}

    # --- Input from people -----------------------------------------------------------------------

    @reported
    async def list_input_requests(
        self,
        *,
        session_id: Annotated[str, Field(description="Only questions in this session.")] = "",
        run_id: Annotated[str, Field(description="Only questions of this run.")] = "",
        include_closed: Annotated[
            bool, Field(description="Also answered, expired and withdrawn ones.")
        ] = False,
        limit: Limit = 20,
        page_token: PageToken = "",
    ) -> Record:
        """List the questions that agents ask people, the latest first."""
        pager = self._client.list_input_requests(
            session_id=session_id or None,
            run_id=run_id or None,
            states=() if include_closed else (InputState.OPEN,),
            page_size=limit,
        )
        page = await pager.page(page_token)
        if session_id and not page.items:
            await check_session(self._client, session_id)
        found = self._questions(page.items)
        return {"input_requests": found, "next_page_token": page.next_page_token}

    @reported
    async def answer_input(
        self,
        *,
        input_request_id: Annotated[str, Field(description="The question.")],
        question_digest: Annotated[
            str, Field(description="question_digest of the question as the person saw it.")
        ],
        approved: Annotated[bool | None, Field(description="For an approval.")] = None,
        reason: Annotated[str, Field(description="Reason for the agent, of an approval.")] = "",
        text: Annotated[str | None, Field(description="For a text, or one of the choices.")] = None,
        form: Annotated[dict[str, Any] | None, Field(description="For a form.")] = None,
    ) -> Record:
        """Answer a question of an agent with what a person decided. The first answer counts.

        Never decide yourself. By default the server refuses every answer from here.
        """
        if not self._allow_answers:
            raise ToolError(REFUSED)
        request = await self._find(input_request_id)
        if not is_whole(request, self._max_text):
            raise ToolError(
                "input_request_id: the question is longer than --max-text, so that nobody has seen "
                "it whole here; answer it with `runlane answer`"
            )
        if request.question_digest != question_digest:
            raise ToolError(
                "question_digest: is not that of this question; show it to the person again"
            )
        answer = _answer(request, approved=approved, reason=reason, text=text, form=form)
        receipt = await self._client.answer_input(request, answer)
        return {
            "accepted_this_answer": receipt.accepted,
            "input_request": record(receipt.input_request, self._max_text),
        }

    async def _find(self, input_request_id: str) -> InputRequest:
        page = await self._client.list_input_requests(page_size=SEARCHED).page()
        for each in page.items:
            if each.input_request_id == input_request_id:
                return each
        raise InputNotFound(f"input_request_id: no input request {input_request_id!r}")


def _answer(
    request: InputRequest,
    *,
    approved: bool | None,
    reason: str,
    text: str | None,
    form: dict[str, Any] | None,
) -> Answer:
    """Returns the answer that fits the question. Raises ToolError, which names the argument."""
    given = {"approved": approved, "text": text, "form": form}
    needed = {InputKind.APPROVAL: "approved", InputKind.FORM: "form"}.get(request.kind, "text")
    other = [name for name, value in given.items() if value is not None and name != needed]
    if given[needed] is None or other:
        raise ToolError(
            f"{(other or [needed])[0]}: the question is of kind {request.kind}; "
            f"answer it with {needed}, and with nothing else"
        )
    if approved is not None:
        return Approval(approved, reason=reason)
    return form if form is not None else str(text)


def as_text(result: Record) -> str:
    """Returns a result as the text that clients without structured results show."""
    return json.dumps(result, ensure_ascii=False, indent=2)
