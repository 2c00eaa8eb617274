"""Structured labels: which rows belong to a study, what their values mean, what is counted instead of used."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from medtvt_rl.data.config import DataConfig, FilmConfig
from medtvt_rl.data.errors import DataError
from medtvt_rl.data.labels import DISEASES
from medtvt_rl.data.labs import LAB_IDS
from medtvt_rl.data.medtvt_qa import QA_KINDS
from medtvt_rl.data.qa.icd import ICD9, ICD10, PAPER_ICD10, IcdRules, diseases_of_stay
from medtvt_rl.data.qa.labels import Labelled, LabelSources, StudyLabels, clean_statement, read_labels
from medtvt_rl.data.qa.reference_ranges import RANGES, Range, read_ranges, readings
from medtvt_rl.data.simulate.label_tables import CXR_TABLE, ECG_TABLE, ICD_TABLE
from medtvt_rl.data.simulate.layout_plain import LABELS
from medtvt_rl.data.study_store import StudyStore


def config_for(root: Path) -> DataConfig:
    return DataConfig(root=str(root), film=FilmConfig(size=48), num_workers=1, max_unusable_share=1.0)


def sources_of(root: Path, **changes: object) -> LabelSources:
    folder = root / LABELS
    found = LabelSources(ecg=folder / ECG_TABLE, cxr=folder / CXR_TABLE, icd=folder / ICD_TABLE)
    return dataclasses.replace(found, **changes)


def labels_of(root: Path, **changes: object) -> Labelled:
    return read_labels(config_for(root), sources_of(root, **changes), QA_KINDS)


def study(labelled: Labelled, study_id: str) -> StudyLabels:
    return next(study for study in labelled.studies if study.study_id == study_id)


def edit(path: Path, change: dict[str, str], where: dict[str, str]) -> None:
    """Writes `change` into the first row that has the cells of `where`."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows, names = list(reader), list(reader.fieldnames or ())
    next(row for row in rows if all(row[key] == value for key, value in where.items())).update(change)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def test_the_cohort_s_tables_give_back_its_diseases_and_modalities(cohort_root: Path, store: StudyStore) -> None:
    labelled = labels_of(cohort_root)
    assert labelled.problems == []
    assert [s.study_id for s in labelled.studies] == [i for split in store.splits for i in store.study_ids(split)]
    for found in labelled.studies:
        truth = store.study(found.study_id)
        assert found.patient_id == truth.patient_id
        assert found.diseases == store.diagnoses(found.study_id)
        assert tuple(name in found.taken for name in ("ecg", "cxr", "lab")) == truth.present
        assert set(found.gaps) == {kind for kind, there in zip(("ecg", "cxr", "lab"), truth.present) if not there}
    assert any(found.gaps for found in labelled.studies)


@pytest.mark.parametrize(
    ("code", "disease"),
    [
        ("I25110", "Coronary Artery Disease"),
        ("N17.9", "Acute Renal Failure"),
        ("I10", "Hypertension"),
        ("I1311", "Hypertension"),
        ("i4820", "Atrial Fibrillation"),
        ("J189", "Pneumonia"),
        ("E11319", "Diabetes Mellitus"),
        ("A4101", "Sepsis"),
        ("R6521", "Sepsis"),
        *((code, None) for code in ("I219", "N189", "I160", "I471", "J159", "E870", "A029", "R6510", "I2")),
    ],
)
def test_families_of_icd10_codes_count_with_their_subcodes(code: str, disease: str | None) -> None:
    counts: Counter[str] = Counter()
    found, reason = diseases_of_stay([(code, "10"), ("Z9999", "10")], IcdRules(icd10="families"), counts)
    assert (found, reason) == ((disease,) if disease else (), "")
    assert counts.total() == 2


@pytest.mark.parametrize(
    ("code", "disease"),
    [
        ("I25.10", "Coronary Artery Disease"),
        ("N17.9", "Acute Renal Failure"),
        ("i10", "Hypertension"),
        ("I13.0", "Hypertension"),
        ("I48.91", "Atrial Fibrillation"),
        ("J18.9", "Pneumonia"),
        ("E11.9", "Diabetes Mellitus"),
        ("E11.319", "Diabetes Mellitus"),
        ("A41.9", "Sepsis"),
        ("R65.21", "Sepsis"),
        *((code, None) for code in ("E11.22", "I25.110", "I13.11", "I48.20", "A41.01", "E10.10", "I16.0")),
    ],
)
def test_by_default_only_the_paper_s_own_icd10_codes_count(code: str, disease: str | None) -> None:
    found, reason = diseases_of_stay([(code, "10"), ("Z9999", "10")], IcdRules(), Counter())
    assert (found, reason) == ((disease,) if disease else (), "")


