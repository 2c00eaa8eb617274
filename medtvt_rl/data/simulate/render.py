"""Renders one simulated study to files: a WFDB record and a JPEG film.

Owns: the strength of each finding as rendered, and the two file formats. Does not own: which studies exist
(cohort.py). It runs in pool processes, so it imports little.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medtvt_rl.data.ecg import LEADS
from medtvt_rl.data.simulate.cxr import FilmFindings, simulate_film
from medtvt_rl.data.simulate.ecg import RATE_HZ, EcgFindings, simulate_ecg
from medtvt_rl.data.simulate.findings import draw_findings

GAIN_PER_MV = 200
_JPEG_QUALITY = 92


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderTask:
    """One study to render.

    Attributes:
        seed: of this study's random numbers, (cohort, split, index).
        diseases: names of the patient's diseases.
        ecg_path, film_path: where to write, without suffix for the ECG; None if the modality was not taken.
        film_size: side of the film, pixels.
    """

    seed: tuple[int, int, int]
    diseases: frozenset[str]
    ecg_path: Path | None
    film_path: Path | None
    film_size: int


def render_study(task: RenderTask) -> dict[str, bool]:
    """Draws the findings of ECG and film, writes both files, and returns the findings drawn."""
    rng = np.random.default_rng(task.seed)
    findings, rate_bpm = draw_findings(rng, task.diseases)
    ecg = simulate_ecg(rng, _ecg_findings(rng, findings, rate_bpm))
    film = simulate_film(rng, _film_findings(rng, findings), task.film_size)
    if task.ecg_path is not None:
        write_wfdb(task.ecg_path, ecg)
    if task.film_path is not None:
        Image.fromarray(film).save(task.film_path, quality=_JPEG_QUALITY)
    return findings


def _ecg_findings(rng: np.random.Generator, findings: dict[str, bool], rate_bpm: float) -> EcgFindings:
    return EcgFindings(
        rate_bpm=rate_bpm,
        afib=findings["afib"],
        lvh=rng.uniform(0.6, 1.0) if findings["lvh"] else 0.0,
        st_depression_mv=rng.uniform(0.15, 0.30) if findings["st_depression"] else 0.0,
        q_wave=rng.uniform(0.6, 1.0) if findings["q_wave"] else 0.0,
        peaked_t=rng.uniform(0.7, 1.2) if findings["peaked_t"] else 0.0,
    )


def _film_findings(rng: np.random.Generator, findings: dict[str, bool]) -> FilmFindings:
    return FilmFindings(
        cardiothoracic_ratio=rng.normal(0.585 if findings["cardiomegaly"] else 0.45, 0.03),
        consolidation=rng.uniform(0.6, 1.0) if findings["consolidation"] else 0.0,
        effusion=rng.uniform(0.25, 0.7) if findings["effusion"] else 0.0,
        edema=rng.uniform(0.5, 1.0) if findings["edema"] else 0.0,
    )


def write_wfdb(record: Path, signal_mv: NDArray[np.float32]) -> None:
    """Writes [12, N] mV at 500 Hz as RECORD.hea and RECORD.dat: format 16, gain 200, as the published records are."""
    samples = np.clip(np.round(signal_mv * GAIN_PER_MV), -32767, 32767).astype("<i2")
    lines = [f"{record.name} {len(LEADS)} {RATE_HZ} {samples.shape[1]}"]
    for lead, row in zip(LEADS, samples):
        checksum = int(row.sum(dtype=np.int64)) & 0xFFFF
        checksum -= 0x10000 if checksum >= 0x8000 else 0
        lines.append(f"{record.name}.dat 16 {GAIN_PER_MV}(0)/mV 16 0 {row[0]} {checksum} 0 {lead}")
    (record.parent / f"{record.name}.dat").write_bytes(np.ascontiguousarray(samples.T).tobytes())
    (record.parent / f"{record.name}.hea").write_text("\n".join(lines) + "\n")
