"""Random prompts for the scripted agent and for echo. Every run ends by itself."""

from __future__ import annotations

import json
import random
from typing import Any

BLOCKED = 0.1
"""Timeout in seconds of a run that waits at a latch that nothing opens."""


def prompt(rng: random.Random, run_id: str, *, scripted: bool) -> tuple[str, float | None]:
    """A prompt, and the run's timeout in seconds."""
    if not scripted:
        return f"{run_id} " + "word " * rng.randint(1, 12), None
    steps = [step for n in range(rng.randint(1, 5)) for step in _steps(rng, f"{run_id}.{n}")]
    waits = any("wait" in step for step in steps)
    return json.dumps(steps), BLOCKED if waits else None


def _steps(rng: random.Random, name: str) -> list[dict[str, Any]]:
    stubborn = rng.random() < 0.1
    choices: tuple[list[dict[str, Any]], ...] = (
        [{"text": f"{name} "}],
        [{"text": f"{name} "}, {"step": True}],
        [{"text": "and so on ", "repeat": 10}],
        [{"text": "and so on ", "repeat": 300}],
        [{"step": True}, {"reasoning": "hm"}],
        [
            {"tool_call": {"id": name, "name": "look", "arguments": {}}},
            {"tool_result": {"id": name, "name": "look", "content": "it"}},
        ],
        [{"text": f"{name} "}, {"wait": "nobody opens this", "ignore_cancel": stubborn}],
        [{"fail": "no"}] if rng.random() < 0.3 else [{"text": "no"}],
    )
    return rng.choice(choices)
