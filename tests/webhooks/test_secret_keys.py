"""Secrets of webhooks are encrypted in the store, with keys that it does not hold."""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from runlane_server.core.errors import SettingsError
from runlane_server.store.base import Store
from runlane_server.store.webhooks import Most, Webhook, WebhookKey
from runlane_server.webhooks.secret_keys import SecretKeys, SecretLocked, is_sealed
from runlane_server.webhooks.signature import new_secret
from support.deliveries import delivering
from support.endpoint import Endpoint, endpoint
from support.story import TENANT, Story

pytest.importorskip("cryptography")

OLD, NEW = (bytes([n]) * 32 for n in (1, 2))
SECRET = new_secret()


@pytest.fixture
async def served() -> AsyncIterator[Endpoint]:
    async with endpoint() as served:
        yield served


async def stored(store: Store, webhook: Webhook) -> tuple[str, ...]:
    found = await store.webhooks.get(webhook.key)
    assert found is not None
    return found.secrets


async def deliver(store: Store, served: Endpoint, run_id: str) -> None:
    """Ends a run, and verifies that its delivery is signed with the secret."""
    await Story(store, f"s-{run_id}").play(run_id)
    await served.until(lambda: run_id in served.run_ids())
    served.accepted[-1].verify(SECRET)


async def test_the_store_holds_no_secret(store: Store, served: Endpoint) -> None:
    async with delivering(store, keys=SecretKeys([NEW])) as node:
        webhook = await node.create(served.url, secret=SECRET)
        assert node.webhooks.secret_of(webhook) == SECRET
        await deliver(store, served, "a")
        rotated = await node.webhooks.rotate(webhook.key, "", expire_now=False)
        assert node.webhooks.secret_of(rotated) != SECRET
        texts = await stored(store, webhook)
    assert len(texts) == 2
    assert all(map(is_sealed, texts))
    assert SECRET.removeprefix("whsec_") not in str(texts)


async def test_plain_secrets_are_encrypted_at_the_start(store: Store, served: Endpoint) -> None:
    async with delivering(store) as node:
        webhook = await node.create(served.url, secret=SECRET)
        asleep = await node.create(served.url, secret=SECRET, enabled=False)
        assert await stored(store, webhook) == (SECRET,)
    async with delivering(store, keys=SecretKeys([NEW])) as node:
        for one in (webhook, asleep):
            found = await node.until(one, lambda it: is_sealed(it.secrets[0]))
            assert found.url == served.url
        await deliver(store, served, "a")


async def test_a_rotated_key_encrypts_again_and_the_old_one_can_go(
    store: Store, served: Endpoint
) -> None:
    async with delivering(store, keys=SecretKeys([OLD])) as node:
        webhook = await node.create(served.url, secret=SECRET)
    before = await stored(store, webhook)
    async with delivering(store, keys=SecretKeys([OLD, NEW])) as node:  # each node knows both
        await deliver(store, served, "a")
        assert await stored(store, webhook) == before
    async with delivering(store, keys=SecretKeys([NEW, OLD])) as node:
        await node.until(webhook, lambda it: it.secrets != before)
        await deliver(store, served, "b")
    async with delivering(store, keys=SecretKeys([NEW])) as node:
        await deliver(store, served, "c")


@pytest.mark.parametrize("left", [(), (NEW,)])
async def test_a_lost_key_stops_deliveries_and_names_the_remedy(
    store: Store, served: Endpoint, left: tuple[bytes, ...]
) -> None:
    async with delivering(store, keys=SecretKeys([OLD])) as node:
        webhook = await node.create(served.url, secret=SECRET)
        await deliver(store, served, "a")
        await node.until(webhook, lambda it: it.progress.delivered == 1)
    async with delivering(store, keys=SecretKeys(left)) as node:
        found = await node.until(webhook, lambda it: bool(it.progress.last_error))
        assert "add that key, or rotate the secret" in found.progress.last_error
        assert found.progress.failing_since is not None
        assert (found.progress.disabled, found.progress.failures) == ("", 0)
        assert node.parts.counts.locked == 1
        # Others are delivered.
        other = await node.create(served.url, secret=SECRET)
        await deliver(store, served, "b")
        assert len(served.accepted) == 2
        await node.webhooks.delete(other.key)
    async with delivering(store, keys=SecretKeys([OLD])) as node:  # it is found again
        await served.until(lambda: len(served.accepted) == 3)
        assert served.accepted[-1].data["runId"] == "b"
        await node.until(webhook, lambda it: it.progress.failing_since is None)


