"""Whether laboratory values have the units of MIMIC-IV, and percentiles are those of the training split.

Owns: these judgements. Does not own: cells that are no numbers (data/labs.py refuses the row), or the ranges
(lab_ranges.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from medtvt_rl.data.check.lab_ranges import LAB_RANGES
from medtvt_rl.data.check.report import Report
from medtvt_rl.data.labs import LAB_IDS, PERCENTILE_SUFFIX, PercentileTable, lab_title
from medtvt_rl.data.study_rows import StudyRow

UNITS, PERCENTILES = "lab units", "lab percentiles"
TOLERANCE = 0.05
"""How far a percentile may lie from the one computed anew. It is exact where the table holds every training admission;
a table of those with one of the diseases alone moves it a little."""
_ENOUGH = 20


def check_labs(
    report: Report, rows: Sequence[StudyRow], table: PercentileTable, means: NDArray[np.float32] | None, share: float
) -> None:
    """Adds what is odd.

    Args:
        rows: of all splits.
        table: of the training split.
        means: [50] mean percentiles that stand in for missing values; None where there are none.
        share: of percentiles that may be wrong before training is called off.
    """
    for split in dict.fromkeys(row.split for row in rows):
        own = [row for row in rows if row.split == split]
        values = np.array([row.labs.values for row in own])
        _check_units(report, split, own, values)
        _check_percentiles(report, split, own, values, table, share)
    if means is not None:
        _check_means(report, rows, table, means)


def _check_units(report: Report, split: str, rows: Sequence[StudyRow], values: NDArray[np.float64]) -> None:
    check = report.open(UNITS, "values")
    check.looked_at += int((~np.isnan(values)).sum())
    for column, item in enumerate(LAB_IDS):
        usual, measured = LAB_RANGES[item], values[:, column][~np.isnan(values[:, column])]
        if len(measured) >= _ENOUGH and not usual.median_low <= np.median(measured) <= usual.median_high:
            report.add(
                UNITS,
                "look",
                f"{lab_title(item)}: the median of {len(measured)} values is {np.median(measured):.4g}, expected "
                f"{usual.median_low:g} to {usual.median_high:g} {usual.unit}; is it another unit?",
                split=split,
                field=item,
            )
            continue  # values outside the range would only say the same once for each row
        for index in np.flatnonzero((values[:, column] < usual.low) | (values[:, column] > usual.high)):
            report.add(
                UNITS,
                "look",
                f"{lab_title(item)} is {values[index, column]:g}, "
                f"expected {usual.low:g} to {usual.high:g} {usual.unit}",
                split=split,
                file=rows[index].location,
                study=rows[index].study_id,
                field=item,
            )


def _check_percentiles(
    report: Report,
    split: str,
    rows: Sequence[StudyRow],
    values: NDArray[np.float64],
    table: PercentileTable,
    share: float,
) -> None:
    check = report.open(PERCENTILES, "percentiles")
    given = [row.labs.percentiles for row in rows]
    if any(percentiles is None for percentiles in given):
        check.note = "a table without percentile columns: they are computed from the training split"
        return
    off = np.abs(np.array(given) - table.percentiles(values))
    measured = int((~np.isnan(off)).sum())
    check.looked_at += measured
    places = np.argwhere(off > TOLERANCE)
    for index, column in places:
        item, row = LAB_IDS[column], rows[index]
        report.add(
            PERCENTILES,
            "look",
            f"{lab_title(item)}: the percentile is off by {off[index, column]:.2f} from the share of training values "
            "at or below; compute the columns again from the training table",
            split=split,
            file=row.location,
            study=row.study_id,
            field=item + PERCENTILE_SUFFIX,
        )
    if measured and len(places) > share * measured:
        report.stop(
            PERCENTILES,
            f"{split}: {len(places)} of {measured} lab percentiles are not those of the training split; compute the "
            "columns again, or leave them out of every table",
            split=split,
        )


def _check_means(report: Report, rows: Sequence[StudyRow], table: PercentileTable, means: NDArray[np.float32]) -> None:
    report.open(PERCENTILES, "percentiles")
    off = np.abs(means - table.mean_percentiles())
    for column in np.flatnonzero(off > TOLERANCE):
        if len(table.samples[column]) >= _ENOUGH:
            report.add(
                PERCENTILES,
                "look",
                f"{lab_title(LAB_IDS[column])}: the mean in data.labs_means is off by {off[column]:.2f} from that of "
                "the training split; compute the file again",
                field=LAB_IDS[column],
            )
