"""Webhooks of single runs: which events they deliver, and when they are deleted."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from runlane_server.core.errors import InvalidArgument, QuotaExceeded, WebhookNotFound
from runlane_server.store.base import Store
from runlane_server.store.memory.store import MemoryStore
from runlane_server.store.webhooks import A2A, STANDARD, OfRun, Webhook
from runlane_server.webhooks import delivery, log_reader, registry
from runlane_server.webhooks.lifetime import Lifetime
from runlane_server.webhooks.log_reader import LogReader
from runlane_server.webhooks.secret_keys import SecretKeys
from support.asking import ask, question
from support.deliveries import Node, delivering, new_node
from support.endpoint import endpoint
from support.story import TENANT, Story

SHORT = Lifetime(delivered=0.0, unconfirmed=0.0, unused=0.0, look=0.01)

HEADERS = '{"Authorization": "Bearer secret"}'


def of_run(run_id: str, name: str = "", format_: str = STANDARD) -> OfRun:
    return OfRun(run_id, name, format_, HEADERS, "Bearer")


async def until_deleted(node: Node, webhook: Webhook) -> None:
    async with asyncio.timeout(10):
        while True:
            try:
                await node.current(webhook)
            except WebhookNotFound:
                return
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("format_", [STANDARD, A2A])
async def test_r55_a_webhook_of_a_run_delivers_its_events_and_is_deleted(
    store: Store, format_: str
) -> None:
    lifetime = replace(SHORT, unused=60.0)
    async with delivering(store, lifetime=lifetime) as node, endpoint() as served:
        webhook = await node.create(served.url, of_run=of_run("mine", format_=format_))
        story = Story(store, "s")
        await story.play("other")
        asking = Story(store, "t")
        await asking.accept("asks")
        await asking.start()
        await ask(asking, question())
        await story.play("mine")
        await story.play("later")
        await until_deleted(node, webhook)
        assert len(served.accepted) == 1
        found = served.accepted[0]
        run_id = found.data["runId"] if format_ == STANDARD else found.message["statusUpdate"]
        assert run_id == "mine" or run_id["taskId"] == "mine"
        assert found.headers["authorization"] == "Bearer secret"


async def test_r55_a_webhook_of_a_run_survives_until_its_event_arrives(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its endpoint fails: nothing is deleted before it is back."""
    monkeypatch.setattr(delivery, "SAVE_SECONDS", 0.01)
    is_bad = True
    async with (
        delivering(store, lifetime=SHORT) as node,
        endpoint(answer=lambda _: 500 if is_bad else 200) as served,
    ):
        story = Story(store, "s")
        await story.accept("mine")
        webhook = await node.create(served.url, of_run=of_run("mine"))
        await Story(store, "t").play("other")
        await story.cancel()
        await served.until(lambda: len(served.attempts) >= 12)
        await node.current(webhook)
        is_bad = False
        await served.until(lambda: len(served.accepted) == 1)
        await until_deleted(node, webhook)


async def test_a_webhook_of_a_run_is_deleted_once_the_end_is_delivered(store: Store) -> None:
    async with delivering(store) as node, endpoint() as served:
        webhook = await node.create(served.url, of_run=of_run("mine"))
        story = Story(store, "s")
        await story.play("mine")
        await until_deleted(node, webhook)
        assert len(served.accepted) == 1


async def test_r55_a_webhook_of_a_run_that_has_ended_delivers_the_end(store: Store) -> None:
    """It delivers neither the questions, which nobody can answer any more, nor other ends."""
    async with delivering(store) as node, endpoint() as served:
        await Story(store, "s").play("before")
        story = Story(store, "t")
        await story.accept("mine")
        await story.start()
        await ask(story, question())
        await story.cancel()
        await story.finish()
        await Story(store, "u").play("after")
        webhook = await node.create(served.url, of_run=of_run("mine"))
        await until_deleted(node, webhook)
        assert [it.data["runId"] for it in served.accepted] == ["mine"]
        assert [it.message["type"] for it in served.accepted] == ["run.ended"]


