"""Runs one prompt to its end and cancels another, with the packed wheel."""

from __future__ import annotations

import sys
from importlib import resources

from runlane import TextDelta
from runlane.sync import Client


def main(server: str, first: str, second: str) -> None:
    """Prints the text and the end of both runs."""
    proto = resources.files("runlane") / "proto" / "runlane" / "v1" / "run_service.proto"
    assert "service RunService" in proto.read_text(), "the wheel carries no protos"
    with Client(server) as client:
        for prompt, cancel in ((first, False), (second, True)):
            run = client.run_accepted("python", prompt, allow_missing=True)
            for event in run.events():
                if isinstance(event.body, TextDelta):
                    print(event.body.text)
                    if cancel:
                        client.cancel("python")
            print(f"RUN_STATE_{run.completed().state.name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
