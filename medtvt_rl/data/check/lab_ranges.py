"""What laboratory values can be, in the units of MIMIC-IV.

Owns: for each of the 50 items the unit, the range outside which a value is a slip, and the range in which the median of
a hospital's admissions lies; a median outside it speaks of another unit. Bounds are wide, and set by hand.
"""

from __future__ import annotations

from typing import NamedTuple


class LabRange(NamedTuple):
    """low, high: of a single value; median_low, median_high: of a cohort's median."""

    unit: str
    low: float
    high: float
    median_low: float
    median_high: float


# fmt: off
LAB_RANGES: dict[str, LabRange] = {
    "50802": LabRange("mEq/L", -45, 45, -8, 6),
    "50804": LabRange("mEq/L", 1, 80, 15, 40),
    "50813": LabRange("mmol/L", 0, 40, 0.7, 5),
    "50818": LabRange("mm Hg", 5, 250, 25, 65),
    "50820": LabRange("units", 6.3, 8.2, 7.2, 7.5),
    "50821": LabRange("mm Hg", 5, 1000, 30, 250),
    "50861": LabRange("IU/L", 0, 40000, 8, 120),
    "50862": LabRange("g/dL", 0.5, 9, 2, 5),
    "50863": LabRange("IU/L", 0, 8000, 40, 200),
    "50868": LabRange("mEq/L", -20, 70, 7, 22),
    "50878": LabRange("IU/L", 0, 60000, 10, 150),
    "50882": LabRange("mEq/L", 1, 65, 17, 32),
    "50885": LabRange("mg/dL", 0, 100, 0.2, 3),
    "50893": LabRange("mg/dL", 2, 30, 6, 11),
    "50902": LabRange("mEq/L", 40, 180, 90, 115),
    "50910": LabRange("IU/L", 0, 1000000, 30, 500),
    "50912": LabRange("mg/dL", 0, 60, 0.5, 3),
    "50931": LabRange("mg/dL", 2, 3000, 75, 250),
    "50934": LabRange("index", 0, 5000, 0, 100),
    "50947": LabRange("index", 0, 500, 0, 30),
    "50960": LabRange("mg/dL", 0.2, 30, 1.2, 3),
    "50970": LabRange("mg/dL", 0.1, 40, 2, 6.5),
    "50971": LabRange("mEq/L", 0.8, 20, 3.2, 5.5),
    "50983": LabRange("mEq/L", 70, 210, 128, 148),
    "51006": LabRange("mg/dL", 0, 350, 9, 60),
    "51133": LabRange("K/uL", 0, 800, 0.4, 4),
    "51146": LabRange("%", 0, 100, 0, 2),
    "51200": LabRange("%", 0, 100, 0, 6),
    "51221": LabRange("%", 3, 80, 22, 48),
    "51222": LabRange("g/dL", 1, 28, 7, 16.5),
    "51237": LabRange("ratio", 0.4, 40, 0.9, 2.5),
    "51244": LabRange("%", 0, 100, 4, 45),
    "51248": LabRange("pg", 8, 70, 25, 34),
    "51249": LabRange("g/dL", 15, 50, 28, 36),
    "51250": LabRange("fL", 35, 170, 80, 102),
    "51254": LabRange("%", 0, 100, 2, 14),
    "51256": LabRange("%", 0, 100, 40, 92),
    "51265": LabRange("K/uL", 0, 4000, 90, 420),
    "51274": LabRange("sec", 5, 250, 10, 27),
    "51275": LabRange("sec", 8, 300, 20, 65),
    "51277": LabRange("%", 8, 50, 12, 19),
    "51279": LabRange("m/uL", 0.3, 12, 2.3, 5.6),
    "51301": LabRange("K/uL", 0, 1000, 4, 20),
    "51678": LabRange("index", 0, 8000, 0, 60),
    "52069": LabRange("K/uL", 0, 50, 0, 0.2),
    "52073": LabRange("K/uL", 0, 200, 0, 0.6),
    "52074": LabRange("K/uL", 0, 200, 0.1, 2),
    "52075": LabRange("K/uL", 0, 500, 2, 16),
    "52135": LabRange("%", 0, 100, 0, 5),
    "52172": LabRange("fL", 15, 200, 36, 62),
}
# fmt: on