def test_the_paper_s_codes_are_of_their_families() -> None:
    assert tuple(PAPER_ICD10) == DISEASES
    # E19 is in the paper's list, and no category of ICD-10.
    families = {**ICD10, "Diabetes Mellitus": (*ICD10["Diabetes Mellitus"], "E19")}
    assert all(code.startswith(families[name]) for name, codes in PAPER_ICD10.items() for code in codes)
    assert [len(codes) for codes in PAPER_ICD10.values()] == [11, 5, 14, 9, 5, 54, 16]


def test_icd9_codes_are_counted_and_map_where_asked() -> None:
    codes = [("4019", "9"), ("42731", "9"), ("99592", "9"), ("V1582", "9"), ("what?", "9"), ("I10", "11")]
    counts: Counter[str] = Counter()
    assert diseases_of_stay(codes, IcdRules(), counts) == (None, "only ICD-9 codes (see --icd9 map)")
    assert counts == {
        "ICD-9 codes left unread": 4,
        "ICD-9 codes that cannot be read": 1,
        "codes of an unknown ICD version": 1,
    }
    assert diseases_of_stay(codes, IcdRules(icd9=True), counts)[0] == ("Hypertension", "Atrial Fibrillation", "Sepsis")
    both: Counter[str] = Counter()
    assert diseases_of_stay([("4019", "9"), ("I10", "10")], IcdRules(), both) == (("Hypertension",), "")
    assert both["stays with codes of both versions"] == 1
    assert diseases_of_stay([("?", "10")], IcdRules(), both) == (None, "no readable ICD code")


def test_a_stay_of_icd9_codes_leaves_the_diagnosis_out_and_says_so(data_root: Path) -> None:
    table = data_root / LABELS / ICD_TABLE
    rows = [line.split(",") for line in table.read_text().splitlines()]
    stay = rows[1][1]
    table.write_text("\n".join(",".join([*r[:3], *(["4019", "9"] if r[1] == stay else r[3:])]) for r in rows) + "\n")
    study_id = str(int(stay) + 20_000_000)
    left_out = labels_of(data_root)
    assert study(left_out, study_id).gaps["diagnosis"] == "only ICD-9 codes (see --icd9 map)"
    assert left_out.counts["icd"]["ICD-9 codes left unread"] > 0
    assert study(labels_of(data_root, icd_rules=IcdRules(icd9=True)), study_id).diseases == ("Hypertension",)


def test_rows_of_other_patients_unknown_values_and_doubles_are_counted(data_root: Path) -> None:
    folder = data_root / LABELS
    first, second, third = (row["study_id"] for row in list(csv.DictReader((folder / ECG_TABLE).open()))[:3])
    edit(folder / ECG_TABLE, {"subject_id": "1"}, {"study_id": first})
    edit(folder / ECG_TABLE, {"report_0": "*** Data quality may affect interpretation"}, {"study_id": second})
    with (folder / ECG_TABLE).open("a") as file:
        file.write(next(line for line in (folder / ECG_TABLE).read_text().splitlines() if third in line) + "\n")
    film = next(csv.DictReader((folder / CXR_TABLE).open()))["study_id"]
    edit(folder / CXR_TABLE, {"Fracture": "2.0", "Edema": "-1.0"}, {"study_id": film})
    labelled = labels_of(data_root)
    assert labelled.counts["ecg"]["rows whose patient is not the study's"] == 1
    assert labelled.counts["ecg"]["technical remarks left out"] == 1
    assert labelled.counts["ecg"]["rows of an ECG that has one already"] == 1
    assert labelled.counts["cxr"]["labels of an unknown value"] == 1
    assert study(labelled, first).gaps["ecg"] == study(labelled, first).gaps["diagnosis"] == "ECG without statements"
    assert study(labelled, film).film["Edema"] == "uncertain" and "Fracture" not in study(labelled, film).film


@pytest.mark.parametrize(
    ("table", "column"),
    [(ECG_TABLE, "report_0"), (CXR_TABLE, "Pleural Other"), (ICD_TABLE, "icd_version"), ("../train.csv", "hadm_id")],
)
def test_a_missing_column_is_named(data_root: Path, table: str, column: str) -> None:
    path = data_root / LABELS / table
    header, rest = path.read_text().split("\n", 1)
    path.write_text(",".join(name if name != column else "renamed" for name in header.split(",")) + "\n" + rest)
    with pytest.raises(
        DataError, match=rf"{path.name}: column {column} missing among the \d+ of its first line"
    ) as caught:
        labels_of(data_root)
    assert "\n" not in str(caught.value)


