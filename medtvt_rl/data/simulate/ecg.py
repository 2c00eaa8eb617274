"""Simulates a 12-lead ECG with chosen findings.

Owns: the heart as a moving dipole and its view from twelve leads. Does not own: which findings a patient has, or files.
Each wave of a beat is a Gaussian bump on a three-dimensional dipole (McSharry et al., IEEE TBME 50:289, 2003; Sameni et
al., EURASIP JASP 2007:43407), projected with Dower's matrix (Dower et al., 1980). III, aVR, aVL and aVF are computed
from I and II, noise included, so that Einthoven's law holds sample by sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RATE_HZ = 500
DURATION_S = 10.0

# Rows V1..V6, I, II; columns left, foot, back.
_DOWER = np.array(
    [
        [-0.515, 0.157, -0.917],
        [0.044, 0.164, -1.387],
        [0.882, 0.098, -1.277],
        [1.213, 0.127, -0.601],
        [1.125, 0.127, -0.086],
        [0.831, 0.076, 0.230],
        [0.632, -0.235, 0.059],
        [0.235, 1.066, -0.132],
    ]
)

# Wave -> (centre relative to R in s, width in s, dipole in mV along left, foot, back).
_WAVES: dict[str, tuple[float, float, tuple[float, float, float]]] = {
    "P": (-0.165, 0.022, (0.12, 0.11, 0.0)),
    "Q": (-0.026, 0.009, (-0.10, 0.02, -0.22)),
    "R": (0.0, 0.011, (1.15, 0.62, 0.15)),
    "S": (0.028, 0.011, (-0.15, -0.12, 0.62)),
    "T1": (0.27, 0.055, (0.24, 0.12, -0.10)),
    "T2": (0.31, 0.030, (0.19, 0.10, -0.08)),
}
_ST_DIPOLE = np.array([-0.85, -0.55, 0.10])
_Q_DIPOLE = np.array([-0.30, -0.25, 0.25])
_FIBRILLATION_DIPOLE = np.array([-0.2, 0.6, -0.6])
_SHORTEST_RR_S = 0.34


@dataclass(frozen=True, slots=True, kw_only=True)
class EcgFindings:
    """What the recording shows; strengths are 0 where the finding is absent.

    Attributes:
        rate_bpm: mean ventricular rate.
        afib: irregular RR intervals, no P waves, fibrillatory waves.
        lvh, q_wave, peaked_t: strength, about 1.
        st_depression_mv: depth of the ST segment in the leads that look at the left ventricle.
    """

    rate_bpm: float = 75.0
    afib: bool = False
    lvh: float = 0.0
    st_depression_mv: float = 0.0
    q_wave: float = 0.0
    peaked_t: float = 0.0


def rr_intervals(rng: np.random.Generator, rate_bpm: float, afib: bool, duration_s: float) -> NDArray[np.float64]:
    """RR intervals in s that cover `duration_s`: independent draws of a gamma in fibrillation, else sinus rhythm."""
    mean_s = 60.0 / rate_bpm
    count = int(duration_s / mean_s * 1.6) + 12
    if afib:
        return np.clip(rng.gamma(22.0, mean_s / 22.0, count), max(_SHORTEST_RR_S, 0.55 * mean_s), 2.0)
    beat_s = np.arange(count) * mean_s
    respiratory = 0.025 * np.sin(2 * np.pi * 0.25 * beat_s + rng.uniform(0, 2 * np.pi))
    vasomotor = 0.020 * np.sin(2 * np.pi * 0.10 * beat_s + rng.uniform(0, 2 * np.pi))
    return mean_s * (1 + respiratory + vasomotor + 0.008 * rng.standard_normal(count))


def simulate_ecg(rng: np.random.Generator, findings: EcgFindings, noise_mv: float = 0.02) -> NDArray[np.float32]:
    """[12, 5000] float32, mV at 500 Hz, leads I II III aVR aVF aVL V1..V6."""
    dipole = _heart_dipole(rng, findings)
    leads = _DOWER.astype(np.float32) @ dipole + _disturbances(rng, dipole.shape[1], noise_mv)
    chest, lead_1, lead_2 = leads[:6], leads[6], leads[7]
    limb = [lead_1, lead_2, lead_2 - lead_1, -(lead_1 + lead_2) / 2, lead_2 - lead_1 / 2, lead_1 - lead_2 / 2]
    return np.concatenate([np.stack(limb), chest]).astype(np.float32)


def _heart_dipole(rng: np.random.Generator, findings: EcgFindings) -> NDArray[np.float32]:
    """[3, N] mV, the summed waves of every beat, turned by this patient's own electrical axis."""
    num_samples = int(RATE_HZ * DURATION_S)
    rr_s = rr_intervals(rng, findings.rate_bpm, findings.afib, DURATION_S + 2)
    r_peaks_s = np.cumsum(rr_s) - 1.0
    near = (r_peaks_s > -0.8) & (r_peaks_s < DURATION_S + 0.6)
    waves = _patient_waves(rng, findings)
    dipole = np.zeros((3, num_samples), dtype=np.float32)
    for peak_s, interval_s in zip(r_peaks_s[near], rr_s[near]):
        stretch = np.sqrt(np.clip(interval_s, 0.35, 1.4) / 0.8)
        for name, (centre_s, width_s, vector) in waves.items():
            shift_s = centre_s * stretch if name in ("T1", "T2", "ST") else centre_s
            _add_wave(dipole, peak_s + shift_s, width_s, vector)
    angle = rng.normal(0, 0.22)
    cos, sin = np.cos(angle), np.sin(angle)
    rotation = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]], dtype=np.float32)
    dipole = rotation @ dipole
    return dipole + _fibrillation(rng, num_samples) if findings.afib else dipole


