"""The report of a round: its figures, and the files that it leaves if a rule was broken."""

from __future__ import annotations

import shutil
import tempfile
import traceback
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from proofs.crash.checker import Violation
from proofs.crash.history import History


@dataclass(slots=True, kw_only=True)
class RoundReport(ABC):
    """The history of a round, and its violations."""

    history: History = field(default_factory=History)
    violations: list[Violation] = field(default_factory=list)

    @abstractmethod
    def figures(self) -> dict[str, int]:
        """The round in numbers."""

    def load_figures(self) -> dict[str, int]:
        """The figures of the load, which all kinds of rounds have."""
        history = self.history
        return {
            "accepts acknowledged": len(history.acknowledged),
            "accepts unknown": len(history.unknown),
            "unknown that are there": len(history.unknown & history.final.runs.keys()),
            "retries": len(history.accepts) - len({each.run_id for each in history.accepts}),
            "cancels": len(history.cancels),
            "runs in receipts": sum(
                len(receipt.cancelled) for each in history.cancels for receipt in each.receipts
            ),
            "runs restarted": sum(run.attempt > 1 for run in history.final.runs.values()),
            "events": sum(len(heard.events) for heard in history.subscribers),
            "resumes": sum(heard.resumed for heard in history.subscribers),
            "run events": sum(len(followed.events) for followed in history.followers),
            "violations": len(self.violations),
        }

    def accepts(self) -> str:
        """The accepts of the round, for its line of output."""
        history = self.history
        return f"{len(history.acknowledged)} accepts, {len(history.unknown)} unknown"

    def verdict(self, line: str, kept: Path | None) -> str:
        """The line of output, with the violations if the round has left files."""
        if kept is None:
            return line
        found = Counter(violation.rule for violation in self.violations)
        return f"{line}\n    WRONG {dict(found) or 'see error.txt'}, kept in {kept}"


ReportT = TypeVar("ReportT", bound=RoundReport)


async def play_in_folder(
    prefix: str, play: Callable[[Path], Awaitable[ReportT]], empty: Callable[[], ReportT]
) -> tuple[ReportT, Path | None]:
    """Plays a round in a new folder; returns the folder too if a rule or the round broke.

    `empty` makes the report of a round that raised an error.
    """
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        report = await play(folder)
    except Exception:  # noqa: BLE001 - after any error the next round is played
        (folder / "error.txt").write_text(traceback.format_exc())
        return empty(), folder
    if not report.violations:
        shutil.rmtree(folder)
        return report, None
    report.history.save(folder / "history.jsonl")
    lines = (f"{violation.rule}: {violation.what}\n" for violation in report.violations)
    (folder / "violations.txt").write_text("".join(lines))
    return report, folder
