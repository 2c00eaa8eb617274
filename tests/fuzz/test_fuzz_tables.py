"""Tables and question-answer files: a store that is whole, or one clear refusal and nothing half-written."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hostile import CASES, SLOW_CASES, any_spoiled, assert_clear
from hypothesis import given
from hypothesis import strategies as st

from medtvt_rl.config import Config
from medtvt_rl.data.check.walk import check_data
from medtvt_rl.data.config import CohortConfig, DataConfig, FilmConfig
from medtvt_rl.data.errors import DataError
from medtvt_rl.data.labs import read_labs_means, read_patient_labs
from medtvt_rl.data.medtvt_qa import QA_KINDS
from medtvt_rl.data.simulate.cohort import write_cohort
from medtvt_rl.data.study_store import StudyStore

PARTS = ".store.building"
FILES = ["train.csv", "test.csv", "findings.csv", "labs_means.json", "qa/diagnosis_train.json", "qa/ecg_train.json"]


@pytest.fixture(scope="session")
def small_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cohort of a few studies."""
    root = tmp_path_factory.mktemp("fuzz") / "tables"
    return write_cohort(CohortConfig(num_train=3, num_validation=1, num_test=1, film_size=32, missing_share=0.0), root)


@pytest.fixture
def root(small_root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_root, tmp_path / "data"))


def read_everything(store: StudyStore) -> int:
    """Reads all that a store offers; how many studies it has."""
    count = 0
    for split in store.splits:
        for study_id in store.study_ids(split):
            study = store.study(study_id)
            assert np.isnan(study.lab_percentiles[~study.lab_measured]).all()
            measured = study.lab_percentiles[study.lab_measured]
            assert ((measured >= 0) & (measured <= 1)).all()
            store.findings(study_id)
            store.diagnoses(study_id)
            count += 1
        for kind in QA_KINDS:
            assert all(example.question and example.answer for example in store.qa(split, kind))
    assert store.percentile_table.mean_percentiles().shape == (50,)
    assert len(store.problems) >= store.num_unusable_studies
    return count


@pytest.mark.parametrize("name", FILES)
@SLOW_CASES
@given(data=st.data(), share=st.sampled_from([0.05, 1.0]))
def test_a_store_of_spoiled_tables(root: Path, small_root: Path, name: str, data: st.DataObject, share: float) -> None:
    content = (small_root / name).read_bytes()
    is_json = name.endswith(".json")
    (root / name).write_bytes(data.draw(any_spoiled(content, None if is_json else ",", is_json)))
    for old in ("store", PARTS):
        shutil.rmtree(root / old, ignore_errors=True)
    (root / "store.problems.csv").unlink(missing_ok=True)
    config = DataConfig(root=str(root), film=FilmConfig(size=16), num_workers=1, max_unusable_share=share)
    left = {PARTS}  # what was read stays for the next attempt
    try:
        store = StudyStore.build(config)
    except DataError as error:
        assert_clear(error)
        assert not (root / "store").exists()
    else:
        left = set()
        assert read_everything(store) == 5 - store.num_unusable_studies or name.endswith(".csv")
    assert {path.name for path in root.iterdir() if path.name.startswith(".")} <= left
    (root / name).write_bytes(content)


@SLOW_CASES
@given(data=st.data(), name=st.sampled_from(FILES))
def test_the_walk_before_training_reports_spoiled_tables(
    root: Path, small_root: Path, tmp_path: Path, data: st.DataObject, name: str
) -> None:
    content = (small_root / name).read_bytes()
    is_json = name.endswith(".json")
    (root / name).write_bytes(data.draw(any_spoiled(content, None if is_json else ",", is_json)))
    config = Config()
    config.data = DataConfig(root=str(root), film=FilmConfig(size=16), num_workers=1)
    report = check_data(config, quick=True)
    report.write(tmp_path / "check.csv")
    for said in [*report.stops, *(check.note for check in report.checks.values() if check.note)]:
        assert_clear(ValueError(said))
    (root / name).write_bytes(content)


@CASES
@given(data=st.data(), suffix=st.sampled_from([".json", ".csv"]))
def test_one_patients_labs(tmp_path: Path, data: st.DataObject, suffix: str) -> None:
    text = '{"Creatinine": 1.2, "50971": "4.1", "WBC": null}' if suffix == ".json" else "Creatinine,1.2\n50971,4.1\n"
    path = tmp_path / f"labs{suffix}"
    path.write_bytes(data.draw(any_spoiled(text.encode(), None if suffix == ".json" else ",", suffix == ".json")))
    try:
        values = read_patient_labs(path)
    except DataError as error:
        assert_clear(error, path.name)
    else:
        assert values.shape == (50,) and not np.isinf(values).any()


@CASES
@given(data=st.data())
def test_means(small_root: Path, tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "labs_means.json"
    path.write_bytes(data.draw(any_spoiled((small_root / "labs_means.json").read_bytes(), None, True)))
    try:
        means = read_labs_means(path)
    except DataError as error:
        assert_clear(error, path.name)
    else:
        assert means.shape == (50,) and ((means >= 0) & (means <= 1)).all()


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 10_000, '{"50802": ' + "9" * 6000 + "}"])
def test_json_that_breaks_parsers_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "labs_means.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"labs_means\.json"):
        read_labs_means(path)
