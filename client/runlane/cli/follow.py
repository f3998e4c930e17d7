"""`runlane follow`: prints what happens in a run or in a session, from now on."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from functools import partial

import click

from runlane.cli.base import DONE, Interrupts, execute, outcome_code, stop
from runlane.cli.command import Command
from runlane.cli.connection import Settings
from runlane.cli.late_prompts import brings, find_late
from runlane.cli.output import field, json_line, one_line
from runlane.cli.run_ids import find_run, find_session
from runlane.cli.run_view import RunView
from runlane.cli.terminal import echo
from runlane.client import Client
from runlane.errors import RunNotFound
from runlane.session_stream import (
    QueueChanged,
    SessionChanged,
    SessionEvent,
    SessionRunEvent,
    SessionSnapshot,
    SessionStream,
)
from runlane.types import Run, RunComplete, Session, Started


@click.command(cls=Command)
@click.option("--cursor", help="Resume a session after the cursor printed by an earlier follow.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per event.")
@click.argument("name", metavar="RUN|SESSION")
@click.pass_obj
def follow(settings: Settings, cursor: str | None, as_json: bool, name: str) -> None:
    """Print what happens in a run, until it ends, or in a session, until Ctrl-C.

    Of a session, the output of the active run comes first, then everything that happens in all its
    runs. The session need not exist yet; a line on stderr says so. Resumes after a lost connection
    or a server restart without missing an event. On exit, prints the cursor of the session on
    stderr.

    Exit codes for a run are those of `wait`. A name of both a run and a session is taken as a run.
    """
    execute(settings, partial(_follow, name, cursor, as_json))


async def _follow(name: str, cursor: str | None, as_json: bool, client: Client) -> int:
    if cursor is None:
        try:
            run_id = await find_run(client, name)
            await client.get_run(run_id)
        except RunNotFound:
            pass
        else:
            return await _follow_run(run_id, as_json, client)
    return await _follow_session(await find_session(client, name), cursor, as_json, client)


async def _follow_run(run_id: str, as_json: bool, client: Client) -> int:
    with RunView(as_json=as_json) as view:
        async with client.subscribe_run(run_id, on_lost=view.show_lost) as events:
            async for event in events:
                view.show(event)
                if isinstance(event.body, RunComplete):
                    return outcome_code(event.body)
    return DONE


async def _follow_session(
    session_id: str, cursor: str | None, as_json: bool, client: Client
) -> int:
    view = SessionView(session_id, as_json=as_json)
    stream = client.subscribe_session(
        session_id,
        cursors={} if cursor is None else {session_id: cursor},
        on_lost=view.runs.show_lost,
    )
    async with AsyncExitStack() as stack:
        # Registered first to run last, and also after an error: the cursor is needed to resume.
        stack.callback(_print_cursor, stream, session_id)
        interrupts = stack.enter_context(Interrupts())
        stack.push_async_callback(stream.aclose)
        reader = asyncio.create_task(_read(client, stream, view))
        stack.push_async_callback(stop, reader)
        interrupted = asyncio.create_task(_wait_for(interrupts.first))
        stack.push_async_callback(stop, interrupted)
        await asyncio.wait({reader, interrupted}, return_when=asyncio.FIRST_COMPLETED)
    return DONE


def _print_cursor(stream: SessionStream, session_id: str) -> None:
    if cursor := stream.cursors.get(session_id):
        echo(f"resume with --cursor {cursor}", err=True)


async def _wait_for(event: asyncio.Event) -> None:
    await event.wait()


async def _read(client: Client, stream: SessionStream, view: SessionView) -> None:
    async for event in stream:
        await find_late(client, view, event)
        view.show(event)


class SessionView:
    """Shows a session: the text of its runs on stdout, everything else on stderr."""

    def __init__(self, session_id: str, *, as_json: bool) -> None:
        self._session_id = session_id
        self._as_json = as_json
        self.runs = RunView(as_json=False)
        self._prompts: dict[str, str] = {}
        self._unannounced = ""
        """The run that has started while its prompt was not known."""
        self._waiting = 0
        self._title = ""

    def learn(self, *runs: Run) -> None:
        """Notes the prompts of runs."""
        for run in runs:
            self._prompts[run.run_id] = run.prompt_excerpt

    def lacking(self, event: SessionEvent) -> str:
        """The run whose prompt the event makes visible but is not known; empty if there is none."""
        is_lacking = self._unannounced and not brings(event, self._unannounced)
        return self._unannounced if is_lacking else ""

    def show(self, event: SessionEvent) -> None:
        """Shows an event."""
        if isinstance(event.body, SessionSnapshot) and event.body.session is None:
            name = field(self._session_id)
            self.runs.note(f"no run or session {name}; waiting for a session with this id")
        if self._as_json:
            echo(json_line(event))
            return
        match event.body:
            case SessionSnapshot() as snapshot:
                self._show_snapshot(snapshot)
            case SessionRunEvent(run_id, of_run):
                self._announce_late()
                if isinstance(of_run.body, Started):
                    self._on_start(run_id)
                self.runs.show(of_run)
            case QueueChanged(run_ids, runs):
                self.learn(*runs)
                self._show_waiting(len(run_ids))
            case SessionChanged(session, active_run):
                if active_run is not None:
                    self.learn(active_run)
                self._announce_late()
                self._show_session(session)

    def _show_session(self, session: Session | None) -> None:
        title = "" if session is None else session.title
        changed, self._title = title != self._title, title
        if session is None:
            self._prompts.clear()
            self.runs.note("the session was deleted")
        elif changed:
            self.runs.note(f"title: {field(title)}")

    def _show_snapshot(self, snapshot: SessionSnapshot) -> None:
        self._title = "" if snapshot.session is None else snapshot.session.title
        self.learn(*snapshot.queue)
        if snapshot.active_run is not None:
            self.learn(snapshot.active_run)
            self._announce(snapshot.active_run.run_id)
        for event in snapshot.output:
            self.runs.show(event)
        self._show_waiting(len(snapshot.queue))

    def _on_start(self, run_id: str) -> None:
        if run_id in self._prompts:
            self._announce(run_id)
        else:
            # The prompt of a run that starts at once follows with the change of the session.
            self._unannounced = run_id

    def _announce_late(self) -> None:
        run_id, self._unannounced = self._unannounced, ""
        if run_id:
            self._announce(run_id)

    def _announce(self, run_id: str) -> None:
        prompt = self._prompts.pop(run_id, "")
        self.runs.note(f"run {field(run_id)} {one_line(prompt)}".rstrip())

    def _show_waiting(self, waiting: int) -> None:
        if waiting != self._waiting:
            self._waiting = waiting
            self.runs.note(f"waiting runs: {waiting}")
