"""Writes of two connections at a time keep the order of each lane and run."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

import pytest

from runlane_server.core.model import RunComplete, SessionKey, TextDelta
from runlane_server.store.base import Stale
from runlane_server.store.postgres.write_lines import WriteLine, WriteLines
from support.postgres import Connection, postgres_store, until_blocked
from support.story import Story, Witness

TENANT = "t"

LOCK_LOG = "SELECT pg_advisory_lock('events'::regclass::oid::bigint)"


@dataclass(frozen=True, eq=False)
class Written:
    """A unit; see `write_lines.LoggedUnit`."""

    lane: SessionKey | None = None
    changed: tuple[str, ...] = ()
    appended: str | None = None
    is_logged: bool = False
    tenant: str = TENANT
    size: int = 1

    @property
    def concerns(self) -> set[str]:
        runs = {f"run {run_id}" for run_id in (*self.changed, self.appended) if run_id}
        return runs if self.lane is None else runs | {f"lane {self.lane.session_id}"}


def commit(session_id: str, *changed: str) -> Written:
    return Written(SessionKey(TENANT, session_id), changed)


def end(session_id: str, *changed: str) -> Written:
    return Written(SessionKey(TENANT, session_id), changed, is_logged=True)


def output(run_id: str) -> Written:
    return Written(appended=run_id)


@pytest.fixture
def lines() -> WriteLines[Written]:
    return WriteLines(2, 1 << 20)


def test_accept_goes_beside_ends(lines: WriteLines[Written]) -> None:
    assert lines.add(end("s", "a")) is lines.log
    assert lines.add(commit("u", "b")) in lines.others


def test_accepts_take_turns_at_the_connections(lines: WriteLines[Written]) -> None:
    assert {lines.add(commit("s", "a")), lines.add(commit("u", "b"))} == {*lines.others}


def test_output_before_the_end_is_written_with_it(lines: WriteLines[Written]) -> None:
    first, second, last = output("a"), output("a"), end("s", "a")
    assert lines.add(first) is lines.add(second)
    lines.add(last)
    assert lines.log.queue.take() == [first, second, last]
    assert not any(line.queue for line in lines.others)


def test_end_waits_for_output_that_is_under_way(lines: WriteLines[Written]) -> None:
    line = lines.add(output("a"))
    under_way = line.queue.take()
    lines.add(end("s", "a"))
    batch = lines.log.queue.take()
    assert lines.must_wait(lines.log, batch)
    line.forget(under_way)
    assert not lines.must_wait(lines.log, batch)


def test_output_after_the_end_follows_it(lines: WriteLines[Written]) -> None:
    """The store refuses it, and no other caller waits for that."""
    lines.add(end("s", "a"))
    assert lines.add(output("a")) is lines.log


def test_lane_whose_run_ends_is_changed_after_it(lines: WriteLines[Written]) -> None:
    lines.add(end("s", "a"))
    assert lines.add(commit("s", "b")) is lines.log


def test_what_is_written_holds_up_nothing(lines: WriteLines[Written]) -> None:
    lines.add(end("s", "a"))
    lines.log.forget(lines.log.queue.take())
    assert lines.add(commit("s", "b")) in lines.others
    assert len(lines.log) == 0


def test_same_id_of_a_session_and_of_a_run_is_not_the_same(lines: WriteLines[Written]) -> None:
    lines.add(end("x", "a"))
    assert lines.add(output("x")) in lines.others


@pytest.mark.parametrize("seed", range(50))
def test_every_lane_and_run_keeps_its_order(seed: int) -> None:
    """Units in any order, and connections that begin and end their calls at any time."""
    rng = Random(seed)  # noqa: S311 - nothing secret
    lines = WriteLines[Written](2, 1 << 20)
    given: list[Written] = []
    written: list[Written] = []
    under_way: dict[WriteLine[Written], list[Written]] = {}
    for _ in range(400):
        if rng.random() < 0.5:
            given.append(_any_unit(rng))
            lines.add(given[-1])
        else:
            _move(lines, rng.choice(lines.every), under_way, written)
    for _ in range(1_000):
        for line in lines.every:
            _move(lines, line, under_way, written)
    assert len(written) == len(given)
    assert [len(line) for line in lines.every] == [0, 0, 0]
    for what in {it for unit in given for it in unit.concerns}:
        assert _of(what, written) == _of(what, given)


def _any_unit(rng: Random) -> Written:
    session = rng.choice("stu")
    run_id = f"{session}{rng.randint(0, 1)}"
    make = rng.choice([commit, end, None])
    return output(run_id) if make is None else make(session, run_id)


def _move(
    lines: WriteLines[Written],
    line: WriteLine[Written],
    under_way: dict[WriteLine[Written], list[Written]],
    written: list[Written],
) -> None:
    """Begins or ends a call of a connection, as the writer would."""
    if line not in under_way:
        if line.queue:
            under_way[line] = line.queue.take()
    elif not lines.must_wait(line, under_way[line]):
        batch = under_way.pop(line)
        written += batch
        line.forget(batch)


def _of(what: str, units: Iterable[Written]) -> list[Written]:
    return [unit for unit in units if what in unit.concerns]


async def test_r21_accepts_and_output_go_on_while_an_end_waits_for_the_log(
    postgres_url: str, beside: Connection
) -> None:
    """Another node holds the log: the end of a run waits for it, and nothing else does."""
    async with postgres_store(postgres_url) as store:
        witness = store.listener = Witness()
        ended, active = Story(store, "ended"), Story(store, "active")
        for story in (ended, active):
            await story.accept(story.session_id)
            await story.start()
        active_run, late = ended.lane.active, ended.events(TextDelta("too late"))
        assert active_run is not None
        await beside.execute(LOCK_LOG)
        ending = asyncio.create_task(ended.finish())
        await until_blocked(beside)
        appending = asyncio.create_task(
            store.append(ended.run_key("ended"), active_run.attempt, late)
        )
        await active.append(TextDelta("on time"))
        for n in range(10):
            await Story(store, f"new-{n}").accept(f"new-{n}")
        assert not ending.done()
        assert not appending.done()
        await beside.execute("SELECT pg_advisory_unlock_all()")
        await ending
        with pytest.raises(Stale):
            await appending
        await active.finish()
        events = witness.runs[ended.run_key("ended")]
        assert isinstance(events[-1].body, RunComplete)
        assert [event.position for event in witness.log] == [1, 2]
