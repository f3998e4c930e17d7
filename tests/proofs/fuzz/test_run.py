"""The runner finds a planted crash, and reports it."""

from __future__ import annotations

from pathlib import Path

import pytest

from proofs.fuzz.run import fuzz, search_random
from proofs.fuzz.targets import Target
from proofs.fuzz.tries import Tries


def _planted(data: bytes) -> None:
    if data.count(b"[") > 50:
        raise KeyError("planted")
    raise ValueError("as promised")


def _run(target: Target, folder: Path) -> int:
    def search(tries: Tries, seconds: float, seed: int) -> None:
        search_random(target, tries, seconds, seed)

    return fuzz({target.name: search}, 0.3, 1, folder)


def test_a_planted_crash_is_found_and_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(Target("planted", _planted, (ValueError,), (b"a[b]",)), tmp_path) == 1
    assert "KeyError" in capsys.readouterr().out
    (kept,) = (path for path in tmp_path.iterdir() if not path.suffix)
    assert kept.read_bytes().count(b"[") > 50
    assert "planted" in kept.with_suffix(".txt").read_text()


def test_a_sound_target_has_no_crash(tmp_path: Path) -> None:
    promised = (ValueError, KeyError)
    assert _run(Target("sound", _planted, promised, (b"a[b]",)), tmp_path) == 0
    assert not list(tmp_path.iterdir())


def test_no_tried_input_is_a_failure(tmp_path: Path) -> None:
    assert fuzz({"idle": lambda *_: None}, 1, 1, tmp_path) == 2
