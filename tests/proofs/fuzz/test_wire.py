"""A server stays healthy after invalid input."""

from __future__ import annotations

from pathlib import Path
from random import Random

import grpc
import pytest

from proofs.fuzz import raw
from proofs.fuzz.messages import METHODS, SHAPES, send
from proofs.fuzz.raw import ATTACKS
from proofs.fuzz.regressions import NOT_UTF8_PATH
from proofs.fuzz.server import fuzzed_server, send_messages, send_raw
from proofs.fuzz.tries import Tries


@pytest.mark.parametrize("store", ["memory", "sqlite"])
def test_a_server_survives_a_batch_of_every_attack(tmp_path: Path, store: str) -> None:
    tries = Tries("wire", tmp_path / "crashes")
    with fuzzed_server(tmp_path, store) as attacked:
        random = Random(3)  # noqa: S311 - a seed repeats it
        send_messages(attacked, tries, random, 15)
        if store == "memory":
            send_raw(attacked, tries, random, list(ATTACKS))
            attacked.check_sizes()
    assert not tries.crashes
    assert tries.inputs >= 15


def test_every_method_survives_every_message(tmp_path: Path) -> None:
    with fuzzed_server(tmp_path, "memory") as attacked:
        with grpc.insecure_channel(attacked.address) as channel:
            for method in METHODS:
                if method.endswith(("Subscribe", "SubscribeRunComplete", "CancelAll", "Watch")):
                    continue  # some messages are valid for these, and their calls stay open
                for shape in SHAPES:
                    send(channel, method, shape, ())
        attacked.check()


def test_a_path_that_is_not_utf8_does_not_end_the_server(tmp_path: Path) -> None:
    """grpc.aio (1.85) decodes the path in its accept loop, and its server ends."""
    with fuzzed_server(tmp_path, "memory") as attacked:
        for _ in range(3):
            raw.attack(attacked.address, NOT_UTF8_PATH)
            attacked.check()
