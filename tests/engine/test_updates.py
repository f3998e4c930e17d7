"""Updates of waiting runs, on a node without the wire (R46, R47)."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from runlane_server.access.quotas import Quota, QuotaBook, Quotas
from runlane_server.core.errors import (
    AlreadyStarted,
    AnchorNotWaiting,
    EditConflict,
    EmptyPrompt,
    InvalidArgument,
    PermissionDenied,
    PromptTooLarge,
    QuotaExceeded,
    RunMissing,
    RunNotFound,
)
from runlane_server.core.limits import Limits
from runlane_server.core.model import (
    Attachment,
    Prompt,
    Run,
    RunKey,
    RunState,
    SessionKey,
    Updated,
    WhenBusy,
)
from runlane_server.core.update import REMEMBERED, Move, Place, RunPatch
from runlane_server.store.base import Store
from support.node import Node, running
from support.staging import STEP, say, script, wait

FIRST = Move(Place.FIRST)


async def update(node: Node, run_id: str, **patch: Any) -> Run:
    return await node.coordinator.updates.update("default", run_id, RunPatch(**patch))


async def queue_of(node: Node, session_id: str = "s") -> list[str]:
    lane = await node.store.load_lane(SessionKey("default", session_id))
    return [run.run_id for run in lane.waiting]


async def accept(node: Node, *run_ids: str, **options: Any) -> None:
    for run_id in run_ids:
        await node.queue("s", f"says {run_id}", run_id=run_id, **options)


async def test_r46_an_edited_run_executes_its_new_prompt(store: Store) -> None:
    async with running(store) as node:
        await node.start_blocked("s", "l", run_id="a")
        await accept(node, "b")
        run = await update(node, "b", text=script(say("new")), metadata={"k": "v"})
        assert (run.revision, run.metadata, run.state) == (1, {"k": "v"}, RunState.QUEUED)
        node.latches.open("l")
        assert (await node.end("b")).text == "new"
        assert "user: " + script(say("new")) in await node.lines("s")
        assert any(isinstance(event.body, Updated) for event in await node.events("b"))


async def test_r47_runs_start_in_the_order_in_which_they_were_moved(store: Store) -> None:
    async with running(store) as node:
        await node.start_blocked("s", "l", run_id="a")
        await accept(node, "b", "c", "d")
        await update(node, "d", move=FIRST)
        await update(node, "b", move=Move(Place.LAST))
        moved = await update(node, "b", move=Move(Place.BEFORE, "c"))
        assert (moved.accept_seq, moved.revision) == (2, 2)
        assert await queue_of(node) == ["d", "b", "c"]
        node.latches.open("l")
        for run_id in "abcd":
            await node.end(run_id)
        ended = [complete.run_id for complete in await node.completes()]
        assert ended == ["a", "d", "b", "c"]
        assert [complete.accept_seq for complete in await node.completes()] == [1, 4, 2, 3]


async def test_r46_a_queued_run_sent_now_interrupts_the_active_one(store: Store) -> None:
    async with running(store) as node:
        await node.start_blocked("s", "l", run_id="a")
        await accept(node, "b", "c")
        await update(node, "c", when_busy=WhenBusy.INTERRUPT)
        complete = await node.end("a")
        assert (complete.cancelled, complete.cancel_reason) == (True, "interrupted by c")
        await node.end("b")
        ended = [complete.run_id for complete in await node.completes()]
        assert ended == ["a", "c", "b"]


async def test_r46_a_queued_run_that_is_to_fold_joins_the_next_step(store: Store) -> None:
    async with running(store) as node:
        await node.accept("s", script(wait("l"), STEP, say("end")), run_id="a")
        await node.latches.reached("l")
        await accept(node, "b", "c")
        run = await update(node, "c", text="joins", when_busy=WhenBusy.FOLD)
        assert run.when_busy is WhenBusy.FOLD
        node.latches.open("l")
        assert (await node.end("a")).text == "[folded: joins]end"
        assert (await node.end("c")).folded_into == "a"
        # The caller missed the answer, and repeats the request.
        again = await update(node, "c", text="joins", when_busy=WhenBusy.FOLD)
        assert again.folded_into == "a"


async def test_r46_a_repeated_update_changes_nothing(store: Store) -> None:
    async with running(store) as node:
        await node.start_blocked("s", "l", run_id="a")
        await accept(node, "b", "c")
        patch = {"text": script(say("new")), "move": Move(Place.LAST), "revision": 0}
        first = await update(node, "b", **patch)
        await update(node, "c", move=Move(Place.LAST))
        assert await update(node, "b", **patch) == first
        assert await queue_of(node) == ["b", "c"]
        node.latches.open("l")
        await node.end("b")
        again = await update(node, "b", **patch)
        assert (again.state, again.revision) == (RunState.COMPLETED, 1)


async def test_r46_an_update_repeated_with_its_id_undoes_no_later_one(store: Store) -> None:
    async with running(store) as node:
        await node.start_blocked("s", "l", run_id="a")
        await accept(node, "b", "c")
        patch = {"text": script(say("mine")), "move": FIRST, "update_id": "u"}
        await update(node, "c", **patch)
        await update(node, "c", text=script(say("theirs")), update_id="v")
        await update(node, "c", move=Move(Place.LAST))
        await update(node, "b", attachments=(Attachment("f", "", "x"),))
        again = await update(node, "c", **patch)
        assert (again.revision, again.prompt_excerpt) == (3, script(say("theirs")))
        assert await queue_of(node) == ["b", "c"]
        node.latches.open("l")
        assert (await node.end("c")).text == "theirs"
        assert (await update(node, "c", **patch)).revision == 3
        for other in ({"text": "other"}, {**patch, "revision": 3}):
            with pytest.raises(InvalidArgument) as refused:
                await update(node, "c", **other | {"update_id": "u"})
            assert "update_id" in str(refused.value)
        with pytest.raises(AlreadyStarted):
            await update(node, "c", **patch | {"update_id": "w"})


async def test_r46_an_update_without_an_effect_is_remembered_by_its_id(store: Store) -> None:
    async with running(store) as node:
        await node.start_blocked("s", "l", run_id="a")
        await accept(node, "b", "c")
        assert (await update(node, "b", move=FIRST, update_id="u")).revision == 0
        await update(node, "c", move=FIRST)
        assert (await update(node, "b", move=FIRST, update_id="u")).revision == 0
        assert await queue_of(node) == ["c", "b"]
        node.latches.open("l")


async def test_r46_a_run_remembers_its_last_updates_by_their_ids(store: Store) -> None:
    async with running(store) as node:
        await node.start_blocked("s", "l", run_id="a")
        await accept(node, "b")
        for n in range(REMEMBERED + 1):
            await update(node, "b", text=script(say(f"{n}")), update_id=f"{n}")
        oldest = await update(node, "b", text=script(say("1")), update_id="1")
        assert oldest.revision == REMEMBERED + 1
        forgotten = await update(node, "b", text=script(say("0")), update_id="0")
        assert forgotten.revision == REMEMBERED + 2
        node.latches.open("l")


async def test_r46_an_update_without_an_effect_is_no_revision(store: Store) -> None:
    async with running(store) as node:
        await node.start_blocked("s", "l", run_id="a")
        await accept(node, "b")
        run = await update(node, "b", move=FIRST, when_busy=WhenBusy.QUEUE, text=script(say("b?")))
        assert run.revision == 1
        same = await update(node, "b", move=FIRST, text=script(say("b?")))
        assert (same.revision, len(await node.events("b"))) == (1, 2)


async def test_r46_of_two_edits_of_the_same_revision_one_is_refused(store: Store) -> None:
    async with running(store) as node:
        await node.start_blocked("s", "l", run_id="a")
        await accept(node, "b")
        edits = [update(node, "b", text=script(say(f"{n}")), revision=0) for n in range(5)]
        results = await asyncio.gather(*edits, return_exceptions=True)
        refused = [result for result in results if isinstance(result, EditConflict)]
        assert len(refused) == 4
        assert refused[0].metadata == {"run_id": "b", "revision": "1"}


async def test_r46_concurrent_edits_without_a_revision_all_count(store: Store) -> None:
    quotas = QuotaBook(Quotas(others=Quota(max_stored_bytes=1 << 30)))
    async with running(store, quotas=quotas) as node:
        await node.start_blocked("s", "l", run_id="a")
        await accept(node, "b")
        before = node.coordinator.stored.of("default")
        texts = [script(say("x" * 10 * n)) for n in range(1, 6)]
        await asyncio.gather(*(update(node, "b", text=text) for text in texts))
        run = await update(node, "b", text=texts[0])
        assert run.revision == 6
        assert await node.store.get_prompt(RunKey("default", "b")) == Prompt(texts[0])
        grown = node.coordinator.stored.of("default") - before
        assert grown == len(texts[0]) - len(script(say("says b")))


async def test_r46_a_run_that_left_the_queue_is_named_with_its_state(store: Store) -> None:
    async with running(store) as node:
        await node.start_blocked("s", "l", run_id="a")
        await accept(node, "b")
        with pytest.raises(AlreadyStarted) as caught:
            await update(node, "a", text="late")
        assert caught.value.metadata == {"run_id": "a", "state": "active", "active_run_id": "a"}
        node.latches.open("l")
        await node.end("b")
        with pytest.raises(AlreadyStarted) as caught:
            await update(node, "b", move=FIRST)
        assert caught.value.metadata == {"run_id": "b", "state": "completed"}
        assert (await node.coordinator.get_run("b")).revision == 0


async def test_r46_a_waiting_run_is_read_with_its_whole_prompt(store: Store) -> None:
    async with running(store) as node:
        await node.start_blocked("s", "l", run_id="a")
        prompt = Prompt("x" * 1_000, (Attachment("f", "image/png", b"\0" * 2_000),))
        await accept(node, "b")
        await update(node, "b", text=prompt.text, attachments=prompt.attachments)
        assert await node.coordinator.updates.read("default", "b") == (
            await node.coordinator.get_run("b"),
            prompt,
        )
        for run_id, missing in (("", RunMissing), ("unknown", RunNotFound)):
            with pytest.raises(missing):
                await node.coordinator.updates.read("default", run_id)
        node.latches.open("l")


async def test_r46_a_prompt_is_read_at_the_revision_of_its_run(store: Store) -> None:
    async with running(store) as node:
        await node.start_blocked("s", "l", run_id="a")
        await accept(node, "b")

        async def edit() -> None:
            for n in range(1, 20):
                await update(node, "b", text=f"revision {n}")

        editor = asyncio.create_task(edit())
        while not editor.done():
            run, prompt = await node.coordinator.updates.read("default", "b")
            first = script(say("says b"))
            assert prompt.text == (f"revision {run.revision}" if run.revision else first)
            await asyncio.sleep(0)  # a memory store never waits
        await editor
        node.latches.open("l")


async def test_r46_a_prompt_grows_only_as_far_as_a_message_holds_it(store: Store) -> None:
    most = 3 << 20
    limits = Limits(max_prompt_bytes=most, max_attachment_bytes=most)
    async with running(store, limits=limits) as node:
        await node.start_blocked("s", "l", run_id="a")
        await node.accept("s", "x" * most, run_id="b")
        with pytest.raises(PromptTooLarge, match="with names and prompt"):
            await update(node, "b", attachments=(Attachment("f", "x/y", b"x" * (1 << 20)),))
        await update(node, "b", attachments=(Attachment("f", "x/y", b"x" * (1 << 19)),))
        node.latches.open("l")


BAD: Mapping[str, tuple[dict[str, Any], type[Exception]]] = {
    "nothing": ({}, InvalidArgument),
    "before itself": ({"move": Move(Place.BEFORE, "b")}, InvalidArgument),
    "after nothing": ({"move": Move(Place.AFTER)}, InvalidArgument),
    "before one that started": ({"move": Move(Place.BEFORE, "a")}, AnchorNotWaiting),
    "before one of another session": ({"move": Move(Place.BEFORE, "other")}, AnchorNotWaiting),
    "before one that is unknown": ({"move": Move(Place.AFTER, "unknown")}, AnchorNotWaiting),
    "interrupt and move": ({"when_busy": WhenBusy.INTERRUPT, "move": FIRST}, InvalidArgument),
    "reject": ({"when_busy": WhenBusy.REJECT}, InvalidArgument),
    "empty": ({"text": "  "}, EmptyPrompt),
    "large": ({"text": "x" * 101}, PromptTooLarge),
    "large file": ({"attachments": (Attachment("f", "x/y", b"x" * 101),)}, PromptTooLarge),
    "old revision": ({"text": "x", "revision": 3}, EditConflict),
}


@pytest.mark.parametrize("name", BAD)
async def test_r46_a_bad_update_is_refused_and_changes_nothing(name: str, store: Store) -> None:
    patch, error = BAD[name]
    limits = Limits(max_prompt_bytes=100, max_attachment_bytes=100)
    async with running(store, limits=limits) as node:
        await node.start_blocked("s", "l", run_id="a")
        await node.start_blocked("another", "m")
        await node.queue("another", "x", run_id="other")
        await accept(node, "b", "c")
        before = await node.store.load_lane(SessionKey("default", "s"))
        with pytest.raises(error):
            # None of its other changes is done either.
            await update(node, "b", **({"metadata": {"k": "v"}} if patch else {}), **patch)
        assert await node.store.load_lane(before.key) == before
        assert (await node.coordinator.get_run("b")).metadata == {}
        for latch in "lm":
            node.latches.open(latch)


async def test_r46_an_attachment_lets_the_prompt_be_empty_as_long_as_it_stays(store: Store) -> None:
    async with running(store) as node:
        await node.start_blocked("s", "l", run_id="a")
        await accept(node, "b")
        await update(node, "b", attachments=(Attachment("f", "text/plain", "text"),))
        await update(node, "b", text="")
        with pytest.raises(EmptyPrompt):
            await update(node, "b", attachments=())
        node.latches.open("l")


@pytest.mark.parametrize(
    "patch",
    [
        {"text": "x"},
        {"attachments": ()},
        {"metadata": {"k": "v"}},
        {"move": FIRST},
        {"when_busy": WhenBusy.FOLD},
        {"when_busy": WhenBusy.INTERRUPT},
    ],
)
async def test_r46_a_caller_limited_to_agents_updates_no_run_of_another(
    patch: dict[str, Any], store: Store
) -> None:
    async with running(store) as node:
        await node.start_blocked("s", "l", run_id="a")
        await accept(node, "b", "c")
        wanted = RunPatch(**patch, update_id="u")
        for run_id in "ac":
            with pytest.raises(PermissionDenied, match="may not use the agent"):
                await node.coordinator.updates.update(
                    "default", run_id, wanted, allowed_agents=frozenset({"another"})
                )
        run = await node.coordinator.get_run("c")
        assert (run.revision, run.state) == (0, RunState.QUEUED)
        assert await queue_of(node) == ["b", "c"]
        own = await node.coordinator.updates.update(
            "default", "c", wanted._replace(text="own"), allowed_agents=frozenset({"default"})
        )
        assert own.revision == 1
        node.latches.open("l")


async def test_r46_an_unknown_run_is_not_found(store: Store) -> None:
    async with running(store) as node:
        with pytest.raises(RunNotFound):
            await update(node, "unknown", text="x")
        with pytest.raises(RunMissing):
            await update(node, "", text="x")
        await node.start_blocked("s", "l", run_id="a")
        await accept(node, "b")
        with pytest.raises(RunNotFound):
            await node.coordinator.updates.update("another", "b", RunPatch(text="x"))
        node.latches.open("l")


async def test_r46_a_longer_prompt_counts_towards_the_quota(store: Store) -> None:
    quotas = QuotaBook(Quotas(others=Quota(max_stored_bytes=2_500)))
    async with running(store, quotas=quotas) as node:
        await node.start_blocked("s", "l", run_id="a")
        await accept(node, "b", "c")
        await update(node, "b", text=script(say("x" * 2_000)))
        with pytest.raises(QuotaExceeded):
            await update(node, "b", text=script(say("y")))
        with pytest.raises(QuotaExceeded):
            await accept(node, "d")
        # The order of the queue stores nothing.
        assert (await update(node, "c", move=FIRST)).revision == 1
        node.latches.open("l")
