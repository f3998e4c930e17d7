"""The synchronous client: threads, interrupts, forks. The tests of `Client` cover the calls."""

from __future__ import annotations

import asyncio
import inspect
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest

import runlane
from runlane import RunComplete, RunState, TextDelta, sync
from runlane.sync import Client
from support.peer import HANG, Peer, accepted, ended, mark, says
from support.server import serving_blocking
from support.staging import SECONDS, script

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CREATED_BEFORE_FORK = (
    "child this runlane.sync client was created before a fork; create a new Client in this process"
)
CLASSES = ["Client", "Pager", "RunEvents", "RunHandle", "SessionStream", "Subscription"]
RENAMED = {
    "aclose": "close",
    "__aenter__": "__enter__",
    "__aexit__": "__exit__",
    "__aiter__": "__iter__",
    "__anext__": "__next__",
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with the scripted agent, in another process."""
    folder = tmp_path_factory.mktemp("server")
    # It is killed at the end: a shutdown would wait for the runs that never end.
    with serving_blocking(folder, "--store", "memory:", "--agent", "scripted") as server:
        yield server.address


@pytest.fixture
def client(target: str) -> Iterator[Client]:
    with Client(target) as made:
        yield made


def forever(gate: str) -> str:
    return script({"text": "begun"}, {"wait": gate})


# --- The same interface --------------------------------------------------------------------------


def offered(kind: type) -> dict[str, object]:
    """The public names of a class, and what makes it an iterator or a context manager."""
    special = RENAMED.keys() | RENAMED.values()
    names = (name for name in dir(kind) if not name.startswith("_") or name in special)
    return {RENAMED.get(name, name): inspect.getattr_static(kind, name) for name in names}


@pytest.mark.parametrize("name", CLASSES)
def test_both_clients_offer_the_same(name: str) -> None:
    theirs = offered(getattr(runlane, name))
    ours = offered(getattr(sync, name))
    assert theirs.keys() == ours.keys()
    for method, there in theirs.items():
        here = ours[method]
        assert not inspect.iscoroutinefunction(here), method
        assert not inspect.isasyncgenfunction(here), method
        if inspect.isfunction(there) and inspect.isfunction(here):
            parameters = inspect.signature(there).parameters
            assert list(inspect.signature(here).parameters.values()) == list(parameters.values())
            assert bool(here.__doc__) == bool(there.__doc__), method


def test_both_clients_are_made_alike() -> None:
    assert inspect.signature(Client) == inspect.signature(runlane.Client)


def test_every_asynchronous_class_has_its_like() -> None:
    public = ((name, getattr(runlane, name)) for name in runlane.__all__)
    asynchronous = {
        name
        for name, kind in public
        if inspect.isclass(kind) and any(map(inspect.iscoroutinefunction, vars(kind).values()))
    }
    assert asynchronous == set(CLASSES) == set(sync.__all__)


def test_nothing_asynchronous_is_said() -> None:
    for name in CLASSES:
        kind = getattr(sync, name)
        for each in (kind, *(value for value in vars(kind).values() if callable(value))):
            doc = inspect.getdoc(each) or ""
            assert not any(word in doc for word in ("await ", "async ", "aclose", "StopAsync"))


def test_it_is_fresh() -> None:
    command = [sys.executable, str(ROOT / "client" / "make_sync.py"), "--check"]
    subprocess.run(command, check=True, timeout=SECONDS)


def test_it_is_stale_after_a_change(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "client", tmp_path / "client")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    command = [sys.executable, str(tmp_path / "client" / "make_sync.py"), "--check"]
    subprocess.run(command, check=True, timeout=SECONDS)
    source = tmp_path / "client" / "runlane" / "client.py"
    old, new = "    async def get_run(", "    async def more(self) -> None:\n        pass\n\n"
    source.write_text(source.read_text().replace(old, new + old))
    stale = subprocess.run(command, check=False, timeout=SECONDS, capture_output=True, text=True)
    assert (stale.returncode, "is stale" in stale.stderr) == (1, True), stale.stderr


# --- What it does --------------------------------------------------------------------------------


def test_a_run_from_its_acceptance_to_its_end(client: Client) -> None:
    handle = client.run_accepted("run", script({"text": "a"}, {"text": "b"}), allow_missing=True)
    bodies = [event.body for event in handle.events()]
    assert "".join(body.text for body in bodies if isinstance(body, TextDelta)) == "ab"
    assert isinstance(bodies[-1], RunComplete)
    assert handle.completed(timedelta(seconds=SECONDS)) == bodies[-1]
    assert client.attach(handle.run_id).run.state is RunState.COMPLETED
    assert client.wait_run(handle.run_id).run_complete == bodies[-1]


def test_a_cancel(client: Client) -> None:
    handle = client.run_accepted("cancel", forever("cancel"), allow_missing=True)
    with pytest.raises(runlane.DeadlineExceeded):
        handle.completed(0.01)
    assert not client.wait_run(handle.run_id, timeout=0.01).state.terminal
    assert [run.run_id for run in handle.cancel("enough").cancelled] == [handle.run_id]
    assert handle.completed(SECONDS).state is RunState.CANCELLED


def test_a_subscription(client: Client) -> None:
    client.create_session("subscribed")
    with client.subscribe_run_complete(session_ids=["subscribed"]) as subscription:
        runs = [client.run_accepted("subscribed", f"{n}").run_id for n in range(3)]
        assert [next(subscription).run_id for _ in runs] == runs
    assert list(subscription) == []
    with pytest.raises(StopIteration):
        subscription.next_item()
    again = client.subscribe_run_complete(session_ids=["subscribed"], from_beginning=True)
    with closing(again):
        assert next(again).run_id == runs[0]
        marked = (item for item in again.with_progress() if isinstance(item, RunComplete))
        assert [next(marked).run_id for _ in runs[1:]] == runs[1:]


def test_listings_and_their_pages(client: Client) -> None:
    client.create_session("listed", title="a list")
    handles = [client.run_accepted("listed", f"{n}") for n in range(5)]
    for handle in handles:
        handle.completed(SECONDS)
    wanted = [handle.run_id for handle in reversed(handles)]
    pager = client.list_runs("listed", page_size=2)
    assert [run.run_id for run in pager] == wanted
    assert [len(page.items) for page in pager.pages()] == [2, 2, 1]
    first = pager.page()
    assert [run.run_id for run in pager.page(first.next_page_token).items] == wanted[2:4]
    assert len(list(client.list_messages("listed", page_size=3))) == 10
    assert client.get_session("listed").title == "a list"
    client.delete_session("listed")
    assert "listed" not in [session.session_id for session in client.list_sessions()]


def test_errors_are_those_of_the_other_client(client: Client) -> None:
    with pytest.raises(runlane.RunNotFound):
        client.get_run("none")
    with pytest.raises(runlane.SessionNotFound):
        client.run_accepted("none", "p")
    with pytest.raises(runlane.SessionNotFound):
        next(iter(client.list_messages("none")))
    with pytest.raises(runlane.RunNotFound):
        next(client.subscribe_run("none"))
    with pytest.raises(ValueError, match="cannot be combined with from_beginning"):
        client.subscribe_run_complete(cursor="c", from_beginning=True)
    client.close()
    client.close()
    with pytest.raises(runlane.ClientClosed):
        client.get_run("none")


def test_many_threads_use_one_client(client: Client) -> None:
    together = threading.Barrier(8)

    def use(n: int) -> list[str]:
        together.wait(SECONDS)
        handles = [client.run_accepted(f"t{n}", f"{n}.{i}", allow_missing=True) for i in range(10)]
        return [handle.completed(SECONDS).text for handle in handles]

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(use, range(8)))
    assert found == [[f"{n}.{i}" for i in range(10)] for n in range(8)]


def test_a_close_ends_what_other_threads_wait_for(client: Client) -> None:
    handle = client.run_accepted("closed", forever("closed"), allow_missing=True)
    events = handle.events()
    begun = threading.Event()

    def follow() -> None:
        for event in events:
            if isinstance(event.body, TextDelta):
                begun.set()

    with ThreadPoolExecutor(1) as threads:
        following = threads.submit(follow)
        assert begun.wait(SECONDS)
        client.close()
        with pytest.raises(runlane.ClientClosed):
            following.result(SECONDS)


async def test_it_is_refused_where_an_event_loop_runs(target: str) -> None:
    client = Client(target)
    with pytest.raises(RuntimeError, match=r"use runlane\.Client"):
        client.get_run("r")
    with pytest.raises(RuntimeError, match=r"use runlane\.Client"):
        next(client.subscribe_run_complete())
    await asyncio.to_thread(client.close)


# --- What stays open -----------------------------------------------------------------------------


async def gone(peer: Peer) -> None:
    async with asyncio.timeout(SECONDS):
        await peer.left.wait()


async def test_a_subscription_that_is_closed_leaves_no_call(peer: Peer) -> None:
    peer.scripts["SubscribeRunComplete"] = [(mark("1"), ended("2", "r"), HANG)]

    def use() -> str:
        with Client(peer.target) as client, client.subscribe_run_complete() as subscription:
            return next(subscription).run_id

    assert await asyncio.to_thread(use) == "r"
    await gone(peer)


async def test_a_loop_that_is_left_leaves_no_call(peer: Peer) -> None:
    peer.scripts["RunAccepted"] = [(accepted(),)]
    peer.scripts["SubscribeRun"] = [(says(1, "a"), HANG)]
    client = Client(peer.target)

    def use() -> int:
        for event in client.run_accepted("s", "p").events():
            return event.index
        return 0

    assert await asyncio.to_thread(use) == 1
    await gone(peer)
    await asyncio.to_thread(client.close)


async def test_marks_outlive_the_name_of_their_subscription(peer: Peer) -> None:
    peer.scripts["SubscribeRunComplete"] = [(mark("1"), ended("2", "r"), HANG)]

    def use() -> list[str]:
        with Client(peer.target) as client:
            items = client.subscribe_run_complete().with_progress()
            return [type(next(items)).__name__ for _ in range(2)]

    assert await asyncio.to_thread(use) == ["Progress", "RunComplete"]


# --- Processes -----------------------------------------------------------------------------------


def program(name: str, target: str) -> list[str]:
    """Returns the lines of a program on stdout; stderr must be empty."""
    script = str(HERE / "sync_programs.py")
    # Later Pythons warn of a fork beside threads, which is what is tried here.
    command = [sys.executable, "-W", "ignore::DeprecationWarning", script, name, target]
    # gRPC logs forks at a lower level.
    env = {**os.environ, "GRPC_VERBOSITY": "ERROR"}
    done = subprocess.run(command, check=False, timeout=60, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


async def test_an_interrupt_ends_a_wait_and_not_the_run(peer: Peer) -> None:
    peer.scripts["RunAccepted"] = [(accepted(),)]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(HERE / "sync_programs.py"), "interrupted", peer.target),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    async with asyncio.timeout(SECONDS):
        await peer.came["WaitRun"].wait()
        process.send_signal(signal.SIGINT)
        assert await process.stdout.readline() == b"interrupted\n"
        # The call is gone while the process still lives.
        await peer.left.wait()
        assert not process.stdout.at_eof()
        await process.communicate(b"\n")
    assert process.returncode == 0
    assert peer.requests.keys() == {"RunAccepted", "WaitRun"}


async def test_an_interrupt_that_the_wait_does_not_feel_ends_it_all_the_same(peer: Peer) -> None:
    peer.scripts["RunAccepted"] = [(accepted(),)]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(HERE / "sync_programs.py"), "interrupted_elsewhere", peer.target),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    async with asyncio.timeout(SECONDS):
        await peer.came["WaitRun"].wait()
        out, _ = await process.communicate(b"\n")
    assert (process.returncode, out) == (0, b"interrupted\n")


def test_a_new_client_works_after_a_fork(target: str) -> None:
    assert program("forked_unused", target) == [
        CREATED_BEFORE_FORK,
        "child c",
        "parent p",
    ]


def test_a_fork_after_the_first_use_is_refused_in_the_child(target: str) -> None:
    before, new, grandchild, parent = program("forked_used", target)
    assert before == CREATED_BEFORE_FORK
    assert new == grandchild
    assert "create clients after the fork" in new
    assert parent == "parent after"


def test_a_process_ends_though_nothing_was_closed(target: str) -> None:
    assert program("left_open", target) == ["left"]