def test_tables_may_be_compressed_and_a_broken_one_is_an_error(data_root: Path) -> None:
    folder = data_root / LABELS
    plain = labels_of(data_root)
    compressed = folder / (ICD_TABLE + ".gz")
    with (folder / ICD_TABLE).open("rb") as source, gzip.open(compressed, "wb") as target:
        shutil.copyfileobj(source, target)
    assert labels_of(data_root, icd=compressed) == plain
    compressed.write_bytes(compressed.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"diagnoses_icd.csv.gz: not a CSV file"):
        labels_of(data_root, icd=compressed)
    with pytest.raises(DataError, match="no such file"):
        labels_of(data_root, icd=folder / "absent.csv")


def test_a_broken_table_is_refused_without_the_words_of_its_rows(data_root: Path) -> None:
    path = data_root / LABELS / ICD_TABLE
    header, rest = path.read_text().split("\n", 1)
    path.write_text(f"{header}\nveiled,cell\n{rest}")
    with pytest.raises(DataError, match=r"not a CSV file \(.*Expected \d+ columns, got 2\)") as caught:
        labels_of(data_root)
    assert "veiled" not in str(caught.value)
    path.write_text(f"veiled,{','.join('1' for _ in header.split(',')[1:])}\n{rest}")
    with pytest.raises(DataError, match="missing among") as caught:
        labels_of(data_root)
    assert "veiled" not in str(caught.value)


def test_paths_of_the_published_layout_lead_to_their_rows(data_root: Path) -> None:
    """Record p10000032/s40689238/40689238, film p10/p10000032/s50414267/UUID.jpg: the folders hold the study ids."""
    row = next(r for r in csv.DictReader((data_root / "train.csv").open()) if r["ecg_path"] and r["cxr_path"])
    study_id, place = row["study_id"], {"study_id": row["study_id"]}
    before = study(labels_of(data_root), study_id)
    edit(data_root / LABELS / ECG_TABLE, {"study_id": "40689238"}, place)
    edit(data_root / LABELS / CXR_TABLE, {"study_id": "50414267"}, place)
    changed = {"ecg_path": "files/p1000/p10000032/s40689238/40689238", "cxr_path": "files/p10/p1/s50414267/02aa-80.jpg"}
    edit(data_root / "train.csv", changed, place)
    found = study(labels_of(data_root), study_id)
    assert (found.statements, found.film) == (before.statements, before.film) and not found.gaps


def test_a_patient_of_two_splits_stays_in_the_later(data_root: Path) -> None:
    train, test = (next(csv.DictReader((data_root / f"{split}.csv").open())) for split in ("train", "test"))
    edit(data_root / "train.csv", {"subject_id": test["subject_id"]}, {"study_id": train["study_id"]})
    labelled = labels_of(data_root)
    assert [problem.study_id for problem in labelled.problems] == [train["study_id"]]
    assert {s.split for s in labelled.studies if s.patient_id == test["subject_id"]} == {"test"}


def test_values_are_placed_beside_their_range(tmp_path: Path) -> None:
    values = np.full(len(LAB_IDS), np.nan)
    for item, value in (("50912", 1.2), ("50971", 5.2), ("51222", 7.0), ("50934", 99.0)):
        values[LAB_IDS.index(item)] = value
    assert [(r.item, r.level) for r in readings(values, RANGES)] == [
        ("50912", "normal"),
        ("50971", "high"),
        ("51222", "low"),
    ]
    own = tmp_path / "ranges.csv"
    own.write_text("item,low,high,unit\n50912,0.5,1.1,mg/dL\n50934,0,50,\n")
    ranges = read_ranges(own)
    assert ranges["50912"] == Range(0.5, 1.1, "mg/dL") and len(ranges) == 48
    assert str(readings(values, ranges)[0]) == "Creatinine 1.2 mg/dL (reference 0.5 to 1.1): high"
    for text, message in (
        ("item,low,high\n", "column unit missing"),
        ("item,low,high,unit\n1,0,1,x\n", "'1' is not one of the 50 item ids"),
        ("item,low,high,unit\n50912,2,1,x\n", "2 to 1 is no range"),
        ("item,low,high,unit\n50912,,1,x\n", "nan to 1 is no range"),
    ):
        own.write_text(text)
        with pytest.raises(DataError, match=message):
            read_ranges(own)


def test_every_disease_has_codes_and_all_but_the_serum_indices_a_range() -> None:
    assert set(LAB_IDS) - set(RANGES) == {"50934", "50947", "51678"}
    assert tuple(ICD10) == tuple(ICD9) == DISEASES


def test_a_statement_becomes_one_clause() -> None:
    assert clean_statement("*** Sinus rhythm. ") == "Sinus rhythm"
    assert clean_statement("Summary: <b> ECG: x. y") == "Summary - b ECG - x, y"
    assert clean_statement("*** ***") == ""
