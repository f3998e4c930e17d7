"""C14: a client shows the questions of an agent, answers each once, and gets the end of the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from polyglot.program import Program, Programs
from polyglot.proxy import Proxy
from polyglot.serving import becomes, becomes_state, script, scripted
from runlane import Client, InputRequest, InputState, RunState

ASKS = script({"text": "before "}, {"ask": {"text": "Which?"}}, {"text": " after"})
"""Asks for a text, and prints the answer between two texts."""


async def asked(program: Program, client: Client, text: str = "Which?") -> InputRequest:
    """Waits until the program has shown the question of the only run."""
    line = await program.reports("asked ")
    (request,) = [one async for one in client.list_input_requests()]
    assert line == f"asked {request.input_request_id} {text}"
    return request


async def test_c14_run_answers_a_question_and_gets_the_end(
    programs: Programs, folder: Path
) -> None:
    async with scripted(folder) as (server, client):
        program = await programs.start("run", "s", ASKS, "--answer", "grün", target=server.address)
        await program.exits(0)
        request = await asked(program, client)
        assert request.answer is not None
        assert (request.state, request.answer.value) == (InputState.ANSWERED, "grün")
        assert request.answer.question_digest == request.question_digest
    assert f"answered {request.input_request_id}" in program.err.lines
    assert program.out.text == "before grün after\n"
    assert program.err.lines[-1] == "completed STOP"


@pytest.mark.parametrize(
    ("question", "answer", "printed"),
    [
        ({"tool_name": "deploy", "arguments": {}}, "yes", "approved {}"),
        ({"tool_name": "deploy", "arguments": {}}, "no", "denied {}"),
        ({"choices": ["a", "b"]}, "b", "b"),
        ({"schema": {"type": "object"}}, '{"n": 1}', '{"n": 1}'),
    ],
    ids=["approved", "refused", "choice", "form"],
)
async def test_c14_run_answers_each_kind_of_question(
    programs: Programs, folder: Path, question: dict[str, object], answer: str, printed: str
) -> None:
    prompt = script({"ask": {"text": "Well?", **question}})
    async with scripted(folder) as (server, _):
        program = await programs.start(
            "run", "s", prompt, "--answer", answer, target=server.address
        )
        await program.exits(0)
    assert program.out.text == f"{printed}\n"


async def test_c14_run_retries_a_lost_answer_with_the_same_id(
    programs: Programs, proxy: Proxy, folder: Path
) -> None:
    async with scripted(folder) as (server, client):
        proxy.target = server.address
        proxy.silence_at_request = 3  # after RunAccepted and SubscribeRun
        program = await programs.start("run", "s", ASKS, "--answer", "x", target=proxy.address)
        request = await asked(program, client)

        async def answered() -> bool:
            (one,) = [one async for one in client.list_input_requests()]
            return one.answer is not None

        await becomes(answered)
        assert f"answered {request.input_request_id}" not in program.err.lines
        proxy.silence_at_request = 0
        proxy.cut()
        proxy.speak()
        await program.exits(0)
    assert f"answered {request.input_request_id}" in program.err.lines
    assert program.out.text == "before x after\n"


async def test_c14_run_goes_on_after_the_answer_of_another(
    programs: Programs, folder: Path
) -> None:
    async with scripted(folder) as (server, client):
        program = await programs.start("run", "s", ASKS, target=server.address)
        request = await asked(program, client)
        await client.answer_input(request, "theirs")
        await program.exits(0)
        late = ("run", "s", ASKS, "--run-id", request.run_id, "--answer", "mine")
        later = await programs.start(*late, target=server.address)
        await later.exits(0)
    assert f"answered before {request.input_request_id}" in later.err.lines
    assert program.out.text == later.out.text == "before theirs after\n"


async def test_c14_run_reports_a_question_that_was_withdrawn(
    programs: Programs, folder: Path
) -> None:
    async with scripted(folder) as (server, client):
        program = await programs.start("run", "s", ASKS, target=server.address)
        request = await asked(program, client)
        await client.cancel("s")
        await program.exits(1)
        late = ("run", "s", ASKS, "--run-id", request.run_id, "--answer", "late")
        later = await programs.start(*late, target=server.address)
        await later.exits(1)
    assert f"closed {request.input_request_id}" in later.err.lines
    assert later.err.lines[-1] == program.err.lines[-1] == "cancelled CANCELED"


async def test_c14_invalid_answer_is_refused(programs: Programs, folder: Path) -> None:
    prompt = script({"ask": {"text": "Which?", "choices": ["a", "b"]}})
    async with scripted(folder) as (server, client):
        program = await programs.start("run", "s", prompt, "--answer", "c", target=server.address)
        await program.exits(3)
        request = await asked(program, client)
        await becomes_state(client, request.run_id, RunState.INPUT_REQUIRED)
    assert any(line.startswith("ANSWER_INVALID: ") for line in program.err.lines)
