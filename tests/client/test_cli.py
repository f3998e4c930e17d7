"""The command: what it takes, what it prints, and the code it leaves with."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner
from grpc import StatusCode

import runlane
from runlane import RunComplete, convert, types
from runlane.cli.app import runlane as command
from runlane.cli.base import describe, failure, outcome_code
from runlane.cli.output import (
    Column,
    duration_text,
    field,
    json_line,
    one_line,
    tsv,
)
from runlane.cli.params import parse_duration, read_attachment
from runlane.cli.run_ids import short_ids
from runlane.cli.run_view import end_text
from runlane.cli.sessions import MESSAGE_COLUMNS
from runlane.cli.terminal import for_terminal
from runlane.cli.watch import columns, line
from runlane.v1 import (
    agent_service_pb2,
    run_pb2,
    run_service_pb2,
    session_pb2,
    session_service_pb2,
)
from runlane.v1.session_service_pb2 import SubscribeSessionResponse as Streamed
from support.command import START, finish, start
from support.peer import (
    HANG,
    LOST,
    Peer,
    Refuse,
    accepted,
    complete,
    ended,
    event,
    mark,
    run,
    says,
)

COMPLETED = run_pb2.RUN_STATE_COMPLETED
CANCELLED = run_pb2.RUN_STATE_CANCELLED
FAILED = run_pb2.RUN_STATE_FAILED


def end_of(state: run_pb2.RunState.ValueType, text: str = "done") -> RunComplete:
    """The end of a run."""
    return convert.run_complete(complete("r", state, text=text))


# --- The parts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("30s", 30), ("1.5m", 90), ("1h30m", 5400), ("250ms", 0.25), ("2d", 172_800)],
)
def test_spans_of_time(text: str, seconds: float) -> None:
    assert parse_duration(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["", "s", "1x", "-1s", "1s ago", "30 s", "1h-5m", "nan", "inf"])
def test_what_is_no_span_of_time(text: str) -> None:
    with pytest.raises((ValueError, OverflowError)):
        parse_duration(text)


def test_exit_codes() -> None:
    assert [outcome_code(end_of(state)) for state in (COMPLETED, FAILED, CANCELLED)] == [0, 1, 130]
    assert failure(runlane.EmptyPrompt("empty")).exit_code == 2
    assert failure(runlane.SessionNotFound("none")).exit_code == 1
    assert failure(runlane.Unavailable("down")).exit_code == 1


def test_an_error_is_one_line_that_names_each_field_once() -> None:
    violations = (
        violation("timeout", "is above 7 days"),
        violation("prompt", "is\nodd"),
    )
    error = runlane.InvalidArgument("timeout: is above 7 days", violations=violations)
    assert describe(error) == "timeout: is above 7 days (prompt: is odd)"


def violation(field: str, description: str) -> runlane.Violation:
    """A violation."""
    return runlane.Violation(field, description)


def test_how_a_run_ended_in_words() -> None:
    assert end_text(end_of(COMPLETED)) is None
    for reason in (types.FinishReason.LENGTH, types.FinishReason.CONTENT_FILTER):
        text = end_text(replace(end_of(COMPLETED), finish_reason=reason)) or ""
        assert text.startswith("the answer is incomplete: ")
        assert str(reason) in text
    assert end_text(end_of(CANCELLED)) == "cancelled"
    assert end_text(end_of(FAILED)) == "failed: AGENT_ERROR: it broke"


def test_nothing_in_a_field_breaks_its_line() -> None:
    assert tsv(["a\tb\nc\\", None, 3, "\x1b[2J"]) == "a\\tb\\nc\\\\\t\t3\t\\x1b[2J"
    assert tsv(columns(end_of(COMPLETED, "a\nb"))).split("\t") == [
        "1970-01-01T00:00:02+00:00",
        "s",
        "1",
        "r",
        "completed",
        "stop",
        "a\\nb",
    ]


def test_the_finish_reason_is_spelled_like_the_state() -> None:
    assert field(types.FinishReason.CANCELED) == field(types.RunState.CANCELLED) == "cancelled"
    ended = replace(end_of(CANCELLED), finish_reason=types.FinishReason.CANCELED)
    assert tsv(columns(ended)).split("\t")[4:6] == ["cancelled", "cancelled"]
    # The values in JSON are part of the interface.
    assert json.loads(json_line(ended))["finish_reason"] == "canceled"


def test_nothing_said_steers_the_terminal() -> None:
    assert for_terminal("a\x1b[2Jb\r\n\tc\x9b") == "a[2Jb\n\tc"
    assert one_line("  a\n b\x1b  " + "x" * 100, 10) == "a b xxxxx…"
    assert line(end_of(COMPLETED, "[bold]\x1b[31mred")).plain.endswith("[bold][31mred")


def test_json_is_what_was_there() -> None:
    attached = types.Attachment("a", b"\0\1", "x/y")
    encoded = {"name": "a", "content": "AAE=", "mime_type": "x/y", "encoding": "base64"}
    assert json.loads(json_line(attached)) == encoded
    time = datetime(2026, 1, 2, tzinfo=UTC)
    said = types.RunEvent(3, time, types.TextDelta("hé"))
    assert json_line(said) == (
        '{"index":3,"time":"2026-01-02T00:00:00+00:00","type":"text_delta","text":"hé"}'
    )
    assert json.loads(json_line(types.RunEvent(4, time, end_of(FAILED))))["error"] == {
        "reason": "AGENT_ERROR",
        "message": "it broke",
    }
    shown = json.loads(json_line(convert.run(run("r", COMPLETED))))
    assert shown["run_complete"]["state"] == "completed"


def said_by(*parts: types.Part) -> types.Message:
    """A message of those parts."""
    message = convert.message(session_pb2.Message(message_id="m", role=session_pb2.ROLE_ASSISTANT))
    return replace(message, parts=parts)


def test_a_part_of_a_message_says_what_it_is() -> None:
    message = said_by(
        types.Reasoning("hm"),
        types.Text("yes"),
        types.ToolCall("c", "find", "{}"),
        types.ToolResult("c", "find", "1", is_error=False),
        types.Attachment("a", b"\0\1", "x/y"),
        types.Attachment("b", "AAE=", "text/plain"),
    )
    shown = json.loads(json_line(message))["parts"]
    kinds = ["reasoning", "text", "tool_call", "tool_result", "attachment", "attachment"]
    assert [part["type"] for part in shown] == kinds
    assert [part["text"] for part in shown[:2]] == ["hm", "yes"]
    assert [part.get("encoding") for part in shown[4:]] == ["base64", None]


def test_reasoning_is_not_in_the_text_of_a_line() -> None:
    message = said_by(types.Reasoning("hm"), types.Text("yes"), types.Text("no"))
    assert MESSAGE_COLUMNS[-1].value(message) == "yes\nno"


def test_a_listing_shows_the_shortest_unique_ids() -> None:
    one, two = "01a22a95-253e-7452-be19-46a88f263879", "01a22a95-253e-7453-be19-000000000000"
    assert short_ids([one]) == {one: "01a22a95-253e"}
    assert short_ids([one, two, "r", "01a22a95-2"]) == {
        one: "01a22a95-253e-7452",
        two: "01a22a95-253e-7453",
        "r": "r",
        "01a22a95-2": "01a22a95-2",
    }
    assert short_ids([]) == {}


def test_times_and_cells_for_people() -> None:
    begin = datetime(2026, 1, 1, tzinfo=UTC)
    spans = [timedelta(seconds=1.24), timedelta(seconds=75), timedelta(hours=2, minutes=5)]
    assert [duration_text(begin, begin + span) for span in spans] == ["1.2s", "1m15s", "2h05m"]
    assert duration_text(None, begin) == ""
    column: Column[str] = Column("T", lambda text: text)
    assert column.cell("a\nb").plain == "a\\nb"


def test_attachments_are_text_where_they_are(tmp_path: Path) -> None:
    contents = {"a.md": "hé".encode(), "b.bin": b"\xff\xfe", "c.png": b"png", "d": b"a\0b"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    kinds = {name: type(read_attachment(tmp_path / name).content) for name in contents}
    assert kinds == {"a.md": str, "b.bin": bytes, "c.png": bytes, "d": bytes}


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--timeout", "soon", "p"],
        ["run", "--timeout", "0", "p"],
        ["run", "--when-busy", "never", "p"],
        ["run", "--attach", "/no/such/file", "p"],
        ["cancel"],
        ["cancel", "s", "--all"],
        ["cancel", "--run", "r", "--scope", "active"],
        ["watch", "--cursor", "c", "--from-beginning"],
        ["runs", "--state", "asleep"],
        ["wait"],
        ["sessions", "delete"],
        ["top", "--metrics", "http://[::1"],
    ],
    ids=" ".join,
)
def test_bad_usage(arguments: list[str]) -> None:
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 2
    assert "Error:" in result.stderr
    assert not result.stdout


def test_an_empty_token_file_is_an_error_with_its_path(tmp_path: Path) -> None:
    empty = tmp_path / "token"
    empty.write_text(" \n")
    result = CliRunner().invoke(command, ["--token-file", str(empty), "runs"])
    assert result.exit_code == 2
    assert f"Error: --token-file: {empty} is empty\n" in result.stderr


def test_help_tells_of_every_command() -> None:
    result = CliRunner().invoke(command, ["--help"])
    assert result.exit_code == 0
    for name, each in command.commands.items():
        assert name in result.stdout
        assert "--help" in CliRunner().invoke(command, [name, "--help"]).stdout
        assert each.help
    assert "runlane" in CliRunner().invoke(command, ["--version"]).stdout


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_without_the_extra_there_is_one_line(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; {START[1]}"
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert told.returncode == 1
    assert told.stderr == f"runlane: {missing} is not installed; run: pip install 'runlane[cli]'\n"


# --- As a process, against a peer ----------------------------------------------------------------


async def test_run_streams_the_text_and_names_the_new_session(peer: Peer) -> None:
    peer.scripts["RunAccepted"] = [(accepted(),)]
    peer.scripts["SubscribeRun"] = [
        (says(1, "hel"), LOST),
        (says(2, "lo"), event(3, run_complete=complete("r"))),
    ]
    code, out, err = await finish(await start(peer, "run"), "what?")
    assert (code, out) == (0, "hello\n")
    assert err.splitlines()[0] == "session s"
    assert "reconnecting" in err
    request = peer.requests["RunAccepted"][0]
    assert request.prompt == "what?"
    assert request.session_id
    assert request.allow_missing


@pytest.mark.parametrize(
    ("state", "code", "told"),
    [(FAILED, 1, "failed: AGENT_ERROR: it broke\n"), (CANCELLED, 130, "cancelled\n")],
)
async def test_run_leaves_with_the_code_of_the_end(
    peer: Peer, state: run_pb2.RunState.ValueType, code: int, told: str
) -> None:
    peer.scripts["RunAccepted"] = [(accepted(),)]
    end = complete("r", state, text="so far")
    peer.scripts["SubscribeRun"] = [(event(1, run_complete=end),)]
    assert await finish(await start(peer, "run", "-s", "s", "p")) == (code, "so far\n", told)


async def test_run_names_artifacts_on_stderr_and_keeps_stdout_for_the_text(peer: Peer) -> None:
    peer.scripts["RunAccepted"] = [(accepted(),)]
    peer.scripts["SubscribeRun"] = [
        (
            says(1, "see "),
            event(2, artifact=run_pb2.Artifact(artifact_id="a", name="log", text="1")),
            event(
                3,
                artifact=run_pb2.Artifact(
                    artifact_id="a", name="log", mime_type="text/x", text="2", last=True
                ),
            ),
            event(
                4, artifact=run_pb2.Artifact(artifact_id="u\x1b[2J", uri="https://e.org", last=True)
            ),
            event(5, custom=run_pb2.RunEvent.Custom(type="t", json="1")),
            says(6, "it"),
            event(7, run_complete=complete("r")),
        )
    ]
    code, out, err = await finish(await start(peer, "run", "-s", "s", "p"))
    assert (code, out) == (0, "see it\n")
    assert err.splitlines() == ["artifact log (text/x)", "artifact u[2J https://e.org"]


async def test_run_as_json_has_artifacts_and_custom_events_whole(peer: Peer) -> None:
    peer.scripts["RunAccepted"] = [(accepted(),)]
    end = complete("r")
    end.result = '{"n":1}'
    peer.scripts["SubscribeRun"] = [
        (
            event(1, artifact=run_pb2.Artifact(artifact_id="a", data=b"\xff", last=True)),
            event(2, custom=run_pb2.RunEvent.Custom(type="t", json="[1]")),
            event(3, run_complete=end),
        )
    ]
    _, out, _ = await finish(await start(peer, "run", "-s", "s", "--json", "p"))
    artifact, custom, ended = map(json.loads, out.splitlines())
    assert (artifact["type"], artifact["kind"]) == ("artifact", "data")
    assert (artifact["content"], artifact["encoding"]) == ("/w==", "base64")
    assert (custom["type"], custom["custom_type"], custom["json"]) == ("custom", "t", "[1]")
    assert ended["result"] == '{"n":1}'


async def test_run_as_json_ends_with_the_end(peer: Peer) -> None:
    peer.scripts["RunAccepted"] = [(accepted(),)]
    peer.scripts["SubscribeRun"] = [(says(1, "a"), event(2, run_complete=complete("r")))]
    code, out, _ = await finish(await start(peer, "run", "-s", "s", "--json", "p"))
    said, end = map(json.loads, out.splitlines())
    assert (code, said["type"], end["type"], end["text"]) == (
        0,
        "text_delta",
        "run_complete",
        "done",
    )


async def test_run_detached_prints_the_id(peer: Peer) -> None:
    peer.scripts["RunAccepted"] = [(accepted("r9"),)]
    assert await finish(await start(peer, "run", "-s", "s", "--detach", "p")) == (0, "r9\n", "")


async def test_the_first_interrupt_cancels_and_waits_for_the_end(peer: Peer) -> None:
    peer.scripts["RunAccepted"] = [(accepted("r"),)]
    peer.scripts["SubscribeRun"] = [(says(1, "so far"), HANG)]
    process = await start(peer, "run", "-s", "s", "p")
    assert process.stdout is not None
    assert await process.stdout.readexactly(6) == b"so far"
    peer.scripts["Cancel"] = [(run_service_pb2.CancelResponse(fence_accept_seq=1),)]
    process.send_signal(signal.SIGINT)
    await peer.came["Cancel"].wait()
    peer.scripts["SubscribeRun"] = [(event(2, run_complete=complete("r", CANCELLED)),)]
    await peer.stop()
    await peer.start()
    code, _, err = await finish(process)
    assert code == 130
    assert "cancelled" in err
    assert peer.requests["Cancel"][0].run_id == "r"


async def test_the_second_interrupt_leaves_at_once(peer: Peer) -> None:
    peer.scripts["RunAccepted"] = [(accepted("r"),)]
    peer.scripts["SubscribeRun"] = [(says(1, "so far"), HANG)]
    process = await start(peer, "run", "-s", "s", "p")
    assert process.stdout is not None
    assert process.stderr is not None
    await process.stdout.readexactly(6)
    process.send_signal(signal.SIGINT)
    assert b"Ctrl-C again" in await process.stderr.readline()
    process.send_signal(signal.SIGINT)
    assert (await finish(process))[0] == 130


async def test_cancel_prints_the_receipt(peer: Peer) -> None:
    covered = run_pb2.CancelledRun(
        session_id="s", run_id="r", accept_seq=2, state_when_cancelled=run_pb2.RUN_STATE_QUEUED
    )
    receipt = run_service_pb2.CancelResponse(cancelled=[covered], fence_accept_seq=3)
    peer.scripts["Cancel"] = [(receipt,), (run_service_pb2.CancelResponse(),)]
    told = await finish(await start(peer, "cancel", "s", "--scope", "waiting"))
    assert told == (0, "s\t2\tr\tqueued\n", "fence 3 in session s\n")
    assert peer.requests["Cancel"][0].scope == run_service_pb2.CANCEL_SCOPE_WAITING
    assert await finish(await start(peer, "cancel", "s")) == (0, "", "nothing to cancel\n")


async def test_watch_goes_on_and_ends_with_its_cursor(peer: Peer) -> None:
    peer.scripts["SubscribeRunComplete"] = [
        (mark("c0"), ended("c1", "r1"), LOST),
        (mark("c1"), ended("c2", "r2"), HANG),
    ]
    process = await start(peer, "watch", "-s", "s")
    assert process.stdout is not None
    runs = [(await process.stdout.readline()).split(b"\t")[3] for _ in range(2)]
    assert runs == [b"r1", b"r2"]
    process.send_signal(signal.SIGINT)
    code, out, err = await finish(process)
    assert (code, out) == (0, "")
    assert err.splitlines()[-1] == "resume with --cursor c2"
    assert err.startswith("reconnecting: ")
    assert "connected again" in err


# --- The queue and the server ---------------------------------------------------------------------


async def test_queue_lists_what_has_not_ended_in_accept_order(peer: Peer) -> None:
    peer.scripts["ListRuns"] = [
        (run_service_pb2.ListRunsResponse(runs=[run("a"), run("b")], total_size=2),)
    ]
    code, out, err = await finish(await start(peer, "queue", "--total"))
    assert (code, err) == (0, "2 in all\n")
    assert [each.split("\t")[3] for each in out.splitlines()] == ["a", "b"]
    (sent,) = peer.requests["ListRuns"]
    assert sent.order == run_service_pb2.RUN_ORDER_EARLIEST_ACCEPTED
    assert not {COMPLETED, CANCELLED, FAILED} & set(sent.states)


@pytest.mark.parametrize("ready", [True, False])
async def test_status_exits_with_1_unless_an_agent_is_ready(peer: Peer, ready: bool) -> None:
    agent = agent_service_pb2.Agent(name="default", kind="echo", ready=ready, slots_limit=4)
    answer = agent_service_pb2.ListAgentsResponse(agents=[agent], server_version="1.2.3")
    peer.scripts["ListAgents"] = [(answer,)]
    peer.scripts["ListRuns"] = [
        (run_service_pb2.ListRunsResponse(total_size=count),) for count in (3, 5)
    ]
    code, out, _ = await finish(await start(peer, "status", "--json"))
    found = json.loads(out)
    assert code == (0 if ready else 1)
    assert (found["active_runs"], found["waiting_runs"]) == (3, 5)
    assert found["version"] == "1.2.3"
    (shown,) = found["agents"]
    assert (shown["name"], shown["kind"], shown["ready"]) == ("default", "echo", ready)
    assert (shown["slots_in_use"], shown["slots_limit"]) == (0, 4)


async def test_update_of_a_session_sends_what_is_given(peer: Peer) -> None:
    session = session_pb2.Session(session_id="s")
    peer.scripts["GetSession"] = [(session_service_pb2.GetSessionResponse(session=session),)]
    peer.scripts["UpdateSession"] = [(session_service_pb2.UpdateSessionResponse(session=session),)]
    arguments = ("sessions", "update", "s", "--title", "new", "--label", "a=b=c")
    code, out, err = await finish(await start(peer, *arguments))
    assert (code, out, err) == (0, "s\n", "")
    (sent,) = peer.requests["UpdateSession"]
    assert (sent.title, dict(sent.metadata)) == ("new", {"a": "b=c"})
    assert list(sent.update_mask.paths) == ["title", "metadata"]


# --- Following -----------------------------------------------------------------------------------


async def test_follow_of_a_run_prints_its_text_and_exits_as_the_run_ended(peer: Peer) -> None:
    peer.scripts["GetRun"] = [(run_service_pb2.GetRunResponse(run=run("r1")),)] * 2
    peer.scripts["SubscribeRun"] = [
        (says(1, "one "), says(2, "two"), event(3, run_complete=complete("r1", FAILED)))
    ]
    process = await start(peer, "follow", "r1")
    code, out, _ = await finish(process)
    assert (code, out) == (1, "one two\n")


async def test_follow_of_a_session_goes_on_and_ends_with_its_cursor(peer: Peer) -> None:
    peer.scripts["GetRun"] = [(Refuse(StatusCode.NOT_FOUND, "RUN_NOT_FOUND"),)] * 2
    session = session_pb2.Session(session_id="s", active_run_id="r1")
    active = run_pb2.Run(run_id="r1", prompt_excerpt="why?")
    snapshot = Streamed.Snapshot(
        session=session, active_run=active, output=[says(2, "so far ").event]
    )
    peer.scripts["SubscribeSession"] = [
        (Streamed(session_id="s", cursor="c0", snapshot=snapshot), LOST),
        (
            Streamed(session_id="s", cursor="c1", run_event=of_run("r1", says(3, "and on\n"))),
            Streamed(
                session_id="s", cursor="c2", queue_changed=Streamed.QueueChanged(run_ids=["r2"])
            ),
            HANG,
        ),
    ]
    process = await start(peer, "follow", "s")
    assert process.stdout is not None
    assert await process.stdout.readline() == b"so far and on\n"
    assert process.stderr is not None
    while (line := await process.stderr.readline()) != b"waiting runs: 1\n":
        assert line
    process.send_signal(signal.SIGINT)
    code, out, err = await finish(process)
    assert (code, out) == (0, "")
    assert err.splitlines()[-1] == "resume with --cursor c2"


async def test_follow_of_a_session_shows_the_prompt_of_a_run_that_starts_at_once(
    peer: Peer,
) -> None:
    """Its prompt comes after its start; it was in no queue before."""
    peer.scripts["GetRun"] = [(Refuse(StatusCode.NOT_FOUND, "RUN_NOT_FOUND"),)] * 2
    changed = Streamed.SessionChanged(
        session=session_pb2.Session(session_id="s", active_run_id="r1"),
        active_run=run_pb2.Run(run_id="r1", prompt_excerpt="why?"),
    )
    start_of = event(1, started=run_pb2.RunEvent.Started(attempt=1))
    peer.scripts["SubscribeSession"] = [
        (
            Streamed(session_id="s", cursor="c1", run_event=of_run("r1", start_of)),
            Streamed(session_id="s", cursor="c1", session_changed=changed),
            Streamed(session_id="s", cursor="c2", run_event=of_run("r2", start_of)),
            Streamed(session_id="s", cursor="c3", run_event=of_run("r2", says(2, "text\n"))),
            HANG,
        )
    ]
    process = await start(peer, "follow", "s", "--cursor", "c0")
    assert process.stdout is not None
    assert await process.stdout.readline() == b"text\n"
    process.send_signal(signal.SIGINT)
    _, _, err = await finish(process)
    # A run whose prompt does not follow is announced before its output.
    assert err.splitlines()[:2] == ["run r1 why?", "run r2"]


async def test_follow_of_a_session_shows_the_prompt_of_a_run_that_has_ended_already(
    peer: Peer,
) -> None:
    """The session was idle again before it could tell of the run."""
    of_past = run_pb2.Run(run_id="r1", prompt_excerpt="why?")
    peer.scripts["GetRun"] = [(run_service_pb2.GetRunResponse(run=of_past),)]
    start_of = event(1, started=run_pb2.RunEvent.Started(attempt=1))
    idle = Streamed.SessionChanged(session=session_pb2.Session(session_id="s"))
    peer.scripts["SubscribeSession"] = [
        (
            Streamed(session_id="s", cursor="c1", run_event=of_run("r1", start_of)),
            Streamed(session_id="s", cursor="c1", session_changed=idle),
            Streamed(session_id="s", cursor="c2", run_event=of_run("r1", says(2, "text\n"))),
            HANG,
        )
    ]
    process = await start(peer, "follow", "s", "--cursor", "c0")
    assert process.stdout is not None
    assert await process.stdout.readline() == b"text\n"
    process.send_signal(signal.SIGINT)
    _, _, err = await finish(process)
    assert err.splitlines()[:1] == ["run r1 why?"]


async def test_follow_of_a_session_shows_changes_of_its_title(peer: Peer) -> None:
    peer.scripts["GetRun"] = [(Refuse(StatusCode.NOT_FOUND, "RUN_NOT_FOUND"),)] * 2
    peer.scripts["GetSession"] = [
        (session_service_pb2.GetSessionResponse(session=session_pb2.Session(session_id="s")),)
    ]

    def titled(title: str) -> session_pb2.Session:
        return session_pb2.Session(session_id="s", title=title)

    titles = ("first", "first", "second\x1b[31m", "")
    peer.scripts["SubscribeSession"] = [
        (
            Streamed(
                session_id="s", cursor="c0", snapshot=Streamed.Snapshot(session=titled("first"))
            ),
            *(
                Streamed(
                    session_id="s",
                    cursor=f"c{n}",
                    session_changed=Streamed.SessionChanged(session=titled(title)),
                )
                for n, title in enumerate(titles, start=1)
            ),
            Streamed(session_id="s", cursor="c9", run_event=of_run("r", says(2, "text\n"))),
            HANG,
        )
    ]
    process = await start(peer, "follow", "s")
    assert process.stdout is not None
    assert await process.stdout.readline() == b"text\n"
    process.send_signal(signal.SIGINT)
    _, _, err = await finish(process)
    assert err.splitlines()[:2] == ["title: second\\x1b[31m", "title: "]


async def test_follow_of_a_session_in_json(peer: Peer) -> None:
    peer.scripts["SubscribeSession"] = [
        (
            Streamed(session_id="s", cursor="c1", run_event=of_run("r1", says(3, "x"))),
            Refuse(StatusCode.OUT_OF_RANGE, "CURSOR_COMPACTED"),
        )
    ]
    process = await start(peer, "follow", "s", "--json", "--cursor", "c0")
    code, out, _ = await finish(process)
    assert code == 1
    (printed,) = map(json.loads, out.splitlines())
    assert {name: printed[name] for name in ("session_id", "cursor", "type", "run_id")} == {
        "session_id": "s",
        "cursor": "c1",
        "type": "session_run_event",
        "run_id": "r1",
    }
    assert printed["event"]["text"] == "x"
    assert list(peer.requests["SubscribeSession"][0].cursors) == ["c0"]


def of_run(run_id: str, answer: run_service_pb2.SubscribeRunResponse) -> Streamed.RunEventOf:
    """An event in the stream of a session."""
    return Streamed.RunEventOf(run_id=run_id, event=answer.event)


@pytest.mark.parametrize("given", [True, False])
async def test_refused_caller_without_a_token_is_told_how_to_give_one(
    peer: Peer, given: bool
) -> None:
    refusal = Refuse(
        StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED", "invalid or missing credentials"
    )
    peer.scripts["ListRuns"] = [(refusal,)] * 5
    code, out, err = await finish(await start(peer, *(("--token", "t") if given else ()), "runs"))
    remedy = ": no token was given; use --token-file or RUNLANE_TOKEN"
    wanted = f"Error: invalid or missing credentials{'' if given else remedy}"
    assert (code, out, err.splitlines()[-1]) == (1, "", wanted)


async def test_ctrl_c_before_the_first_call_exits_as_one_during_it(
    peer: Peer, tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    process = await start(peer, "run", "--attach", str(pipe), "x")
    writer = await asyncio.to_thread(os.open, pipe, os.O_WRONLY)  # until the command reads
    process.send_signal(signal.SIGINT)
    assert await finish(process) == (130, "", "")
    os.close(writer)
