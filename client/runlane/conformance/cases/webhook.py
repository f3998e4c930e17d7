"""The cases of R55: webhooks."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from runlane.client import Client
from runlane.conformance.cases.answer import ask, requested
from runlane.conformance.context import CaseContext, say
from runlane.conformance.rules import Need, case, expect
from runlane.errors import WebhookNotFound
from runlane.webhooks import WebhookFilter, WebhookRun


@dataclass(frozen=True, slots=True)
class _Delivery:
    headers: Mapping[str, str]
    body: bytes

    @property
    def message(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = json.loads(self.body)
        return found

    @property
    def event(self) -> tuple[str, str]:
        """The type of the event, and the run."""
        return self.message["type"], self.message["data"]["runId"]

    def is_signed(self, secret: str) -> bool:
        """Whether it has the signature that Standard Webhooks define."""
        key = base64.b64decode(secret.removeprefix("whsec_"))
        name, seconds = self.headers["webhook-id"], self.headers["webhook-timestamp"]
        made = hmac.new(key, f"{name}.{seconds}.".encode() + self.body, hashlib.sha256).digest()
        mine = f"v1,{base64.b64encode(made).decode()}"
        return mine in self.headers["webhook-signature"].split()


@dataclass
class _Endpoint:
    """An endpoint on this machine; it answers challenges and accepts all deliveries."""

    url: str = ""
    arrived: asyncio.Queue[_Delivery] = field(default_factory=asyncio.Queue)
    _open: dict[asyncio.Task[Any], asyncio.StreamWriter] = field(default_factory=dict)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - of asyncio
        self._open[task] = writer
        try:
            while True:
                await self._exchange(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()
        finally:
            del self._open[task]

    async def close(self) -> None:
        """Ends all connections."""
        for writer in self._open.values():
            writer.transport.abort()
        if self._open:
            await asyncio.wait(tuple(self._open))

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        lines = [line.partition(": ") for line in head.split("\r\n")[1:]]
        headers = {name.lower(): value for name, _, value in lines}
        found = _Delivery(headers, await reader.readexactly(int(headers["content-length"])))
        answer = b""
        if found.message["type"] == "webhook.challenge":
            answer = found.message["data"]["challenge"].encode()
        else:
            self.arrived.put_nowait(found)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(answer) + answer)
        await writer.drain()

    async def next(self, ctx: CaseContext) -> _Delivery:
        """Waits for the next delivery."""
        async with ctx.time_limit("a delivery"):
            return await self.arrived.get()


@asynccontextmanager
async def _endpoint() -> AsyncIterator[_Endpoint]:
    made = _Endpoint()
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    try:
        yield made
    finally:
        server.close()
        await made.close()


@case(55, Need.WEBHOOKS)
async def _signed_in_order(ctx: CaseContext) -> None:
    """Events of a session are delivered signed and in its order."""
    endpoint = await ctx.exit_stack.enter_async_context(_endpoint())
    wanted = WebhookFilter(session_ids=(ctx.session,))
    made = await ctx.client.create_webhook(endpoint.url, events=wanted)
    ctx.exit_stack.push_async_callback(ctx.client.delete_webhook, made.webhook.webhook_id)
    await ctx.wait_for_end(await ctx.accept(say("x"), session=f"{ctx.session} other"))
    first = await ctx.accept(say("one"))
    second = await ctx.accept(ask())
    [request] = await requested(ctx, second)
    await ctx.client.answer_input(request, "this")
    third = await ctx.accept(say("three"))
    await ctx.wait_for_end(third)
    expected = [
        ("run.ended", first.run_id),
        ("input.requested", second.run_id),
        ("run.ended", second.run_id),
        ("run.ended", third.run_id),
    ]
    found: list[_Delivery] = []
    while len({one.headers["webhook-id"] for one in found}) < len(expected):
        found.append(await endpoint.next(ctx))
    expect("deliveries", list(dict.fromkeys(one.event for one in found)), expected)
    unsigned = [one.event for one in found if not one.is_signed(made.secret)]
    expect("deliveries that are not signed", unsigned, [])


@case(55, Need.WEBHOOKS)
async def _of_one_run(ctx: CaseContext) -> None:
    """A webhook of one run delivers the events of no other run."""
    endpoint = await ctx.exit_stack.enter_async_context(_endpoint())
    run_id = f"{ctx.session} run"
    made = await ctx.client.create_webhook(endpoint.url, run=WebhookRun(run_id))
    ctx.exit_stack.push_async_callback(_delete_if_there, ctx.client, made.webhook.webhook_id)
    await ctx.wait_for_end(await ctx.accept(say("one")))
    await ctx.wait_for_end(await ctx.accept(say("two"), run_id=run_id))
    expect("delivery", (await endpoint.next(ctx)).event, ("run.ended", run_id))


async def _delete_if_there(client: Client, webhook_id: str) -> None:
    with suppress(WebhookNotFound):  # the server deletes it once the end of its run is delivered
        await client.delete_webhook(webhook_id)
