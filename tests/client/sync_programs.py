"""Small programs of one process each: what a synchronous client does there that a test cannot.

`python sync_programs.py PROGRAM TARGET`
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from runlane import DeadlineExceeded
from runlane.sync import Client


def interrupted(target: str) -> None:
    """Handles Ctrl-C during a wait for a run; exits on request."""
    client = Client(target)
    handle = client.run_accepted("s", "p")
    try:
        handle.completed()
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    sys.stdin.readline()
    client.close()


def interrupted_elsewhere(target: str) -> None:
    """The same, with the signal in another thread, as it may be delivered in any."""

    def signal_here() -> None:
        sys.stdin.readline()
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    threading.Thread(target=signal_here, daemon=True).start()
    with Client(target) as client:
        handle = client.run_accepted("s", "p")
        try:
            handle.completed()
        except KeyboardInterrupt:
            print("interrupted", flush=True)


def forked_unused(target: str) -> None:
    """A fork of a process that has made a client, and not used it."""
    early = Client(target)
    if os.fork() == 0:
        _tell(early)
        with Client(target) as client:
            print("child", client.create_session("c").session_id, flush=True)
        os._exit(0)
    os.wait()
    print("parent", early.create_session("p").session_id)
    early.close()


def forked_used(target: str) -> None:
    """A fork of a process that has used a client."""
    early = Client(target)
    early.create_session("before")
    if os.fork() == 0:
        _tell(early)
        _tell(Client(target))
        if os.fork() == 0:
            _tell(Client(target))
            os._exit(0)
        os.wait()
        os._exit(0)
    os.wait()
    print("parent", early.create_session("after").session_id)
    early.close()


def left_open(target: str) -> None:
    """The end of a process while a thread waits, and nothing was closed."""
    client = Client(target)
    handle = client.run_accepted("left", '[{"wait": "never"}]', allow_missing=True)
    begun = threading.Event()

    def follow() -> None:
        for _ in handle.events():
            begun.set()

    threading.Thread(target=follow, daemon=True).start()
    begun.wait()
    try:
        handle.completed(0.01)
    except DeadlineExceeded:
        print("left")


def _tell(client: Client) -> None:
    try:
        client.get_run("r")
    except RuntimeError as error:
        print("child", error, flush=True)


if __name__ == "__main__":
    programs = (interrupted, interrupted_elsewhere, forked_unused, forked_used, left_open)
    {each.__name__: each for each in programs}[sys.argv[1]](sys.argv[2])
