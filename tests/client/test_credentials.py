"""Tokens: where they are sent, and how calls continue when they rotate."""

from __future__ import annotations

import asyncio
from pathlib import Path

import click
import grpc
import pytest
from click.testing import CliRunner

from runlane import Client, RunEvent, RunEvents, RunState, Unauthenticated
from runlane.cli.app import runlane
from runlane.conformance.app import command as conformance
from runlane.conformance.app import main
from runlane.harness import Harness
from runlane.targets import is_local
from support.callers import LIFETIME, SECONDS, World, guarded

SHOWN = "geheim"


@pytest.mark.parametrize(
    ("target", "local"),
    [
        ("127.0.0.1:1", True),
        ("127.9.9.9:1", True),
        ("localhost:1", True),
        ("LOCALHOST:1", True),
        ("localhost", True),
        ("[::1]:1", True),
        ("[::ffff:127.0.0.1]:1", True),
        ("::1", True),
        ("dns:localhost:1", True),
        ("dns:///127.0.0.1:1", True),
        ("ipv4:127.0.0.1:1,127.0.0.2:1", True),
        ("ipv6:[::1]:1", True),
        ("unix:/run/x", True),
        ("unix:///run/x", True),
        ("unix-abstract:x", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        (":1", False),
        ("", False),
        ("10.0.0.7:1", False),
        ("host.example:1", False),
        ("localhost.example:1", False),
        ("127.0.0.1.example:1", False),
        ("dns://192.0.2.1/localhost:1", False),
        ("dns:///host.example:1", False),
        ("ipv4:127.0.0.1:1,10.0.0.7:1", False),
        ("xds:///localhost", False),
        ("passthrough:///host.example:1", False),
        ("[::ffff:10.0.0.7]:1", False),
    ],
)
def test_local_targets(target: str, local: bool) -> None:
    assert is_local(target) is local


def test_a_token_does_not_go_to_another_machine_in_plaintext() -> None:
    with pytest.raises(ValueError, match="unencrypted") as raised:
        Client("host.example:1", token=SHOWN)
    assert "geheim" not in str(raised.value)
    Client("host.example:1", token=SHOWN, plaintext_token=True)
    Client("host.example:1", token=SHOWN, credentials=grpc.ssl_channel_credentials())
    Client("host.example:1")
    with pytest.raises(ValueError, match="unencrypted"):
        Harness("host.example:1", token=SHOWN)
    Harness("host.example:1", token=SHOWN, credentials=grpc.ssl_channel_credentials())
    refused = CliRunner().invoke(conformance, ["host.example:1", "--token", SHOWN])
    assert isinstance(refused.exception, ValueError)


@pytest.mark.parametrize(
    ("metadata", "named"),
    [({"x": "\u00e9"}, "'x'"), ({"A B": "x"}, "'A B'"), ({"x": "a\nb"}, "'x'"), ({"": "x"}, "''")],
)
async def test_metadata_that_cannot_be_sent_is_refused_before_it_is(
    metadata: dict[str, str], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        Client("127.0.0.1:1", metadata=metadata)


async def test_a_place_in_a_trace_that_cannot_be_sent_is_refused_before_it_is() -> None:
    async with Client("127.0.0.1:1") as client:
        with pytest.raises(ValueError, match="'traceparent'"):
            await client.run_accepted("s", "x", traceparent="\u00e9")


def test_a_binary_value_is_sent_as_it_is() -> None:
    Client("127.0.0.1:1", metadata={"x-bin": "\u00e9", "X-BIN": "\u00e9"})


def test_a_token_that_cannot_be_sent_is_one_line_of_the_conformance_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNLANE_TOKEN", "a b")
    with pytest.raises(SystemExit) as left:
        main(["127.0.0.1:1"])
    told = capsys.readouterr()
    assert (left.value.code, told.out, told.err.count("\n")) == (2, "", 1)
    assert "token: may contain only printable ASCII characters" in told.err


def test_a_token_that_cannot_be_sent_is_not_shown() -> None:
    for token in ("", "geheim\n", "ge heim", "gehéim"):
        with pytest.raises(ValueError, match="printable") as raised:
            Client(token=token)
        assert "geh" not in str(raised.value)
    with pytest.raises(ValueError, match="set either one"):
        Client(token=SHOWN, metadata={"Authorization": "Bearer y"})


class Rotating:
    """A token that is another one once its time is up."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.asked = 0
        self.names = ["expiring", "admin"]

    def __call__(self) -> str:
        self.asked += 1
        return self._world.texts[self.names[0]]

    def expire(self) -> None:
        """Time passes; from now on there is a new one."""
        self._world.clock[0] += LIFETIME + 1
        del self.names[0]
        self._world.look()


async def test_a_call_with_a_token_that_was_renewed_meanwhile_is_made_again(
    tmp_path: Path,
) -> None:
    async with guarded(tmp_path) as world:
        # At the first call it is the old one still; when that is refused there is another.
        names = iter(["stranger expired", "admin", "admin"])
        world.texts["stranger expired"] = world.texts["expiring"]
        world.clock[0] += LIFETIME + 1

        def token() -> str:
            return world.texts[next(names)]

        async with Client(world.wire.address, token=token) as client:
            assert (await client.get_run("r-theirs")).state is RunState.ACTIVE


async def test_a_token_that_is_refused_and_stays_the_same_is_not_tried_again(
    tmp_path: Path,
) -> None:
    async with guarded(tmp_path) as world:
        rotating = Rotating(world)
        world.revoke("expiring")
        world.look()
        async with Client(world.wire.address, token=rotating) as client:
            with pytest.raises(Unauthenticated) as raised:
                await client.get_run("r-theirs")
            assert raised.value.attempts == 1
            with pytest.raises(Unauthenticated):
                await anext(aiter(client.subscribe_run_complete()))


async def test_subscriptions_and_waits_go_on_with_the_next_token(tmp_path: Path) -> None:
    async with guarded(tmp_path) as world, asyncio.timeout(SECONDS):
        rotating = Rotating(world)
        async with Client(world.wire.address, token=rotating) as client:
            ends = client.subscribe_run_complete()
            events = client.subscribe_run("r-theirs")
            told = asyncio.create_task(anext(aiter(ends)))
            waited = asyncio.create_task(client.wait_run("r-theirs"))
            followed = asyncio.create_task(_all(events))
            while len({open_call.method for open_call in world.access_control._open_calls}) < 3:
                await asyncio.sleep(0)
            before = set(world.access_control._open_calls)
            rotating.expire()
            assert all(open_call.revocation for open_call in before)
            # All are back, by the new token.
            while (
                len({open_call.method for open_call in world.access_control._open_calls - before})
                < 3
            ):
                await asyncio.sleep(0.01)
            world.wire.latches.open("g")
            assert (await told).run_id == "r-theirs"
            assert (await waited).state is RunState.COMPLETED
            assert [event.index for event in await followed] == [1, 2, 3, 4]


async def _all(events: RunEvents) -> list[RunEvent]:
    return [event async for event in events]


@pytest.mark.parametrize("command", [runlane, conformance])
def test_a_token_on_the_command_line_is_warned_of(command: click.Command, tmp_path: Path) -> None:
    to = ["127.0.0.1:1"] if command is conformance else ["-S", "127.0.0.1:1"]
    rest = ["--timeout", "1"] if command is conformance else ["sessions", "--help"]
    file = tmp_path / "token"
    file.write_text("geheim")
    warning = "Warning: --token: other users of this machine can see the token"
    for given, env, warned in (
        (["--token", "geheim"], {}, True),
        (["--token-file", str(file)], {}, False),
        ([], {"RUNLANE_TOKEN": "geheim"}, False),
    ):
        result = CliRunner().invoke(command, [*to, *given, *rest], env=env)
        assert (warning in result.stderr) is warned
        assert "geheim" not in result.output
        assert not isinstance(result.exception, ValueError)
    shown = CliRunner().invoke(command, ["--help"]).output
    assert "--token-file FILE" in shown
    assert "--token " not in shown


def test_the_command_does_not_show_the_token(tmp_path: Path) -> None:
    env = {"RUNLANE_TOKEN": "geheim"}
    for arguments in (["--help"], ["-S", "host.example:1", "runs"], ["--token", "ge heim", "runs"]):
        result = CliRunner().invoke(runlane, arguments, env=env)
        assert "heim" not in result.output, result.output
    (tmp_path / "empty").write_text("")
    for arguments, why in (
        (["--token-file", str(tmp_path / "none"), "runs"], "none"),
        (["--tls-cert", "x", "runs"], "must be used together"),
        (["--tls-ca", str(tmp_path / "none"), "runs"], "none"),
    ):
        result = CliRunner().invoke(runlane, arguments)
        assert result.exit_code != 0
        assert why in result.output
