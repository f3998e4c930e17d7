"""Quickstart: runs a prompt in a session and prints the answer as it arrives. Ctrl-C cancels it."""

import asyncio
import os
import signal
import sys

from runlane import Client, RunComplete, RunHandle, RunlaneError, RunState, TextDelta


async def run(session_id: str, prompt: str) -> RunComplete:
    server = os.environ.get("RUNLANE_SERVER") or "127.0.0.1:50051"
    token = os.environ.get("RUNLANE_TOKEN") or None
    # Before the run is accepted: a Ctrl-C from here on finds a run to cancel.
    interrupted = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, interrupted.set)

    async with Client(server, token=token) as client:
        handle = await client.run_accepted(session_id, prompt, allow_missing=True)
        canceller = asyncio.create_task(cancel_when(interrupted, handle))
        # The stream goes on after Ctrl-C, so that it delivers the end of the cancelled run.
        async for event in handle.events():
            match event.body:
                case TextDelta(text=text):
                    print(text, end="", flush=True)
                case RunComplete() as complete:
                    canceller.cancel()
                    return complete
    raise AssertionError("the events of a run end with RunComplete")


async def cancel_when(interrupted: asyncio.Event, handle: RunHandle) -> None:
    await interrupted.wait()
    # A second Ctrl-C ends the program.
    asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)
    try:
        await handle.cancel()
    except RunlaneError as error:
        print(error, file=sys.stderr)


def main() -> int:
    if len(sys.argv) != 3:
        print("usage: main.py SESSION PROMPT", file=sys.stderr)
        return 1
    try:
        complete = asyncio.run(run(sys.argv[1], sys.argv[2]))
    except (RunlaneError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print()
    end = f"{complete.state}: {complete.error.message}" if complete.error else complete.state
    print(end, file=sys.stderr)
    return 0 if complete.state is RunState.COMPLETED else 1


if __name__ == "__main__":
    sys.exit(main())
