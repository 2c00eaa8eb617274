"""Whether an ECG is what its header says: order and units of leads, rate, amplitude, and the laws of the limb leads.

Owns: these judgements. Does not own: what cannot be read at all (data/ecg.py refuses it). In every 12-lead ECG
II = I + III (Einthoven), and aVR, aVL and aVF are combinations of the same two signals (Goldberger); where they are
not, a lead has another's name, or another's signal.
"""

from __future__ import annotations

from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from medtvt_rl.data.ecg import LEADS, plain_lead
from medtvt_rl.data.raw_ecg import RawEcg

LIMB_LEADS = LEADS[:6]
PUBLISHED_RATE_HZ = 500.0
SMALLEST_MV, LARGEST_MV = 0.15, 20.0
MAX_RESIDUAL = 0.1
_GOOD_RESIDUAL = 0.02
# Rows are sums of I II III aVR aVF aVL that are zero.
_LAWS = np.array(
    [
        [1, -1, 1, 0, 0, 0],
        [0.5, 0.5, 0, 1, 0, 0],
        [0, -0.5, -0.5, 0, 1, 0],
        [-0.5, 0, 0.5, 0, 0, 1],
    ]
)

ORDER, UNIT, RATE, GAPS, AMPLITUDE, LIMBS = "lead order", "unit", "rate", "gaps", "amplitude", "limb leads"


def raw_notes(raw: RawEcg) -> dict[str, str]:
    """What is unusual in the file, though it can be read: kind -> sentence."""
    notes = {}
    names = [plain_lead(lead) for lead in raw.leads]
    if names != [lead.upper() for lead in LEADS]:
        notes[ORDER] = f"leads stand as {' '.join(raw.leads)}, published is {' '.join(LEADS)}; they are read by name"
    units = sorted({unit for unit in raw.units if unit.strip().lower() != "mv"})
    if units:
        notes[UNIT] = f"unit {', '.join(units)}, published is mV; values are converted"
    if raw.rate_hz != PUBLISHED_RATE_HZ:
        notes[RATE] = f"{raw.rate_hz:g} Hz, published is {PUBLISHED_RATE_HZ:g} Hz; it is resampled"
    invalid = (~np.isfinite(raw.signal)).mean(axis=0)
    if invalid.any():
        leads = ", ".join(f"{lead} {share:.1%}" for lead, share in zip(raw.leads, invalid) if share)
        notes[GAPS] = f"invalid samples (NaN or -32768) are interpolated: {leads}"
    return notes


def signal_notes(signal: NDArray[np.float32]) -> dict[str, str]:
    """What cannot be in a true ECG: kind -> sentence.

    Args:
        signal: [12, 1000] mV, in the order of LEADS.
    """
    notes = {}
    peak = float(np.ptp(signal, axis=1).max())
    if not SMALLEST_MV <= peak <= LARGEST_MV:
        notes[AMPLITUDE] = (
            f"the largest lead spans {peak:.3g} mV, expected {SMALLEST_MV:g} to {LARGEST_MV:g}; "
            "is the unit in the header right (mV or uV)?"
        )
    limbs = signal[:6].astype(np.float64)
    limbs -= limbs.mean(axis=1, keepdims=True)
    products = limbs @ limbs.T
    residual = _residual(products)
    if residual > MAX_RESIDUAL:
        notes[LIMBS] = (
            f"the limb leads contradict each other (II = I + III and its kin are off by {residual:.0%}); "
            f"{_better_order(products)}"
        )
    return notes


def _residual(products: NDArray[np.float64]) -> float:
    """What the laws leave over, as a share of the limb leads' own size, from their [6, 6] inner products."""
    size = float(np.trace(products)) / 6
    left = float(np.einsum("li,ij,lj->", _LAWS, products, _LAWS)) / len(_LAWS)
    return float(np.sqrt(max(left, 0.0) / size)) if size > 0 else 0.0


def _better_order(products: NDArray[np.float64]) -> str:
    """The names that the limb leads should have, if some order of the same names obeys the laws."""
    best = min(
        permutations(range(6)),
        key=lambda order: (
            round(_residual(products[np.ix_(order, order)]), 3),
            sum(i != o for i, o in enumerate(order)),
        ),
    )
    if _residual(products[np.ix_(best, best)]) > _GOOD_RESIDUAL:
        return "no order of their names mends it: a lead holds something else"
    names = ", ".join(
        f"what is called {LIMB_LEADS[o]} seems to be {LIMB_LEADS[i]}" for i, o in enumerate(best) if i != o
    )
    return f"{names}: mend the names in the header"
