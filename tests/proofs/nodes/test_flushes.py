"""The writes of several nodes over a PostgreSQL with a slow flush."""

from __future__ import annotations

from statistics import median

import pytest

from support.postgres import own_postgres

pytest.importorskip("asyncpg")

from proofs.nodes.flushes import FLUSH, measure


async def test_accept_at_eight_nodes_does_not_wait_for_ends() -> None:
    """The ends take turns, so that one waits for about as many flushes as there are nodes."""
    with own_postgres() as server:
        server.flush_in(FLUSH)
        await server.restart()
        waits = await measure(server, nodes=8, seconds=4.0)
    accept, end = (median(it) / FLUSH for it in (waits.accepts, waits.ends))
    print(f"accept {accept:.1f} flushes, end {end:.1f}")
    assert end > 6
    # It takes 2 to 3 flushes on an idle machine. Behind the ends it takes more than half the time
    # of an end, also on a busy machine.
    assert accept < end / 4
