"""Simulates the 50 laboratory values of a cohort.

Owns: their medians, spreads, shared causes, shifts by disease, and which are measured together. Does not own: names or
percentiles (data/labs.py). A latent Gaussian copula: z = shared factors + disease shifts + own noise, then a normal or
log-normal margin. Medians and spreads are set by hand to look like intensive care; they are fitted to no patient.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medtvt_rl.data.labels import DISEASES
from medtvt_rl.data.labs import LAB_IDS, NUM_LABS

_SHORT = dict(zip(("CAD", "ARF", "HTN", "AF", "PNA", "DM", "SEP"), DISEASES))
_SEVERITY_SPREAD = 0.35
_SICKER_ARE_MEASURED_MORE = 0.12


@dataclass(frozen=True, slots=True)
class Lab:
    """One item.

    Attributes:
        median, spread: in the laboratory's unit; of the logarithm where `margin` is "l" (log-normal; "n" is normal).
        measured: share of patients in whom it is measured.
        factors: loading on each shared factor (an anaemia, re renal, in inflammation, li liver, co coagulation,
            ac acidosis, na sodium, mc cell size, ly lymphocytes, al albumin, rs respiration, mu muscle).
        shifts: by disease, in standard deviations.
    """

    median: float
    spread: float
    margin: str
    measured: float
    factors: dict[str, float]
    shifts: dict[str, float]


# fmt: off
_LABS: dict[str, Lab] = {
    "50802": Lab(-1, 5, "n", 0.40, {"ac": -0.9}, {"SEP": -0.6, "ARF": -0.6}),
    "50804": Lab(25.5, 6, "n", 0.40, {"ac": -0.7, "rs": 0.5}, {"ARF": -0.6, "SEP": -0.5}),
    "50813": Lab(1.7, 0.55, "l", 0.60, {"ac": 0.6, "in": 0.2}, {"SEP": 1.1, "PNA": 0.2}),
    "50818": Lab(42, 0.25, "l", 0.40, {"rs": 0.9}, {"PNA": 0.3}),
    "50820": Lab(7.37, 0.085, "n", 0.43, {"ac": -0.8, "rs": -0.5}, {"SEP": -0.5, "ARF": -0.5}),
    "50821": Lab(92, 0.65, "l", 0.40, {"rs": -0.2}, {"PNA": -0.5}),
    "50861": Lab(25, 0.85, "l", 0.63, {"li": 0.9}, {"SEP": 0.4}),
    "50862": Lab(3.5, 0.6, "n", 0.45, {"al": 0.8, "in": -0.3}, {"SEP": -0.8, "PNA": -0.4, "ARF": -0.3}),
    "50863": Lab(88, 0.5, "l", 0.62, {"li": 0.5}, {"SEP": 0.3}),
    "50868": Lab(14.5, 3.2, "n", 0.99, {"ac": 0.75, "re": 0.3}, {"ARF": 0.8, "SEP": 0.6, "DM": 0.2}),
    "50878": Lab(33, 0.85, "l", 0.63, {"li": 0.92}, {"SEP": 0.5, "CAD": 0.35}),
    "50882": Lab(24.5, 4, "n", 0.99, {"ac": -0.8, "re": -0.3}, {"ARF": -0.8, "SEP": -0.7}),
    "50885": Lab(0.6, 0.8, "l", 0.62, {"li": 0.6, "co": 0.25}, {"SEP": 0.4}),
    "50893": Lab(8.7, 0.75, "n", 0.92, {"al": 0.6}, {"ARF": -0.3, "SEP": -0.5}),
    "50902": Lab(102.5, 5.2, "n", 0.99, {"na": 0.75, "ac": 0.25}, {}),
    "50910": Lab(110, 1.1, "l", 0.35, {"mu": 0.9}, {"CAD": 0.6, "SEP": 0.2}),
    "50912": Lab(1.0, 0.42, "l", 0.99, {"re": 0.85}, {"ARF": 1.9, "HTN": 0.25, "DM": 0.25, "SEP": 0.3}),
    "50931": Lab(122, 0.30, "l", 0.99, {"in": 0.2}, {"DM": 1.7, "SEP": 0.2}),
    "50934": Lab(8, 0.8, "l", 0.52, {}, {}),
    "50947": Lab(2, 0.6, "l", 0.50, {"li": 0.6}, {"SEP": 0.2}),
    "50960": Lab(2.0, 0.3, "n", 0.93, {"re": 0.3}, {"ARF": 0.3, "AF": -0.1}),
    "50970": Lab(3.5, 0.32, "l", 0.92, {"re": 0.6}, {"ARF": 1.0}),
    "50971": Lab(4.2, 0.6, "n", 0.99, {"re": 0.4, "ac": 0.3}, {"ARF": 0.8, "DM": 0.15}),
    "50983": Lab(138.5, 4.5, "n", 0.99, {"na": 0.9}, {"PNA": -0.2, "SEP": -0.2}),
    "51006": Lab(19, 0.5, "l", 0.99, {"re": 0.8}, {"ARF": 1.5, "AF": 0.25, "SEP": 0.4, "HTN": 0.15}),
    "51133": Lab(1.3, 0.65, "l", 0.55, {"ly": 0.85}, {"SEP": -0.6, "PNA": -0.3}),
    "51146": Lab(0.4, 0.6, "l", 0.72, {"in": -0.25}, {"SEP": -0.4}),
    "51200": Lab(1.1, 1.0, "l", 0.72, {"in": -0.4, "ly": 0.3}, {"SEP": -0.6, "PNA": -0.3}),
    "51221": Lab(35.5, 6, "n", 0.99, {"an": -0.95}, {"ARF": -0.35, "SEP": -0.4, "CAD": -0.1}),
    "51222": Lab(11.6, 2.1, "n", 0.99, {"an": -0.96}, {"ARF": -0.4, "SEP": -0.4, "CAD": -0.1}),
    "51237": Lab(1.2, 0.28, "l", 0.87, {"co": 0.9}, {"AF": 0.9, "SEP": 0.5}),
    "51244": Lab(14, 0.65, "l", 0.73, {"in": -0.5, "ly": 0.8}, {"SEP": -0.7, "PNA": -0.5}),
    "51248": Lab(30, 2.4, "n", 0.99, {"mc": 0.9}, {}),
    "51249": Lab(32.8, 1.5, "n", 0.99, {"mc": 0.3, "an": -0.3}, {"ARF": -0.2}),
    "51250": Lab(91, 6, "n", 0.99, {"mc": 0.95}, {}),
    "51254": Lab(6.5, 0.45, "l", 0.73, {"ly": 0.3}, {"SEP": -0.3}),
    "51256": Lab(75, 11, "n", 0.73, {"in": 0.75, "ly": -0.5}, {"PNA": 0.6, "SEP": 0.8}),
    "51265": Lab(215, 0.42, "l", 0.99, {"in": 0.2, "co": -0.35}, {"SEP": -0.35}),
    "51274": Lab(13.2, 0.27, "l", 0.87, {"co": 0.9}, {"AF": 0.9, "SEP": 0.5}),
    "51275": Lab(30.5, 0.28, "l", 0.86, {"co": 0.6}, {"SEP": 0.4, "AF": 0.3, "CAD": 0.2}),
    "51277": Lab(14.6, 0.14, "l", 0.99, {"an": 0.5}, {"ARF": 0.4, "SEP": 0.5, "AF": 0.25}),
    "51279": Lab(3.9, 0.75, "n", 0.99, {"an": -0.92}, {"ARF": -0.35, "SEP": -0.35}),
    "51301": Lab(9.2, 0.45, "l", 0.99, {"in": 0.85}, {"PNA": 0.8, "SEP": 1.0, "CAD": 0.1}),
    "51678": Lab(9, 0.6, "l", 0.50, {}, {"DM": 0.2}),
    "52069": Lab(0.03, 0.6, "l", 0.55, {}, {}),
    "52073": Lab(0.09, 1.0, "l", 0.55, {"in": -0.3, "ly": 0.3}, {"SEP": -0.6}),
    "52074": Lab(0.6, 0.55, "l", 0.55, {"in": 0.4}, {}),
    "52075": Lab(7.0, 0.6, "l", 0.55, {"in": 0.88}, {"PNA": 0.8, "SEP": 1.0}),
    "52135": Lab(0.5, 0.7, "l", 0.45, {"in": 0.6}, {"SEP": 0.9, "PNA": 0.4}),
    "52172": Lab(48, 0.14, "l", 0.55, {"an": 0.5, "mc": 0.4}, {"ARF": 0.4, "SEP": 0.5}),
}

_PANELS: dict[str, tuple[str, ...]] = {
    "blood gas": ("50820", "50802", "50821", "50804", "50818"),
    "absolute counts": ("52075", "52073", "52074", "52069", "51133", "52172", "52135"),
    "differential": ("51146", "51256", "51254", "51200", "51244"),
    "liver": ("50861", "50878", "50863", "50885"),
    "indices": ("50934", "51678", "50947"),
}
# fmt: on
_PANEL_OF = {item: panel for panel, items in _PANELS.items() for item in items}
_BOUNDS = {"50820": (6.6, 7.9), "51256": (1.0, 99.0), "51244": (0.1, 98.0)}
_SMALLEST_SHARE_OF_MEDIAN = 0.1


def draw_labs(rng: np.random.Generator, diseases: NDArray[np.bool_]) -> NDArray[np.float64]:
    """[N, 50] in the laboratory's units and the order of LAB_IDS, NaN where not measured, from diseases [N, 7]."""
    num_patients = len(diseases)
    names = sorted({name for lab in _LABS.values() for name in lab.factors})
    factors = {name: rng.standard_normal(num_patients) for name in names}
    severity = diseases * np.exp(rng.normal(0, _SEVERITY_SPREAD, diseases.shape))
    ordered = {panel: rng.random(num_patients) for panel in _PANELS}
    septic = diseases[:, DISEASES.index(_SHORT["SEP"])]
    values = np.full((num_patients, NUM_LABS), np.nan)
    for column, item in enumerate(LAB_IDS):
        lab, panel = _LABS[item], _PANEL_OF.get(item)
        drawn = _draw_values(rng, item, lab, factors, severity)
        more = _SICKER_ARE_MEASURED_MORE * septic if panel in ("blood gas", "liver") or item == "50813" else 0.0
        chance = ordered[panel] if panel else rng.random(num_patients)
        values[:, column] = np.where(chance < lab.measured + more, drawn, np.nan)
    return values


def _draw_values(
    rng: np.random.Generator,
    item: str,
    lab: Lab,
    factors: dict[str, NDArray[np.float64]],
    severity: NDArray[np.float64],
) -> NDArray[np.float64]:
    """[N] values of one item, as if every patient had been measured, rounded as laboratories print them."""
    explained = sum(loading**2 for loading in lab.factors.values())
    latent = np.sqrt(max(0.05, 1 - explained)) * rng.standard_normal(len(severity))
    for name, loading in lab.factors.items():
        latent = latent + loading * factors[name]
    for short, shift in lab.shifts.items():
        latent = latent + shift * severity[:, DISEASES.index(_SHORT[short])]
    if lab.margin == "l":
        drawn = lab.median * np.exp(lab.spread * latent)
    else:
        drawn = lab.median + lab.spread * latent
        if lab.median > 0:
            drawn = np.maximum(drawn, _SMALLEST_SHARE_OF_MEDIAN * lab.median)
    drawn = np.clip(drawn, *_BOUNDS[item]) if item in _BOUNDS else drawn
    return np.asarray(np.round(drawn, 2 if abs(lab.median) >= 1 else 3))
