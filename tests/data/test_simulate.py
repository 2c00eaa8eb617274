"""The simulator: physiology, penetrance, texts, files."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import wfdb
from PIL import Image

from medtvt_rl.data.config import CohortConfig
from medtvt_rl.data.ecg import LEADS
from medtvt_rl.data.errors import DataError
from medtvt_rl.data.labels import ALL_FINDINGS, DISEASES, FINDINGS, named_findings
from medtvt_rl.data.labs import LAB_IDS, read_labs_means
from medtvt_rl.data.simulate import diseases as disease_model
from medtvt_rl.data.simulate.cohort import write_cohort
from medtvt_rl.data.simulate.cxr import FilmFindings, simulate_film
from medtvt_rl.data.simulate.ecg import EcgFindings, rr_intervals, simulate_ecg
from medtvt_rl.data.simulate.findings import LAB_THRESHOLDS, PENETRANCE, draw_findings, lab_findings
from medtvt_rl.data.simulate.labs import draw_labs
from medtvt_rl.data.simulate.texts import chain_of_evidence, section

LEAD = {name: i for i, name in enumerate(LEADS)}


def mean_beat(findings: EcgFindings, seed: int = 0) -> np.ndarray:
    """[12, 400] mV, 0.4 s before to 0.4 s after R, averaged over beats and 12 patients."""
    beats = []
    for patient in range(12):
        signal = simulate_ecg(np.random.default_rng([seed, patient]), findings)
        strength = signal[LEAD["V5"]]
        peaks = [i for i in range(200, 4800) if strength[i] == strength[i - 120 : i + 120].max() and strength[i] > 0.5]
        beats += [signal[:, i - 200 : i + 200] for i in peaks]
    return np.mean(beats, axis=0)


@pytest.mark.parametrize("findings", [EcgFindings(), EcgFindings(afib=True, lvh=1, q_wave=1, st_depression_mv=0.3)])
def test_limb_leads_obey_einthoven_and_goldberger(findings: EcgFindings) -> None:
    lead = dict(zip(LEADS, simulate_ecg(np.random.default_rng(1), findings)))
    np.testing.assert_allclose(lead["I"] + lead["III"], lead["II"], atol=1e-6)
    np.testing.assert_allclose(lead["aVR"], -(lead["I"] + lead["II"]) / 2, atol=1e-6)
    np.testing.assert_allclose(lead["aVL"], (lead["I"] - lead["III"]) / 2, atol=1e-6)
    np.testing.assert_allclose(lead["aVF"], (lead["II"] + lead["III"]) / 2, atol=1e-6)


def test_a_normal_beat_has_a_usual_shape() -> None:
    peak = mean_beat(EcgFindings())[:, 180:220]
    assert 0.4 < peak[LEAD["I"]].max() < 1.2 and 0.6 < peak[LEAD["II"]].max() < 1.5
    assert peak[LEAD["aVR"]].min() < -0.5
    assert abs(peak[LEAD["V1"]].min()) > peak[LEAD["V1"]].max() and peak[LEAD["V5"]].max() > abs(peak[LEAD["V5"]].min())


@pytest.mark.parametrize("rate_bpm", [60, 90, 120, 150])
def test_fibrillation_is_irregular_but_never_impossibly_fast(rate_bpm: float) -> None:
    rng = np.random.default_rng(0)
    irregular = np.concatenate([rr_intervals(rng, rate_bpm, True, 60) for _ in range(5)])
    regular = rr_intervals(rng, rate_bpm, False, 60)
    assert irregular.min() >= 0.34 and irregular.std() / irregular.mean() > 0.14
    assert regular.std() / regular.mean() < 0.06
    assert abs(regular.mean() - 60 / rate_bpm) < 0.02 and abs(irregular.mean() * rate_bpm / 60 - 1) < 0.05


def test_fibrillation_has_no_p_wave() -> None:
    def p_height(findings: EcgFindings) -> float:
        beat = mean_beat(findings)[LEAD["II"]]
        return float(beat[105:130].mean() - beat[60:80].mean())

    assert p_height(EcgFindings()) > 0.06 > 0.03 > abs(p_height(EcgFindings(afib=True, rate_bpm=60)))


def test_findings_change_the_beat_as_named() -> None:
    normal = mean_beat(EcgFindings())
    v5 = LEAD["V5"]
    assert mean_beat(EcgFindings(lvh=0.8))[v5, 200] > 1.4 * normal[v5, 200]
    assert mean_beat(EcgFindings(st_depression_mv=0.25))[v5, 260:275].mean() < normal[v5, 260:275].mean() - 0.1
    assert mean_beat(EcgFindings(q_wave=0.8))[v5, 180:195].min() < normal[v5, 180:195].min() - 0.15
    peaked = mean_beat(EcgFindings(peaked_t=1.0))
    assert peaked[LEAD["V4"], 300:380].max() > 1.5 * normal[LEAD["V4"], 300:380].max()


def mean_film(findings: FilmFindings) -> np.ndarray:
    return np.mean([simulate_film(np.random.default_rng(seed), findings, 96) for seed in range(12)], axis=0)


def test_film_findings_change_their_region() -> None:
    normal = mean_film(FilmFindings())
    assert normal[40:60, 20:30].mean() < 120 < normal[40:60, 46:50].mean()
    heart = np.s_[50:72, 66:78]
    assert mean_film(FilmFindings(cardiothoracic_ratio=0.6))[heart].mean() > normal[heart].mean() + 15
    both_bases = [np.s_[66:78, 12:22], np.s_[66:78, 74:84]]
    wet = mean_film(FilmFindings(effusion=0.6))
    assert sum((wet[base] - normal[base]).mean() for base in both_bases) > 25
    hila = np.s_[36:52, 26:38]
    assert mean_film(FilmFindings(edema=0.9))[hila].mean() > normal[hila].mean() + 12
    dense = mean_film(FilmFindings(consolidation=0.9)) - normal
    assert dense[20:75].mean() > 2


def test_diseases_have_their_prevalence_and_company() -> None:
    drawn = disease_model.draw_diseases(np.random.default_rng(0), 20_000)
    assert drawn.any(axis=1).all()
    share = dict(zip(DISEASES, drawn.mean(axis=0)))
    for name, prevalence in disease_model.PREVALENCE.items():
        assert prevalence - 0.01 < share[name] < prevalence + 0.06
    together = np.corrcoef(drawn.T)
    assert together[DISEASES.index("Pneumonia"), DISEASES.index("Sepsis")] > 0.2
    assert together[DISEASES.index("Hypertension"), DISEASES.index("Sepsis")] < 0
    assert np.linalg.eigvalsh(disease_model.correlation_matrix()).min() > 0


@pytest.mark.parametrize("key", sorted(PENETRANCE))
def test_findings_appear_as_often_as_their_penetrance_says(key: str) -> None:
    rng = np.random.default_rng(0)
    for present in (frozenset(), frozenset(PENETRANCE[key].causes)):
        share = np.mean([draw_findings(rng, present)[0][key] for _ in range(1500)])
        expected = PENETRANCE[key].probability(present)
        assert abs(share - expected) < 0.045 and 0 < expected < 0.95


def test_labs_follow_diseases_and_thresholds() -> None:
    diseases = disease_model.draw_diseases(np.random.default_rng(0), 4000)
    values = draw_labs(np.random.default_rng(1), diseases)
    assert values.shape == (4000, 50) and 0.15 < np.isnan(values).mean() < 0.35
    assert np.nanmin(values[:, LAB_IDS.index("50971")]) > 0
    renal = diseases[:, DISEASES.index("Acute Renal Failure")]
    creatinine = values[:, LAB_IDS.index("50912")]
    assert np.nanmedian(creatinine[renal]) > 1.6 * np.nanmedian(creatinine[~renal])
    assert 0.5 < np.nanmean(creatinine[renal] > 1.5) < 0.95
    assert not any(lab_findings(np.full(50, np.nan)).values())
    for item, threshold in LAB_THRESHOLDS.values():
        assert 0.02 < np.nanmean(values[:, LAB_IDS.index(item)] > threshold) < 0.98


def test_texts_name_what_was_rendered_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        findings = {
            modality: None if rng.random() < 0.2 else {key: bool(rng.random() < 0.4) for key in keys}
            for modality, keys in FINDINGS.items()
        }
        shown = {key for found in findings.values() if found for key, has in found.items() if has}
        text = chain_of_evidence(rng, findings, {"Sepsis"})
        assert named_findings(text) == shown
        assert text.startswith("<think> ECG: ") and text.endswith(" </think><answer> Sepsis </answer>")
        for modality, found in findings.items():
            assert ("not available" in section(rng, modality, found)) == (found is None)


def test_a_cohort_has_the_published_layout(cohort_root: Path) -> None:
    counts = {"train": 20, "validation": 6, "test": 8}
    patients: list[str] = []
    findings = {row["study_id"]: row for row in csv.DictReader((cohort_root / "findings.csv").open())}
    for split, count in counts.items():
        rows = list(csv.DictReader((cohort_root / f"{split}.csv").open()))
        assert len(rows) == count
        patients += [row["subject_id"] for row in rows]
        for row in rows:
            present = {"ecg": row["ecg_path"], "cxr": row["cxr_path"], "lab": any(row[item] for item in LAB_IDS)}
            assert sum(map(bool, present.values())) >= 2
            if present["ecg"]:
                record = wfdb.rdrecord(str(cohort_root / row["ecg_path"]), physical=False)
                assert record.sig_name == list(LEADS) and record.fs == 500 and record.d_signal.shape == (5000, 12)
                assert [value % 65536 for value in record.checksum] == record.calc_checksum()
            if present["cxr"]:
                assert Image.open(cohort_root / row["cxr_path"]).size == (64, 64)
            shown = findings[row["study_id"]]
            assert all(shown[key] == "0" for m, keys in FINDINGS.items() if not present[m] for key in keys)
        for entry in json.loads((cohort_root / f"qa/diagnosis_{split}.json").read_text()):
            rendered = {key for key in ALL_FINDINGS if findings[entry["study_id"]][key] == "1"}
            assert named_findings(entry["messages"][1]["content"]) == rendered
    assert len(set(patients)) == len(patients) == 34
    assert 0.3 < read_labs_means(cohort_root / "labs_means.json").mean() < 0.7


def test_a_cohort_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    config = CohortConfig(num_train=3, num_validation=1, num_test=1, film_size=32)
    first, second = write_cohort(config, tmp_path / "a"), write_cohort(config, tmp_path / "b")
    other = write_cohort(dataclasses.replace(config, seed=1), tmp_path / "c")
    names = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert [path.relative_to(second) for path in sorted(second.rglob("*")) if path.is_file()] == names
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)
    assert (first / "train.csv").read_bytes() != (other / "train.csv").read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_a_cohort_is_reused_and_never_overwrites_anything_else(tmp_path: Path) -> None:
    config = CohortConfig(num_train=2, num_validation=1, num_test=1, film_size=32)
    root = write_cohort(config, tmp_path / "data")
    written = (root / "train.csv").stat().st_mtime_ns
    seen: list[tuple[int, int]] = []
    write_cohort(config, root, lambda *done: seen.append(done))
    assert (root / "train.csv").stat().st_mtime_ns == written and not seen
    with pytest.raises(DataError, match=r"another cohort.*seed 0 instead of 5"):
        write_cohort(dataclasses.replace(config, seed=5), root)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("keep")
    with pytest.raises(DataError, match="no simulated cohort"):
        write_cohort(config, tmp_path / "mine")
    with pytest.raises(DataError, match="num_test is 0"):
        write_cohort(dataclasses.replace(config, num_test=0), tmp_path / "new")


def test_progress_counts_every_study(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    config = CohortConfig(num_train=2, num_validation=1, num_test=1, film_size=32)
    write_cohort(config, tmp_path / "data", lambda *done: seen.append(done))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
