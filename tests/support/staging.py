"""The words in which tests stage runs of the scripted agent.

A run's prompt is a script: a JSON list of steps. Two fixtures carry the scripts out:

- `support.node.Node` drives a coordinator in this process. It asks the agent itself whether a run
  has reached a latch, so its scripts say nothing but what the test is about.
- `support.wire.Wire` drives a server through the public client. It can only see a run's output,
  so a run announces a latch before it waits there (`at_latch`).

`runlane.conformance` has words of its own: it ships with the client and cannot import the tests.
"""

from __future__ import annotations

import json
from typing import Any

SECONDS = 30.0
"""Seconds that a test waits for an event before it fails."""

Step = dict[str, Any]

STEP: Step = {"step": True}
"""The agent takes the prompts that wait to be folded in."""


def script(*steps: Step) -> str:
    """A prompt for the scripted agent."""
    return json.dumps(steps)


def say(text: str) -> Step:
    """The agent emits a text."""
    return {"text": text}


def wait(latch: str, **more: Any) -> Step:
    """The agent waits until a latch is open."""
    return {"wait": latch, **more}


def open_latch(latch: str) -> Step:
    """The agent opens a latch, and all that wait there go on."""
    return {"open": latch}


def at_latch(latch: str, **more: Any) -> tuple[Step, Step]:
    """The agent emits `<latch>`, and waits there."""
    return say(f"<{latch}>"), wait(latch, **more)
