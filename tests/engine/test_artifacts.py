"""Artifacts, custom events and structured results: stored, replayed, limited, in the transcript."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from runlane_server.agents.base import AgentEvent, Artifact, Custom, Result, Turn
from runlane_server.core.artifact import MAX_ARTIFACT_BYTES, ArtifactKind, ArtifactPiece
from runlane_server.core.limits import Limits
from runlane_server.core.model import (
    CustomEvent,
    FinishReason,
    Part,
    Prompt,
    ResultPart,
    Role,
    RunComplete,
    RunState,
    Text,
    TextDelta,
)
from runlane_server.store.base import Store
from support.node import Node, running

pytestmark = pytest.mark.stores("memory", "sqlite", "postgresql")

K = ArtifactKind

ODD = "naïve\0 \N{GRINNING FACE}"


@dataclass
class Saying:
    """An agent that yields these events."""

    events: Sequence[Any]

    async def start(self) -> None:
        pass

    async def run(self, turn: Turn) -> AsyncGenerator[AgentEvent, None]:
        for event in self.events:
            yield event

    async def close(self) -> None:
        pass


async def run_once(store: Store, *events: Any) -> tuple[RunComplete, tuple[Part, ...]]:
    """The end of a run whose agent yields these events, and the parts of its answer."""
    async with running(store, agent=Saying(events)) as node:
        complete = await node.coordinator.run("s", Prompt("x"))
        return complete, (await answer(node)).parts


async def answer(node: Node) -> Any:
    return [it for it in await node.messages("s") if it.role is Role.ASSISTANT][-1]


async def test_each_kind_of_artifact_is_in_the_events_and_in_the_transcript(store: Store) -> None:
    given = [
        Artifact(artifact_id="t", name="notes.md", mime_type="text/markdown", text=ODD),
        Artifact(artifact_id="d", data=bytes(range(256))),
        Artifact(artifact_id="j", json={"ö": [1, None, 1.5]}),
        Artifact(artifact_id="u", uri="https://example.com/big.bin"),
    ]
    pieces = [
        ArtifactPiece("t", "notes.md", "text/markdown", K.TEXT, ODD),
        ArtifactPiece("d", "", "application/octet-stream", K.DATA, bytes(range(256))),
        ArtifactPiece("j", "", "application/json", K.JSON, '{"ö":[1,null,1.5]}'),
        ArtifactPiece("u", "", "", K.URI, "https://example.com/big.bin"),
    ]
    agent = Saying([TextDelta("see"), *given])
    async with running(store, agent=agent) as node:
        complete = await node.coordinator.run("s", Prompt("x"))
        assert (complete.state, complete.text) == (RunState.COMPLETED, "see")
        bodies = [event.body for event in await node.events(complete.run_id)]
        assert bodies[2:-1] == [TextDelta("see"), *pieces]
        assert (await answer(node)).parts == (Text("see"), *pieces)


async def test_pieces_are_separate_events_and_one_part(store: Store) -> None:
    def piece(text: str, **fields: Any) -> Artifact:
        return Artifact(artifact_id="a", name="log", text=text, **fields)

    agent = Saying(
        [
            piece("a\ud83d", last=False),
            TextDelta("between"),
            piece("b", append=True, last=False),
            piece("c", append=True),
        ]
    )
    async with running(store, agent=agent) as node:
        complete = await node.coordinator.run("s", Prompt("x"))
        bodies = [event.body for event in await node.events(complete.run_id)]
        pieces = [body for body in bodies if isinstance(body, ArtifactPiece)]
        assert [it.content for it in pieces] == ["a\ufffd", "b", "c"]
        assert [it.append for it in pieces] == [False, True, True]
        assert [it.last for it in pieces] == [False, False, True]
        whole = ArtifactPiece("a", "log", "text/plain", K.TEXT, "a\ufffdbc")
        assert (await answer(node)).parts == (whole, Text("between"))


async def test_an_unfinished_artifact_of_a_failed_run_is_kept_as_incomplete(store: Store) -> None:
    complete, parts = await run_once(
        store, Artifact(artifact_id="a", data=b"1", last=False), Custom("")
    )
    assert complete.state is RunState.FAILED
    assert parts == (ArtifactPiece("a", "", "application/octet-stream", K.DATA, b"1", last=False),)


async def test_an_artifact_that_begins_again_replaces_what_it_had(store: Store) -> None:
    _, parts = await run_once(
        store,
        Artifact(artifact_id="a", text="first"),
        TextDelta("x"),
        Artifact(artifact_id="a", json=2),
    )
    assert parts == (ArtifactPiece("a", "", "application/json", K.JSON, "2"), Text("x"))


async def test_a_custom_event_is_in_the_events_only(store: Store) -> None:
    agent = Saying([Custom("progress", {"percent": 40}), TextDelta("x"), Custom("none")])
    async with running(store, agent=agent) as node:
        complete = await node.coordinator.run("s", Prompt("x"))
        bodies = [event.body for event in await node.events(complete.run_id)]
        assert bodies[2:-1] == [
            CustomEvent("progress", '{"percent":40}'),
            TextDelta("x"),
            CustomEvent("none", "null"),
        ]
        assert (await answer(node)).parts == (Text("x"),)


async def test_the_last_result_is_in_every_form_of_the_run_complete(store: Store) -> None:
    agent = Saying([Result({"n": 1}), TextDelta("x"), Result([ODD])])
    expected = json.dumps([ODD], ensure_ascii=False)
    async with running(store, agent=agent) as node:
        complete = await node.coordinator.run("s", Prompt("x"))
        assert (complete.text, complete.result) == ("x", expected)
        assert (await node.completes())[-1] == complete
        assert (await node.coordinator.get_run(complete.run_id)).complete == complete
        assert (await answer(node)).parts == (Text("x"), ResultPart(expected))
        page = await store.list_runs("default", limit=10)
        assert page.items[0].complete == complete._replace(text="", result="")


async def test_a_run_that_fails_or_is_refused_has_no_result(store: Store) -> None:
    complete, parts = await run_once(store, Result(1), None)
    assert (complete.state, complete.result, parts) == (RunState.FAILED, "", ())


INVALID: list[tuple[Any, str]] = [
    (Artifact(artifact_id="a"), "exactly one of text, data, json and uri"),
    (Artifact(artifact_id="a", text="x", data=b"x"), "exactly one of"),
    (Artifact(artifact_id="", text="x"), "Artifact.artifact_id is empty"),
    (Artifact(artifact_id="a" * 129, text="x"), "Artifact.artifact_id has 129 bytes"),
    (Artifact(artifact_id="a", name="é" * 128, text="x"), "Artifact.name has 256 bytes"),
    (Artifact(artifact_id="a", text=b"x"), "Artifact.text must be a str, not bytes"),  # type: ignore[arg-type]
    (Artifact(artifact_id="a", data="x"), "Artifact.data must be bytes, not str"),  # type: ignore[arg-type]
    (Artifact(artifact_id="a", text="x", last=1), "Artifact.last must be a bool"),  # type: ignore[arg-type]
    (Artifact(artifact_id="a", text="x" * (MAX_ARTIFACT_BYTES + 1)), "content as a `uri`"),
    (Artifact(artifact_id="a", uri="x" * 8193), "Artifact.uri has 8193 bytes"),
    (Artifact(artifact_id="a", json=float("nan")), "Artifact.json is no JSON value"),
    (Artifact(artifact_id="a", json={1, 2}), "Artifact.json is no JSON value"),
    (Artifact(artifact_id="a", json=1, last=False), "Artifact.json cannot come in pieces"),
    (Artifact(artifact_id="a", uri="x", append=True), "Artifact.uri cannot come in pieces"),
    (Artifact(artifact_id="a", text="x", append=True), "has no piece to append to"),
    (Artifact(artifact_id="done", text="x", append=True), "'done' is complete"),
    (Artifact(artifact_id="open", text="x", append=True), "began as data, not as text"),
    (
        Artifact(artifact_id="open", data=b"x" * MAX_ARTIFACT_BYTES, append=True),
        "'open' has more than 1 MiB",
    ),
    (Custom("t" * 129), "Custom.type has 129 bytes"),
    (Custom(7), "Custom.type must be a str"),  # type: ignore[arg-type]
    (Custom("t", {"x": object()}), "Custom.json is no JSON value"),
    (Custom("t", "x" * MAX_ARTIFACT_BYTES), "Custom.json has"),
    (Result(float("inf")), "Result.json is no JSON value"),
    (Result("x" * MAX_ARTIFACT_BYTES), "Result.json has"),
]


@pytest.mark.stores("memory")
@pytest.mark.parametrize(("event", "message"), INVALID, ids=[text for _, text in INVALID])
async def test_an_invalid_event_fails_the_run_and_names_the_field(
    store: Store, event: Any, message: str
) -> None:
    complete, parts = await run_once(
        store,
        Artifact(artifact_id="done", text="1"),
        Artifact(artifact_id="open", data=b"2", last=False),
        event,
    )
    assert (complete.state, complete.finish_reason) == (RunState.FAILED, FinishReason.ERROR)
    assert complete.error is not None
    assert complete.error.reason == "AGENT_ERROR"
    assert message in complete.error.message
    assert len(parts) == 2


@pytest.mark.stores("memory")
@pytest.mark.parametrize(
    "event",
    [
        Artifact(artifact_id="a", text="x" * 600),
        Artifact(artifact_id="a", data=b"x" * 600),
        Custom("t", "x" * 600),
        Result("x" * 600),
    ],
    ids=["text", "data", "custom", "result"],
)
async def test_what_an_agent_says_counts_towards_the_output_limit(
    store: Store, event: AgentEvent
) -> None:
    limits = Limits(max_run_output=2000)
    async with running(store, agent=Saying([event] * 2), limits=limits) as node:
        assert (await node.coordinator.run("s", Prompt("x"))).state is RunState.COMPLETED
    async with running(store, agent=Saying([event] * 3), limits=limits) as node:
        complete = await node.coordinator.run("s", Prompt("x"))
        assert complete.error is not None
        assert complete.error.reason == "OUTPUT_LIMIT"
