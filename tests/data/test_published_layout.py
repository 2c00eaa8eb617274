"""The published layout: what is written, what the readers make of it, and the joins that have no id."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wfdb

from medtvt_rl.config import ConfigError, load_config
from medtvt_rl.data.config import CohortConfig, DataConfig, FilmConfig
from medtvt_rl.data.ecg import LEADS
from medtvt_rl.data.errors import DataError
from medtvt_rl.data.labs import LAB_IDS
from medtvt_rl.data.simulate.cohort import write_cohort
from medtvt_rl.data.simulate.layout_published import CXR_FOLDER, ECG_FOLDER, QUESTIONS, TABLES
from medtvt_rl.data.study_rows import patient_place
from medtvt_rl.data.study_store import StudyStore

CONFIG = str(Path(__file__).parents[2] / "configs" / "medtvt_r1.yaml")
NUM_TRAIN = 30


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"num_train": NUM_TRAIN, "num_validation": 4, "num_test": 5, "film_size": 64}
    cohort = CohortConfig(**sizes, seed=1, missing_share=0, layout="published")
    return write_cohort(cohort, tmp_path_factory.mktemp("published") / "data")


def data(root: Path, *overrides: str) -> DataConfig:
    sizes = ["data.film.size=64", "model.cxr.image_size=64", "data.num_workers=1", "data.validation_share=0.2"]
    return load_config(CONFIG, [f"data.root={root}", *sizes, *overrides]).data


def rows(root: Path, split: str) -> list[dict[str, str]]:
    with (root / TABLES[split]).open(newline="") as file:
        return list(csv.DictReader(file))


def test_files_are_named_as_in_mimic(root: Path) -> None:
    row = rows(root, "train")[0]
    patient = row["subject_id"]
    assert row["ecg_path"].startswith(f"files/p{patient[:4]}/p{patient}/s")
    assert row["cxr_path"].startswith(f"files/p{patient[:2]}/p{patient}/s") and row["cxr_path"].endswith(".jpg")
    record = wfdb.rdrecord(str(root / ECG_FOLDER / row["ecg_path"]))
    assert (record.fs, record.sig_len, tuple(record.sig_name)) == (500, 5000, LEADS)
    assert (root / CXR_FOLDER / row["cxr_path"]).is_file()
    test = rows(root, "test")
    assert [row["label"] for row in test[:5]] == ["1"] * 5 and {row["label"] for row in test[5:]} == {"0"}
    means = json.loads((root / "QA/labs_means.json").read_text())
    assert len(means) == 50 and all(name.endswith("_percentile") for name in means)
    entry = json.loads((root / "QA" / QUESTIONS["diagnosis", "train"]).read_text())[0]
    assert set(entry) == {"messages", "ECG"} and entry["ECG"] == [row["ecg_path"]]
    assert entry["messages"][0]["content"].startswith("<ecg><cxr><lab>")


def test_the_recipe_reads_it(root: Path, tmp_path: Path) -> None:
    store = StudyStore.build(data(root, f"data.store={tmp_path / 'store'}"))
    assert store.problems == () and store.splits == ("train", "validation", "test")
    train, validation, test = (store.study_ids(split) for split in store.splits)
    assert sorted(train + validation) == sorted(row["hadm_id"] for row in rows(root, "train"))
    assert test == [row["hadm_id"] for row in rows(root, "test") if row["label"] == "1"]
    held_out = [row for row in rows(root, "train") if patient_place(row["subject_id"]) < 0.2]
    assert validation == [row["hadm_id"] for row in held_out] and 0 < len(validation) < NUM_TRAIN / 2
    for split, ids in (("train", train), ("validation", validation)):
        for kind in ("ecg", "cxr", "lab", "diagnosis"):
            assert sorted(example.study_id for example in store.qa(split, kind)) == sorted(ids)
    question = store.qa("test", "diagnosis")[0].question
    assert question.startswith("<ecg><cxr><lab>\n") and "<" not in question[15:]
    assert "<" not in store.qa("train", "ecg")[0].question, "one placeholder alone is not kept"
    by_id = {row["hadm_id"]: row for row in rows(root, "train")}
    percentile = store.study(train[3]).lab_percentiles[16]
    assert percentile == pytest.approx(float(by_id[train[3]]["50912_percentile"]), abs=1e-6)


def test_without_a_file_of_means_they_are_those_of_the_training_table(root: Path, tmp_path: Path) -> None:
    settings = data(root, "data.labs_means=null", f"data.store={tmp_path / 'store'}")
    means = StudyStore.build(settings).lab_mean_percentiles
    written = json.loads((root / "QA/labs_means.json").read_text())
    # The rounding of raw values in the table moves no rank.
    assert means == pytest.approx(np.array([written[f"{item}_percentile"] for item in LAB_IDS]), abs=1e-6)


def test_a_cohort_of_another_layout_is_another_cohort(root: Path) -> None:
    sizes = {"num_train": NUM_TRAIN, "num_validation": 4, "num_test": 5, "film_size": 64}
    with pytest.raises(DataError, match=r"holds another cohort .*layout 'published' instead of 'plain'"):
        write_cohort(CohortConfig(**sizes, seed=1, missing_share=0), root)


def test_films_and_ecgs_may_lie_elsewhere_but_no_path_leaves_them(root: Path, tmp_path: Path) -> None:
    tables = tmp_path / "tables"
    tables.mkdir()
    for name in ("QA", "Dataset/symile-mimic"):
        (tables / name).parent.mkdir(exist_ok=True)
        (tables / name).symlink_to(root / name)
    with pytest.raises(DataError, match="leads out of the data root by a link"):
        StudyStore.build(data(tables, f"data.ecg_folder={root / ECG_FOLDER}", f"data.cxr_folder={root / CXR_FOLDER}"))
    for name in ("QA", "Dataset/symile-mimic"):
        (tables / name).unlink()
        (tables / name).mkdir()
        for file in (root / name).iterdir():
            (tables / name / file.name).write_bytes(file.read_bytes())
    folders = [f"data.ecg_folder={root / ECG_FOLDER}", f"data.cxr_folder={root / CXR_FOLDER}"]
    assert StudyStore.build(data(tables, *folders)).problems == ()
    with pytest.raises(DataError, match=r"data\.cxr_folder: .*none is no folder"):
        StudyStore.build(data(tables, folders[0], "data.cxr_folder=none"))
    with (tables / TABLES["train"]).open(newline="") as file:
        text = file.read()
    first = rows(root, "train")[0]["cxr_path"]
    (tables / TABLES["train"]).write_text(text.replace(first, f"../../{first}"))
    (problem, *others) = StudyStore.build(data(tables, *folders)).problems
    assert "climbs with '..'" in problem.reason
    # Its questions are not counted as unusable: their study is, and is counted once.
    assert {other.reason.split(":")[0] for other in others if "messages" not in other.field} <= {
        f"study {problem.study_id} was refused itself",
        "no usable study of this split has the path '" + first + "'; mend it or drop the entry",
    }


def test_a_file_that_two_studies_share_needs_an_id(root: Path, tmp_path: Path) -> None:
    content = write_cohort(
        CohortConfig(num_train=20, num_validation=2, num_test=3, film_size=64, missing_share=0, layout="published"),
        tmp_path / "data",
    )
    table = rows(content, "train")
    path = content / TABLES["train"]
    path.write_text(path.read_text().replace(table[1]["ecg_path"], table[0]["ecg_path"]))
    file = content / "QA" / QUESTIONS["diagnosis", "train"]
    entries: list[dict[str, Any]] = json.loads(file.read_text())
    entries[1]["image"] = [table[1]["cxr_path"]]
    entries[1]["ECG"] = entries[0]["ECG"]
    file.write_text(json.dumps(entries))
    store = StudyStore.build(data(content, "data.max_unusable_share=0.5"))
    reasons = [problem.reason for problem in store.problems]
    shared = f"studies {table[0]['hadm_id']} and {table[1]['hadm_id']} share this file; add a study_id"
    assert shared in reasons
    named = [e.study_id for split in ("train", "validation") for e in store.qa(split, "diagnosis")]
    assert table[1]["hadm_id"] in named and table[0]["hadm_id"] not in named


def test_settings_that_cannot_be_are_named(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.validation_share is 1\.5"):
        data(root, "data.validation_share=1.5")
    with pytest.raises(ConfigError, match=r"evaluation\.split is 'dev'.*train, validation, test"):
        data(root, "evaluation.split=dev")
    with pytest.raises(ConfigError, match=r"model\.cxr\.num_channels is 1: .*imagenet"):
        data(root, "model.cxr.num_channels=1")


def test_splits_are_those_of_tables_and_of_the_share() -> None:
    config = DataConfig(labs_csv={"train": "a.csv", "validation": None, "test": "b.csv"}, film=FilmConfig(size=48))
    assert config.splits == ("train", "test")
    config.validation_share = 0.1
    assert config.splits == ("train", "validation", "test")
    assert DataConfig(validation_share=0.1).splits == ("train", "validation", "test")
    places = [patient_place(str(number)) for number in range(4000)]
    assert abs(np.mean(np.array(places) < 0.1) - 0.1) < 0.02
