"""The rules, and the cases that are registered for them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Never, TypeAlias

if TYPE_CHECKING:
    from runlane.conformance.world import World

RULES: Mapping[int, str] = MappingProxyType(
    {
        1: "What is accepted is durable, and never waits for the agent",
        2: "An empty prompt, no session, or an unknown one is refused",
        3: "A run id names one run for ever",
        4: "accept_seq increases in accept order",
        5: "A run outlives its caller",
        6: "A failed accept leaves nothing behind",
        7: "One run is active at a time, in accept order",
        8: "A session with work never looks idle",
        9: "A session is busy until the agent has returned",
        10: "A cancel covers all that is accepted and has not ended",
        11: "A cancel touches nothing that is accepted after it",
        12: "A cancel of an idle session does nothing",
        13: "A repeated cancel changes nothing",
        14: "A cancel on entry writes the turn",
        15: "A cancel before the first message writes the prompt once",
        16: "A cancel in mid-stream keeps what was said",
        17: "A shutdown writes what becomes of what is active",
        18: "A cancel covers its scope and no more",
        19: "Where a cancel meets a completion, all agree on who won",
        20: "A receipt names what was covered, its state, and the fence",
        21: "Every accepted run has exactly one RunComplete",
        22: "The transcript is there before its RunComplete is",
        23: "A RunComplete tells all about the end",
        24: "The end of one run is not that of another's wait",
        25: "A subscription with a cursor gets each event once, in order",
        26: "A FOLD run joins the active turn at its next step",
        27: "QUEUE waits, REJECT is refused, INTERRUPT goes first",
        28: "A completion leaves nothing behind",
        29: "A burst on an idle session starts one run",
        30: "Until the agent is ready runs wait, or fail in the end",
    }
)
"""Each rule in a line; the whole of it is in CONTRIBUTING.md."""


class Need(StrEnum):
    """What a case needs of a server; as a reason for leaving it out."""

    RESTARTS = "the process is not the server's own to end"
    DURABLE = "the store is in memory"
    CLOCK = "the clock cannot be moved"
    RETENTION = "events are kept without limit"


class Broken(Exception):
    """The server did not do what the rule says; the message says what it did."""


Play: TypeAlias = "Callable[[World], Awaitable[None]]"


@dataclass(frozen=True, slots=True)
class Case:
    """One way to find out whether a rule is kept.

    Attributes:
        rule: The number of the rule.
        name: What is to come true, as a sentence.
        play: Stages it; raises Broken, or any error of the client, where it does not come true.
        needs: What the server has to be capable of.
    """

    rule: int
    name: str
    play: Play
    needs: frozenset[Need]


CASES: list[Case] = []
"""All cases, by rules; filled by the modules that have them."""


def case(rule: int, *needs: Need) -> Callable[[Play], Play]:
    """Registers a function as a case of a rule. Its docstring is the name."""

    def register(play: Play) -> Play:
        name = " ".join((play.__doc__ or "").split()).rstrip(".")
        CASES.append(Case(rule, name, play, frozenset(needs)))
        return play

    return register


def broken(what: str) -> Never:
    """The rule is broken."""
    raise Broken(what)


def expect(what: str, found: object, expected: object) -> None:
    """Raises Broken unless what was found is what was expected."""
    if found != expected:
        raise Broken(f"{what}: expected {_shown(expected)}, found {_shown(found)}")


def hold(what: str, *, true: bool) -> None:
    """Raises Broken unless it is true."""
    if not true:
        raise Broken(f"not so: {what}")


def _shown(value: object) -> str:
    if isinstance(value, StrEnum):
        return str(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown, value))}]"
    return repr(value)
