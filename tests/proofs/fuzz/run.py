"""Fuzzes all targets, which share the given seconds, and prints the result.

cd tests && python -m proofs.fuzz.run --seconds 300
cd tests && python -m proofs.fuzz.run --seconds 60 --only script --seed 7

Crashing inputs are saved in .cache/fuzz/crashes. The exit code is 1 after a crash, and 2 if no
input was tried.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from random import Random

from proofs.fuzz.agents import WILD, search_agents
from proofs.fuzz.mutate import mutated
from proofs.fuzz.raw import ATTACKS
from proofs.fuzz.server import BATCH, fuzzed_server, send_messages, send_raw
from proofs.fuzz.targets import TARGETS, Target
from proofs.fuzz.tries import Broken, Tries
from support.server import clean_environment

CACHE = Path(__file__).resolve().parents[3] / ".cache" / "fuzz"

GRACE = 30
"""Seconds that atheris may take to start and to end, beyond the fuzzing itself."""

Search = Callable[[Tries, float, int], None]


def search_random(target: Target, tries: Tries, seconds: float, seed: int) -> None:
    """Tries the seeds of a parser and mutations of them for `seconds`."""
    random = Random(seed)  # noqa: S311 - a seed repeats it
    end = time.monotonic() + seconds
    for data in target.seeds:
        tries.take(target, data)
    while time.monotonic() < end:
        tries.take(target, mutated(random, random.choice(target.seeds), target.seeds))


def search_guided(target: Target, tries: Tries, seconds: float, seed: int) -> None:
    """Fuzzes a parser by coverage with atheris, after mutations for half of the time."""
    search_random(target, tries, seconds / 2, seed)
    corpus = CACHE / "corpus" / target.name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(target.seeds):
        (corpus / f"seed-{number}").write_bytes(data)
    figures = CACHE / f"{target.name}.json"
    figures.unlink(missing_ok=True)
    limit = max(1, round(seconds / 2))
    flags = (
        f"-max_total_time={limit}",
        f"-seed={seed + 1}",
        "-timeout=10",
        "-rss_limit_mb=1024",
        "-max_len=4096",
        f"-artifact_prefix={tries.folder}/{target.name}-",
        str(corpus),
    )
    tries.folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "proofs.fuzz.child",
        target.name,
        str(figures),
        str(tries.folder),
    ]
    said, code = "", -1
    try:
        ended = subprocess.run(
            [*command, *flags],
            capture_output=True,
            text=True,
            errors="replace",
            env=clean_environment(),
            timeout=limit + GRACE,
            check=False,
        )
        said, code = ended.stderr[-4000:], ended.returncode
    except subprocess.TimeoutExpired:
        said = f"atheris did not end within {limit + GRACE} s"
    if figures.exists():
        tries.load(figures)
    if code != 0:
        tries.crashed(said.encode(), Broken(f"atheris ended with {code}: {said[-500:]}"))


def _search(target: Target) -> Search:
    search = search_guided if find_spec("atheris") else search_random
    return lambda tries, seconds, seed: search(target, tries, seconds, seed)


def _attack(store: str, kind: str) -> Search:
    def search(tries: Tries, seconds: float, seed: int) -> None:
        random = Random(seed)  # noqa: S311 - a seed repeats it
        names = list(ATTACKS)
        with (
            tempfile.TemporaryDirectory() as folder,
            fuzzed_server(Path(folder), store) as attacked,
        ):
            end = time.monotonic() + seconds
            while time.monotonic() < end and not tries.crashes:
                if kind == "messages":
                    send_messages(attacked, tries, random, BATCH)
                else:
                    send_raw(attacked, tries, random, random.choices(names, k=BATCH))
            try:
                attacked.check_sizes()
                attacked.check()
            except Broken as error:
                tries.crashed(b"", error)

    return search


def searches(targets: Sequence[Target] = TARGETS) -> dict[str, Search]:
    """The names of all targets."""
    found = {target.name: _search(target) for target in targets}
    for store in ("memory", "sqlite"):
        for kind in ("messages", "connections"):
            found[f"{kind}-{store}"] = _attack(store, kind)
    for store in ("memory", "sqlite", "postgresql"):
        for kind in WILD:
            found[f"{kind}-{store}"] = partial(search_agents, kind, store)
    return found


def _named(known: Mapping[str, Search], only: Sequence[str] | None) -> dict[str, Search]:
    """The chosen targets: all, or those with one of the names, or one like `agent-sqlite`."""
    return {
        name: search
        for name, search in known.items()
        if not only or name in only or name.partition("-")[0] in only
    }


def fuzz(
    chosen: Mapping[str, Search], seconds: float, seed: int, folder: Path = CACHE / "crashes"
) -> int:
    """Fuzzes each target and prints the table; returns the exit code."""
    print(f"{'target':<20} {'inputs':>9} {'crashes':>7} {'slowest':>9}", flush=True)
    done = []
    for name, search in chosen.items():
        tries = Tries(name, folder)
        search(tries, seconds / len(chosen), seed)
        done.append(tries)
        print(
            f"{name:<20} {tries.inputs:>9,} {len(tries.crashes):>7} {tries.slowest * 1e3:>6.0f} ms",
            flush=True,
        )
        for kind, path in tries.crashes.items():
            print(f"    {kind}: {path}", flush=True)
    if any(tries.crashes for tries in done):
        return 1
    return 0 if sum(tries.inputs for tries in done) else 2


def main() -> None:
    """The command line."""
    known = searches()
    parser = argparse.ArgumentParser(prog="proofs.fuzz.run", description=__doc__)
    parser.add_argument("--seconds", type=float, default=300, help="in all")
    kinds = sorted({name.partition("-")[0] for name in known} - set(known))
    parser.add_argument("--only", action="append", choices=[*known, *kinds], help="this target")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    sys.exit(fuzz(_named(known, options.only), options.seconds, options.seed))


if __name__ == "__main__":
    main()