def _patient_waves(
    rng: np.random.Generator, findings: EcgFindings
) -> dict[str, tuple[float, float, NDArray[np.float32]]]:
    """The waves of this patient's beats: individual amplitudes, then the findings."""
    amplitude = np.exp(rng.normal(0, 0.18))
    waves = {}
    for name, (centre_s, width_s, base) in _WAVES.items():
        vector = np.array(base) * np.exp(rng.normal(0, 0.10, 3)) * amplitude
        if name == "R":
            vector = vector * (1 + findings.lvh)
        elif name == "S":
            vector = vector * (1 + 1.3 * findings.lvh)
        elif name == "Q":
            vector = vector + findings.q_wave * _Q_DIPOLE
        elif name in ("T1", "T2"):
            vector = vector * (1 - 0.6 * min(findings.lvh, 0.8)) * (1 + 1.6 * findings.peaked_t)
            width_s = width_s * (1 - 0.35 * min(findings.peaked_t, 1.2))
        waves[name] = (centre_s, width_s, vector.astype(np.float32))
    if findings.afib:
        del waves["P"]
    if findings.st_depression_mv:
        waves["ST"] = (0.13, 0.045, (findings.st_depression_mv * _ST_DIPOLE).astype(np.float32))
    return waves


def _add_wave(dipole: NDArray[np.float32], centre_s: float, width_s: float, vector: NDArray[np.float32]) -> None:
    first = max(0, int((centre_s - 4 * width_s) * RATE_HZ))
    last = min(dipole.shape[1], int((centre_s + 4 * width_s) * RATE_HZ) + 2)
    if last > first:
        offset_s = np.arange(first, last, dtype=np.float32) / RATE_HZ - np.float32(centre_s)
        dipole[:, first:last] += vector[:, None] * np.exp(-0.5 * (offset_s / np.float32(width_s)) ** 2)


def _fibrillation(rng: np.random.Generator, num_samples: int) -> NDArray[np.float32]:
    """[3, N] mV: atrial waves of 4.5-7 Hz, strongest in V1 and II."""
    time_s = np.arange(num_samples) / RATE_HZ
    rate_hz = rng.uniform(4.5, 7) + 0.6 * np.sin(2 * np.pi * 0.3 * time_s + rng.uniform(0, 6))
    phase = 2 * np.pi * np.cumsum(rate_hz) / RATE_HZ
    wave = (np.sin(phase) + 0.4 * np.sin(2 * phase)) * rng.uniform(0.03, 0.07)
    wave *= 1 + 0.3 * np.sin(2 * np.pi * 0.2 * time_s)
    return (_FIBRILLATION_DIPOLE[:, None] * wave).astype(np.float32)


def _disturbances(rng: np.random.Generator, num_samples: int, noise_mv: float) -> NDArray[np.float32]:
    """[8, N] mV: electrode noise and baseline wander of the eight independent leads."""
    noise = rng.standard_normal((8, num_samples), dtype=np.float32)
    noise = (noise + np.roll(noise, 1, axis=1)) * np.float32(noise_mv / 1.4)
    time_s = np.arange(num_samples, dtype=np.float32) / RATE_HZ
    rate_hz = rng.uniform(0.1, 0.35, (8, 1)).astype(np.float32)
    phase = rng.uniform(0, 2 * np.pi, (8, 1)).astype(np.float32)
    depth_mv = (0.06 * rng.uniform(0.2, 1, (8, 1))).astype(np.float32)
    return noise + depth_mv * np.sin(2 * np.float32(np.pi) * rate_hz * time_s + phase)
