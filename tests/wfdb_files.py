"""The two files of a WFDB record in format 16, changed as whole: a header knows the sums of its leads' samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

CHECKSUM = 6
"""Its place among the fields of a signal's line."""


def read_samples(record: Path) -> NDArray[np.int16]:
    """[N, L], as stored."""
    num_leads = len(_header(record).read_text().split("\n", 1)[1].strip().splitlines())
    return np.fromfile(_beside(record, ".dat"), "<i2").reshape(-1, num_leads)


def write_samples(record: Path, samples: NDArray[np.int16]) -> None:
    """Stores [N, L], and writes their checksums into the header."""
    samples.astype("<i2").tofile(_beside(record, ".dat"))
    first, *lines = _header(record).read_text().strip().splitlines()
    changed = []
    for line, total in zip(lines, samples.sum(axis=0, dtype=np.int64), strict=True):
        fields = line.split(" ")
        fields[CHECKSUM] = str(int(total) % 65536)
        changed.append(" ".join(fields))
    _header(record).write_text("\n".join([first, *changed]) + "\n")


def _header(record: Path) -> Path:
    return _beside(record, ".hea")


def _beside(record: Path, suffix: str) -> Path:
    return record.parent / f"{record.name.removesuffix('.hea').removesuffix('.dat')}{suffix}"
