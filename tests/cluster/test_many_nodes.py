"""A subscription on a node that lags behind another one."""

from __future__ import annotations

import pytest

from runlane.v1 import run_service_pb2 as pb
from runlane_server.store.open import StoreUrl, open_store
from support.rpc_wire import serving


async def test_r25_a_cursor_ahead_of_a_lagging_node_is_accepted(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from support.postgres import listening, postgres_store  # noqa: PLC0415 - an optional extra

    monkeypatch.setattr("runlane_server.store.postgres.log.POLL_SECONDS", 3_600.0)
    store, lagging = (
        postgres_store(postgres_url),
        open_store(StoreUrl.parse(postgres_url)),
    )
    async with serving(store=store) as one, serving(store=lagging) as two:
        await listening(postgres_url, 2)
        await store._open.notifier.close()
        wanted = pb.RunAcceptedRequest(session_id="s", prompt='[{"text": "x"}]', allow_missing=True)
        run_id = (await one.runs.RunAccepted(wanted)).run.run_id
        await one.runs.WaitRun(pb.WaitRunRequest(run_id=run_id))
        first = one.runs.SubscribeRunComplete(pb.SubscribeRunCompleteRequest(from_beginning=True))
        async for answer in first:
            if answer.WhichOneof("event") == "run_complete":
                break
        first.cancel()
        assert lagging.position == 0
        resumed = two.runs.SubscribeRunComplete(
            pb.SubscribeRunCompleteRequest(cursor=answer.cursor)
        )
        async for mark in resumed:
            assert mark.cursor == answer.cursor
            break
        resumed.cancel()
        assert lagging.position == 1
