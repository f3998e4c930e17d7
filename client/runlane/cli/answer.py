"""`runlane answer`: lists the questions of agents, shows one, and answers it."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import click

from runlane.cli.base import DONE, FAILED, InvalidUsage, execute
from runlane.cli.command import Command
from runlane.cli.connection import Settings
from runlane.cli.output import Column, field, json_line, one_line, show, stderr_console, take
from runlane.cli.params import Switch
from runlane.cli.run_ids import check_session
from runlane.cli.terminal import echo, escaped, on_terminal
from runlane.client import Client
from runlane.inputs import (
    Answer,
    AnswerReceipt,
    Approval,
    InputAnswer,
    InputKind,
    InputRequest,
    InputState,
)


def summary(request: InputRequest) -> str:
    """The question in one line, with the tool that it is about."""
    about = f"{request.tool_name} {request.arguments_json} " if request.tool_name else ""
    return one_line(f"{about}{request.text}", 60)


_COLUMNS: tuple[Column[InputRequest], ...] = (
    Column("ASKED", lambda request: request.requested_at),
    Column("REQUEST", lambda request: request.input_request_id),
    Column("SESSION", lambda request: request.session_id),
    Column("RUN", lambda request: request.run_id),
    Column("STATE", lambda request: request.state),
    Column("KIND", lambda request: request.kind),
    Column("QUESTION", lambda request: request.text, summary),
)


@dataclass(frozen=True, slots=True)
class Options:
    """The options of `runlane answer`."""

    request_id: str | None
    session: str | None
    verdict: bool | None
    arguments: str
    reason: str
    text: str | None
    form: str | None
    include_closed: bool
    as_json: bool

    @property
    def has_answer(self) -> bool:
        """Whether there is an answer among them."""
        return self.verdict is not None or self.text is not None or self.form is not None


@click.command(cls=Command)
@click.option("-s", "--session", metavar="SESSION", help="List only requests of this session.")
@click.option("--closed", is_flag=True, help="List the answered, expired and withdrawn ones too.")
@click.option(
    "--yes/--no", "verdict", cls=Switch, default=None, help="Approve or deny a tool call."
)
@click.option(
    "--arguments", default="", metavar="JSON", help="Arguments to use instead, with --yes."
)
@click.option("--reason", default="", help="Reason for the agent, with --yes or --no.")
@click.option("--text", metavar="TEXT", help="Answer with a text, or with one of the choices.")
@click.option("--form", metavar="JSON", help="Answer with a JSON object.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per request.")
@click.argument("request_id", metavar="REQUEST", required=False)
@click.pass_obj
def answer(
    settings: Settings,
    *,
    session: str | None,
    closed: bool,
    verdict: bool | None,
    arguments: str,
    reason: str,
    text: str | None,
    form: str | None,
    as_json: bool,
    request_id: str | None,
) -> None:
    """List the questions of agents to people; show one, and answer it.

    Without REQUEST, lists the open questions, the latest first. With REQUEST, shows the question
    whole, and sends the answer if there is one; on a terminal, asks for it. REQUEST is an id, or
    the unique end or beginning of one.

    The first answer counts. The exit code is 1 if another one came first.

    \b
    Examples:
      runlane answer
      runlane answer 4f1c --yes
      runlane answer 4f1c --no --reason "not on a Friday"
      runlane answer 4f1c --form '{"environment": "test"}'
    """
    options = Options(request_id, session, verdict, arguments, reason, text, form, closed, as_json)
    if request_id is None and options.has_answer:
        raise click.UsageError("REQUEST is missing; `runlane answer` lists the open ones")
    _refuse_contradictions(options)
    execute(settings, partial(_answer, options))


def _refuse_contradictions(options: Options) -> None:
    """Raises UsageError for options of which only some could become the answer."""
    answers = (options.verdict, options.text, options.form)
    if sum(each is not None for each in answers) > 1:
        raise click.UsageError("give one of --yes, --no, --text and --form")
    if options.arguments and not options.verdict:
        raise click.UsageError("--arguments: needs --yes")
    if options.reason and options.verdict is None:
        raise click.UsageError("--reason: needs --yes or --no")


async def _answer(options: Options, client: Client) -> int:
    if options.request_id is None:
        return await _list(options, client)
    request = await _find(client, options.request_id)
    if not options.has_answer:
        print_request(request, as_json=options.as_json)
        if options.as_json or request.state is not InputState.OPEN or not can_ask():
            return DONE
        given = await ask_on_terminal(request)
        if given is None:
            return DONE
    else:
        given = _given(options, request)
    receipt = await client.answer_input(request, given)
    if options.as_json:
        echo(json_line(receipt))
    else:
        echo(outcome_text(receipt), err=True)
    return DONE if receipt.accepted else FAILED


async def _list(options: Options, client: Client) -> int:
    states = () if options.include_closed else (InputState.OPEN,)
    pager = client.list_input_requests(session_id=options.session, states=states)
    note = "no input requests" if options.include_closed else "no open input requests"
    shown = await show(take(aiter(pager), 0), _COLUMNS, as_json=options.as_json, empty_note=note)
    if not shown and options.session:
        await check_session(client, options.session)
    return DONE


async def _find(client: Client, text: str) -> InputRequest:
    """Finds a request by its id, or by the unique end or beginning of one."""
    matching: list[InputRequest] = []
    async for request in take(aiter(client.list_input_requests(page_size=1000)), 1000):
        if request.input_request_id == text:
            return request
        if request.input_request_id.startswith(text) or request.input_request_id.endswith(text):
            matching.append(request)
    if len(matching) == 1:
        return matching[0]
    problem = f"{len(matching)} input requests match" if matching else "no input request matches"
    raise InvalidUsage(f"REQUEST: {problem} {escaped(text)!r}; `runlane answer` lists them")


def _given(options: Options, request: InputRequest) -> Answer:
    kind = request.kind
    if kind is InputKind.APPROVAL and options.verdict is not None:
        return Approval(options.verdict, options.arguments, options.reason)
    if kind in {InputKind.TEXT, InputKind.CHOICE} and options.text is not None:
        return options.text
    if kind is InputKind.FORM and options.form is not None:
        return _object(options.form)
    needed = {InputKind.APPROVAL: "--yes or --no", InputKind.FORM: "--form"}.get(kind, "--text")
    raise InvalidUsage(f"REQUEST: the question is of kind {kind}; answer it with {needed}")


def _object(text: str) -> dict[str, object]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InvalidUsage(f"--form: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidUsage("--form: not a JSON object")
    return value


# --- For people ----------------------------------------------------------------------------------


def print_request(request: InputRequest, *, as_json: bool = False, err: bool = False) -> None:
    """Prints a request whole, one line per field; escapes what a terminal would execute or hide."""
    if as_json:
        echo(json_line(request))
        return
    for name, value in _fields(request):
        if value not in {None, ""}:
            echo(f"{name}\t{field(value)}", err=err)


def _fields(request: InputRequest) -> Iterator[tuple[str, object]]:
    yield from (("request", request.input_request_id), ("run", request.run_id))
    yield from (("session", request.session_id), ("state", request.state))
    yield from (("asked", request.requested_at), ("expires", request.expires_at))
    yield from (("kind", request.kind), ("question", request.text))
    yield from (("tool", request.tool_name), ("arguments", request.arguments_json))
    yield from ((f"choice {n}", choice) for n, choice in enumerate(request.choices, start=1))
    yield "schema", request.schema_json
    if request.answer is not None:
        yield from _fields_of_answer(request.answer)


def _fields_of_answer(given: InputAnswer) -> Iterator[tuple[str, object]]:
    if isinstance(given.value, Approval):
        yield "answer", "approved" if given.value.approved else "denied"
        yield "with arguments", given.value.arguments_json
        yield "reason", given.value.reason
    else:
        yield "answer", given.value
    yield "answered by", given.answered_by
    yield from (("authenticated by", given.authenticated_by), ("from", given.peer))
    yield "answered", given.answered_at


def outcome_text(receipt: AnswerReceipt) -> str:
    """The line to print for an answer that was sent."""
    if receipt.accepted:
        return "answered"
    given = receipt.input_request.answer
    by = given.answered_by if given is not None else ""
    return f"another answer came first{f', by {field(by)}' if by else ''}"


def can_ask() -> bool:
    """Whether a person is at the terminal."""
    streams = (sys.stdout, sys.stderr)
    return sys.stdin is not None and sys.stdin.isatty() and all(map(on_terminal, streams))


async def ask_on_terminal(request: InputRequest) -> Answer | None:
    """Asks for the answer at the terminal; None for an empty line or the end of the input."""
    prompts = {InputKind.APPROVAL: "approve? [y/n] ", InputKind.FORM: "JSON object: "}
    while line := await _read_line(prompts.get(request.kind, "answer: ")):
        given = read_answer(request, line)
        if given is not None:
            return given
    stderr_console().print("not answered", style="dim")
    return None


def read_answer(request: InputRequest, line: str) -> Answer | None:
    """The answer in a line; None if it is not one."""
    match request.kind:
        case InputKind.APPROVAL:
            return line.startswith("y") if line in {"y", "yes", "n", "no"} else None
        case InputKind.CHOICE if line.isdigit() and 0 < int(line) <= len(request.choices):
            return request.choices[int(line) - 1]
        case InputKind.CHOICE:
            return line if line in request.choices else None
        case InputKind.FORM:
            return _object(line)
        case _:
            return line


async def _read_line(prompt: str) -> str:
    """Reads a line from the terminal in a daemon thread, which does not keep the command alive."""
    loop = asyncio.get_running_loop()
    line: asyncio.Future[str] = loop.create_future()

    def settle(text: str) -> None:
        if not line.done():
            line.set_result(text.strip())

    def read() -> None:
        text = sys.stdin.readline()
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, text)

    echo(prompt, err=True, nl=False)
    threading.Thread(target=read, daemon=True).start()
    return await line
