"""Questions built for the published layout, from the simulated cohort to the study store, as the README has it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medtvt_rl.config import load_config
from medtvt_rl.data.check.walk import check_data
from medtvt_rl.data.medtvt_qa import QA_KINDS
from medtvt_rl.data.qa.build import MANIFEST
from medtvt_rl.data.simulate.layout_published import LABEL_TABLES
from medtvt_rl.data.study_store import StudyStore
from pipelines import cli

RECIPE = str(Path(__file__).parents[2] / "configs" / "medtvt_r1.yaml")
SIZES = {"num_train": 30, "num_validation": 2, "num_test": 5, "seed": 1, "film_size": 64, "missing_share": 0.2}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of the recipe for a small cohort in the published layout, which is written."""
    folder = tmp_path_factory.mktemp("published")
    common = [f"data.root={folder}/data", f"run.root={folder}/runs", "data.num_workers=1"]
    common += ["data.film.size=64", "model.cxr.image_size=64", "data.validation_share=0.2"]
    sizes = [f"cohort.{name}={value}" for name, value in SIZES.items()]
    assert cli.main(["cohort", "-c", RECIPE, *common, "cohort.layout=published", *sizes]) == 0
    return common


def build_command(settings: list[str]) -> list[str]:
    root = Path(load_config(RECIPE, settings).data.root)
    tables = [word for name, file in LABEL_TABLES.items() for word in (f"--{name}-table", str(root / file))]
    return ["build-qa", "-c", RECIPE, *tables, *settings]


def test_what_is_built_is_what_the_recipe_reads(settings: list[str]) -> None:
    built = [*settings, "data.questions=built"]
    config = load_config(RECIPE, built)
    assert cli.main(build_command(built)) == 0
    assert cli.main(["cohort", "-c", RECIPE, *built]) == 0
    store = StudyStore.build(config.data)
    assert store.problems == () and store.splits == ("train", "validation", "test")
    root = Path(config.data.root)
    manifest = json.loads((root / "qa" / MANIFEST).read_text())
    assert sorted(path.name for path in (root / "qa").glob("diagnosis_*")) == [
        "diagnosis_test.json", "diagnosis_train.json"]  # fmt: skip
    for split in store.splits:
        counted = manifest["splits"][split]
        assert counted["studies"] == len(store.study_ids(split)) > 0
        assert counted["entries"] == {kind: len(store.qa(split, kind)) for kind in QA_KINDS}
        assert min(counted["entries"].values()) > 0 and not any(counted["without_accepted_answer"].values())
    # The diseases are those that the cohort's own questions name.
    own = StudyStore.build(load_config(RECIPE, [*settings, f"data.store={root}/own"]).data)
    assert all(store.diagnoses(i) == own.diagnoses(i) for split in store.splits for i in store.study_ids(split))
    report = check_data(config, quick=True)
    assert report.splits["validation"]["questions: diagnosis"] == len(store.qa("validation", "diagnosis"))


def test_questions_that_would_never_be_read_are_not_built(
    settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(build_command(settings)) == 2
    error = capsys.readouterr().err
    assert "data.qa_files: names the questions that are read" in error and "add data.questions=built" in error
    assert cli.main(["cohort", "-c", RECIPE, *settings, "data.questions=built", "data.qa=no/{kind}_{split}.json"]) == 1
    assert "run `medtvt-rl build-qa` with the same configuration first" in capsys.readouterr().err
