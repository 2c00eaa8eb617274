"""The one exception that bad input raises, and the record of an input that was set aside.

Owns: DataError and Problem, whose reason may hold ids and values of a patient and goes to data files alone. Does not
own: who decides whether a fault ends the build (study_store.py).
"""

from __future__ import annotations

from dataclasses import dataclass

_LONGEST = 200


class DataError(ValueError):
    """Input that cannot be used; the message is one line that names the file, the field, and the mend."""


def one_line(error: BaseException) -> str:
    """A parser's words, in one line of reasonable length; its type where it has none."""
    return " ".join(str(error).split())[:_LONGEST] or type(error).__name__


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One input that was set aside.

    Attributes:
        file: the file at fault, relative to the data root.
        study_id: the study it belongs to; empty where none is known.
        field: the column or key at fault.
        reason: what is wrong and how to mend it, one line.
    """

    file: str
    study_id: str
    field: str
    reason: str

    @property
    def place(self) -> str:
        """Where it is, in words that say nothing of a patient: "train.csv:12, ecg_path"."""
        return f"{self.file}, {self.field}"
