"""The command: reads prompts and keys while the session streams."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from functools import partial
from typing import Any

import click

from runlane.cli.answer import can_ask, outcome_text, read_answer
from runlane.cli.base import DONE, InvalidUsage, describe, execute, stop
from runlane.cli.chat.transcript import read_past
from runlane.cli.command import Command
from runlane.cli.connection import Settings
from runlane.cli.late_prompts import find_late
from runlane.cli.output import field
from runlane.cli.terminal import echo, unsafe_text
from runlane.client import Client
from runlane.errors import (
    CursorCompacted,
    DeadlineExceeded,
    Draining,
    RunlaneError,
    StoreUnavailable,
    Unavailable,
)
from runlane.ids import new_id
from runlane.inputs import Answer, InputKind, InputRequest
from runlane.session_stream import SessionSnapshot
from runlane.types import RunPrompt, WhenBusy

TRANSIENT = (Unavailable, DeadlineExceeded, Draining, StoreUnavailable)
"""Errors that a restarting server causes."""

RETRY_SECONDS = 1.0


@click.command(cls=Command)
@click.option(
    "--when-busy",
    type=click.Choice([str(WhenBusy.QUEUE), str(WhenBusy.FOLD), str(WhenBusy.INTERRUPT)]),
    default=str(WhenBusy.QUEUE),
    show_default=True,
    help="The effect of a prompt while a run is active: queue, join its turn, or interrupt it.",
)
@click.option("--agent", default="", metavar="NAME", help="Agent that executes your prompts.")
@click.option(
    "--turns",
    type=click.IntRange(0, 1000),
    default=10,
    show_default=True,
    metavar="N",
    help="Number of earlier turns to show first.",
)
@click.option("--json", "as_json", is_flag=True, hidden=True)
@click.argument("session")
@click.pass_obj
def chat(
    settings: Settings, /, when_busy: str, agent: str, *, turns: int, as_json: bool, session: str
) -> None:
    """Talk to the agent of SESSION, which is created if it does not exist.

    The latest turns of the session are shown first; `runlane messages SESSION` prints all of them.
    Prompts can be typed while an answer streams; they wait in the queue. Questions of the agent are
    shown whole: y or yes approves, n or no denies; any other line is a prompt. Other answers are
    typed. Runs of others in the session are shown too. If the connection is lost, the chat
    continues when the server is back.

    \b
    Keys:
      Enter           send the prompt, or the answer to a question
      Alt-Enter       new line
      Up              edit the prompt that was queued last, if the input is empty
      Esc             cancel the active run
      Ctrl-C          empty the input; on an empty one, leave
      Ctrl-D          leave; the runs continue
    """
    if as_json:
        raise click.UsageError("--json: a chat is for people; use `runlane follow SESSION --json`")
    if not can_ask():
        raise click.UsageError("a chat needs a terminal; use `runlane run -s SESSION` in a pipe")
    execute(settings, partial(_chat, session, WhenBusy(when_busy), agent, turns))


async def _chat(
    session_id: str, when_busy: WhenBusy, agent: str, turns: int, client: Client
) -> int:
    talk = Chat(client, session_id, when_busy, agent, turns)
    return await talk.run()


class Chat:
    """A conversation: one task reads the session, one the keyboard, and one each prompt sends."""

    def __init__(
        self, client: Client, session_id: str, when_busy: WhenBusy, agent: str, turns: int
    ) -> None:
        # Not at the top of the module: the library takes as long to import as all else together.
        from runlane.cli.chat.screen import Screen  # noqa: PLC0415

        self._client = client
        self._session_id = session_id
        self._when_busy = when_busy
        self._agent = agent
        self._turns = turns
        self._tasks: set[asyncio.Task[None]] = set()
        self._screen = Screen(self._on_escape, self._on_up)
        self._view = self._screen.view

    async def run(self) -> int:
        """Talks until the person leaves. Raises the error that ended the stream."""
        reader = asyncio.create_task(self._read())
        keyboard = asyncio.create_task(self._type())
        try:
            await asyncio.wait({reader, keyboard}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (keyboard, reader, *self._tasks):
                await stop(task)
        for prompt in self._view.sending.values():
            echo(f"not sent: {field(prompt)}", err=True)
        if run_id := field(self._view.active_run_id):
            echo(f"run {run_id} continues: runlane follow {field(self._session_id)}", err=True)
        return DONE

    # --- The session ------------------------------------------------------------------------------

    async def _read(self) -> None:
        """Shows the session, across lost connections and restarts."""
        cursors: dict[str, str] = {}
        is_connected = False
        while True:
            stream = self._client.subscribe_session(
                self._session_id, cursors=cursors, on_lost=self._on_lost
            )
            try:
                async with stream:
                    async for event in stream:
                        if not is_connected and isinstance(event.body, SessionSnapshot):
                            await self._show_past(event.body)
                        is_connected = True
                        await find_late(self._client, self._view, event)
                        self._view.show(event)
                        self._screen.redraw()
            except TRANSIENT as error:
                if not is_connected:
                    raise
                self._on_lost(error)
                cursors = dict(stream.cursors)
                await asyncio.sleep(RETRY_SECONDS)
            except CursorCompacted:
                self._view.note("some events were missed; this is the session as it is now")
                cursors = {}

    async def _show_past(self, snapshot: SessionSnapshot) -> None:
        """Shows the turns that ended before the snapshot."""
        if snapshot.session is None or not self._turns:
            return
        active = () if snapshot.active_run is None else (snapshot.active_run,)
        unfinished = {run.run_id for run in (*active, *snapshot.folded, *snapshot.queue)}
        try:
            past = await read_past(self._client, self._session_id, self._turns, unfinished)
        except RunlaneError as error:
            self._view.note(f"the earlier turns cannot be read: {describe(error)}")
        else:
            self._view.show_past(past, self._session_id)

    def _on_lost(self, error: RunlaneError) -> None:
        self._view.show_lost(error)
        self._screen.redraw()

    # --- The keyboard -----------------------------------------------------------------------------

    async def _type(self) -> None:
        while (text := await self._screen.read()) is not None:
            if not text.strip():
                continue
            editing, self._view.editing = self._view.editing, None
            question = self._view.addressee
            if editing is not None:
                self._start(self._save(editing, text))
            elif question is None:
                self._start(self._send(text))
            elif question.kind is InputKind.APPROVAL:
                self._decide(question, text)
            else:
                self._answer_with(question, text)

    def _decide(self, question: InputRequest, text: str) -> None:
        """Only a whole line is a verdict: a prompt may begin with y."""
        verdict = read_answer(question, text.strip().lower())
        if verdict is None:
            self._start(self._send(text))
        elif self._view.is_considered:
            self._start(self._answer(question, verdict), "not answered")
        else:
            self._view.note("the question has only just come: read it, then answer again")

    def _answer_with(self, question: InputRequest, text: str) -> None:
        try:
            given = read_answer(question, text.strip())
        except InvalidUsage as error:
            self._view.note(error.message.replace("--form: ", ""))
            return
        if given is None:
            self._view.note("that is not one of the choices")
        else:
            self._start(self._answer(question, given), "not answered")

    def _on_escape(self) -> None:
        run_id = self._view.active_run_id
        if run_id:
            self._start(self._cancel(run_id), "not cancelled")
        else:
            self._view.note("no run is active")

    def _on_up(self) -> None:
        self._start(self._take_back(self._view.last_waiting), "the queued prompt cannot be read")

    # --- Calls ------------------------------------------------------------------------------------

    async def _send(self, prompt: str) -> None:
        """Submits a prompt, again and again while the server is away: always as the same run."""
        run_id = new_id()
        self._view.sending[run_id] = prompt
        self._screen.redraw()
        has_told = False
        while True:
            try:
                await self._client.run_accepted(
                    self._session_id,
                    prompt,
                    run_id=run_id,
                    when_busy=self._when_busy,
                    agent=self._agent,
                    allow_missing=True,
                )
            except TRANSIENT as error:
                # The stream says whether it is lost: it continues while the server drains.
                if not has_told and not self._view.is_lost:
                    self._view.note(f"not sent yet: {describe(error)}")
                has_told = True
                await asyncio.sleep(RETRY_SECONDS)
                continue
            except RunlaneError as error:
                del self._view.sending[run_id]
                self._view.note(f"not sent: {describe(error)}")
            self._view.accepted(run_id)
            return

    async def _take_back(self, run_id: str) -> None:
        """Puts a prompt that waits into the input, whole; it waits on until that is sent."""
        prompt = await self._client.get_prompt(run_id)
        if unsafe_text(prompt.text.replace("\n", "")):
            name = field(run_id)
            self._view.note(f"the prompt has hidden characters; use runlane queue edit {name}")
        elif self._screen.fill(prompt.text):
            self._view.editing = prompt

    async def _save(self, before: RunPrompt, text: str) -> None:
        """Replaces a prompt that waits. A text that is refused goes back into the input."""
        run = before.run
        try:
            await self._client.update_run(run.run_id, prompt=text, revision=run.revision)
        except RunlaneError as error:
            self._view.note(f"not changed: {describe(error)}")
            self._screen.fill(text)
        else:
            self._view.note("changed the queued prompt")

    async def _cancel(self, run_id: str) -> None:
        receipt = await self._client.cancel(
            self._session_id, run_id=run_id, reason="cancelled in a chat"
        )
        for run in receipt.cancelled:
            was = str(run.state_when_cancelled).replace("_", " ")
            fence = receipt.fence_accept_seq
            self._view.note(f"cancelled run {field(run.run_id)}, which was {was}; fence {fence}")
        if not receipt.cancelled:
            self._view.note("nothing to cancel: the run has ended")

    async def _answer(self, question: InputRequest, given: Answer) -> None:
        receipt = await self._client.answer_input(question, given)
        self._view.note(outcome_text(receipt))

    def _start(self, call: Coroutine[Any, Any, None], failed: str = "failed") -> None:
        """Starts a call; `failed` is what a person reads if it fails."""
        task = asyncio.create_task(self._report(call, failed))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _report(self, call: Coroutine[Any, Any, None], failed: str) -> None:
        try:
            await call
        except RunlaneError as error:
            self._view.note(f"{failed}: {describe(error)}")
        self._screen.redraw()
