"""Input from people over the wire: a real server, the public client, and the command."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from e2e.test_several_agents import _runlane
from runlane import (
    AnswerInvalid,
    Client,
    InputAnswered,
    InputClosed,
    InputNotFound,
    InputRequest,
    InputRequested,
    InputState,
    InputWithdrawn,
    PermissionDenied,
    RunHandle,
    RunlaneError,
    RunState,
)
from runlane_server.access import editing
from runlane_server.access.caller import Role
from support.server import serving
from support.staging import SECONDS, Step, say, script

FLAGS = ("--agent", "scripted")


def ask(text: str = "well?", *, leave: bool = False, **options: object) -> Step:
    """The agent asks, and emits the answer."""
    return {"ask": {"text": text, **options}, "leave": leave}


async def accept(client: Client, session_id: str, *steps: Step, **options: object) -> RunHandle:
    return await client.run_accepted(session_id, script(*steps), allow_missing=True, **options)  # type: ignore[arg-type]


async def requested(handle: RunHandle) -> InputRequest:
    """Waits until a run has asked."""
    async with asyncio.timeout(SECONDS):
        async for event in handle.events():
            if isinstance(event.body, InputRequested):
                return event.body.input_request
    raise AssertionError("the run ended without a question")


async def test_r45_a_late_subscriber_learns_what_is_open(tmp_path: Path) -> None:
    async with serving(tmp_path, *FLAGS) as server, Client(server.address) as client:
        handle = await accept(client, "s", ask("one?"), ask("two?", leave=True))
        first = await requested(handle)
        await client.answer_input(first, "1")
        async with asyncio.timeout(SECONDS):
            while not (found := [it async for it in open_of(client)]):
                await asyncio.sleep(0.01)
        assert [it.text for it in found] == ["two?"]
        await client.cancel("s")
        await handle.completed(SECONDS)
        bodies = [event.body async for event in handle.events()]
        told = [it for it in bodies if isinstance(it, InputRequested | InputAnswered)]
        assert len(told) == 3
        assert InputWithdrawn(found[0].input_request_id) in bodies


def open_of(client: Client) -> AsyncIterator[InputRequest]:
    return aiter(client.list_input_requests(states=[InputState.OPEN]))


async def test_who_may_answer_and_what_is_recorded(tmp_path: Path) -> None:
    path = tmp_path / "access.toml"
    texts = {
        (tenant, role): editing.add(
            path, f"{tenant}-{role}", tenant=tenant, role=role, expires=None
        )
        for tenant in ("acme", "other")
        for role in (Role.READ, Role.ANSWER, Role.RUN, Role.OPERATOR)
    }
    async with serving(tmp_path, *FLAGS, "--access", str(path)) as server:

        def client(tenant: str, role: Role) -> Client:
            return Client(server.address, token=texts[tenant, role])

        async with client("acme", Role.RUN) as runs:
            handle = await accept(runs, "s", ask(tool_name="rm", arguments={"path": "/"}))
            request = await requested(handle)
            with pytest.raises(PermissionDenied):
                await runs.answer_input(request, True)
        async with client("acme", Role.READ) as reads:
            with pytest.raises(PermissionDenied):
                await reads.answer_input(request, True)
            assert [it async for it in reads.list_input_requests(session_id="s")] == [request]
        async with client("other", Role.OPERATOR) as stranger:
            with pytest.raises(InputNotFound):
                await stranger.answer_input(request, True)
            assert [it async for it in stranger.list_input_requests()] == []
        async with client("acme", Role.ANSWER) as answers:
            with pytest.raises(PermissionDenied):
                await accept(answers, "s", say("x"))
            receipt = await answers.answer_input(request, False)
            assert receipt.accepted
            given = receipt.input_request.answer
            assert given is not None
            assert (given.answered_by, given.authenticated_by) == ("acme-answer", "token")
            assert given.peer.startswith("ipv4:127.0.0.1:")
            assert given.question_digest == request.question_digest
        async with client("acme", Role.OPERATOR) as operator:
            assert not (await operator.answer_input(request, True)).accepted
            end = await (await operator.attach(handle.run_id)).completed(SECONDS)
            assert end.text == 'denied {"path": "/"}'
            other = await requested(await accept(operator, "t", ask()))
            mistaken = replace(other, kind=request.kind)
            with pytest.raises(AnswerInvalid, match="this one is"):
                await operator.answer_input(mistaken, True)


async def test_the_command_lists_shows_and_answers(tmp_path: Path) -> None:
    async with serving(tmp_path, *FLAGS) as server, Client(server.address) as client:
        handle = await accept(client, "s", ask("\x1b[31mred?", choices=["a", "b"]))
        request = await requested(handle)
        listed = await _runlane(server.address, "answer")
        assert listed.split("\t")[1] == request.input_request_id
        shown = await _runlane(server.address, "answer", request.input_request_id[-12:])
        assert "question\t\\x1b[31mred?\n" in shown
        assert "choice 1\ta\nchoice 2\tb\n" in shown
        assert "input_required" in await _runlane(server.address, "runs")
        await _runlane(server.address, "answer", request.input_request_id, "--text", "b")
        assert (await handle.completed(SECONDS)).text == "b"
        assert "answered" in await _runlane(server.address, "answer", "--closed")


@pytest.mark.timeout(300)
async def test_answer_cancel_and_kill_in_the_same_instant_agree(tmp_path: Path) -> None:
    """Receipt, request, run, transcript and stream agree in each order of the calls."""
    rng = random.Random(7)  # noqa: S311 - no secret
    outcomes: Counter[str] = Counter()
    async with serving(tmp_path, *FLAGS) as server, Client(server.address, timeout=60) as client:
        for n in range(12):
            leave = bool(n % 2)
            handle = await accept(client, f"s{n}", say("a"), ask(leave=leave), max_attempts=2)
            request = await requested(handle)
            actions = [_answer(client, request), _cancel(client, f"s{n}")]
            rng.shuffle(actions)
            running = [asyncio.create_task(action) for action in actions]
            await asyncio.sleep(rng.choice([0, 0.001, 0.003]))
            if n % 3 == 0:
                await server.kill()
                await server.start()
            answered, cancelled = sorted(
                [await task for task in running], key=lambda it: it[0] != "answer"
            )
            outcomes[await _check(client, handle, answered[1], cancelled[1])] += 1
    print(outcomes)
    assert len(outcomes) > 1


async def _answer(client: Client, request: InputRequest) -> tuple[str, str]:
    try:
        receipt = await client.answer_input(request, "A", answer_id=request.input_request_id)
    except InputClosed:
        return "answer", "closed"
    return "answer", "accepted" if receipt.accepted else "late"


async def _cancel(client: Client, session_id: str) -> tuple[str, str]:
    try:
        receipt = await client.cancel(session_id)
    except RunlaneError:
        return "cancel", "unknown"
    states = {it.state_when_cancelled for it in receipt.cancelled}
    return "cancel", str(states.pop()) if states else "empty"


async def _check(client: Client, handle: RunHandle, answered: str, cancelled: str) -> str:
    if cancelled == "unknown":
        await client.cancel(handle.session_id)
    end = await handle.completed(SECONDS)
    bodies = [event.body async for event in handle.events()]
    [request] = [it async for it in client.list_input_requests(run_id=handle.run_id)]
    if answered == "closed":
        assert request.state is InputState.WITHDRAWN
    else:
        assert request.state is InputState.ANSWERED
        assert InputAnswered(request.input_request_id) in bodies
    if request.state is InputState.WITHDRAWN:
        assert end.state is RunState.CANCELLED
        assert InputWithdrawn(request.input_request_id) in bodies
    if cancelled in {"input_required", "active"}:
        assert end.state is RunState.CANCELLED
    if end.state is RunState.COMPLETED:
        assert end.text == "aA"
    messages = [it async for it in client.list_messages(handle.session_id)]
    assert messages[-1].message_id == end.message_id
    assert messages[-1].text == end.text
    return f"{answered} {cancelled} {end.state}"
