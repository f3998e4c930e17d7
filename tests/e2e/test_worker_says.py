"""The output of an agent in a worker: steps, questions, artifacts, custom events and results."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from runlane import (
    Artifact,
    Client,
    Custom,
    InputRequest,
    InputRequested,
    RunComplete,
    RunHandle,
    RunRetryPolicy,
    RunState,
    Started,
    Step,
    Usage,
    WhenBusy,
)
from runlane.v1 import run_pb2
from runlane.worker import AgentError, Approval, BlockingTurn, Report, Result, Turn
from runlane.worker import Artifact as Made
from runlane.worker import Custom as Own
from runlane.worker.v1 import worker_service_pb2 as pb
from support.server import ServerProcess, clean_environment, serving
from support.staging import SECONDS
from support.workers import RawWorker, accept, requested, resume_of, working

AGENTS = ("--agent", "worker", "--agent", "coder=worker")

RETRY = RunRetryPolicy(max_attempts=3, initial_backoff=timedelta(0))


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[ServerProcess]:
    flags = (*AGENTS, "--worker-lease", "20s", "--cancel-grace", "2s", "--store", "memory:")
    async with serving(tmp_path, *flags, base=clean_environment()) as started:
        yield started


@pytest.fixture
async def client(server: ServerProcess) -> AsyncIterator[Client]:
    async with Client(server.address) as connected:
        yield connected


async def bodies(handle: RunHandle) -> list[Any]:
    async with asyncio.timeout(SECONDS):
        return [event.body async for event in handle.events()]


async def emit(worker: RawWorker, number: int, *events: pb.Event) -> None:
    await worker.send(emit=pb.WorkRequest.Emit(number=number, events=events))


async def until(worker: RawWorker, kind: str) -> Any:
    """Reads until a message of a kind comes."""
    while (found := await worker.read()).WhichOneof("message") != kind:
        pass
    return getattr(found, kind)


def step_event(key: str, result: str) -> pb.Event:
    return pb.Event(step=run_pb2.RunEvent.Step(key=key, result=result))


async def ask(worker: RawWorker, *questions: pb.Question) -> None:
    await worker.send(ask=pb.WorkRequest.Ask(questions=questions))


# --- Output ---------------------------------------------------------------------------------------


async def test_a_worker_emits_artifacts_custom_events_and_a_result(
    server: ServerProcess, client: Client
) -> None:
    async def agent(turn: Turn) -> AsyncIterator[Any]:
        yield Made(artifact_id="a", name="a.txt", text="one ", last=False)
        await turn.emit(Made(artifact_id="a", name="a.txt", text="two", append=True))
        yield Made(artifact_id="b", data=b"\x00\xff", mime_type="x/y")
        yield Made(artifact_id="c", json={"n": [1]})
        yield Own("progress", {"percent": 10})
        yield "done"
        yield Result({"ok": False})
        yield Result({"ok": True})

    handle = await accept(client, "s", "x")
    async with working(server.address, {"default": agent}):
        end = await handle.completed(SECONDS)
    assert (end.text, end.result) == ("done", '{"ok":true}')
    said = [it for it in await bodies(handle) if isinstance(it, Artifact | Custom)]
    assert said[-1] == Custom("progress", '{"percent":10}')
    messages = [message async for message in client.list_messages("s")]
    kept = [part for one in messages for part in one.parts if isinstance(part, Artifact)]
    assert [(one.artifact_id, one.content) for one in kept] == [
        ("a", "one two"),
        ("b", b"\x00\xff"),
        ("c", '{"n":[1]}'),
    ]


BAD_EVENTS = (
    (pb.Event(custom=run_pb2.RunEvent.Custom(type="x", json="{")), "no JSON value"),
    (pb.Event(custom=run_pb2.RunEvent.Custom(type="x", json="NaN")), "no JSON value"),
    (pb.Event(custom=run_pb2.RunEvent.Custom(type="", json="1")), "type is empty"),
    (pb.Event(artifact=run_pb2.Artifact(artifact_id="a")), "exactly one of"),
    (
        pb.Event(artifact=run_pb2.Artifact(artifact_id="a", text="x" * (1 << 20) + "y")),
        "1048576 is the limit",
    ),
    (step_event("", "1"), "key of a step is empty"),
    (step_event("k", "x"), "no JSON value"),
)


async def test_what_cannot_be_stored_fails_the_run_and_frees_the_slot(
    server: ServerProcess, client: Client
) -> None:
    async with RawWorker(server.address) as worker:
        for event, problem in BAD_EVENTS:
            handle = await accept(client, "s", problem)
            assert (await worker.turn()).prompt == problem
            await emit(worker, 1, event)
            assert problem in (await worker.expect("fenced")).message
            end = await handle.completed(SECONDS)
            assert end.error is not None
            assert end.error.reason == "AGENT_ERROR"
            assert problem in end.error.message


async def test_a_result_that_is_no_json_fails_the_run(
    server: ServerProcess, client: Client
) -> None:
    handle = await accept(client, "s", "x")
    async with RawWorker(server.address) as worker:
        await worker.turn()
        await worker.send(finish=pb.WorkRequest.Finish(result_json="{"))
        await worker.expect("fenced")
    end = await handle.completed(SECONDS)
    assert end.error is not None
    assert "result_json is no JSON value" in end.error.message


# --- Steps ----------------------------------------------------------------------------------------


class Wordless(Exception):
    """A failure without a text."""

    def __str__(self) -> str:
        raise ValueError("it has none")


ODD_ENDS: dict[str, tuple[Sequence[object], BaseException, str]] = {
    "no message": ((), AgentError(None, reason="NO_MODEL"), "NO_MODEL"),  # type: ignore[arg-type]
    "no reason": ((), AgentError("away", reason=None), "AGENT_ERROR"),  # type: ignore[arg-type]
    "half a character": ((), AgentError("no file \udcff", reason="NO_FILE"), "NO_FILE"),
    "no text": ((), Wordless(), "AGENT_ERROR"),
    "a model that is no text": (
        (Report(model=7),),  # type: ignore[arg-type]
        ValueError("x"),
        "AGENT_ERROR",
    ),
    "usage that is no number": (
        (Report(usage=Usage(input_tokens=0.5)),),  # type: ignore[arg-type]
        AgentError("x", reason="LOST"),
        "AGENT_ERROR",
    ),
}
"""The events of an agent, its exception, and the reason of its run."""


@pytest.mark.parametrize("name", ODD_ENDS)
async def test_a_failure_that_is_hard_to_tell_ends_its_run(
    name: str, server: ServerProcess, client: Client
) -> None:
    reports, failure, reason = ODD_ENDS[name]

    async def agent(turn: Turn) -> AsyncIterator[object]:
        if turn.prompt.text == "fail":
            for report in reports:
                yield report
            raise failure
        yield "ok"

    async with working(server.address, {"default": agent}):
        end = await (await accept(client, "s", "fail")).completed(SECONDS)
        assert (end.state, end.error and end.error.reason) == (RunState.FAILED, reason)
        assert (await (await accept(client, "s", "go on")).completed(SECONDS)).text == "ok"


async def test_r39_a_step_is_not_repeated_by_the_next_attempt(
    server: ServerProcess, client: Client
) -> None:
    done: list[str] = []

    async def work() -> list[int]:
        done.append("step")
        return [1, 2]

    async def agent(turn: Turn) -> str:
        found = await turn.step("read", work)
        if turn.attempt == 1:
            raise RuntimeError("after the step")
        return f"{found} in attempt {turn.attempt}"

    async with working(server.address, {"default": agent}):
        handle = await accept(client, "s", "x", retry_policy=RETRY)
        end = await handle.completed(SECONDS)
    assert (end.text, done) == ("[1, 2] in attempt 2", ["step"])
    steps = [one for one in await bodies(handle) if isinstance(one, Step)]
    assert steps == [Step("read", "[1,2]")]


async def test_r39_a_step_is_acknowledged_when_it_is_durable_and_numbered_like_an_event(
    server: ServerProcess, client: Client
) -> None:
    handle = await accept(client, "s", "x")
    async with RawWorker(server.address) as worker:
        await worker.turn()
        await worker.send(find_step=pb.WorkRequest.FindStep(key="k"))
        assert not (await worker.expect("step")).HasField("result")
        await emit(worker, 1, pb.Event(text_delta="a"), step_event("k", "1"))
        await worker.acked(2)
        # Repeated after a lost connection: it is passed over.
        await emit(worker, 2, step_event("k", "1"), pb.Event(text_delta="b"))
        await worker.acked(3)
        await worker.send(find_step=pb.WorkRequest.FindStep(key="k"))
        assert (await worker.expect("step")).result == "1"
        await worker.finish(3)
        await worker.expect("acked")
    assert (await handle.completed(SECONDS)).text == "ab"


async def test_r39_a_key_has_one_result(server: ServerProcess, client: Client) -> None:
    handle = await accept(client, "s", "x")
    async with RawWorker(server.address) as worker:
        await worker.turn()
        await emit(worker, 1, step_event("k", "1"), step_event("k", "2"))
        await until(worker, "fenced")
    end = await handle.completed(SECONDS)
    assert end.error is not None
    assert "has a result already" in end.error.message


# --- Questions ------------------------------------------------------------------------------------


async def test_r40_a_worker_is_free_while_a_person_thinks(
    server: ServerProcess, client: Client
) -> None:
    async def agent(turn: Turn) -> AsyncIterator[str]:
        if turn.prompt.text != "ask":
            yield "at once"
            return
        yield "before "
        answer = await turn.ask("go on?", key="k")
        yield f"after {answer} in attempt {turn.attempt}"

    async with working(server.address, {"default": agent}):
        handle = await accept(client, "s", "ask")
        request = await requested(client, handle.run_id)
        assert (await client.get_run(handle.run_id)).state is RunState.INPUT_REQUIRED
        # The only slot executes another run meanwhile.
        other = await accept(client, "t", "x")
        assert (await other.completed(SECONDS)).text == "at once"
        await client.answer_input(request, "yes")
        end = await handle.completed(SECONDS)
    assert (end.text, end.attempt) == ("before after yes in attempt 2", 2)
    said = await bodies(handle)
    assert [it.attempt for it in said if isinstance(it, Started)] == [1, 2]


async def test_r44_all_kinds_of_questions_and_blocking_functions(
    server: ServerProcess, client: Client
) -> None:
    def agent(turn: BlockingTurn) -> str:
        try:
            text = turn.ask("name?")
            again = turn.ask("name?")
            choice = turn.ask("which?", choices=["a", "b"])
            form = turn.ask("form?", schema={"type": "object", "required": ["n"]})
            approval = turn.ask("may I?", tool_name="rm", arguments={"path": "/"})
        except Exception as error:  # noqa: BLE001 - a CancelledError must not come here
            return f"caught {error!r}"
        assert isinstance(approval, Approval)
        return json.dumps(
            [text, again, choice, form, bool(approval), approval.arguments, approval.reason]
        )

    answers: list[Any] = ["Ann", "Bob", "b", {"n": 1}, True]
    async with working(server.address, {"default": agent}):
        handle = await accept(client, "s", "x")
        seen: set[str] = set()
        for given in answers:
            async with asyncio.timeout(SECONDS):
                while (request := await open_request(client, handle.run_id)) is None:
                    await asyncio.sleep(0.01)
            assert request.key not in seen
            seen.add(request.key)
            await client.answer_input(request, given)
        end = await handle.completed(SECONDS)
    assert json.loads(end.text) == ["Ann", "Bob", "b", {"n": 1}, True, {"path": "/"}, ""]
    assert end.attempt == len(answers) + 1


async def open_request(client: Client, run_id: str) -> InputRequest | None:
    async for one in client.list_input_requests(run_id=run_id):
        if one.state == "open":
            return one
    return None


async def test_r44_questions_asked_together_are_shown_together(
    server: ServerProcess, client: Client
) -> None:
    async def agent(turn: Turn) -> str:
        return " ".join(await asyncio.gather(*(turn.ask(f"{n}?") for n in range(3))))

    async with working(server.address, {"default": agent}):
        handle = await accept(client, "s", "x")
        await requested(client, handle.run_id)
        found = [one async for one in client.list_input_requests(run_id=handle.run_id)]
        assert sorted(one.text for one in found) == ["0?", "1?", "2?"]
        for one in found:
            await client.answer_input(one, one.text.strip("?"))
        end = await handle.completed(SECONDS)
    assert (end.text, end.attempt) == ("0 1 2", 2)


async def test_r41_an_answered_question_is_answered_at_once(
    server: ServerProcess, client: Client
) -> None:
    handle = await accept(client, "s", "x")
    question = pb.Question(key="k", text="well?")
    async with RawWorker(server.address) as worker:
        await worker.turn()
        await emit(worker, 1, pb.Event(text_delta="before"))
        await ask(worker, question)
        await until(worker, "parked")
        await client.answer_input(await requested(client, handle.run_id), "yes")
        turn = await worker.turn()
        assert turn.attempt == 2
        await ask(worker, question)
        answer = (await worker.expect("answers")).answers[0]
        assert (answer.key, answer.answer.text) == ("k", "yes")
        # Repeated after a lost connection.
        await ask(worker, question)
        assert (await worker.expect("answers")).answers[0] == answer
        await worker.finish(0)
        await worker.expect("acked")
    assert (await handle.completed(SECONDS)).text == ""


async def test_r42_a_cancel_ends_a_run_that_waits_and_keeps_its_text(
    server: ServerProcess, client: Client
) -> None:
    handle = await accept(client, "s", "x")
    async with RawWorker(server.address) as worker:
        await worker.turn()
        await emit(worker, 1, pb.Event(text_delta="so far"))
        await ask(worker, pb.Question(key="k", text="well?"))
        await requested(client, handle.run_id)
        receipt = await client.cancel("s")
        assert [one.state_when_cancelled for one in receipt.cancelled] == [RunState.INPUT_REQUIRED]
        end = await handle.completed(SECONDS)
    assert (end.cancelled, end.text) == (True, "so far")


async def test_r43_a_default_applies_and_the_run_goes_on(
    server: ServerProcess, client: Client
) -> None:
    async def agent(turn: Turn) -> str:
        approval = await turn.ask("may I?", tool_name="rm", timeout=0.1, default=False)
        return f"{bool(approval)}"

    async with working(server.address, {"default": agent}):
        handle = await accept(client, "s", "x")
        assert (await handle.completed(SECONDS)).text == "False"


async def test_r43_without_a_default_the_run_fails(server: ServerProcess, client: Client) -> None:
    async def agent(turn: Turn) -> str:
        return str(await turn.ask("well?", timeout=0.1))

    async with working(server.address, {"default": agent}):
        handle = await accept(client, "s", "x")
        end = await handle.completed(SECONDS)
    assert end.error is not None
    assert end.error.reason == "INPUT_EXPIRED"


async def test_r26_what_an_asking_turn_has_folded_in_joins_the_next_attempt(
    server: ServerProcess, client: Client
) -> None:
    async def agent(turn: Turn) -> str:
        # Two takes at the same time: each prompt goes to one of them.
        taken = await asyncio.gather(*(turn.take_folded() for _ in range(3)))
        texts = [one.prompt.text for each in taken for one in each]
        answer = await turn.ask("well?", key="k")
        return f"{answer} {texts}"

    handle = await accept(client, "s", "x")
    folded = await accept(client, "s", "join", when_busy=WhenBusy.FOLD)
    async with working(server.address, {"default": agent}):
        await client.answer_input(await requested(client, handle.run_id), "yes")
        assert (await handle.completed(SECONDS)).text == "yes ['join']"
        assert (await folded.completed(SECONDS)).folded_into == handle.run_id


BAD_QUESTIONS = (
    (pb.Question(key="k", text="x", choices=["a"], schema_json="{}"), "exclude each other"),
    (pb.Question(key="k", text="x", schema_json="{"), "no JSON value"),
    (pb.Question(key="k", text="x", tool_name="t", arguments_json="[1]"), "no JSON object"),
    (
        pb.Question(key="k", text="x", tool_name="t", arguments_json='{"a": 1, "a": 2}'),
        "name twice",
    ),
    (pb.Question(key="k", text="x", choices=["a", "a"]), "each choice"),
    (pb.Question(key="k", text="x", default_json="1"), "give a timeout"),
    (pb.Question(key="k", text="x" * (300 << 10)), "is the limit"),
)


async def test_a_question_that_nobody_can_answer_fails_the_run(
    server: ServerProcess, client: Client
) -> None:
    async with RawWorker(server.address) as worker:
        for question, problem in BAD_QUESTIONS:
            handle = await accept(client, "s", problem)
            assert (await worker.turn()).prompt == problem
            await ask(worker, question)
            await worker.expect("fenced")
            end = await handle.completed(SECONDS)
            assert end.error is not None
            assert end.error.reason == "QUESTION_INVALID"
            assert problem in end.error.message


BAD_MESSAGES: Sequence[tuple[dict[str, Any], str]] = (
    ({"ask": pb.WorkRequest.Ask()}, "ask.questions: is empty"),
    (
        {"ask": pb.WorkRequest.Ask(questions=[pb.Question(key="k")] * 2)},
        "ask.questions: has a key twice",
    ),
    (
        {"ask": pb.WorkRequest.Ask(questions=[pb.Question(text="x")])},
        r"ask.questions[0].key: is empty",
    ),
    (
        {"ask": pb.WorkRequest.Ask(questions=[pb.Question(key=str(n)) for n in range(17)])},
        "ask.questions: has 17",
    ),
    ({"find_step": pb.WorkRequest.FindStep()}, "find_step.key: is empty"),
    ({"find_step": pb.WorkRequest.FindStep(key="k" * 129)}, "find_step.key"),
)


async def test_a_message_that_breaks_the_rules_ends_the_call(
    server: ServerProcess, client: Client
) -> None:
    for n, (message, field) in enumerate(BAD_MESSAGES):
        await accept(client, f"s{n}", "x")
        async with RawWorker(server.address) as worker:
            await worker.turn()
            await worker.send(**message)
            assert await worker.end() is grpc.StatusCode.INVALID_ARGUMENT
            assert field in await worker.details()


async def test_a_worker_of_the_network_has_no_checkpoint(
    server: ServerProcess, client: Client
) -> None:
    # Another worker might not know how to continue from it.
    await accept(client, "s", "hello", max_attempts=1)
    async with RawWorker(server.address) as worker:
        assert (await worker.turn()).checkpoint == ""
        question = pb.Question(key="k", text="well?")
        await worker.send(ask=pb.WorkRequest.Ask(questions=[question], checkpoint="here"))
        assert await worker.end() is grpc.StatusCode.INVALID_ARGUMENT
        assert "ask.checkpoint" in await worker.details()


async def test_a_request_without_a_turn_ends_the_call(server: ServerProcess) -> None:
    question = pb.Question(key="k", text="x")
    messages: dict[str, Any] = {
        "ask": pb.WorkRequest.Ask(questions=[question]),
        "find_step": pb.WorkRequest.FindStep(key="k"),
    }
    for kind, message in messages.items():
        async with RawWorker(server.address) as worker:
            await worker.offer()
            await worker.send(**{kind: message})
            assert await worker.end() is grpc.StatusCode.INVALID_ARGUMENT
            assert f"{kind}: came without a turn" in await worker.details()


async def test_r33_a_fenced_worker_asks_and_keeps_nothing(
    server: ServerProcess, client: Client
) -> None:
    handle = await accept(client, "s", "x")
    async with RawWorker(server.address) as old:
        turn = await old.turn()
        async with RawWorker(server.address) as new:
            await new.offer(resume=resume_of(turn))
            await new.expect("acked")
            await old.expect("fenced")
            await emit(old, 1, step_event("k", "1"))
            await ask(old, pb.Question(key="k", text="well?"))
            await new.finish(0)
            await new.expect("acked")
    await handle.completed(SECONDS)
    said = await bodies(handle)
    assert not [it for it in said if isinstance(it, Step | InputRequested)]
    assert isinstance(said[-1], RunComplete)
