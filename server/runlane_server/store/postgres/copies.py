"""The copies that forks begin with. The database copies its rows, a statement for each piece."""

from __future__ import annotations

from collections.abc import Sequence

from runlane_server.core.model import SessionKey
from runlane_server.store.base import MessagePlace, NewSession, SessionTaken, Stale
from runlane_server.store.codec import encode_metadata
from runlane_server.store.copies import (
    SIZES_PER_READ,
    CopyPlan,
    MessageSize,
    MessagesPiece,
    PartSize,
    Piece,
    message_sizes,
    part_sizes,
    with_pieces,
)
from runlane_server.store.postgres.pool import Pool
from runlane_server.store.postgres.schema import SQL
from runlane_server.store.postgres.text import escape
from runlane_server.store.weight import session_weight


class PostgresCopies:
    """Plans and makes copies. It implements `SizeReader`."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def plan(self, key: SessionKey, turn: int) -> CopyPlan | None:
        """See `Store.plan_copy`."""
        row = await self._pool.fetchrow(SQL["copy_source"], *map(escape, key), tenant=key.tenant)
        if row is None:
            return None
        plan = CopyPlan(key, turn, row["created_no"], row["created_at"])
        return await with_pieces(plan, row["copy_id"] or 0, self)

    async def messages(
        self, plan: CopyPlan, copy_id: int, after: MessagePlace
    ) -> Sequence[MessageSize]:
        """The sizes of the next messages."""
        name = "copied_message_sizes" if copy_id else "message_sizes"
        args = (*_of_source(plan, copy_id), *after, plan.turn, SIZES_PER_READ)
        return message_sizes(await self._pool.fetch(SQL[name], *args, tenant=plan.tenant))

    async def parts(self, plan: CopyPlan, copy_id: int, run_id: str) -> Sequence[PartSize]:
        """The sizes of the parts of a run; its id is in its stored form."""
        name = "copied_part_sizes" if copy_id else "part_sizes"
        args = (_of_source(plan, copy_id)[0], run_id)
        return part_sizes(run_id, await self._pool.fetch(SQL[name], *args, tenant=plan.tenant))

    async def drop_stale(self) -> None:
        """Removes copies that stopped nodes have left."""
        await self._pool.fetch(SQL["drop_stale_copies"])

    async def fork(self, plan: CopyPlan, session: NewSession) -> int:
        """See `Store.fork_session`. Returns the version of the new lane."""
        await self.drop_stale()
        await self._pool.fetch(SQL["start_copy"], plan.copy_id, tenant=plan.tenant)
        try:
            for piece in plan.pieces:
                await self._copy(plan, piece)
            return await self._create(plan, session)
        except (SessionTaken, Stale):
            await self._pool.fetch(SQL["drop_copy"], plan.copy_id, tenant=plan.tenant)
            raise

    async def _copy(self, plan: CopyPlan, piece: Piece) -> None:
        source = _of_source(plan, piece.copy_id)
        copied = "copied_" if piece.copy_id else ""
        args: tuple[object, ...]
        if isinstance(piece, MessagesPiece):
            name, args = f"copy_{copied}messages", (*source, *piece.after, *piece.upto)
        else:
            name = f"copy_{copied}parts"
            args = (source[0], piece.run_id, piece.attempt, piece.first, piece.last)
        row = await self._pool.fetchrow(SQL[name], plan.copy_id, *args, tenant=plan.tenant)
        if not row["held"]:
            raise Stale.lane()

    async def _create(self, plan: CopyPlan, session: NewSession) -> int:
        row = await self._pool.fetchrow(
            SQL["create_fork"],
            *map(escape, plan.source),
            plan.session_no,
            plan.copy_id,
            plan.turn,
            escape(session.key.session_id),
            escape(session.title),
            encode_metadata(session.metadata),
            session.agent,
            plan.size + session_weight(session.title, session.metadata),
            session.created_at,
            tenant=plan.tenant,
        )
        version: int = row["version"]
        if version < 0:
            raise Stale.lane()
        if version == 0:
            raise SessionTaken
        return version


def _of_source(plan: CopyPlan, copy_id: int) -> tuple[object, ...]:
    """The parameters that name the source: a copy, or a session."""
    return (copy_id,) if copy_id else tuple(map(escape, plan.source))
