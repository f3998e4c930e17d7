"""`runlane queue` of one session, and its commands that change waiting runs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from grpc import StatusCode

from runlane.v1 import run_pb2, session_pb2
from runlane.v1 import run_service_pb2 as pb
from runlane.v1 import session_service_pb2 as sessions_pb
from support.command import finish, start
from support.peer import HANG, Peer, Refuse, run

Streamed = sessions_pb.SubscribeSessionResponse


def script_update(peer: Peer) -> None:
    """Answers for a run that is found and changed."""
    changed = run_pb2.Run(session_id="s", run_id="bbbbbb", revision=1)
    peer.scripts["GetRun"] = [(pb.GetRunResponse(run=changed),)] * 2
    peer.scripts["UpdateRun"] = [(pb.UpdateRunResponse(run=changed),)]


@pytest.mark.parametrize(
    ("arguments", "paths", "fields"),
    [
        (("move", "--first"), ["position"], {"position": pb.QueuePosition(first=True)}),
        (("move", "--last"), ["position"], {"position": pb.QueuePosition(last=True)}),
        (
            ("move", "--before", "b", "--revision", "3"),
            ["position"],
            {"position": pb.QueuePosition(before_run_id="b"), "revision": 3},
        ),
        (("move", "--after", "b"), ["position"], {"position": pb.QueuePosition(after_run_id="b")}),
        (("edit", "--prompt", "new"), ["prompt"], {"prompt": "new"}),
        (("edit", "--label", "k=v"), ["metadata"], {"metadata": {"k": "v"}}),
        (("edit", "--no-labels"), ["metadata"], {}),
        (("now",), ["when_busy"], {"when_busy": run_pb2.WHEN_BUSY_FOLD}),
        (("now", "--interrupt"), ["when_busy"], {"when_busy": run_pb2.WHEN_BUSY_INTERRUPT}),
    ],
)
async def test_r46_a_command_of_the_queue_sends_its_update(
    peer: Peer, arguments: tuple[str, ...], paths: list[str], fields: dict[str, Any]
) -> None:
    script_update(peer)
    code, out, err = await finish(await start(peer, "queue", *arguments, "bbbbbb"))
    assert (code, out, err) == (0, "bbbbbb\n", "")
    wanted = pb.UpdateRunRequest(run_id="bbbbbb", **fields)
    wanted.update_mask.paths.extend(paths)
    [sent] = peer.requests["UpdateRun"]
    wanted.update_id = sent.update_id
    assert (sent, bool(sent.update_id)) == (wanted, True)


async def test_r46_an_update_whose_answer_is_lost_is_repeated_with_its_id(peer: Peer) -> None:
    script_update(peer)
    peer.scripts["UpdateRun"].insert(0, (Refuse(StatusCode.UNAVAILABLE, ""),))
    code, out, err = await finish(await start(peer, "queue", "now", "bbbbbb"))
    assert (code, out, err) == (0, "bbbbbb\n", "")
    first, second = peer.requests["UpdateRun"]
    assert first == second


async def test_r46_the_changed_run_is_printed_as_json(peer: Peer) -> None:
    script_update(peer)
    code, out, _ = await finish(await start(peer, "queue", "now", "bbbbbb", "--json"))
    assert (code, json.loads(out)["revision"]) == (0, 1)


async def test_r46_a_run_that_left_the_queue_is_an_error(peer: Peer) -> None:
    script_update(peer)
    peer.scripts["UpdateRun"] = [(Refuse(StatusCode.FAILED_PRECONDITION, "ALREADY_STARTED"),)]
    code, out, err = await finish(await start(peer, "queue", "now", "bbbbbb"))
    assert (code, out) == (1, "")
    assert err.startswith("Error: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ("move", "r"),
        ("move", "r", "--first", "--last"),
        ("move", "r", "--first", "--before", "b"),
        ("edit", "r"),
        ("edit", "r", "--label", "k=v", "--no-labels"),
    ],
)
async def test_a_command_of_the_queue_without_one_change_is_refused(
    peer: Peer, arguments: tuple[str, ...]
) -> None:
    code, out, err = await finish(await start(peer, "queue", *arguments))
    assert (code, out, err.startswith("Error: ")) == (2, "", True)
    assert not peer.requests.get("UpdateRun")


async def test_a_dropped_run_is_cancelled_with_its_receipt(peer: Peer) -> None:
    covered = run_pb2.CancelledRun(
        session_id="s",
        run_id="r",
        accept_seq=2,
        state_when_cancelled=run_pb2.RUN_STATE_QUEUED,
    )
    peer.scripts["Cancel"] = [(pb.CancelResponse(cancelled=[covered], fence_accept_seq=3),)]
    told = await finish(await start(peer, "queue", "drop", "r", "--reason", "why"))
    assert told == (0, "s\t2\tr\tqueued\n", "fence 3 in session s\n")
    (sent,) = peer.requests["Cancel"]
    assert (sent.run_id, sent.reason) == ("r", "why")


@pytest.mark.parametrize("options", [(), ("--json",)])
async def test_a_run_that_has_ended_cannot_be_dropped(peer: Peer, options: tuple[str, ...]) -> None:
    peer.scripts["Cancel"] = [(pb.CancelResponse(fence_accept_seq=3),)]
    code, out, err = await finish(await start(peer, "queue", "drop", "r", *options))
    assert (code, bool(out)) == (1, bool(options))
    assert options or err == "Error: run r has ended; there is nothing to drop\n"


@pytest.mark.parametrize("arguments", [("s",), ("list", "s")])
async def test_r47_the_queue_of_a_session_is_listed_in_the_order_of_its_starts(
    peer: Peer, arguments: tuple[str, ...]
) -> None:
    snapshot = Streamed.Snapshot(
        session=session_pb2.Session(session_id="s"), active_run=run("a"), queue=[run("c"), run("b")]
    )
    peer.scripts["SubscribeSession"] = [
        (Streamed(session_id="s", cursor="c", snapshot=snapshot), HANG)
    ]
    code, out, err = await finish(await start(peer, "queue", *arguments, "--total"))
    assert (code, err) == (0, "3 in all\n")
    assert [each.split("\t")[3] for each in out.splitlines()] == ["a", "c", "b"]
