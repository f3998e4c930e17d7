"""The setting that answers the questions of agents."""

from __future__ import annotations

from typing import get_args

import pytest
from acp.schema import ToolKind

from runlane_server.agents.acp.policy import KINDS, parse_policy


def test_the_kinds_are_those_of_the_protocol() -> None:
    assert get_args(ToolKind) == KINDS


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("deny", set()),
        ("allow", set(KINDS)),
        ("read=allow", {"read"}),
        ("deny,read=allow, search=allow", {"read", "search"}),
        ("allow,execute=deny,other=deny", set(KINDS) - {"execute", "other"}),
        ("read=allow,read=deny", set()),
        ("deny,allow", set(KINDS)),
        ("read=allow,deny", {"read"}),
        ("allow,execute=ask", set(KINDS) - {"execute"}),
        ("ask", set()),
    ],
)
def test_the_last_word_counts_and_a_kind_comes_before_all(text: str, allowed: set[str]) -> None:
    policy = parse_policy(text)
    assert {kind for kind in KINDS if policy.answer_for(kind) == "allow"} == allowed


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "cannot read ''; write allow, deny or ask, or KIND=ANSWER"),
        ("yes", "cannot read 'yes'"),
        ("allow,", "cannot read ''"),
        ("read", "cannot read 'read'"),
        ("read=maybe", "cannot read 'read=maybe'"),
        ("Read=allow", "'Read' is not a kind of tool call; use one of read, edit, delete"),
        ("=allow", "'' is not a kind of tool call"),
        ("a=b=allow", "'a=b' is not a kind of tool call"),
    ],
)
def test_an_invalid_word_is_refused_with_the_forms(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason.replace("'", "['\"]")):
        parse_policy(text)