async def test_r55_a_webhook_of_a_run_that_ended_while_nobody_delivered_delivers_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The next node looks at the run before it has read the log."""
    monkeypatch.setattr(delivery, "SAVE_SECONDS", 0.01)
    async with MemoryStore() as store, endpoint() as served:
        async with delivering(store) as node:
            story = Story(store, "s")
            await story.accept("mine")
            webhook = await node.create(served.url, of_run=of_run("mine"))
            await node.until(webhook, lambda it: bool(it.progress.confirmed))
        await story.cancel()
        looked = asyncio.Event()
        is_over, read = delivery.is_over, LogReader.next

        async def look(*args: Any, **options: Any) -> bool:
            found = await is_over(*args, **options)
            if looked_once:
                looked.set()
            looked_once.append(found)
            return found

        async def read_later(self: LogReader, timeout: float) -> Any:
            await looked.wait()
            return await read(self, timeout)

        looked_once: list[bool] = []
        monkeypatch.setattr(delivery, "is_over", look)
        monkeypatch.setattr(LogReader, "next", read_later)
        async with delivering(store, lifetime=SHORT) as node:
            await until_deleted(node, webhook)
        assert looked_once[0]
        assert len(served.accepted) == 1


@pytest.mark.parametrize("case", ["unused", "unconfirmed", "disabled"])
async def test_a_webhook_of_a_run_that_will_never_deliver_is_deleted(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_reader, "LOOK_SECONDS", 0.0)
    async with MemoryStore() as store:
        kept = {"unused": 600.0, "unconfirmed": 600.0} | {case: 0.0}
        kept.pop("disabled", None)
        lifetime = replace(SHORT, **kept)
        options: dict[str, Any] = {"answers_challenges": case != "unconfirmed"}
        async with delivering(store, lifetime=lifetime) as node, endpoint(**options) as served:
            served.answer = lambda _: 410
            story = Story(store, "s")
            await story.accept("other" if case == "unused" else "mine")
            webhook = await node.create(served.url, of_run=of_run("mine"))
            await story.cancel()
            await until_deleted(node, webhook)
            assert not served.accepted


async def test_a_webhook_of_a_run_is_replaced_by_its_name_and_goes_on(store: Store) -> None:
    async with delivering(store) as node, endpoint() as served:
        served.gate.clear()
        first = await node.create(f"{served.url}1", of_run=of_run("mine", "n"))
        await Story(store, "s").play("mine")
        await served.until(lambda: len(served.attempts) == 1)  # it waits at the gate
        second = await node.create(f"{served.url}2", of_run=of_run("mine", "n"))
        assert (second.key, second.revision) == (first.key, 2)
        page = await node.webhooks.list(TENANT, after=None, limit=9, run_id="mine")
        assert [it.url for it in page.items] == [f"{served.url}2"]
        served.gate.set()
        await served.until(lambda: any(it.path == "/hook2" for it in served.accepted))


async def test_the_credentials_of_a_webhook_are_sent_to_no_other_url(store: Store) -> None:
    node = new_node(store)
    url, other = "http://127.0.0.1:9/", "http://127.0.0.1:9/other"

    def moved(webhook: Webhook) -> Webhook:
        return replace(webhook, url=other)

    keyed = await node.create(url, of_run=of_run("mine", "keyed"))
    with pytest.raises(InvalidArgument, match=r"url: cannot change.*create the webhook"):
        await node.webhooks.update(keyed.key, moved, revision=None)
    assert (await node.current(keyed)).url == url
    await node.webhooks.update(keyed.key, lambda it: replace(it, full=True), revision=None)
    for bound in (None, OfRun("mine", "open")):
        webhook = await node.create(url, of_run=bound)
        assert (await node.webhooks.update(webhook.key, moved, revision=None)).url == other
    node.feed.close()
    node.parts.sender.close()


async def test_concurrent_creations_of_one_name_make_one_webhook(store: Store) -> None:
    node = new_node(store)
    made = await asyncio.gather(
        *(node.create("http://127.0.0.1:9/", of_run=of_run("r", "n")) for _ in range(4))
    )
    assert len({it.key for it in made}) == 1
    page = await node.webhooks.list(TENANT, after=None, limit=9)
    assert len(page.items) == 1
    node.feed.close()
    node.parts.sender.close()


async def test_runs_and_tenants_have_limits(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "MAX_FOR_RUNS", 3)
    monkeypatch.setattr(registry, "MAX_OF_RUN", 2)
    node = new_node(store)
    url = "http://127.0.0.1:9/"
    for run_id, name in (("a", "1"), ("a", "2"), ("b", "1")):
        await node.create(url, of_run=of_run(run_id, name))
    for run_id, owner in (("a", "run 'a' has 2 webhooks"), ("c", "has 3 webhooks of runs")):
        with pytest.raises(QuotaExceeded, match=owner):
            await node.create(url, of_run=of_run(run_id, "3"))
    await node.create(url)
    await node.create(url, of_run=of_run("a", "2"))  # it is replaced
    node.feed.close()
    node.parts.sender.close()


async def test_the_headers_of_a_webhook_are_encrypted_in_the_store() -> None:
    old, new = SecretKeys([b"a" * 32]), SecretKeys([b"b" * 32, b"a" * 32])
    async with MemoryStore() as store:
        stored: Webhook | None = None
        for keys in (SecretKeys(), old, new):
            async with delivering(store, keys=keys) as node, endpoint() as served:
                webhook = await node.create(served.url, of_run=of_run("mine", "n"))
                stored = await store.webhooks.get(webhook.key)
                assert stored is not None
                assert stored.of_run is not None
                assert ("secret" in stored.of_run.headers) == (not keys)
                assert keys.headers(stored) == {"Authorization": "Bearer secret"}
                assert keys.sealed(stored) is stored
        assert stored is not None
        moved = new.sealed(replace(stored, of_run=of_run("mine", "n")))
        assert moved.of_run is not None
        assert "secret" not in moved.of_run.headers
        assert new.headers(moved) == {"Authorization": "Bearer secret"}
