"""The store: what it gives back, what it refuses and why, when it is built anew."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import pickle
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from wfdb_files import read_samples, write_samples

from medtvt_rl.data import parallel
from medtvt_rl.data.config import DataConfig, FilmConfig
from medtvt_rl.data.cxr import read_film
from medtvt_rl.data.ecg import read_ecg
from medtvt_rl.data.errors import DataError
from medtvt_rl.data.labels import ALL_FINDINGS, named_findings
from medtvt_rl.data.study_build import store_folder
from medtvt_rl.data.study_store import StudyStore

Rows = list[dict[str, str]]
FILM = FilmConfig(size=48)


def config_for(root: Path, **changes: Any) -> DataConfig:
    config = DataConfig(root=str(root), film=FILM, num_workers=1, max_unusable_share=1.0)
    return dataclasses.replace(config, **changes)


def edit_table(root: Path, split: str, change: Callable[[Rows], None]) -> None:
    with (root / f"{split}.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        rows, names = list(reader), list(reader.fieldnames or [])
    change(rows)
    with (root / f"{split}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def edit_questions(root: Path, name: str, change: Callable[[list[Any]], None]) -> None:
    entries = json.loads((root / "qa" / name).read_text())
    change(entries)
    (root / "qa" / name).write_text(json.dumps(entries))


def complete(rows: Rows) -> dict[str, str]:
    """The first row that lacks neither ECG nor film nor labs."""
    return next(row for row in rows if row["ecg_path"] and row["cxr_path"] and row["50912"])


def test_a_store_gives_back_what_was_written(cohort_root: Path, store: StudyStore) -> None:
    assert store.problems == () and store.splits == ("train", "validation", "test") and store.film_size == 48
    for split in store.splits:
        rows = list(csv.DictReader((cohort_root / f"{split}.csv").open()))
        assert store.study_ids(split) == [row["study_id"] for row in rows]
        for row in rows:
            study = store.study(row["study_id"])
            assert study.patient_id == row["subject_id"] == store.patient_id(row["study_id"])
            assert (study.ecg is None) == (not row["ecg_path"]) and (study.cxr is None) == (not row["cxr_path"])
            if study.ecg is not None:
                expected = read_ecg(cohort_root / row["ecg_path"])
                np.testing.assert_allclose(study.ecg, expected, atol=2e-3, rtol=1e-3)
                assert study.ecg.dtype == np.float32
            if study.cxr is not None:
                np.testing.assert_array_equal(study.cxr, read_film(cohort_root / row["cxr_path"], FILM))
            assert study.lab_measured.sum() == sum(bool(row[item]) for item in row if item.isdigit())
            assert study.present == (
                bool(row["ecg_path"]),
                bool(row["cxr_path"]),
                bool(row["50912"]) or study.present[2],
            )
    assert any(
        store.study(study_id).present[2] is False for split in store.splits for study_id in store.study_ids(split)
    )


def test_answers_diagnoses_and_findings_agree(store: StudyStore) -> None:
    for example in store.qa("test", "diagnosis"):
        findings = store.findings(example.study_id)
        assert findings is not None and tuple(findings) == ALL_FINDINGS
        assert named_findings(example.answer) == {key for key, shown in findings.items() if shown}
        assert example.answer.endswith(f"<answer> {'; '.join(store.diagnoses(example.study_id))} </answer>")
    assert len(store.qa("train", "diagnosis")) == 20
    assert len(store.qa("train", "ecg")) == sum(store.study(i).present[0] for i in store.study_ids("train"))
    assert store.lab_mean_percentiles.shape == (50,)


def test_a_store_travels_as_its_path(store: StudyStore) -> None:
    copy = pickle.loads(pickle.dumps(store))
    study_id = store.study_ids("test")[0]
    assert copy.path == store.path and len(pickle.dumps(store)) < 1000
    np.testing.assert_array_equal(copy.study(study_id).lab_percentiles, store.study(study_id).lab_percentiles)


def test_reading_is_fast(store: StudyStore) -> None:
    ids = store.study_ids("train")
    started = time.process_time()
    for _ in range(20):
        for study_id in ids:
            store.study(study_id)
    assert 20 * len(ids) / (time.process_time() - started) > 2000


def test_unknown_names_are_errors(store: StudyStore, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"study-[0-9a-f]{12} is not in the store .*problems\.csv"):
        store.study("x")
    with pytest.raises(DataError, match="split 'dev' is not in the store"):
        store.study_ids("dev")
    with pytest.raises(DataError, match="no split 'train' or kind 'mri'"):
        store.qa("train", "mri")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no study store"):
        StudyStore.open(tmp_path)


def _cut_film(root: Path, row: dict[str, str]) -> None:
    path = root / row["cxr_path"]
    path.write_bytes(path.read_bytes()[:900])


def _eleven_leads(root: Path, row: dict[str, str]) -> None:
    header = root / f"{row['ecg_path']}.hea"
    lines = header.read_text().splitlines()
    header.write_text("\n".join([lines[0].replace(" 12 500 5000", " 11 500 5000"), *lines[1:12]]))
    write_samples(root / row["ecg_path"], np.zeros((5000, 11), np.int16))


def _invalid_lead(root: Path, row: dict[str, str]) -> None:
    samples = read_samples(root / row["ecg_path"])
    samples[:4000, 6] = -32768
    write_samples(root / row["ecg_path"], samples)


def _wrong_rate(root: Path, row: dict[str, str]) -> None:
    header = root / f"{row['ecg_path']}.hea"
    header.write_text(header.read_text().replace(" 12 500 5000", " 12 100 5000"))


def _link_outside(root: Path, row: dict[str, str]) -> None:
    outside = root.parent / "outside.jpg"
    shutil.move(root / row["cxr_path"], outside)
    (root / row["cxr_path"]).symlink_to(outside)


def _linked_signal(root: Path, row: dict[str, str]) -> None:
    outside = root.parent / "outside.dat"
    shutil.move(root / f"{row['ecg_path']}.dat", outside)
    (root / f"{row['ecg_path']}.dat").symlink_to(outside)


BAD_FILES = {
    "missing ECG": (lambda root, row: (root / f"{row['ecg_path']}.hea").unlink(), "ecg_path", r"\.hea: no such file"),
    "missing signal": (
        lambda root, row: (root / f"{row['ecg_path']}.dat").unlink(),
        "ecg_path",
        r"\.dat: no such file",
    ),
    "missing film": (lambda root, row: (root / row["cxr_path"]).unlink(), "cxr_path", r"\.jpg: no such file"),
    "truncated film": (_cut_film, "cxr_path", "truncated"),
    "eleven leads": (_eleven_leads, "ecg_path", "11 leads.*missing V6"),
    "invalid lead": (_invalid_lead, "ecg_path", "lead V1 is 80% invalid"),
    "wrong rate": (_wrong_rate, "ecg_path", "5000 samples at 100 Hz are 50 s"),
    "film linked outside": (_link_outside, "cxr_path", "leads out of the data root by a link"),
    "signal linked outside": (_linked_signal, "ecg_path", "leads out of the data root by a link"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_sets_its_study_aside(data_root: Path, name: str) -> None:
    spoil, field, reason = BAD_FILES[name]
    row = complete(list(csv.DictReader((data_root / "train.csv").open())))
    spoil(data_root, row)
    check_refused(StudyStore.build(config_for(data_root)), row["study_id"], field, reason)


BAD_CELLS = {
    "text in a number": ({"50912": "high"}, "50912", "'high' is not a number"),
    "percentile outside 0..1": ({"50912_percentile": "63"}, "50912_percentile", "63 is outside 0..1"),
    "absolute path": ({"cxr_path": "/etc/passwd"}, "cxr_path", "is absolute"),
    "climbing path": ({"ecg_path": "../ecg/1"}, "ecg_path", r"climbs with '\.\.'"),
    "no patient": ({"subject_id": ""}, "subject_id", "empty"),
    "reserved sign": ({"study_id": "a|b"}, "study_id", "reserved"),
}


@pytest.mark.parametrize("name", BAD_CELLS)
def test_a_bad_cell_sets_its_study_aside(data_root: Path, name: str) -> None:
    changes, field, reason = BAD_CELLS[name]
    chosen: dict[str, str] = {}

    def change(rows: Rows) -> None:
        row = complete(rows)
        row.update(changes)
        chosen.update(row)

    edit_table(data_root, "train", change)
    check_refused(StudyStore.build(config_for(data_root)), chosen["study_id"], field, reason)


def check_refused(store: StudyStore, study_id: str, field: str, reason: str) -> None:
    """The study is gone, listed once with its reason, and its questions are listed too."""
    own = [p for p in store.problems if p.study_id == study_id and not p.file.startswith("qa/")]
    assert len(own) == 1 and own[0].field == field and own[0].file.startswith("train.csv:")
    assert re.search(reason, own[0].reason) and "\n" not in own[0].reason, own[0]
    assert study_id not in store.study_ids("train") and len(store.study_ids("train")) == 19
    assert store.num_unusable_studies == 1
    assert all(example.study_id != study_id for example in store.qa("train", "diagnosis"))
    assert len(store.qa("train", "diagnosis")) == 19
    assert sum(p.file.startswith("qa/diagnosis_train.json[") for p in store.problems) == 1


def test_a_study_or_patient_in_two_splits_stays_with_the_held_out_one(data_root: Path) -> None:
    test_rows = list(csv.DictReader((data_root / "test.csv").open()))

    def change(rows: Rows) -> None:
        rows[0]["subject_id"] = test_rows[0]["subject_id"]
        rows.append(dict(test_rows[1]))

    edit_table(data_root, "train", change)
    store = StudyStore.build(config_for(data_root))
    reasons = {p.field: p.reason for p in store.problems if p.file.startswith("train.csv")}
    assert f"patient {test_rows[0]['subject_id']} is in split test too" in reasons["subject_id"]
    assert f"study {test_rows[1]['study_id']} is in split test too" in reasons["study_id"]
    assert len(store.study_ids("test")) == 8 and len(store.study_ids("train")) == 19
    patients = {split: {store.patient_id(i) for i in store.study_ids(split)} for split in store.splits}
    assert not patients["train"] & patients["test"]


def test_a_study_id_twice_is_refused_both_times(data_root: Path) -> None:
    edit_table(data_root, "train", lambda rows: rows[1].update(study_id=rows[0]["study_id"]))
    store = StudyStore.build(config_for(data_root))
    lines = sorted(p.file for p in store.problems if p.field == "study_id" and p.file.startswith("train.csv"))
    assert lines == ["train.csv:2", "train.csv:3"] and len(store.study_ids("train")) == 18


BAD_ENTRIES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no study": (lambda e: e.update(study_id="999", ECG=[], image=[]), "no usable study '999'"),
    "no key": (lambda e: [e.pop("study_id"), e.update(ECG=[], image=[])], "neither a study_id nor"),
    "another's ECG": (lambda e: e.update(ECG=["ecg/train/none"]), "no usable study of this split has the path"),
    "absolute path": (lambda e: e.update(image=["/tmp/film.jpg"]), "leaves the data root"),
    "two paths": (lambda e: e.update(image=["a.jpg", "b.jpg"]), "expected a list of one path"),
    "no answer tag": (lambda e: e["messages"][1].update(content="Sepsis"), "does not end in <answer>"),
    "text after the answer": (
        lambda e: e["messages"][1].update(content="<answer>Sepsis</answer> ok"),
        "does not end in",
    ),
    "unknown disease": (
        lambda e: e["messages"][1].update(content="<answer>Flu</answer>"),
        "diagnosis 'Flu' is unknown",
    ),
    "no disease": (lambda e: e["messages"][1].update(content="<answer> </answer>"), "diagnosis '' is unknown"),
    "disease twice": (lambda e: e["messages"][1].update(content="<answer>Sepsis; sepsis</answer>"), "named twice"),
    "roles": (lambda e: e["messages"].reverse(), "expected \\['user', 'assistant'\\]"),
    "empty question": (lambda e: e["messages"][0].update(content="<ecg>"), "empty but for placeholders"),
    "number as text": (lambda e: e["messages"][1].update(content=3), "expected a text"),
    "no messages": (lambda e: e.pop("messages"), "expected a list of"),
}


@pytest.mark.parametrize("name", BAD_ENTRIES)
def test_a_bad_entry_is_listed(data_root: Path, name: str) -> None:
    spoil, reason = BAD_ENTRIES[name]
    edit_questions(data_root, "diagnosis_train.json", lambda entries: spoil(entries[4]))
    store = StudyStore.build(config_for(data_root))
    (problem,) = store.problems
    assert problem.file == "qa/diagnosis_train.json[4]"
    assert re.search(reason, problem.reason), problem
    assert len(store.qa("train", "diagnosis")) == 19 and len(store.study_ids("train")) == 20


def test_entries_are_joined_by_path_where_they_have_no_id(data_root: Path, store: StudyStore) -> None:
    def change(entries: list[Any]) -> None:
        for entry in entries:
            if entry["ECG"] or entry["image"]:
                del entry["study_id"]
                entry["ECG"] = [f"./{path}.hea" for path in entry["ECG"]]
        entries.reverse()

    edit_questions(data_root, "diagnosis_train.json", change)
    joined = StudyStore.build(config_for(data_root))
    assert joined.problems == ()
    assert {e.study_id: e.answer for e in joined.qa("train", "diagnosis")} == {
        e.study_id: e.answer for e in store.qa("train", "diagnosis")
    }


def test_placeholders_stay_in_questions_that_name_each_once(data_root: Path) -> None:
    spoken = {
        "<ecg><image> <lab>\nWhat is it?": "What is it?",
        "<ecg> What is it?": "What is it?",
        "<ecg><cxr><lab>What is it?": "What is it?",
        "<ecg><cxr><lab> <lab>What is it?": "What is it?",
        "<ecg><cxr><lab>\nWhat is it?": "<ecg><cxr><lab>\nWhat is it?",
        "Read <lab>, <ecg> and <cxr>.": "Read <lab>, <ecg> and <cxr>.",
    }

    def change(entries: list[Any]) -> None:
        for entry, question in zip(entries, spoken):
            entry["messages"][0]["content"] = question

    edit_questions(data_root, "diagnosis_train.json", change)
    found = StudyStore.build(config_for(data_root)).qa("train", "diagnosis")
    assert [example.question for example in found[: len(spoken)]] == list(spoken.values())


def test_too_much_that_is_unusable_ends_the_build(data_root: Path) -> None:
    row = complete(list(csv.DictReader((data_root / "train.csv").open())))
    (data_root / row["cxr_path"]).unlink()
    listed = data_root / "store.problems.csv"
    with pytest.raises(DataError, match=r"1 of 34 studies are unusable, more than data\.max_unusable_share=0\.01"):
        StudyStore.build(config_for(data_root, max_unusable_share=0.01))
    assert row["study_id"] in listed.read_text() and not (data_root / "store").exists()
    edit_questions(data_root, "ecg_train.json", lambda entries: entries.extend([{}] * 30))
    with pytest.raises(DataError, match=r"30 of \d+ question-answer entries are unusable"):
        StudyStore.build(config_for(data_root, max_unusable_share=0.05))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "train.csv").unlink(), r"train\.csv: no such file"),
        (lambda root: (root / "qa/diagnosis_test.json").unlink(), r"diagnosis_test\.json: no such file"),
        (lambda root: (root / "qa/ecg_train.json").write_text("{"), r"ecg_train\.json: not valid json"),
        (lambda root: (root / "labs_means.json").unlink(), r"labs_means\.json: no such file"),
        (lambda root: (root / "findings.csv").unlink(), r"findings\.csv: no such file"),
        (
            lambda root: (root / "train.csv").write_text("study_id,subject_id\n"),
            r"train\.csv: columns ecg_path, cxr_path",
        ),
    ],
)
def test_a_bad_table_ends_the_build(data_root: Path, spoil: Callable[[Path], Any], message: str) -> None:
    spoil(data_root)
    with pytest.raises(DataError, match=message):
        StudyStore.build(config_for(data_root))


def test_percentiles_are_computed_where_a_table_has_none(data_root: Path, store: StudyStore) -> None:
    for split in ("train", "validation", "test"):
        with (data_root / f"{split}.csv").open(newline="") as file:
            rows = list(csv.reader(file))
        keep = [i for i, name in enumerate(rows[0]) if not name.endswith("_percentile")]
        with (data_root / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([[row[i] for i in keep] for row in rows])
    computed = StudyStore.build(config_for(data_root))
    for study_id in store.study_ids("test"):
        expected = store.study(study_id).lab_percentiles
        np.testing.assert_allclose(computed.study(study_id).lab_percentiles, expected, atol=1e-5)


def test_a_store_is_built_again_only_when_its_inputs_change(data_root: Path) -> None:
    calls: list[tuple[int, int]] = []

    def builds(**changes: Any) -> bool:
        calls.clear()
        StudyStore.build(config_for(data_root, **changes), lambda *done: calls.append(done))
        return bool(calls)

    assert builds() and calls[-1] == (34, 34)
    assert not builds() and not builds(num_workers=2)
    assert builds(film=FilmConfig(size=40)) and builds()
    row = complete(list(csv.DictReader((data_root / "test.csv").open())))
    os.utime(data_root / row["cxr_path"], (1, 1))
    assert builds()
    edit_questions(data_root, "lab_train.json", lambda entries: entries.pop())
    assert builds() and not builds()
    assert not list(data_root.glob(".*"))


def test_a_store_never_replaces_anything_else(data_root: Path) -> None:
    with pytest.raises(DataError, match="no study store; choose another folder"):
        StudyStore.build(config_for(data_root, store=str(data_root / "ecg")))
    assert (data_root / "ecg" / "train").is_dir()


def test_a_missing_root_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.root: .*gone is no folder"):
        StudyStore.build(config_for(tmp_path / "gone"))


def test_a_build_over_processes_gives_the_same_store(
    cohort_root: Path, store: StudyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "_WORTH_A_POOL", 10)
    other = StudyStore.build(config_for(cohort_root, num_workers=2, store=str(tmp_path / "store")))
    assert (other.path / "studies.arrow").read_bytes() == (store.path / "studies.arrow").read_bytes()


def test_the_default_store_follows_the_root() -> None:
    assert store_folder(DataConfig(root="there")) == Path("there/store")
