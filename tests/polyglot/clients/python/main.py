"""The conformance client of ../README.md, on Runlane's Python client.

The Python client follows most rules of docs/clients.md by itself. Comments with a rule number
mark the rest.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from pathlib import Path

from runlane import (
    Answer,
    Client,
    CursorCompacted,
    EventBody,
    InputClosed,
    InputKind,
    InputRequest,
    InputRequested,
    RunComplete,
    RunEvent,
    RunHandle,
    RunlaneError,
    RunState,
    SessionChanged,
    SessionEvent,
    SessionRunEvent,
    SessionSnapshot,
    SessionStream,
    Started,
    Subscription,
    TextDelta,
)
from runlane.ids import new_id

FAILED, WRONG, REFUSED, UNANSWERED, INTERRUPTED = 1, 2, 3, 4, 130


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def reason(complete: RunComplete) -> str:
    return complete.finish_reason.name if complete.finish_reason else "UNSPECIFIED"


def reconnecting(error: RunlaneError) -> None:
    log(f"reconnecting {error.reason or error.status.name}")


def report(error: RunlaneError) -> int:
    """Prints an error (C5); returns the exit code."""
    log(f"{error.reason or error.status.name}: {error.message}")
    for violation in error.violations:
        log(f"  {violation.field}: {violation.description}")
    return UNANSWERED if error.status.name in ("UNAVAILABLE", "DEADLINE_EXCEEDED") else REFUSED


async def run(client: Client, args: argparse.Namespace) -> int:
    # C1: the Python client creates an id too. This one is known before the answer arrives, so that
    # Ctrl-C can cancel the run at any time.
    run_id = args.run_id or new_id()
    accepting = asyncio.create_task(accept(client, args, run_id))
    try:
        # Shielded: an accept that arrived after its own cancel would leave the run active.
        return await follow(client, await asyncio.shield(accepting), args.answer)
    except asyncio.CancelledError:
        await asyncio.wait([accepting])
        try:
            await client.cancel(args.session, run_id=run_id, reason="interrupted")
        except RunlaneError as error:
            report(error)
        raise


async def accept(client: Client, args: argparse.Namespace, run_id: str) -> RunHandle:
    handle = await client.run_accepted(
        args.session,
        args.prompt,
        run_id=run_id,
        max_attempts=args.max_attempts,
        allow_missing=True,
    )
    log(f"accepted {handle.run_id}")
    return handle


async def follow(client: Client, handle: RunHandle, answer: str | None) -> int:
    complete = None
    try:
        async for event in handle.events(on_lost=reconnecting):
            complete = show(event.body)
            if isinstance(event.body, InputRequested):
                await ask(client, event.body.input_request, answer)
    except CursorCompacted:  # C12: its events are compacted, because its id was used long ago
        complete = (await client.get_run(handle.run_id)).run_complete
        if complete is not None:
            print(complete.text, end="")
    if complete is None:
        return FAILED
    print(flush=True)
    log(f"{complete.state} {reason(complete)}")
    return 0 if complete.state is RunState.COMPLETED else FAILED


def show(body: EventBody) -> RunComplete | None:
    """Prints an event of a run; returns its end."""
    match body:
        case TextDelta(text=text):
            print(text, end="", flush=True)
        case Started(attempt=attempt) if attempt > 1:  # C8
            log(f"attempt {attempt}")
        case RunComplete() as complete:
            return complete
    return None


async def ask(client: Client, asked: InputRequest, answer: str | None) -> None:
    """Shows a question, and answers it if there is an answer (C14)."""
    log(f"asked {asked.input_request_id} {asked.text}")
    if answer is None:
        return
    try:
        # The client creates the id of the answer, and repeats it with every attempt.
        receipt = await client.answer_input(asked, answer_to(asked.kind, answer))
    except InputClosed:
        log(f"closed {asked.input_request_id}")
    else:
        word = "answered" if receipt.accepted else "answered before"
        log(f"{word} {asked.input_request_id}")


def answer_to(kind: InputKind, text: str) -> Answer:
    match kind:
        case InputKind.APPROVAL:
            return text == "yes"
        case InputKind.FORM:
            form: dict[str, object] = json.loads(text)
            return form
        case _:
            return text


async def cancel(client: Client, args: argparse.Namespace) -> int:
    receipt = await client.cancel(args.session, run_id=args.run_id)
    for covered in receipt.cancelled:
        print(covered.run_id, covered.state_when_cancelled.name, flush=True)
    return 0


async def edit(client: Client, args: argparse.Namespace) -> int:
    """Replaces the prompt of a waiting run (C16): the client creates and repeats the update id."""
    before = await client.get_prompt(args.run)
    run = await client.update_run(args.run, prompt=args.prompt, revision=before.run.revision)
    print(before.text, flush=True)
    print(run.run_id, run.revision, flush=True)
    return 0


async def fork(client: Client, args: argparse.Namespace) -> int:
    """Copies a session (C17): without an id, the client creates and repeats one."""
    made = await client.fork_session(args.session, args.new)
    print(made.session_id, made.origin.turn if made.origin else "-", flush=True)
    return 0


async def watch(client: Client, args: argparse.Namespace) -> int:
    kept = args.cursor_file.read_text().strip() if args.cursor_file.exists() else ""
    cursor = kept or None
    while True:
        subscription = client.subscribe_run_complete(
            cursor=cursor, silence=args.silence, on_lost=reconnecting
        )
        try:
            return await ends(subscription, args)
        except CursorCompacted as error:  # C12
            cursor = error.oldest_cursor
            log(f"events before {cursor} are gone")


async def ends(subscription: Subscription, args: argparse.Namespace) -> int:
    """Prints completions until `--count` is reached."""
    async with subscription:
        log("watching")
        async for item in subscription.with_progress():
            if isinstance(item, RunComplete):
                print(item.run_id, item.state.name, reason(item), flush=True)
                args.count -= 1
            if subscription.cursor is not None:
                keep(args.cursor_file, subscription.cursor)  # C9: after the event, marks too
            if args.count == 0:
                break
    return 0


async def session(client: Client, args: argparse.Namespace) -> int:
    """Prints a session as it is, and what happens in it (C15)."""
    kept = args.cursor_file.read_text().strip() if args.cursor_file.exists() else ""
    while True:
        stream = client.subscribe_session(
            args.session,
            cursors={args.session: kept} if kept else {},
            silence=args.silence,
            on_lost=reconnecting,
        )
        try:
            return await happens(stream, args)
        except CursorCompacted:  # a snapshot shows what the lost events have led to
            log(f"events after {kept or stream.cursors[args.session]} are gone")
            kept = ""


async def happens(stream: SessionStream, args: argparse.Namespace) -> int:
    """Prints what happens in a session until `--count` is reached, or it is deleted."""
    watching = False
    async with stream:
        async for event in stream:
            if not watching:
                log("watching")
                watching = True
            deleted = show_session(event)
            ended = isinstance(event.body, SessionRunEvent) and isinstance(
                event.body.event.body, RunComplete
            )
            args.count -= ended
            keep(args.cursor_file, event.cursor)  # after the event
            if deleted or args.count == 0:
                break
    return 0


def show_session(event: SessionEvent) -> bool:
    """Prints what happened in a session; returns whether it was deleted."""
    match event.body:
        case SessionSnapshot(active_run=run, queue=queue, output=output):
            active = run.run_id if run else "-"
            print("snapshot", active, *(waiting.run_id for waiting in queue), flush=True)
            for each in output:
                show_event(active, each)
        case SessionRunEvent(run_id=run_id, event=each):
            show_event(run_id, each)
        case SessionChanged(session=None):
            print("deleted", flush=True)
            return True
    return False


def show_event(run_id: str, event: RunEvent) -> None:
    match event.body:
        case TextDelta(text=text):
            print(run_id, "text", text, flush=True)
        case RunComplete() as complete:
            print(run_id, complete.state.name, reason(complete), flush=True)


def keep(file: Path, cursor: str) -> None:
    """Replaces the file atomically, so that a crash leaves the old cursor or the new one."""
    if file != Path(os.devnull):
        new = file.with_name(f"{file.name}.new")
        new.write_text(cursor)
        new.replace(file)


def arguments() -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--target", default="127.0.0.1:50051", metavar="HOST:PORT")
    common.add_argument("--timeout", type=float, default=10.0, metavar="SECONDS")
    parser = argparse.ArgumentParser(
        description="Runs, edits, cancels and watches runs of Runlane."
    )
    commands = parser.add_subparsers(required=True)
    for command in (run, cancel, watch, session, edit, fork):
        words = commands.add_parser(command.__name__, parents=[common])
        words.set_defaults(command=command)
        if command is edit:
            words.add_argument("run")
            words.add_argument("prompt")
            continue
        if command is fork:
            words.add_argument("session")
            words.add_argument("new", nargs="?")
            continue
        if command is session:
            words.add_argument("session")
        if command in (watch, session):
            words.add_argument("--cursor-file", type=Path, default=Path(os.devnull))
            words.add_argument("--count", type=int, default=-1)
            words.add_argument("--silence", type=float, default=45.0, metavar="SECONDS")
            continue
        words.add_argument("session")
        words.add_argument("--run-id")
        if command is run:
            words.add_argument("prompt")
            words.add_argument("--max-attempts", type=int, default=1)
            words.add_argument("--answer", metavar="TEXT")
    return parser.parse_args()


async def main() -> int:
    args = arguments()
    token = os.environ.get("RUNLANE_TOKEN") or None
    try:
        client = Client(args.target, token=token, timeout=args.timeout)
    except ValueError as error:  # C13: the client refuses to send the token unencrypted
        log(str(error))
        return WRONG
    async with client:
        work = asyncio.ensure_future(args.command(client, args))
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, work.cancel)
        try:
            return int(await work)
        except RunlaneError as error:
            return report(error)
        except asyncio.CancelledError:
            return INTERRUPTED


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
