"""Brings a 12-lead ECG of any layout to one form.

Owns: the one form in which the rest sees an ECG, [12, 1000] float32 in mV at 100 Hz, and every check on the way there.
Does not own: file formats (raw_ecg.py), or normalisation for a model. Invalid samples are interpolated before
resampling, because a filter spreads them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medtvt_rl.data.errors import DataError
from medtvt_rl.data.raw_ecg import RawEcg, read_raw_ecg

LEADS = ("I", "II", "III", "aVR", "aVF", "aVL", "V1", "V2", "V3", "V4", "V5", "V6")
RATE_HZ = 100
DURATION_S = 10
NUM_SAMPLES = RATE_HZ * DURATION_S
MAX_INVALID_SHARE = 0.1
MAX_PLAUSIBLE_MV = 50.0
_DURATION_TOLERANCE = 0.01
_MILLIVOLTS = {"mv": 1.0, "uv": 1e-3, "µv": 1e-3, "μv": 1e-3, "v": 1e3, "nv": 1e-6}


def read_ecg(path: Path) -> NDArray[np.float32]:
    """Reads a WFDB record (with or without suffix) or a DICOM waveform (.dcm): [12, 1000] float32, mV at 100 Hz.

    Raises:
        DataError: the file is missing or unreadable, or the recording is not 12 named leads of 10 s in a unit of
            volts, or more than a tenth of a lead is invalid.
    """
    raw = read_raw_ecg(path)
    try:
        return standard_ecg(raw)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def standard_ecg(raw: RawEcg) -> NDArray[np.float32]:
    """Reorders leads by name, converts units, mends short gaps, resamples; raises DataError naming what is wrong."""
    num_samples = raw.signal.shape[0]
    duration_s = num_samples / raw.rate_hz if raw.rate_hz > 0 else math.inf
    order = _lead_order(raw.leads)
    if raw.rate_hz < RATE_HZ:
        raise DataError(f"sampling rate is {raw.rate_hz:g} Hz, expected at least {RATE_HZ}; record it again")
    if abs(duration_s - DURATION_S) > _DURATION_TOLERANCE * DURATION_S:
        raise DataError(
            f"{num_samples} samples at {raw.rate_hz:g} Hz are {duration_s:.4g} s, expected {DURATION_S} s; "
            "check the sampling rate in the header, or cut the recording"
        )
    scale = np.array([_millivolts(raw.units[i], raw.leads[i]) for i in order])
    signal = _mend_gaps(raw.signal[:, order].T * scale[:, None])
    peak = float(np.abs(signal).max())
    if peak > MAX_PLAUSIBLE_MV:
        raise DataError(f"the peak is {peak:.0f} mV, expected below {MAX_PLAUSIBLE_MV:g}; check the unit in the header")
    if np.ptp(signal, axis=1).max() == 0:
        raise DataError("every lead is flat; the recording holds no signal")
    return _resample(signal, raw.rate_hz)


def _lead_order(leads: Sequence[str]) -> list[int]:
    """Position in the file of each of the 12 leads."""
    names = [plain_lead(lead) for lead in leads]
    missing = [lead for lead in LEADS if lead.upper() not in names]
    if len(names) != len(LEADS) or missing:
        lacking = f", missing {' '.join(missing)}" if missing else ""
        raise DataError(f"{len(names)} leads ({' '.join(leads)}){lacking}; expected the 12 leads {' '.join(LEADS)}")
    return [names.index(lead.upper()) for lead in LEADS]


def plain_lead(name: str) -> str:
    """The bare name in capitals: "Lead I (Einthoven)" -> "I", "avf" -> "AVF"."""
    return re.sub(r"\([^()]*\)|\blead\b|[\s_\-]", "", name, flags=re.IGNORECASE).upper()


def _millivolts(unit: str, lead: str) -> float:
    factor = _MILLIVOLTS.get(unit.strip().lower())
    if factor is None:
        raise DataError(f"lead {lead} has unit {unit!r}, expected mV, uV or V; mend the header")
    return factor


def _mend_gaps(signal: NDArray[np.float64]) -> NDArray[np.float64]:
    """Interpolates invalid samples of [12, N] linearly. Raises DataError for a lead that lacks more than a tenth."""
    invalid = ~np.isfinite(signal)
    if not invalid.any():
        return signal
    signal = signal.copy()
    positions = np.arange(signal.shape[1])
    for lead, row, bad in zip(LEADS, signal, invalid):
        if bad.mean() > MAX_INVALID_SHARE:
            raise DataError(
                f"lead {lead} is {bad.mean():.0%} invalid (NaN or -32768), at most {MAX_INVALID_SHARE:.0%} is "
                "interpolated; leave this ECG out or record it again"
            )
        row[bad] = np.interp(positions[bad], positions[~bad], row[~bad])
    return signal


def _resample(signal: NDArray[np.float64], rate_hz: float) -> NDArray[np.float32]:
    """[12, N] at `rate_hz` -> [12, 1000] at 100 Hz with an anti-alias filter; ends are continued, not taken as zero."""
    if rate_hz != RATE_HZ:
        from scipy.signal import resample_poly

        ratio = Fraction(RATE_HZ / rate_hz).limit_denominator(1000)
        window = _low_pass(ratio.numerator, ratio.denominator)
        signal = resample_poly(signal, ratio.numerator, ratio.denominator, axis=1, window=window, padtype="line")
    missing = NUM_SAMPLES - signal.shape[1]
    if missing > 0:
        signal = np.pad(signal, ((0, 0), (0, missing)), mode="edge")
    return np.ascontiguousarray(signal[:, :NUM_SAMPLES], dtype=np.float32)


@cache
def _low_pass(up: int, down: int) -> NDArray[np.float64]:
    from scipy.signal import firwin

    longest = max(up, down)
    return np.asarray(firwin(20 * longest + 1, 1.0 / longest, window=("kaiser", 5.0)))
