"""What each fault cost: a row as soon as it is known, a Markdown table at the end.

Owns: its form. Does not own: the measurements (strikes.py and the tests).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

HEADINGS = ("fault", "phase", "seconds to recover", "groups lost", "groups repeated", "verdict")
FINE = "passed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One fault, or many alike.

    Attributes:
        seconds: from the fault until what was lost serves again; None where nothing was.
        lost: groups that were given up. repeated: groups that were trained on twice.
        verdict: FINE, or what was wrong.
    """

    fault: str
    phase: str
    seconds: float | None
    lost: int
    repeated: int
    verdict: str = FINE

    @property
    def is_fine(self) -> bool:
        return self.verdict == FINE and self.lost == self.repeated == 0

    def cells(self) -> list[str]:
        """In the order of HEADINGS."""
        seconds = "" if self.seconds is None else f"{self.seconds:.1f}"
        return [self.fault, self.phase, seconds, str(self.lost), str(self.repeated), self.verdict.replace("|", "/")]


class FaultTable:
    """Rows in the order in which they came; the file, where there is one, always holds all of them.

    Args:
        head: text above the table.
    """

    def __init__(self, path: Path | None, head: str) -> None:
        self._path, self._head = path, head
        self.rows: list[Row] = []

    def add(self, row: Row) -> Row:
        """A fault is over."""
        self.rows.append(row)
        if self._path is not None:
            self._path.write_text(f"{self._head}\n{self.text()}\n")
        return row

    def text(self) -> str:
        """As Markdown; below it how many there were, and the sums."""
        lines = [HEADINGS, ["---"] * len(HEADINGS), *(row.cells() for row in self.rows)]
        lost, repeated = sum(row.lost for row in self.rows), sum(row.repeated for row in self.rows)
        fine = sum(row.is_fine for row in self.rows)
        total = f"\n{len(self.rows)} rows, {fine} {FINE}; groups lost {lost}, repeated {repeated}."
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n" + total
