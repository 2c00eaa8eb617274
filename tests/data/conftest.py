"""A small simulated cohort, shared by the tests of this folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from medtvt_rl.config import Config
from medtvt_rl.data.config import CohortConfig, DataConfig, FilmConfig
from medtvt_rl.data.simulate.cohort import write_cohort
from medtvt_rl.data.study_store import StudyStore

COHORT = CohortConfig(num_train=20, num_validation=6, num_test=8, seed=7, film_size=64, missing_share=0.2)


@pytest.fixture(scope="session")
def cohort_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cohort that no test changes."""
    return write_cohort(COHORT, tmp_path_factory.mktemp("cohort") / "data")


@pytest.fixture
def data_root(cohort_root: Path, tmp_path: Path) -> Path:
    """A copy of the cohort for one test to spoil."""
    return Path(shutil.copytree(cohort_root, tmp_path / "data"))


@pytest.fixture(scope="session")
def config(cohort_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A configuration whose store lies outside the cohort."""
    config = Config()
    config.data = data_config(cohort_root)
    config.data.store = str(tmp_path_factory.mktemp("stores") / "store")
    return config


@pytest.fixture(scope="session")
def store(config: Config) -> StudyStore:
    """The cohort's store."""
    return StudyStore.build(config.data)


def data_config(root: Path) -> DataConfig:
    return DataConfig(root=str(root), film=FilmConfig(size=48), num_workers=1, max_unusable_share=1.0)
