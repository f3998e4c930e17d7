"""`runlane mcp`: what an assistant can do through it, with the client of the package `mcp`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any, Literal

import pytest
import pytest_asyncio
from mcp import Client as Assistant
from mcp import ClientSession, MCPError
from mcp.client import ClaimContext, ClientExtension, ResultClaim, advertise
from mcp.types import (
    INVALID_PARAMS,
    MISSING_REQUIRED_CLIENT_CAPABILITY,
    CallToolResult,
    Request,
    RequestParams,
    Result,
)

import runlane
from runlane.cli.mcp_server.following import MESSAGE
from runlane.cli.mcp_server.server import build
from runlane.cli.mcp_server.tasks import IDENTIFIER
from runlane_server.agents.base import Turn
from runlane_server.agents.functions import resumable
from runlane_server.testing import LocalServer
from support.assistant import accept, call, connected, refused
from support.staging import SECONDS, say, script, wait

ANSWER = "\u202eHello \x1b[2Jthere"
"""A text that a terminal would reorder and execute."""

SHOWN = "\\u202eHello \\x1b[2Jthere"


@pytest_asyncio.fixture
async def server() -> AsyncIterator[LocalServer]:
    async with LocalServer("scripted") as server:
        yield server


# --- Access --------------------------------------------------------------------------------------


async def test_no_tool_takes_an_address_or_a_token(server: LocalServer) -> None:
    async with connected(server) as assistant:
        for tool in (await assistant.list_tools()).tools:
            names = set(tool.input_schema["properties"])
            assert not names & {"token", "server", "address", "credentials", "password"}


async def test_a_server_that_is_away_is_an_error_of_each_call() -> None:
    retry = runlane.RetryPolicy(attempts=1)
    async with (
        runlane.Client("127.0.0.1:1", retry=retry) as client,
        Assistant(build(client, allow_answers=False, max_text=1000)) as assistant,
    ):
        assert "UNAVAILABLE" in await refused(assistant, "list_agents")


# --- Results -------------------------------------------------------------------------------------


async def test_text_of_others_is_visible_and_bounded(server: LocalServer) -> None:
    async with connected(server) as assistant:
        run_id = await accept(assistant, say(ANSWER), say("x" * 2500))
        outcome = await call(assistant, "follow_run", run_id=run_id)
        assert outcome["text"].startswith(SHOWN)
        assert outcome["next_text_offset"] == 1000
        pieces = [outcome["text"]]
        while (offset := outcome.get("next_text_offset")) is not None:
            outcome = await call(assistant, "show_run", run_id=run_id, text_offset=offset)
            assert len(outcome["text"]) <= 1000
            pieces.append(outcome["text"])
        assert "".join(pieces) == SHOWN + "x" * 2500
        assert outcome["text_length"] == len(ANSWER) + 2500


async def test_labels_and_titles_of_others_are_visible(server: LocalServer) -> None:
    async with server.client() as client, connected(server) as assistant:
        await client.create_session("s", title=ANSWER, metadata={ANSWER: ANSWER})
        (session,) = (await call(assistant, "list_sessions"))["sessions"]
        assert session["title"] == SHOWN
        assert session["metadata"] == {SHOWN: SHOWN}


async def follow_until(assistant: Assistant, text: str, **run: Any) -> dict[str, Any]:
    """Follows a run for a moment, again and again until it has said the text."""
    async with asyncio.timeout(SECONDS):
        while True:
            part = await call(assistant, "follow_run", **run, timeout_seconds=0.2)
            if part["text"] == text:
                return part
            assert not part["ended"]


async def test_a_follow_that_is_not_over_says_where_it_goes_on(server: LocalServer) -> None:
    async with connected(server) as assistant:
        run_id = await accept(assistant, say("one "), wait("go"), say("two"), wait("end"))
        await server.gates.reached("go")
        part = await follow_until(assistant, "one ", run_id=run_id)
        assert (part["ended"], part["text"], part["run"]["state"]) == (False, "one ", "active")
        server.gates.open("go")
        await server.gates.reached("end")
        more = {"run_id": run_id, "after_index": part["last_event_index"]}
        part = await follow_until(assistant, "two", **more)
        assert (part["ended"], part["text"], part["text_length"]) == (False, "two", 3)
        server.gates.open("end")
        rest = await call(assistant, "follow_run", **more)
        assert (rest["ended"], rest["text"]) == (True, "one two")


async def test_a_follow_that_is_given_up_leaves_the_run_alone(server: LocalServer) -> None:
    async with connected(server) as assistant, server.client() as client:
        run_id = await accept(assistant, say("one"), wait("go"))
        following = asyncio.create_task(call(assistant, "follow_run", run_id=run_id))
        await server.gates.reached("go")
        following.cancel()
        await asyncio.wait({following})
        server.gates.open("go")
        assert (await client.wait_run(run_id)).state is runlane.RunState.COMPLETED
        assert (await call(assistant, "show_run", run_id=run_id))["text"] == "one"


async def test_progress_of_a_busy_run_comes_in_few_bounded_messages(server: LocalServer) -> None:
    async with connected(server) as assistant:
        steps: list[dict[str, Any]] = []
        for n in range(100):
            tool = {"id": str(n), "name": "look"}
            steps.append({"tool_call": {**tool, "arguments": {"at": "x" * 900}}})
            steps += ({"tool_result": {**tool, "content": "y"}}, say("z" * 500))
        run_id = await accept(assistant, *steps)
        said: list[str] = []

        async def on_progress(progress: float, total: float | None, message: str | None) -> None:
            said.append(message or "")

        await assistant.call_tool("follow_run", {"run_id": run_id}, progress_callback=on_progress)
        assert len(said) < 60
        assert max(map(len, said)) <= MESSAGE
        assert said[-1].endswith("completed")


async def test_a_failed_run_is_shown_with_its_reason(server: LocalServer) -> None:
    async with connected(server) as assistant:
        run_id = await accept(assistant, {"fail": "no disk", "reason": "NO_DISK"})
        outcome = await call(assistant, "follow_run", run_id=run_id)
        assert outcome["run"]["state"] == "failed"
        assert outcome["run"]["run_complete"]["error"]["reason"] == "NO_DISK"


async def test_lists_have_filters_and_pages(server: LocalServer) -> None:
    async with connected(server) as assistant:
        ids = [await accept(assistant, say("x"), session=f"s{n}") for n in range(3)]
        for run_id in ids:
            await call(assistant, "follow_run", run_id=run_id)
        page = await call(assistant, "list_runs", states=["completed"], limit=2)
        rest = await call(
            assistant,
            "list_runs",
            states=["completed"],
            limit=2,
            page_token=page["next_page_token"],
        )
        assert [run["run_id"] for run in page["runs"] + rest["runs"]] == ids[::-1]
        of_session = await call(assistant, "list_runs", session_id="s1")
        assert [run["run_id"] for run in of_session["runs"]] == [ids[1]]
        (agent,) = (await call(assistant, "list_agents"))["agents"]
        assert agent["name"] == "default"


# --- The queue, and forks ------------------------------------------------------------------------


async def test_a_waiting_run_is_edited_moved_sent_now_and_dropped(server: LocalServer) -> None:
    async with connected(server) as assistant:
        active = await accept(assistant, wait("go"))
        first, second, third = [await accept(assistant, say(word)) for word in "abc"]
        edited = await call(
            assistant, "update_run", run_id=third, prompt=script(say("new")), labels={"by": "ann"}
        )
        assert edited["run"]["metadata"] == {"by": "ann"}
        stale = await refused(assistant, "update_run", run_id=third, place="last", revision=0)
        assert "EDIT_CONFLICT" in stale
        await call(assistant, "update_run", run_id=third, place="first")
        await call(assistant, "update_run", run_id=second, place="before", anchor_run_id=first)
        receipt = await call(assistant, "cancel_runs", run_id=first)
        assert [run["run_id"] for run in receipt["receipt"]["cancelled"]] == [first]
        await call(assistant, "update_run", run_id=third, send_now="interrupt")
        outcome = await call(assistant, "follow_run", run_id=third)
        assert outcome["text"] == "new"
        outcome = await call(assistant, "show_run", run_id=active)
        assert outcome["run"]["state"] == "cancelled"
        late = await refused(assistant, "update_run", run_id=third, place="first")
        assert "ALREADY_STARTED" in late
        ended = [await call(assistant, "follow_run", run_id=each) for each in (first, second)]
        assert [each["run"]["state"] for each in ended] == ["cancelled", "completed"]


async def test_a_fork_begins_with_the_finished_turns(server: LocalServer) -> None:
    async with connected(server) as assistant, server.client() as client:
        await call(assistant, "follow_run", run_id=await accept(assistant, say("one")))
        forked = await call(assistant, "fork_session", session_id="s", new_session_id="copy")
        again = await call(assistant, "fork_session", session_id="s", new_session_id="copy")
        assert forked["session"]["session_id"] == again["session"]["session_id"] == "copy"
        texts = [each.text async for each in client.list_messages("copy")]
        assert texts[-1] == "one"


# --- Errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tool", "arguments", "words"),
    [
        ("cancel_runs", {}, ("SESSION_MISSING", "session_id")),
        ("cancel_runs", {"session_id": "s", "runid": "x"}, ("runid", "session_id, run_id, scope")),
        ("cancel_runs", {"session_id": "none"}, ("SESSION_NOT_FOUND",)),
        ("follow_run", {"run_id": "none"}, ("RUN_NOT_FOUND",)),
        ("accept_run", {"session_id": "s", "prompt": "x", "timeout_seconds": 1e300}, ("timeout",)),
        ("accept_run", {"session_id": "s", "prompt": "x", "timeout_seconds": -1}, ("timeout",)),
        ("accept_run", {"session_id": "s", "prompt": ""}, ("EMPTY_PROMPT", "prompt")),
        ("accept_run", {"session_id": "s", "prompt": "x", "agent": "no"}, ("AGENT_NOT_FOUND",)),
        ("accept_run", {"session_id": "s"}, ("prompt",)),
        ("list_runs", {"limit": 1000}, ("limit", "100")),
        ("list_runs", {"session_id": "none"}, ("SESSION_NOT_FOUND", "none")),
        ("list_input_requests", {"session_id": "none"}, ("SESSION_NOT_FOUND", "none")),
        ("update_run", {"run_id": "none", "place": "first"}, ("RUN_NOT_FOUND",)),
        ("update_run", {"run_id": "none"}, ("prompt", "nothing to change")),
        ("update_run", {"run_id": "none", "place": "after"}, ("anchor_run_id",)),
        ("update_run", {"run_id": "none", "prompt": "", "anchor_run_id": "x"}, ("anchor_run_id",)),
        ("fork_session", {"session_id": "none"}, ("SESSION_NOT_FOUND",)),
        ("list_runs", {"page_token": "x"}, ("PAGE_TOKEN_INVALID", "page_token")),
    ],
)
async def test_an_error_names_the_field_and_the_reason(
    server: LocalServer, tool: str, arguments: dict[str, Any], words: tuple[str, ...]
) -> None:
    async with connected(server) as assistant:
        error = await refused(assistant, tool, **arguments)
        for word in words:
            assert word in error
        assert (await call(assistant, "list_runs"))["runs"] == []


# --- Questions of agents -------------------------------------------------------------------------


@resumable
async def _careful(turn: Turn) -> AsyncGenerator[str, None]:
    approval = await turn.ask("Deploy \u202enow?", tool_name="deploy", arguments={"to": "x"})
    yield "deployed" if approval else f"refused: {approval.reason}"


async def _question(assistant: Assistant) -> tuple[str, dict[str, Any]]:
    """Accepts a run that asks; returns its id and the question."""
    accepted = await call(assistant, "accept_run", session_id="s", prompt="go")
    run_id = accepted["run"]["run_id"]
    outcome = await call(assistant, "follow_run", run_id=run_id)
    assert outcome["run"]["state"] == "input_required"
    (question,) = outcome["input_requests"]
    assert question["text"] == "Deploy \\u202enow?"
    assert (await call(assistant, "list_input_requests"))["input_requests"] == [question]
    return run_id, question


async def test_an_assistant_may_not_answer_by_default() -> None:
    async with LocalServer(_careful) as server, connected(server) as assistant:
        run_id, question = await _question(assistant)
        error = await refused(
            assistant,
            "answer_input",
            input_request_id=question["input_request_id"],
            question_digest=question["question_digest"],
            approved=True,
        )
        assert "--allow-answers" in error
        shown = await call(assistant, "show_run", run_id=run_id)
        assert shown["run"]["state"] == "input_required"


async def test_an_assistant_may_answer_where_it_is_allowed() -> None:
    async with LocalServer(_careful) as server, connected(server, allow_answers=True) as assistant:
        run_id, question = await _question(assistant)
        answer = {"input_request_id": question["input_request_id"]}
        digest = {"question_digest": question["question_digest"]}
        error = await refused(
            assistant, "answer_input", **answer, question_digest="of another", approved=True
        )
        assert error.startswith("Error executing tool answer_input: question_digest:")
        error = await refused(assistant, "answer_input", **answer, **digest, text="yes")
        assert "text: the question is of kind approval" in error
        error = await refused(assistant, "answer_input", **answer, **digest)
        assert "approved:" in error
        receipt = await call(
            assistant, "answer_input", **answer, **digest, approved=False, reason="Friday"
        )
        assert receipt["accepted_this_answer"]
        outcome = await call(assistant, "follow_run", run_id=run_id)
        assert outcome["text"] == "refused: Friday"
        late = await call(assistant, "answer_input", **answer, **digest, approved=True)
        assert not late["accepted_this_answer"]


@pytest.mark.parametrize("text", ['{"a": 1}', "[1]", "null", "true"])
async def test_a_text_that_looks_like_json_stays_text(text: str) -> None:
    @resumable
    async def curious(turn: Turn) -> AsyncGenerator[str, None]:
        yield f"{turn.prompt.text} {await turn.ask('What?')}"

    async with LocalServer(curious) as server, connected(server, allow_answers=True) as assistant:
        accepted = await call(assistant, "accept_run", session_id="s", prompt=text)
        run_id = accepted["run"]["run_id"]
        (question,) = (await call(assistant, "follow_run", run_id=run_id))["input_requests"]
        await call(
            assistant,
            "answer_input",
            input_request_id=question["input_request_id"],
            question_digest=question["question_digest"],
            text=text,
        )
        assert (await call(assistant, "follow_run", run_id=run_id))["text"] == f"{text} {text}"


async def test_a_question_that_is_not_shown_whole_cannot_be_answered() -> None:
    @resumable
    async def wordy(turn: Turn) -> AsyncGenerator[str, None]:
        arguments = {"command": "x" * 2000 + "; rm -rf /"}
        approval = await turn.ask("Run it?", tool_name="shell", arguments=arguments)
        yield "done" if approval else "refused"

    async with LocalServer(wordy) as server, connected(server, allow_answers=True) as assistant:
        accepted = await call(assistant, "accept_run", session_id="s", prompt="go")
        outcome = await call(assistant, "follow_run", run_id=accepted["run"]["run_id"])
        (question,) = outcome["input_requests"]
        assert question["arguments_json"].endswith(" more characters)")
        error = await refused(
            assistant,
            "answer_input",
            input_request_id=question["input_request_id"],
            question_digest=question["question_digest"],
            approved=True,
        )
        assert "longer than --max-text" in error


# --- Tasks ---------------------------------------------------------------------------------------


class _Params(RequestParams):
    task_id: str
    input_responses: dict[str, Any] | None = None


class _Task(Result):
    result_type: Literal["complete", "task"] = "complete"
    task_id: str = ""
    status: str = ""
    status_message: str = ""
    result: CallToolResult | None = None


class _CreatedTask(_Task):
    result_type: Literal["task"] = "task"


class _TaskRequest(Request[_Params, str]):
    pass


class _TaskClient(ClientExtension):
    """A client that knows tasks: it asks for the result when the test says so."""

    identifier = IDENTIFIER

    def __init__(self) -> None:
        self.created: asyncio.Future[_CreatedTask] = asyncio.get_running_loop().create_future()
        self.may_poll = asyncio.Event()

    def claims(self) -> Sequence[ResultClaim[Any]]:
        return [ResultClaim(result_type="task", model=_CreatedTask, resolve=self._resolve)]

    async def _resolve(self, created: _CreatedTask, context: ClaimContext) -> CallToolResult:
        self.created.set_result(created)
        await self.may_poll.wait()
        task = await about_task(context.session, "tasks/get", created.task_id)
        assert task.result is not None
        return task.result


async def about_task(
    session: ClientSession, method: str, task_id: str, answers: dict[str, Any] | None = None
) -> _Task:
    """Sends a request of the extension."""
    params = _Params(task_id=task_id, input_responses=answers)
    return await session.send_request(_TaskRequest(method=method, params=params), _Task)


async def test_a_long_run_is_a_task_for_a_client_that_knows_tasks(server: LocalServer) -> None:
    tasks = _TaskClient()
    async with connected(server, extensions=[tasks]) as assistant, server.client() as client:
        run_id = await accept(assistant, say("Good "), wait("go"), say("morning"))
        following = asyncio.create_task(call(assistant, "follow_run", run_id=run_id))
        created = await tasks.created
        assert (created.task_id, created.status) == (run_id, "working")
        # Another process with the same rights can go on with it.
        async with connected(server, extensions=[advertise(IDENTIFIER)]) as other:
            assert (await about_task(other.session, "tasks/get", run_id)).status == "working"
        server.gates.open("go")
        await client.wait_run(run_id)
        tasks.may_poll.set()
        outcome = await following
        assert (outcome["ended"], outcome["text"]) == (True, "Good morning")
        # A run that has ended needs no task.
        assert await call(assistant, "follow_run", run_id=run_id) == outcome


async def test_cancelling_a_task_cancels_its_run(server: LocalServer) -> None:
    async with connected(server, extensions=[advertise(IDENTIFIER)]) as assistant:
        run_id = await accept(assistant, wait("never"))
        later = await accept(assistant, say("spared"))
        await about_task(assistant.session, "tasks/cancel", run_id)
        async with server.client() as client:
            assert (await client.wait_run(run_id)).state is runlane.RunState.CANCELLED
            assert (await client.wait_run(later)).state is runlane.RunState.COMPLETED
        task = await about_task(assistant.session, "tasks/get", run_id)
        assert (task.status, task.status_message) == ("cancelled", "cancelled: tasks/cancel")


async def test_a_failed_run_is_a_task_with_a_result(server: LocalServer) -> None:
    async with connected(server, extensions=[advertise(IDENTIFIER)]) as assistant:
        run_id = await accept(assistant, {"fail": "no disk", "reason": "NO_DISK"})
        await call(assistant, "follow_run", run_id=run_id)
        task = await about_task(assistant.session, "tasks/get", run_id)
        assert task.status == "completed"
        assert task.result is not None
        assert task.result.structured_content is not None
        assert task.result.structured_content["run"]["state"] == "failed"


async def test_the_client_of_a_task_may_not_answer_for_a_person() -> None:
    async with (
        LocalServer(_careful) as server,
        connected(server) as assistant,
        connected(server, extensions=[advertise(IDENTIFIER)]) as with_tasks,
    ):
        run_id, question = await _question(assistant)
        answers = {question["input_request_id"]: {"action": "accept", "content": {"yes": True}}}
        await about_task(with_tasks.session, "tasks/update", run_id, answers)
        task = await about_task(with_tasks.session, "tasks/get", run_id)
        assert task.status == "working"
        assert "a person answers" in task.status_message


@pytest.mark.parametrize("method", ["tasks/get", "tasks/update", "tasks/cancel"])
async def test_an_unknown_task_and_a_client_without_tasks_are_refused(
    server: LocalServer, method: str
) -> None:
    async with connected(server, extensions=[advertise(IDENTIFIER)]) as assistant:
        with pytest.raises(MCPError, match=r"taskId: RUN_NOT_FOUND") as unknown:
            await about_task(assistant.session, method, "none", {})
        assert unknown.value.code == INVALID_PARAMS
    async with connected(server) as assistant:
        with pytest.raises(MCPError) as refusal:
            await about_task(assistant.session, method, "none", {})
        assert refusal.value.code == MISSING_REQUIRED_CLIENT_CAPABILITY
