# ruff: noqa: S608 - every value is an argument
"""The statements of filtered lists, for SQLite and PostgreSQL.

A statement reads numbers in the order of the list from one index, the most selective one that a
filter has, and drops the rows that the other filters exclude. It reads at most `SCAN_ROWS` rows, so
no page walks a large table. The statements are composed, because they are as many as combinations
of filters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from runlane_server.core.model import RunState
from runlane_server.store.lookup import (
    ALWAYS,
    COUNT_ROWS,
    SCAN_ROWS,
    Count,
    ListPlace,
    RunFilter,
    SessionFilter,
    Span,
)
from runlane_server.store.records import OPEN_STATES, Row

RUN_COLUMNS = """\
    run_no, run_id, session_id, accept_seq, state, when_busy, turn, timeout, max_attempts, attempt,
    accepted_at, started_at, ended_at, folded_into, cancel_reason, finish_reason, error_reason,
    error_message, message_id, usage, metadata, prompt_fingerprint, prompt_head, agent, retry,
    revision, last_update,
    EXISTS (
        SELECT 1 FROM removals
        WHERE removals.tenant = runs.tenant AND removals.session_id = runs.session_id
    ) AS is_removed,
    (
        SELECT coalesce(max(idx), 0) FROM run_events
        WHERE run_events.tenant = runs.tenant AND run_events.run_id = runs.run_id
    ) AS last_event_index"""

SESSION_COLUMNS = """\
    created_no, session_id, title, metadata, active_run_id, waiting_runs, input_tokens,
    output_tokens, cache_read_tokens, cache_write_tokens, requests, created_at, updated_at, agent,
    origin_id, origin_turn"""


_NOT_REMOVED = """\
(
    SELECT count(*) FROM removals
    WHERE removals.tenant = runs.tenant AND removals.session_id = runs.session_id
) = 0"""
"""The condition that a run does not belong to a deleted session. A count, because a database would
join the table for NOT EXISTS, and choose another order."""


class Statement(NamedTuple):
    """SQL with its arguments, of which the tenant is the first. `drops`: it drops some of the rows
    that it reads, and so may stop before the end of the list."""

    sql: str
    args: tuple[object, ...]
    drops: bool


@dataclass(frozen=True, slots=True)
class Dialect:
    """The differences between the databases.

    `mark` precedes the number of a parameter, and `escape` makes the stored form of a text.
    `by_number`: a row has an index on its number alone, so a list reads numbers from its index and
    then their rows; a statement then names its index. Otherwise a list reads rows at once, and a
    statement repeats the predicate of its index, which is always true.
    `label` is the condition of a row of labels, from a function that adds an argument, a key and a
    value; `any_of` is the condition that a column has one of some values.
    """

    mark: str
    by_number: bool
    escape: Callable[[str], str]
    label: Callable[[Callable[[object], str], str, str], str]
    any_of: Callable[[Callable[[object], str], str, Sequence[str]], str]


class _Table(NamedTuple):
    """A table with the columns of its number and its id, and its table of labels."""

    name: str
    number: str
    id: str
    columns: str
    labels: str


_RUNS = _Table("runs", "run_no", "run_id", RUN_COLUMNS, "run_labels")
_SESSIONS = _Table("sessions", "created_no", "session_id", SESSION_COLUMNS, "session_labels")


class _Query:
    """A statement under construction: its arguments, and its conditions on rows.

    `reach` is the number of rows of its list that are needed, unless `rows` drops some. Without
    `filters` it has no conditions on rows.
    """

    def __init__(
        self,
        dialect: Dialect,
        table: _Table,
        tenant: str,
        *,
        descending: bool,
        reach: int,
        filters: bool,
    ) -> None:
        self.dialect = dialect
        self.table = table
        self.reach = reach
        self.filters = filters
        self._args: list[object] = []
        self.tenant = self.text(tenant)
        self.direction = "DESC" if descending else "ASC"
        self._beyond = "<" if descending else ">"
        self._order = ""
        self.rows: list[str] = []

    def add(self, value: object) -> str:
        """Adds an argument; returns its mark."""
        self._args.append(value)
        return f"{self.dialect.mark}{len(self._args)}"

    def text(self, value: str) -> str:
        """Adds a text of a caller."""
        return self.add(self.dialect.escape(value))

    def always(self, predicate: str) -> list[str]:
        """The predicate of an index that is always true."""
        return [] if self.dialect.by_number else [predicate]

    def span(self, column: str, span: Span) -> list[str]:
        """The conditions that a time is in a range."""
        found = []
        if span.since is not None:
            found.append(f"{column} >= {self.add(span.since)}")
        if span.until is not None:
            found.append(f"{column} < {self.add(span.until)}")
        return found

    def label(self, key: str, value: str) -> str:
        """The condition that a row of labels is this one."""
        return self.dialect.label(self.add, key, value)

    def require_labels(self, labels: Mapping[str, str]) -> None:
        """Requires labels of each row."""
        name, number, table = self.table.name, self.table.number, self.table.labels
        for key, value in labels.items():
            self.rows.append(
                f"EXISTS (SELECT 1 FROM {table} WHERE {table}.tenant = {self.tenant}"
                f" AND {self.label(key, value)} AND {table}.{number} = {name}.{number})"
            )

    def labelled(self, key: str, value: str, after: ListPlace | None) -> str:
        """The list of what has a label."""
        name, table, key_column = self.table.name, self.table.labels, self.table.id
        rows = table
        if not self.dialect.by_number:
            rows += f" JOIN {name} USING (tenant, {key_column})"
        return self._list(rows, table, [self.label(key, value)], after, "")

    def listed(
        self, index: str, conditions: Sequence[str], after: ListPlace | None, order: str = ""
    ) -> str:
        """The list from one index; `order` is the column that it is ordered by, if that is not the
        number."""
        name = self.table.name
        hint = f" INDEXED BY {index}" if self.dialect.by_number else ""
        return self._list(f"{name}{hint}", name, conditions, after, order)

    def _list(
        self, rows: str, name: str, conditions: Sequence[str], after: ListPlace | None, order: str
    ) -> str:
        number = f"{name}.{self.table.number}"
        where = [f"{name}.tenant = {self.tenant}", *conditions]
        if after is not None and order:
            marks = ", ".join([self.add(part) for part in after])
            where.append(f"({order}, {number}) {self._beyond} ({marks})")
        elif after is not None:
            where.append(f"{number} {self._beyond} {self.add(after[1])}")
        by = f"{order} {self.direction}, " if order else ""
        self._order = (f"place {self.direction}, " if order else "") + f"n {self.direction}"
        row = "" if self.dialect.by_number else f", {self.table.name}.*"
        return (
            f"SELECT {order or '0'} AS place, {number} AS n{row}\nFROM {rows}\n"
            f"WHERE {' AND '.join(where)}\n"
            f"ORDER BY {by}{number} {self.direction}"
        )

    def merged(self, lists: Sequence[str]) -> str:
        """The union of lists that are ordered by the number."""
        if len(lists) == 1:
            return lists[0]
        reach = max(self.reach, SCAN_ROWS) if self.rows else self.reach
        parts = [f"SELECT * FROM (\n{one} LIMIT {reach}\n) AS part" for one in lists]
        union = "\nUNION ALL\n".join(parts)
        return f"SELECT * FROM (\n{union}\n) AS parts ORDER BY n {self.direction}"

    def page(self, source: str) -> Statement:
        """The first `reach` rows of a list, if as many are among the first `SCAN_ROWS`."""
        ordered = "" if self.dialect.by_number else f"\nORDER BY {self._order}"
        return self._statement(
            f"SELECT place, n, {self.table.columns}\n{self._rows(source, SCAN_ROWS)}{ordered}"
            f"\nLIMIT {self.add(self.reach)}"
        )

    def last_read(self, source: str) -> Statement:
        """The place of row `SCAN_ROWS` of a list."""
        return self._statement(
            f"SELECT place, n FROM (\n{source} LIMIT 1 OFFSET {SCAN_ROWS - 1}\n) AS found"
        )

    def count(self, source: str) -> Statement:
        """`items`: the matching rows among the first `COUNT_ROWS`; `seen`: all rows of the list, up
        to one more than that."""
        seen = f"SELECT count(*) FROM (\n{source} LIMIT {COUNT_ROWS + 1}\n) AS found"
        if self.table.name == "runs":
            self.rows.append(_NOT_REMOVED)
        items = f"SELECT count(*) {self._rows(source, COUNT_ROWS)}"
        return self._statement(f"SELECT (\n{items}\n) AS items, (\n{seen}\n) AS seen")

    def _rows(self, source: str, limit: int) -> str:
        name = self.table.name
        rows = f"FROM (\n{source} LIMIT {limit}\n) AS "
        if self.dialect.by_number:
            # CROSS JOIN fixes the order of the loops in SQLite, and with it that of the rows.
            rows += f"found CROSS JOIN {name} ON {name}.{self.table.number} = found.n"
        else:
            rows += name
        return rows + (f"\nWHERE {' AND '.join(self.rows)}" if self.rows else "")

    def _statement(self, sql: str) -> Statement:
        return Statement(sql, tuple(self._args), bool(self.rows))


class Lookup:
    """The statements of one list: its page after a place, and its count."""

    def __init__(self, make: Callable[[ListPlace | None, int, bool], tuple[_Query, str]]) -> None:
        self._make = make

    def page(self, after: ListPlace | None, limit: int) -> Statement:
        """The rows of a page after a place, and one more if the list goes on."""
        query, source = self._make(after, limit + 1, True)
        return query.page(source)

    def last_read(self, after: ListPlace | None) -> Statement:
        """The place where a page that is not full stops to read; no row at the end of the list."""
        query, source = self._make(after, SCAN_ROWS, False)
        return query.last_read(source)

    def count(self) -> Statement:
        """`items` and `seen`, see `count_from`."""
        query, source = self._make(None, COUNT_ROWS + 1, True)
        return query.count(source)


def count_from(row: Row) -> Count:
    """The count that a statement found."""
    return Count(row["items"], row["seen"] <= COUNT_ROWS)


# --- Runs ---------------------------------------------------------------------------------------


def runs(dialect: Dialect, tenant: str, wanted: RunFilter) -> Lookup:
    """The statements of a list of runs."""

    def make(after: ListPlace | None, reach: int, filters: bool) -> tuple[_Query, str]:
        query = _Query(
            dialect,
            _RUNS,
            tenant,
            descending=wanted.order.is_descending,
            reach=reach,
            filters=filters,
        )
        return query, _runs_list(query, wanted, after)

    return Lookup(make)


def _runs_list(query: _Query, wanted: RunFilter, after: ListPlace | None) -> str:
    """Chooses the index; what it does not decide becomes a condition on rows."""
    labels = dict(wanted.labels)
    if wanted.order.by_end:
        _require(query, replace(wanted, ended=ALWAYS))
        conditions = ["ended_at >= 0", *query.span("ended_at", wanted.ended)]
        return query.listed("runs_by_ended", conditions, after, "ended_at")
    if wanted.session_id is not None:
        _require(query, replace(wanted, session_id=None))
        condition = f"session_id = {query.text(wanted.session_id)}"
        return query.listed("runs_by_session", [condition, *query.always("run_no > 0")], after)
    if labels:
        key, value = labels.popitem()
        _require(query, replace(wanted, labels=labels))
        return query.labelled(key, value, after)
    if wanted.accepted.is_bounded:
        _require(query, replace(wanted, accepted=ALWAYS))
        conditions = [
            *query.always("accepted_at >= 0"),
            *query.span("accepted_at", wanted.accepted),
        ]
        return query.listed("runs_by_accepted", conditions, after, "accepted_at")
    if wanted.agent and not (wanted.states and wanted.states <= OPEN_STATES):
        _require(query, replace(wanted, agent=""))
        conditions = [f"agent = {query.text(wanted.agent)}", *query.always("agent >= ''")]
        return query.listed("runs_by_agent", conditions, after)
    return _runs_by_state(query, wanted, after)


def _runs_by_state(query: _Query, wanted: RunFilter, after: ListPlace | None) -> str:
    """Merges the indexes that have runs in these states; all states for none."""
    states = wanted.states or frozenset(RunState)
    some_open = states & OPEN_STATES and not states >= OPEN_STATES
    _require(query, wanted if some_open else replace(wanted, states=frozenset()))
    lists = []
    if states & OPEN_STATES:
        lists.append(
            query.listed("runs_open", ["ended_at IS NULL", *query.always("run_no > 0")], after)
        )
    for state in sorted(states - OPEN_STATES):
        wanted_state = f"state = {query.add(state.value)}"
        conditions = [wanted_state, "ended_at IS NOT NULL", *query.always("run_no > 0")]
        lists.append(query.listed("runs_ended", conditions, after))
    return query.merged(lists)


def _require(query: _Query, wanted: RunFilter) -> None:
    """Adds the filters as conditions on rows."""
    if not query.filters:
        return
    if wanted.session_id is not None:
        query.rows.append(f"runs.session_id = {query.text(wanted.session_id)}")
    if wanted.states:
        states = sorted(state.value for state in wanted.states)
        query.rows.append(query.dialect.any_of(query.add, "runs.state", states))
    if wanted.agent:
        query.rows.append(f"runs.agent = {query.text(wanted.agent)}")
    query.rows += query.span("runs.accepted_at", wanted.accepted)
    query.rows += query.span("runs.ended_at", wanted.ended)
    query.require_labels(wanted.labels)


# --- Sessions -----------------------------------------------------------------------------------


_BUSY = "(active_run_id <> '' OR waiting_runs > 0)"


def sessions(dialect: Dialect, tenant: str, wanted: SessionFilter) -> Lookup:
    """The statements of a list of sessions."""

    def make(after: ListPlace | None, reach: int, filters: bool) -> tuple[_Query, str]:
        query = _Query(
            dialect,
            _SESSIONS,
            tenant,
            descending=wanted.is_descending,
            reach=reach,
            filters=filters,
        )
        return query, _sessions_list(query, wanted, after)

    return Lookup(make)


def _sessions_list(query: _Query, wanted: SessionFilter, after: ListPlace | None) -> str:
    labels = dict(wanted.labels)
    if labels:
        key, value = labels.popitem()
        _require_of_session(query, replace(wanted, labels=labels))
        return query.labelled(key, value, after)
    if wanted.busy:
        _require_of_session(query, replace(wanted, busy=None))
        return query.listed("sessions_busy", [_BUSY], after)
    if wanted.created.is_bounded:
        _require_of_session(query, replace(wanted, created=ALWAYS))
        conditions = [*query.always("created_at >= 0"), *query.span("created_at", wanted.created)]
        return query.listed("sessions_by_created", conditions, after, "created_at")
    if wanted.agent:
        _require_of_session(query, replace(wanted, agent=""))
        conditions = [f"agent = {query.text(wanted.agent)}", "agent <> ''"]
        return query.listed("sessions_by_agent", conditions, after)
    _require_of_session(query, wanted)
    return query.listed("sessions_by_tenant", query.always("created_no > 0"), after)


def _require_of_session(query: _Query, wanted: SessionFilter) -> None:
    if not query.filters:
        return
    if wanted.agent:
        query.rows.append(f"sessions.agent = {query.text(wanted.agent)}")
    if wanted.busy is not None:
        # Its columns are only in the table of sessions.
        query.rows.append(_BUSY if wanted.busy else f"NOT {_BUSY}")
    query.rows += query.span("sessions.created_at", wanted.created)
    query.require_labels(wanted.labels)
