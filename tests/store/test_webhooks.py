"""The contract of every store about webhooks, and about the order of what they deliver."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

from runlane_server.core.model import RunState
from runlane_server.store.base import Store
from runlane_server.store.webhooks import (
    A2A,
    INPUT_REQUESTED,
    RUN_ENDED,
    START,
    Held,
    Most,
    OfRun,
    Place,
    Progress,
    Webhook,
    WebhookFilter,
    WebhookKey,
    encode_webhook,
)
from support.asking import answer, ask, question
from support.story import MANY, TENANT, Story

KEY = WebhookKey(TENANT, "hook")

MOST = Most(100, 10)

PROGRESS = Progress(
    cursor=Place(7, 2),
    held=(Held("a\x00", Place(3), 2, 9, 5), Held("b", Place(6, 1), 1, 8, 8)),
    failures=3,
    failing_since=5,
    next_attempt_at=9,
    last_error="HTTP 500",
    last_error_at=8,
    last_success_at=4,
    delivered=12,
    given_up=1,
    lost_before=2,
    disabled="why",
    confirmed="https://example.org/",
)


def webhook(key: WebhookKey = KEY, **changes: Any) -> Webhook:
    wanted = WebhookFilter(
        frozenset({"s\x00", "é"}),
        ("a", "b-"),
        {"team": "\x01red"},
        frozenset({"default"}),
        frozenset({RunState.FAILED, RunState.CANCELLED}),
        frozenset({RUN_ENDED, INPUT_REQUESTED}),
    )
    made = Webhook(
        key,
        "https://example.org/\x00",
        ("new", "old"),
        wanted,
        True,
        True,
        1,
        2,
        1,
        1,
        99,
        PROGRESS,
    )
    return replace(made, **changes)


async def test_r55_a_webhook_is_stored_whole(store: Store) -> None:
    await store.webhooks.create(webhook(), most=MOST)
    assert await store.webhooks.get(KEY) == webhook()
    assert await store.webhooks.get(WebhookKey("other", "hook")) is None
    assert await store.webhooks.delete(KEY)
    assert not await store.webhooks.delete(KEY)
    assert await store.webhooks.get(KEY) is None


def of_run(name: str, run_id: str = "r\x00", tenant: str = TENANT) -> Webhook:
    bound = OfRun(run_id, name, A2A, '{"Authorization":"Bearer \x00"}', "Bearer")
    return webhook(WebhookKey(tenant, f"{run_id}:{name}"), of_run=bound)


async def test_r55_a_webhook_of_a_run_is_stored_whole_and_counts_for_its_run(
    store: Store,
) -> None:
    most = Most(3, 2)
    assert await store.webhooks.create(webhook(), most=Most(1, 1))
    made = of_run("a")
    assert await store.webhooks.create(made, most=most)
    assert await store.webhooks.get(made.key) == made
    # A server of before would deliver the events of all runs, if it could read this.
    assert "url" not in json.loads(encode_webhook(made).settings)
    other = replace(made, secrets=("other",), url="https://example.org/other")
    assert not await store.webhooks.create(other, most=most)  # it exists
    assert await store.webhooks.get(made.key) == made
    assert await store.webhooks.create(of_run("b"), most=most)
    assert not await store.webhooks.create(of_run("c"), most=most)  # one too many of the run
    assert await store.webhooks.create(of_run("c", "r2"), most=most)
    assert not await store.webhooks.create(of_run("d", "r3"), most=most)  # of the tenant
    assert await store.webhooks.create(of_run("a", tenant="other"), most=most)
    assert not await store.webhooks.create(webhook(WebhookKey(TENANT, "x")), most=Most(1, 1))
    page = await store.webhooks.list(TENANT, after=None, limit=1, run_id="r\x00")
    assert [it.key.webhook_id for it in page.items] == ["r\x00:b"]
    page = await store.webhooks.list(TENANT, after=page.next, limit=9, run_id="r\x00")
    assert ([it.key.webhook_id for it in page.items], page.next) == (["r\x00:a"], None)
    everything = await store.webhooks.list(TENANT, after=None, limit=9)
    assert len(everything.items) == 4


async def test_webhooks_are_listed_by_tenant_the_latest_first(store: Store) -> None:
    for n in range(5):
        await store.webhooks.create(webhook(WebhookKey(TENANT, f"h{n}")), most=MOST)
    await store.webhooks.create(webhook(WebhookKey("other", "x")), most=MOST)
    first = await store.webhooks.list(TENANT, after=None, limit=3)
    rest = await store.webhooks.list(TENANT, after=first.next, limit=3)
    assert [it.key.webhook_id for it in (*first.items, *rest.items)] == [
        "h4",
        "h3",
        "h2",
        "h1",
        "h0",
    ]
    assert rest.next is None


async def test_a_change_requires_the_revision_that_it_was_made_from(store: Store) -> None:
    await store.webhooks.create(webhook(), most=MOST)
    changed = webhook(enabled=False, url="https://example.org/2", progress=Progress())
    assert await store.webhooks.replace(changed, resets=False)
    assert not await store.webhooks.replace(replace(changed, updated_at=77), resets=False)
    found = await store.webhooks.get(KEY)
    assert found == replace(changed, revision=2, progress=PROGRESS)
    assert await store.webhooks.replace(replace(found, progress=Progress()), resets=True)
    found = await store.webhooks.get(KEY)
    assert found is not None
    assert (found.revision, found.fence, found.progress) == (3, 2, Progress())


async def test_a_tenant_gets_no_more_webhooks_than_it_may_have(store: Store) -> None:
    keys = [WebhookKey(TENANT, f"h{n}") for n in range(40)]
    made = await asyncio.gather(
        *(store.webhooks.create(webhook(key), most=Most(9, 2)) for key in keys)
    )
    assert sum(made) == 9
    assert len((await store.webhooks.list(TENANT, after=None, limit=40)).items) == 9
    assert await store.webhooks.create(webhook(WebhookKey("other", "x")), most=Most(9, 2))
    assert not await store.webhooks.create(webhook(WebhookKey(TENANT, "more")), most=Most(9, 2))
    assert await store.webhooks.delete(keys[made.index(True)])
    assert await store.webhooks.create(webhook(WebhookKey(TENANT, "more")), most=Most(9, 2))


async def test_only_the_holder_of_the_fence_writes_progress(store: Store) -> None:
    await store.webhooks.create(webhook(progress=Progress()), most=MOST)
    [lease] = await store.webhooks.lease("node", 60, 10)
    assert lease.key == KEY
    assert await store.webhooks.save(KEY, lease.fence, PROGRESS)
    assert not await store.webhooks.save(KEY, lease.fence + 1, Progress())
    found = await store.webhooks.get(KEY)
    assert found is not None
    assert found.progress == PROGRESS
    # A caller begins again elsewhere: what the node was about to write counts no more.
    assert await store.webhooks.replace(replace(found, progress=Progress()), resets=True)
    assert not await store.webhooks.save(KEY, lease.fence, PROGRESS)
    assert [one.fence for one in await store.webhooks.lease("node", 60, 10)] == [lease.fence + 1]
    await store.webhooks.delete(KEY)
    assert not await store.webhooks.save(KEY, lease.fence + 1, PROGRESS)
    await store.webhooks.release("node")


async def test_r55_input_requests_stand_between_the_terminal_events(
    store: Store, story: Story
) -> None:
    other = Story(store, "other")
    stranger = Story(store, "stranger", tenant="elsewhere")
    await story.play("a")  # 1
    for one in (story, other, stranger):
        await one.accept(f"b-{one.session_id}")
        await one.start()
    first = await ask(story, question("1"), question("2"))
    [strange] = await ask(stranger, question())
    [second] = await ask(other, question())
    await Story(store, "third").play("c")  # 2
    await answer(other, "b-other", second)
    [third] = await ask(other, question("2"))
    found = await store.webhooks.inputs(TENANT, after=START, upto=store.position, limit=MANY)
    names = [it.request.input_request_id for it in found]
    assert names == [*first, second, third]
    assert [it.place.position for it in found] == [1, 1, 1, 2]
    assert sorted(it.place for it in found) == [it.place for it in found]
    assert len({it.place for it in found}) == 4
    elsewhere = await store.webhooks.inputs("elsewhere", after=START, upto=9, limit=MANY)
    assert [it.request.input_request_id for it in elsewhere] == [strange]
    assert await store.webhooks.last_input() == found[-1].place
    # Every place continues exactly after itself.
    for n, logged in enumerate(found):
        rest = await store.webhooks.inputs(TENANT, after=logged.place, upto=9, limit=MANY)
        assert [it.request.input_request_id for it in rest] == names[n + 1 :]
    early = await store.webhooks.inputs(TENANT, after=START, upto=1, limit=2)
    assert [it.request.input_request_id for it in early] == names[:2]
    own = await store.webhooks.inputs(TENANT, after=START, upto=9, limit=MANY, session_id="other")
    assert [it.request.input_request_id for it in own] == [second, third]


async def test_r55_a_place_is_not_used_again_after_its_session_was_deleted(
    store: Store, story: Story
) -> None:
    await story.accept("a")
    await story.start()
    await ask(story, question())
    before = await store.webhooks.last_input()
    await story.cancel()
    await story.finish()
    await story.remove()
    later = Story(store, "later")
    await later.accept("b")
    await later.start()
    await ask(later, question())
    assert await store.webhooks.last_input() > before
