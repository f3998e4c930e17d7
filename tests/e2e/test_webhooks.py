"""Webhooks over the wire: the client, the command, and what a caller sees of their health."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path

import pytest
from standardwebhooks.webhooks import WebhookVerificationError

from runlane import (
    Client,
    CursorInvalid,
    InvalidArgument,
    PermissionDenied,
    QuotaExceeded,
    RunState,
    Webhook,
    WebhookChanged,
    WebhookEventKind,
    WebhookFilter,
    WebhookNotFound,
)
from runlane.sync import Client as SyncClient
from runlane_server.access import editing
from runlane_server.access.caller import Role
from runlane_server.webhooks.registry import MAX_OF_TENANT
from support.endpoint import Delivery, Endpoint, endpoint
from support.server import ServerProcess, serving

RUNLANE = str(Path(sys.executable).with_name("runlane"))

ALLOWED = ("--webhook-allow-network", "127.0.0.0/8")

EVERYTHING = WebhookFilter(
    session_ids=("a", "b"),
    session_id_prefixes=("c-",),
    labels={"team": "red"},
    agents=("default",),
    states=(RunState.COMPLETED, RunState.FAILED),
    kinds=(WebhookEventKind.RUN_ENDED, WebhookEventKind.INPUT_REQUESTED),
)


@pytest.fixture
async def hooked(tmp_path: Path) -> AsyncIterator[ServerProcess]:
    async with serving(tmp_path, *ALLOWED) as server:
        yield server


@pytest.fixture
async def client(hooked: ServerProcess) -> AsyncIterator[Client]:
    async with Client(hooked.address) as client:
        yield client


@pytest.fixture
async def served() -> AsyncIterator[Endpoint]:
    async with endpoint() as served:
        yield served


async def until(client: Client, webhook_id: str, condition: Callable[[Webhook], bool]) -> Webhook:
    async with asyncio.timeout(30):
        while not condition(found := await client.get_webhook(webhook_id)):
            await asyncio.sleep(0.05)
    return found


async def test_a_webhook_is_managed_by_the_client(client: Client, served: Endpoint) -> None:
    created = await client.create_webhook(served.url, events=EVERYTHING, full=True)
    webhook = created.webhook
    assert (webhook.filter, webhook.full, webhook.enabled) == (EVERYTHING, True, True)
    assert created.secret.startswith("whsec_")
    assert [it.webhook_id async for it in client.list_webhooks()] == [webhook.webhook_id]
    changed = await client.update_webhook(
        webhook.webhook_id, events=WebhookFilter(), full=False, etag=webhook.etag
    )
    assert (changed.filter, changed.full, changed.url) == (WebhookFilter(), False, webhook.url)
    with pytest.raises(WebhookChanged):
        await client.update_webhook(webhook.webhook_id, full=True, etag=webhook.etag)
    rotated = await client.rotate_webhook_secret(webhook.webhook_id)
    assert rotated.secret != created.secret
    assert rotated.webhook.old_secret_expires_at is not None
    await until(client, webhook.webhook_id, lambda it: it.health.confirmed)
    handle = await client.run_accepted("s", "Hello", allow_missing=True)
    await served.until(lambda: served.run_ids() == [handle.run_id])
    found = await until(client, webhook.webhook_id, lambda it: it.health.delivered == 1)
    assert (found.health.failures, found.health.last_error) == (0, "")
    await client.redeliver_webhook(webhook.webhook_id)
    await served.until(lambda: len(served.accepted) == 2)
    await client.redeliver_webhook(webhook.webhook_id, cursor=handle.cursor)
    await served.until(lambda: len(served.accepted) == 3)
    assert len({it.headers["webhook-id"] for it in served.accepted}) == 1
    with pytest.raises(CursorInvalid):
        await client.redeliver_webhook(webhook.webhook_id, cursor="no")
    await client.delete_webhook(webhook.webhook_id)
    with pytest.raises(WebhookNotFound):
        await client.get_webhook(webhook.webhook_id)


async def test_the_synchronous_client_manages_webhooks_too(hooked: ServerProcess) -> None:
    def work() -> None:
        with SyncClient(hooked.address) as client:
            created = client.create_webhook("http://127.0.0.1:9/")
            assert [it.url for it in client.list_webhooks()] == ["http://127.0.0.1:9/"]
            client.delete_webhook(created.webhook.webhook_id)

    await asyncio.to_thread(work)


async def test_r55_a_failing_endpoint_shows(client: Client, served: Endpoint) -> None:
    served.answer = lambda _: 418
    webhook = (await client.create_webhook(served.url)).webhook
    await client.run_accepted("s", "Hello", allow_missing=True)
    found = await until(client, webhook.webhook_id, lambda it: it.health.failures > 0)
    assert found.health.last_error == "HTTP 418"
    assert found.health.failing_since is not None
    assert found.health.held_sessions == 1


async def test_a_tenant_has_a_bounded_number_of_webhooks(client: Client) -> None:
    for _ in range(MAX_OF_TENANT):
        await client.create_webhook("http://127.0.0.1:9/", enabled=False)
    with pytest.raises(QuotaExceeded, match="delete one first"):
        await client.create_webhook("http://127.0.0.1:9/")


async def test_r55_without_the_setting_no_local_address_is_reached(
    tmp_path: Path, served: Endpoint
) -> None:
    async with serving(tmp_path) as server, Client(server.address) as client:
        with pytest.raises(InvalidArgument, match="global"):
            await client.create_webhook(f"https://127.0.0.1:{served.port}/")
        webhook = (await client.create_webhook(f"https://localhost:{served.port}/")).webhook
        found = await until(client, webhook.webhook_id, lambda it: bool(it.health.last_error))
        assert "not allowed" in found.health.last_error
        assert served.connections == 0


async def test_a_role_manages_webhooks_and_nothing_else(tmp_path: Path) -> None:
    access = tmp_path / "access.toml"
    hooks = editing.add(access, "hooks", tenant="acme", role=Role.WEBHOOKS)
    runner = editing.add(access, "runner", tenant="acme", role=Role.OPERATOR)
    async with (
        serving(tmp_path, "--access", str(access), *ALLOWED, "--log-format", "json") as server,
        Client(server.address, token=hooks) as manager,
        Client(server.address, token=runner) as operator,
    ):
        created = await manager.create_webhook("http://127.0.0.1:9/secret-path")
        with pytest.raises(PermissionDenied):
            await manager.run_accepted("s", "x", allow_missing=True)
        with pytest.raises(PermissionDenied):
            await operator.get_webhook(created.webhook.webhook_id)
        await manager.delete_webhook(created.webhook.webhook_id)
        lines = [line for line in server.log.splitlines() if "runlane.audit" in line]
        assert [json.loads(line)["method"] for line in lines] == [
            "WebhookService/CreateWebhook",
            "WebhookService/DeleteWebhook",
        ]
        assert "secret-path" not in server.log
        assert created.secret not in server.log


@pytest.mark.sqlite("it reads the file")
async def test_the_database_holds_no_secret(tmp_path: Path, served: Endpoint) -> None:
    keys = tmp_path / "keys"
    keys.write_text("AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\n")
    keys.chmod(0o600)
    async with serving(tmp_path, *ALLOWED) as server, Client(server.address) as client:
        plain = await client.create_webhook(served.url)
        await until(client, plain.webhook.webhook_id, lambda it: it.health.confirmed)
        await server.logs("not encrypted in the store; use --webhook-keys")
    async with (
        serving(tmp_path, *ALLOWED, "--webhook-keys", str(keys)) as server,
        Client(server.address) as client,
    ):
        created = await client.create_webhook(served.url)
        rotated = await client.rotate_webhook_secret(created.webhook.webhook_id)
        await client.run_accepted("s", "Hello", allow_missing=True)
        await served.until(lambda: len(served.accepted) == 2)
        for secret in (plain.secret, created.secret):
            assert any(_is_signed(delivery, secret) for delivery in served.accepted)
        assert server.log.count("not encrypted") == 1  # of the first start
    with closing(sqlite3.connect(tmp_path / "runlane.db")) as database:
        rows = str(database.execute("SELECT secrets FROM webhooks").fetchall())
    assert rows.count("sealed:1:") == 3
    for secret in (plain.secret, created.secret, rotated.secret):
        assert secret.removeprefix("whsec_") not in rows


def _is_signed(delivery: Delivery, secret: str) -> bool:
    try:
        delivery.verify(secret)
    except WebhookVerificationError:
        return False
    return True


async def command(server: ServerProcess, *arguments: str) -> tuple[int | None, str]:
    process = await asyncio.create_subprocess_exec(
        *(RUNLANE, "-S", server.address, "webhooks", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await process.communicate()
    return process.returncode, out.decode()


async def test_the_command_manages_webhooks(
    hooked: ServerProcess, client: Client, served: Endpoint
) -> None:
    code, out = await command(
        hooked, "create", served.url, "--state", "failed", "--label", "a=b", "-s", "x"
    )
    webhook_id, secret = out.strip().split("\t")
    assert (code, secret[:6]) == (0, "whsec_")
    found = await client.get_webhook(webhook_id)
    assert found.filter == WebhookFilter(("x",), labels={"a": "b"}, states=(RunState.FAILED,))
    _, shown = await command(hooked, "show", webhook_id)
    assert json.loads(shown)["url"] == served.url
    assert (await command(hooked, "update", webhook_id, "--everything", "--disable"))[0] == 0
    found = await client.get_webhook(webhook_id)
    assert (found.filter, found.enabled) == (WebhookFilter(), False)
    code, out = await command(hooked)
    assert out.split("\t")[1:3] == [webhook_id, "disabled"]
    assert (await command(hooked, "redeliver", webhook_id, "--from-beginning"))[0] == 0
    assert (await command(hooked, "redeliver", webhook_id))[0] == 2
    code, out = await command(hooked, "rotate-secret", webhook_id, "--expire-now")
    assert out.strip() not in {"", secret}
    assert (await command(hooked, "delete", webhook_id))[0] == 0
    code, out = await command(hooked, "show", webhook_id)
    assert (code, "there is no webhook" in out) == (1, True)
