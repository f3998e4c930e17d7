"""Deliveries from the event log of every store to real endpoints (R55)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from runlane_server.core.model import CancelScope, RunState
from runlane_server.store.base import Store
from runlane_server.store.webhooks import (
    INPUT_REQUESTED,
    RUN_ENDED,
    START,
    Held,
    Place,
    WebhookFilter,
    WebhookKey,
)
from runlane_server.webhooks import delivery as delivery_module
from runlane_server.webhooks import log_reader
from runlane_server.webhooks.attempts import CONCURRENCY, Schedule
from support.asking import answer, ask, question
from support.deliveries import Node, delivering, new_node, real_time
from support.endpoint import Delivery, Endpoint, endpoint
from support.story import Story, request

PATIENT = Schedule(delays=(0.05,) * 1_000, longest_pause=0.05)
"""It gives up no event."""


@dataclass
class Stage:
    """A node, an endpoint, and the sessions of a test."""

    node: Node
    served: Endpoint
    stories: dict[str, Story] = field(default_factory=dict)

    async def play(self, session: str, *run_ids: str) -> None:
        story = self.stories.setdefault(session, Story(self.node.store, session))
        for run_id in run_ids:
            await story.play(run_id)


@pytest.fixture
async def stage(store: Store) -> AsyncIterator[Stage]:
    async with delivering(store) as node, endpoint() as served:
        yield Stage(node, served)


async def test_r55_ends_are_delivered_in_order_and_signed(stage: Stage) -> None:
    await stage.play("s", "before")
    webhook = await stage.node.create(stage.served.url)
    names = [f"r{n}" for n in range(20)]
    await stage.play("s", *names)
    await stage.served.until(lambda: len(stage.served.accepted) == 20)
    assert [it.data["runId"] for it in stage.served.accepted] == names  # and not `before`
    for delivery in stage.served.accepted:
        delivery.verify(webhook.secrets[0])
        assert delivery.message["type"] == "run.ended"
        assert delivery.data["state"] == "RUN_STATE_COMPLETED"
        assert "text" not in delivery.data
    assert len({it.headers["webhook-id"] for it in stage.served.accepted}) == 20
    found = await stage.node.until(webhook, lambda it: it.progress.cursor == Place(21))
    assert (found.progress.delivered, found.progress.last_error) == (20, "")


async def test_r55_a_full_delivery_has_the_whole_event(stage: Stage) -> None:
    await stage.node.create(stage.served.url, full=True)
    await stage.play("s", "r")
    await stage.served.until(lambda: bool(stage.served.accepted))
    data = stage.served.accepted[0].data
    assert (data["text"], data["finishReason"]) == ("done", "FINISH_REASON_STOP")


async def test_r55_input_requests_come_between_the_ends_of_their_session(stage: Stage) -> None:
    await stage.node.create(stage.served.url)
    await stage.play("s", "a")
    story = stage.stories["s"]
    await story.accept("b")
    await story.start()
    [name] = await ask(story, question())
    await stage.served.until(lambda: len(stage.served.accepted) == 2)
    asked = stage.served.accepted[1]
    assert asked.message["type"] == "input.requested"
    assert (asked.data["inputRequestId"], asked.data["runId"]) == (name, "b")
    await answer(story, "b", name)
    await story.cancel(CancelScope.SESSION)
    await story.finish()
    await stage.served.until(lambda: len(stage.served.accepted) == 3)
    assert stage.served.accepted[2].data["state"] == "RUN_STATE_CANCELLED"


FILTERS = {
    "session": (WebhookFilter(session_ids=frozenset({"s-a"})), ["a"]),
    "prefix": (WebhookFilter(session_prefixes=("s-b", "x")), ["b"]),
    "both": (WebhookFilter(frozenset({"s-a"}), ("s-b",)), ["a", "b"]),
    "labels": (WebhookFilter(labels={"team": "red"}), ["b"]),
    "two labels": (WebhookFilter(labels={"team": "red", "x": "y"}), []),
    "agent": (WebhookFilter(agents=frozenset({"default"})), ["a", "b", "c"]),
    "other agent": (WebhookFilter(agents=frozenset({"other"})), []),
    "state": (WebhookFilter(states=frozenset({RunState.CANCELLED})), ["c"]),
    "kind": (WebhookFilter(kinds=frozenset({INPUT_REQUESTED})), []),
    "ends": (WebhookFilter(kinds=frozenset({RUN_ENDED})), ["a", "b", "c"]),
}


@pytest.mark.parametrize("name", FILTERS)
async def test_a_filter_selects(stage: Stage, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_reader, "LOOK_SECONDS", 0.1)
    wanted, expected = FILTERS[name]
    webhook = await stage.node.create(stage.served.url, wanted)
    await Story(stage.node.store, "s-a").play("a")
    await Story(stage.node.store, "s-b").play(request("b", team="red"))
    cancelled = Story(stage.node.store, "s-c")
    await cancelled.accept("c")
    await cancelled.cancel()
    await stage.node.until(webhook, lambda it: it.progress.cursor.position == 3)
    await stage.served.until(lambda: len(stage.served.accepted) == len(expected))
    assert sorted(stage.served.run_ids()) == expected


async def test_r55_a_failing_session_holds_up_no_other(store: Store) -> None:
    """One session fails for a while; its events come late, in order; the others do not wait."""
    async with delivering(store, schedule=PATIENT) as node, endpoint() as served:
        await _fail_one_session(Stage(node, served))


async def _fail_one_session(stage: Stage) -> None:
    is_bad = True

    def status(delivery: Delivery) -> int:
        return 500 if is_bad and delivery.data["sessionId"] == "bad" else 200

    stage.served.answer = status
    webhook = await stage.node.create(stage.served.url)
    for n in range(10):
        await stage.play("bad", f"bad{n}")
        await stage.play("good", f"good{n}")
    await stage.served.until(lambda: len(stage.served.run_ids("good")) == 10)
    found = await stage.node.until(webhook, lambda it: bool(it.progress.held))
    assert [it.session_id for it in found.progress.held] == ["bad"]
    assert found.progress.last_error == "HTTP 500"
    assert stage.served.run_ids("bad") == []
    assert {it.data["runId"] for it in stage.served.attempts if "bad" in it.data["runId"]} == {
        "bad0"
    }
    is_bad = False
    await stage.served.until(lambda: len(stage.served.run_ids("bad")) == 10)
    assert stage.served.run_ids("bad") == [f"bad{n}" for n in range(10)]
    assert stage.served.run_ids("good") == [f"good{n}" for n in range(10)]
    await stage.node.until(webhook, lambda it: not it.progress.held)
    # It goes on from memory again.
    await stage.play("bad", "last")
    await stage.served.until(lambda: "last" in stage.served.run_ids())


async def test_r55_an_event_that_never_arrives_is_given_up_and_says_so(stage: Stage) -> None:
    stage.served.answer = lambda it: 400 if it.data["runId"] == "poison" else 200
    webhook = await stage.node.create(stage.served.url)
    await stage.play("s", "a", "poison", "b")
    for n in range(100):
        await stage.play("other", f"o{n}")
        if "b" in stage.served.run_ids():
            break
        await asyncio.sleep(0.02)
    await stage.served.until(lambda: "b" in stage.served.run_ids())
    assert stage.served.run_ids("s") == ["a", "b"]
    assert sum(it.data["runId"] == "poison" for it in stage.served.attempts) >= 5
    found = await stage.node.until(webhook, lambda it: not it.progress.held)
    assert found.progress.given_up == 1


async def test_r55_an_endpoint_that_is_down_gets_one_attempt_at_a_time(store: Store) -> None:
    slow = Schedule(delays=(0.3,), longest_pause=0.3)
    async with delivering(store, schedule=slow) as node, endpoint() as served:
        served.answer = lambda _: 503
        webhook = await node.create(served.url)
        began = time.monotonic()
        for n in range(50):
            await Story(store, f"s{n}").play(f"r{n}")
        # At most 16 are in flight when the fifth fails; each further one waits for a pause.
        await served.until(lambda: len(served.attempts) >= 5 + 16 + 4)
        assert time.monotonic() - began > 0.7
        assert served.most_in_flight <= 16
        found = await node.current(webhook)
        assert found.progress.failing_since is not None
        served.answer = lambda _: 200
        await served.until(lambda: len(served.run_ids()) == 50)
        found = await node.until(webhook, lambda it: not it.progress.held)
        assert (found.progress.failures, found.progress.failing_since) == (0, None)


async def test_r55_a_webhook_is_disabled_after_days_and_loses_nothing(store: Store) -> None:
    ahead = 0
    async with delivering(store, now=lambda: real_time() + ahead) as node, endpoint() as served:
        served.answer = lambda _: 500
        webhook = await node.create(served.url)
        await Story(store, "s").play("a")
        await node.until(webhook, lambda it: it.progress.failures > 1)
        ahead = 6 * 86_400_000_000
        found = await node.until(webhook, lambda it: bool(it.progress.disabled))
        assert found.progress.disabled == "no delivery has arrived for 5 days: HTTP 500"
        await Story(store, "t").play("b")
        served.answer = lambda _: 200
        assert served.accepted == []
        await node.webhooks.update(webhook.key, lambda it: replace(it, enabled=True), revision=None)
        await served.until(lambda: len(served.run_ids()) == 2)
        assert (await node.current(webhook)).progress.disabled == ""


async def test_an_endpoint_that_is_gone_is_disabled_at_once(stage: Stage) -> None:
    stage.served.answer = lambda _: 410
    webhook = await stage.node.create(stage.served.url)
    await stage.play("s", "a")
    found = await stage.node.until(webhook, lambda it: bool(it.progress.disabled))
    assert "410" in found.progress.disabled


async def test_r55_nothing_is_delivered_before_a_challenge_is_answered(stage: Stage) -> None:
    stage.served.answers_challenges = False
    webhook = await stage.node.create(stage.served.url)
    await stage.play("s", "a")
    found = await stage.node.until(webhook, lambda it: it.progress.failures > 2)
    assert "challenge" in found.progress.last_error
    assert stage.served.attempts == []
    stage.served.answers_challenges = True
    await stage.served.until(lambda: stage.served.run_ids() == ["a"])


async def test_r55_a_new_url_must_answer_too(stage: Stage) -> None:
    webhook = await stage.node.create(stage.served.url)
    await stage.play("s", "a")
    await stage.served.until(lambda: len(stage.served.accepted) == 1)
    async with endpoint(answers_challenges=False) as other:
        await stage.node.webhooks.update(
            webhook.key, lambda it: replace(it, url=other.url), revision=None
        )
        await stage.play("s", "b")
        await stage.node.until(webhook, lambda it: it.progress.failures > 1)
        assert (other.attempts, stage.served.run_ids()) == ([], ["a"])
        other.answers_challenges = True
        await other.until(lambda: other.run_ids() == ["b"])


async def test_redelivery_begins_at_a_place_and_keeps_the_ids(stage: Stage) -> None:
    webhook = await stage.node.create(stage.served.url)
    await stage.play("s", "a", "b", "c")
    await stage.served.until(lambda: len(stage.served.accepted) == 3)
    await stage.node.webhooks.redeliver(webhook.key, Place(1))
    await stage.served.until(lambda: len(stage.served.accepted) == 5)
    ids = [it.headers["webhook-id"] for it in stage.served.accepted]
    assert ids[3:] == ids[1:3]


async def test_r55_two_secrets_sign_during_a_rotation(stage: Stage) -> None:
    webhook = await stage.node.create(stage.served.url)
    rotated = await stage.node.webhooks.rotate(webhook.key, "", expire_now=False)
    await stage.node.delivers_revision(webhook, 2)
    await stage.play("s", "a")
    await stage.served.until(lambda: len(stage.served.accepted) == 1)
    for secret in (webhook.secrets[0], rotated.secrets[0]):
        stage.served.accepted[0].verify(secret)
    await stage.node.webhooks.rotate(webhook.key, rotated.secrets[0], expire_now=True)
    await stage.node.delivers_revision(webhook, 3)
    await stage.play("s", "b")
    await stage.served.until(lambda: len(stage.served.accepted) == 2)
    assert len(stage.served.accepted[1].headers["webhook-signature"].split()) == 1


async def test_a_disabled_webhook_delivers_later_what_happened_meanwhile(stage: Stage) -> None:
    webhook = await stage.node.create(stage.served.url, enabled=False)
    await stage.play("s", "a")
    await stage.node.webhooks.update(
        webhook.key, lambda it: replace(it, enabled=True), revision=None
    )
    await stage.served.until(lambda: stage.served.run_ids() == ["a"])
    await stage.node.webhooks.delete(webhook.key)
    async with asyncio.timeout(10):
        while stage.node.dispatcher.deliveries:
            await asyncio.sleep(0.01)


async def test_r55_events_lost_to_compaction_are_visible(stage: Stage) -> None:
    webhook = await stage.node.create(stage.served.url, enabled=False)
    await stage.play("s", "a", "b", "c")
    assert await stage.node.store.compact(1 << 62, 2) == 2
    await stage.node.webhooks.update(
        webhook.key, lambda it: replace(it, enabled=True), revision=None
    )
    await stage.served.until(lambda: len(stage.served.accepted) == 1)
    assert stage.served.run_ids() == ["c"]
    assert (await stage.node.current(webhook)).progress.lost_before is not None


async def test_r55_the_window_bounds_what_is_read_ahead(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery_module, "WINDOW", 5)
    monkeypatch.setattr(delivery_module, "MAX_HELD", 3)
    async with delivering(store, schedule=PATIENT) as node, endpoint() as served:
        stage = Stage(node, served)
        served.answer = lambda it: 500 if it.data["sessionId"].startswith("bad") else 200
        webhook = await node.create(served.url)
        for n in range(12):
            await stage.play(f"bad{n}", f"b{n}")
            await stage.play("good", f"g{n}")
        found = await node.until(webhook, lambda it: len(it.progress.held) >= 3)
        assert len(found.progress.held) <= 3 + 5
        served.answer = lambda _: 200
        await served.until(lambda: len(served.run_ids()) == 24)
        assert served.run_ids("good") == [f"g{n}" for n in range(12)]


async def test_r55_retries_read_no_more_pages_than_deliveries_may_be_in_flight(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixty sessions are due at once, and the endpoint answers none of them yet."""
    read, reads = log_reader.session_entries, 0

    async def count(*args: Any, **options: Any) -> Sequence[log_reader.Entry]:
        nonlocal reads
        reads += 1
        return await read(*args, **options)

    monkeypatch.setattr(delivery_module, "session_entries", count)
    async with delivering(store) as node, endpoint() as served:
        served.gate.clear()
        names = [f"s{n}" for n in range(60)]
        for name in names:
            await Story(store, name).play(f"r-{name}")
        webhook = await node.create(served.url, enabled=False)
        stored = await store.webhooks.get(webhook.key)
        assert stored is not None
        held = tuple(Held(name, START, 1, 0, 0) for name in names)
        progress = replace(stored.progress, held=held)
        await store.webhooks.replace(replace(stored, enabled=True, progress=progress), resets=True)
        await served.until(lambda: served.in_flight == CONCURRENCY)
        running = node.dispatcher.deliveries[webhook.key]
        assert (reads, len(running._retrying)) == (CONCURRENCY, CONCURRENCY)
        served.gate.set()
        await served.until(lambda: len(served.run_ids()) == len(names))
        await node.until(webhook, lambda it: not it.progress.held)


