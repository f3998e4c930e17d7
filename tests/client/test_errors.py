"""Errors: what comes over the wire is raised as the class that its reason names."""

from __future__ import annotations

import pickle
from datetime import timedelta

import grpc.aio
import pytest
from grpc import StatusCode

import runlane
from runlane import Client, RetryPolicy, errors
from runlane.errors import BY_REASON, RunlaneError
from runlane.v1.error_reason_pb2 import ErrorReason
from runlane_server.rpc.errors import STATUS
from support.peer import HANG, LOST, Peer, Refuse

REASONS = [name.removeprefix("ERROR_REASON_") for name in ErrorReason.keys()][1:]  # noqa: SIM118
ONCE = RetryPolicy(attempts=1)


async def raised(peer: Peer, refuse: Refuse) -> RunlaneError:
    """Returns the error of a call that the peer rejects."""
    peer.scripts["GetRun"] = [(refuse,)]
    async with peer.client(retry=ONCE) as client:
        with pytest.raises(RunlaneError) as caught:
            await client.get_run("r")
    return caught.value


def test_there_is_a_class_for_each_reason_and_no_other() -> None:
    assert sorted(BY_REASON) == sorted(REASONS)
    for reason, cls in BY_REASON.items():
        assert cls.__name__ == "".join(word.capitalize() for word in reason.split("_"))


def test_the_statuses_are_those_of_the_server() -> None:
    assert {reason: cls.default_status for reason, cls in BY_REASON.items()} == dict(STATUS)


def test_the_tree_in_the_docstring_names_every_class() -> None:
    classes = [
        cls
        for cls in vars(errors).values()
        if isinstance(cls, type) and issubclass(cls, RunlaneError)
    ]
    assert errors.__doc__ is not None
    tree = errors.__doc__.split("The server sends")[0]
    for cls in classes:
        assert cls.__name__ in tree
        assert cls.__name__ in runlane.__all__


@pytest.mark.parametrize("reason", REASONS)
async def test_a_reason_is_raised_as_its_class(peer: Peer, reason: str) -> None:
    error = await raised(
        peer,
        Refuse(
            STATUS[reason],
            reason,
            "as it is",
            metadata={"oldest_cursor": "old", "cursor": "here", "error_id": "e1"},
            violations=(("prompt", "is empty"),),
            retry_after=timedelta(seconds=1.5),
        ),
    )
    assert type(error) is BY_REASON[reason]
    assert error.reason == reason
    assert error.status is STATUS[reason]
    assert error.message == str(error) == "as it is"
    assert [(each.field, each.description) for each in error.violations] == [("prompt", "is empty")]
    assert error.retry_after == timedelta(seconds=1.5)
    assert error.error_id == "e1"
    assert isinstance(error.__cause__, grpc.aio.AioRpcError)
    if isinstance(error, runlane.CursorCompacted):
        assert error.oldest_cursor == "old"
    if isinstance(error, runlane.Draining):
        assert error.cursor == "here"


@pytest.mark.parametrize(
    ("code", "cls"),
    [
        (StatusCode.INVALID_ARGUMENT, runlane.InvalidArgument),
        (StatusCode.UNAVAILABLE, runlane.Unavailable),
        (StatusCode.DEADLINE_EXCEEDED, runlane.DeadlineExceeded),
        (StatusCode.UNAUTHENTICATED, runlane.Unauthenticated),
        (StatusCode.PERMISSION_DENIED, runlane.PermissionDenied),
        (StatusCode.INTERNAL, runlane.Internal),
        (StatusCode.UNIMPLEMENTED, runlane.UnexpectedStatus),
        (StatusCode.CANCELLED, runlane.UnexpectedStatus),
        (StatusCode.DATA_LOSS, runlane.UnexpectedStatus),
    ],
)
async def test_a_status_alone_is_raised_as_its_class(
    peer: Peer, code: StatusCode, cls: type[RunlaneError]
) -> None:
    error = await raised(peer, Refuse(code, message="hm"))
    assert type(error) is cls
    assert error.status is code
    assert not error.reason
    assert peer.target in error.message


async def test_a_reason_of_a_newer_server_keeps_its_name(peer: Peer) -> None:
    error = await raised(peer, Refuse(StatusCode.INVALID_ARGUMENT, "PROMPT_TOO_RUDE"))
    assert type(error) is runlane.InvalidArgument
    assert error.reason == "PROMPT_TOO_RUDE"


async def test_the_reasons_of_other_domains_are_not_ours(peer: Peer) -> None:
    refuse = Refuse(StatusCode.NOT_FOUND, "RUN_NOT_FOUND", domain="example.com")
    assert type(await raised(peer, refuse)) is runlane.UnexpectedStatus


async def test_details_that_cannot_be_read_do_not_hide_the_status(
    peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    garbage = (("grpc-status-details-bin", b"\xff\xff\xff"),)
    monkeypatch.setattr(Refuse, "trailers", lambda _: garbage)
    assert type(await raised(peer, LOST)) is runlane.Unavailable


async def test_nobody_there(peer: Peer) -> None:
    await peer.stop()
    async with Client(peer.target, retry=ONCE) as client:
        with pytest.raises(runlane.Unavailable, match=f"cannot reach {peer.target}"):
            await client.get_run("r")


async def test_a_call_without_a_connection_was_not_sent(peer: Peer) -> None:
    peer.scripts["GetRun"] = [(LOST,)]
    async with peer.client(retry=RetryPolicy(attempts=3, initial=0.01)) as client:
        await peer.stop()
        with pytest.raises(runlane.NotConnected, match="is a server running there") as never:
            await client.get_run("r")
    assert never.value.may_have_arrived is False
    for target in ("no-such-host.invalid:1", "unix:/no/such/socket"):
        async with Client(target, retry=ONCE) as client:
            with pytest.raises(runlane.NotConnected):
                await client.get_run("r")


async def test_a_call_that_was_sent_once_may_have_arrived(peer: Peer) -> None:
    peer.scripts["GetRun"] = [(LOST,), (LOST,)]
    async with peer.client(retry=RetryPolicy(attempts=2, initial=0.01)) as client:
        with pytest.raises(runlane.Unavailable) as lost:
            await client.get_run("r")
    assert type(lost.value) is runlane.Unavailable
    assert lost.value.may_have_arrived


async def test_no_answer_in_time_is_a_timeout_error_too(peer: Peer) -> None:
    peer.scripts["GetRun"] = [(HANG,)]
    async with peer.client(timeout=0.05) as client:
        with pytest.raises(TimeoutError, match="did not answer in time") as caught:
            await client.get_run("r")
    assert type(caught.value) is runlane.DeadlineExceeded


def test_errors_survive_pickling() -> None:
    error = runlane.CursorCompacted("gone", metadata={"oldest_cursor": "c"})
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert type(again) is runlane.CursorCompacted
    assert (again.message, again.oldest_cursor, again.status) == ("gone", "c", error.status)
    assert str(pickle.loads(pickle.dumps(runlane.DeadlineExceeded("late")))) == "late"  # noqa: S301


def test_a_quota_is_tried_again_only_where_the_server_says_when() -> None:
    renews = runlane.QuotaExceeded("too fast", retry_after=timedelta(seconds=1))
    lasts = runlane.QuotaExceeded("too much stored")
    assert (errors.is_refused(renews), errors.is_transient(renews)) == (True, True)
    assert (errors.is_refused(lasts), errors.is_transient(lasts)) == (False, False)