async def test_a_rotation_replaces_a_secret_whose_key_is_lost(
    store: Store, served: Endpoint
) -> None:
    async with delivering(store, keys=SecretKeys([OLD])) as node:
        webhook = await node.create(served.url)
    async with delivering(store, keys=SecretKeys([NEW])) as node:
        await node.until(webhook, lambda it: bool(it.progress.last_error))
        rotated = await node.webhooks.rotate(webhook.key, SECRET, expire_now=False)
        assert (len(rotated.secrets), rotated.old_secret_until) == (1, None)
        await deliver(store, served, "a")


def sealed(keys: SecretKeys, webhook_id: str = "w") -> str:
    return keys.seal(WebhookKey(TENANT, webhook_id), SECRET)


def test_a_secret_is_bound_to_its_webhook() -> None:
    keys = SecretKeys([OLD])
    text = sealed(keys)
    assert keys.open(WebhookKey(TENANT, "w"), text) == SECRET
    for other in (WebhookKey(TENANT, "x"), WebhookKey("other", "w")):
        with pytest.raises(SecretLocked, match="belongs to another webhook"):
            keys.open(other, text)


@pytest.mark.parametrize("change", [lambda it: it[:-8], lambda it: it + "!", lambda it: it[:19]])
def test_a_damaged_secret_is_refused(change: object) -> None:
    keys = SecretKeys([OLD])
    with pytest.raises(SecretLocked, match="damaged"):
        keys.open(WebhookKey(TENANT, "w"), change(sealed(keys)))  # type: ignore[operator]


def test_the_same_secret_never_looks_the_same() -> None:
    keys = SecretKeys([OLD])
    assert len({sealed(keys) for _ in range(100)}) == 100


def write(path: Path, text: str, mode: int = 0o600) -> str:
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_keys_are_read_from_a_file(tmp_path: Path) -> None:
    lines = ["# current", b64encode(NEW).decode(), "", b64encode(OLD).decode() + "  "]
    keys = SecretKeys.read(write(tmp_path / "keys", "\n".join(lines)))
    assert keys.open(WebhookKey(TENANT, "w"), sealed(SecretKeys([OLD]))) == SECRET
    assert sealed(keys).rpartition(":")[0] == sealed(SecretKeys([NEW])).rpartition(":")[0]
    assert not SecretKeys.read(None)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "has no key; run: openssl rand -base64 32"),
        ("# only a comment\n", "has no key"),
        ("c2hvcnQ=\n", "line 1: is not the base64 of 32 bytes"),
        (b64encode(OLD).decode() + "\npassword!\n", "line 2: is not the base64"),
        ("é" * 44, "line 1: is not the base64"),
        ("\n".join(b64encode(os.urandom(32)).decode() for _ in range(9)), "more than 8 keys"),
    ],
)
def test_a_wrong_file_of_keys_says_so_and_shows_nothing_of_it(
    tmp_path: Path, text: str, problem: str
) -> None:
    path = write(tmp_path / "keys", text)
    with pytest.raises(SettingsError, match="--webhook-keys: ") as raised:
        SecretKeys.read(path)
    assert problem in str(raised.value)
    assert "password" not in str(raised.value)


def test_a_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "keys", b64encode(OLD).decode(), 0o644)
    with pytest.raises(SettingsError, match=r"--webhook-keys: other users .* chmod 600"):
        SecretKeys.read(path)
    with pytest.raises(SettingsError, match="No such file"):
        SecretKeys.read(str(tmp_path / "missing"))


async def test_a_webhook_without_keys_keeps_what_cannot_be_read(store: Store) -> None:
    """Reading a row never changes what its key, found again, decrypts."""
    text = sealed(SecretKeys([OLD]), "hook")
    async with delivering(store) as node:
        made = await node.create("http://127.0.0.1:9/", enabled=False)
        await store.webhooks.delete(made.key)
        key = WebhookKey(TENANT, "hook")
        await store.webhooks.create(replace(made, key=key, secrets=(text,)), most=Most(100, 100))
        node.dispatcher.wake()
        await node.until(replace(made, key=key), lambda it: bool(it.progress.last_error))
        changed = await node.webhooks.update(
            key, lambda it: replace(it, enabled=True), revision=None
        )
        assert await stored(store, changed) == (text,)