async def _ask_and_end(story: Story, run_id: str) -> list[str]:
    """A run that asks, is answered and ends; returns the ids of its events, in order."""
    await story.accept(run_id)
    await story.start()
    [name] = await ask(story, question())
    await answer(story, run_id, name)
    await story.cancel()
    await story.finish()
    return [name, run_id]


async def test_r55_an_event_that_comes_while_a_session_catches_up_is_not_lost(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with delivering(store, schedule=PATIENT) as node, endpoint() as served:
        stage = Stage(node, served)
        read, came = log_reader.session_entries, False

        async def read_and_wait(*args: Any, **options: Any) -> Sequence[log_reader.Entry]:
            """Between a read that finds no more and its result, another run ends."""
            nonlocal came
            entries = await read(*args, **options)
            if not (entries or came):
                came = True
                await stage.play("s", "late")
                async with asyncio.timeout(10):
                    while node.dispatcher.deliveries[webhook.key]._scanned < Place(store.position):
                        await asyncio.sleep(0)
            return entries

        monkeypatch.setattr(delivery_module, "session_entries", read_and_wait)
        is_bad = True
        served.answer = lambda _: 500 if is_bad else 200
        webhook = await node.create(served.url)
        await stage.play("s", "a")
        await node.until(webhook, lambda it: bool(it.progress.held))
        is_bad = False
        await served.until(lambda: served.run_ids() == ["a", "late"])


async def test_r55_a_crash_at_any_instant_loses_nothing(store: Store) -> None:
    """The deliveries end without their last write, again and again, while runs end."""
    async with AsyncExitStack() as closing, endpoint() as served:
        bad: set[str] = set()
        served.answer = lambda it: 500 if it.data["sessionId"] in bad else 200
        first = new_node(store)
        webhook = await first.create(served.url)
        closing.callback(first.parts.sender.close)
        expected: dict[str, list[str]] = {f"s{n}": [] for n in range(4)}
        stories = {name: Story(store, name) for name in expected}
        for turn in range(12):
            async with delivering(store, schedule=PATIENT) as node:
                bad = {f"s{turn % 4}"}
                for name, story in stories.items():
                    for _ in range(3):
                        run_id = f"{name}-{len(expected[name])}"
                        expected[name] += await _ask_and_end(story, run_id)
                await served.until(lambda: len(served.attempts) > 0)
                await asyncio.sleep(0.01 * turn)
                await node.kill()
        bad = set()
        async with delivering(store, schedule=PATIENT) as node:
            await served.until(lambda: len(served.event_ids()) == 4 * 36 * 2)
            for name, events in expected.items():
                assert served.event_ids(name) == events
            await node.until(webhook, lambda it: not it.progress.held)


async def test_r55_a_webhook_key_of_another_tenant_is_unknown(stage: Stage) -> None:
    webhook = await stage.node.create(stage.served.url)
    await Story(stage.node.store, "s", tenant="other").play("theirs")
    await stage.play("s", "mine")
    await stage.served.until(lambda: stage.served.run_ids() == ["mine"])
    assert await stage.node.store.webhooks.get(WebhookKey("other", webhook.key.webhook_id)) is None
