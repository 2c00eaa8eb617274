"""`medtvt-rl study`: from a hashed id back to a study, a patient or a prompt, for whoever has salt and data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from stored_examples import a_config

from medtvt_rl import privacy
from medtvt_rl.config import Config
from medtvt_rl.data.config import CohortConfig
from medtvt_rl.data.simulate.cohort import write_cohort
from medtvt_rl.data.study_store import StudyStore
from pipelines.cli import main
from pipelines.stages import prepare_run_folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A run folder with a study store beside it, and a journal of one group."""
    monkeypatch.setattr(privacy, "_current", privacy._current)
    cohort = CohortConfig(num_train=3, num_validation=1, num_test=1, film_size=96, missing_share=0.0)
    root = write_cohort(cohort, tmp_path / "data")
    config = a_config(tmp_path / "runs", f"data.root={root}", "data.num_workers=1", "data.max_unusable_share=1")
    StudyStore.build(config.data)
    prepare_run_folder(config)
    journal = config.folder / "journal"
    journal.mkdir()
    (journal / "groups.jsonl").write_text(json.dumps({"prompt_id": "a question#1"}) + "\n")
    privacy.open_for(config.privacy, config.folder)
    return config


def test_a_hashed_id_leads_back(run: Config, capsys: pytest.CaptureFixture[str]) -> None:
    store = StudyStore.open(Path(run.data.store))
    study_id = store.study_ids("train")[1]
    for name in (study_id, store.patient_id(study_id), "a question#1"):
        assert main(["study", str(run.folder), privacy.hashed(name)]) == 0
        assert capsys.readouterr().out == f"{name}\n"


def test_what_leads_nowhere_is_said(run: Config, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", str(run.folder), "study-000000000000"]) == 1
    assert "is no study, patient or prompt of" in capsys.readouterr().err
    (run.folder / "salt").unlink()
    assert main(["study", str(run.folder), privacy.hashed("x")]) == 2
    assert "salt cannot be read" in capsys.readouterr().err
