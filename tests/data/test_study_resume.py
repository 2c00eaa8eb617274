"""A build of the store that is killed half-way: the next start goes on, and leaves the same store behind."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from medtvt_rl.data import parallel, study_parts
from medtvt_rl.data.config import CohortConfig, DataConfig, FilmConfig
from medtvt_rl.data.errors import DataError
from medtvt_rl.data.parallel import ordered_map
from medtvt_rl.data.simulate.cohort import write_cohort
from medtvt_rl.data.study_build import build_store
from medtvt_rl.data.study_store import StudyStore

ROWS_PER_PART = 10
NUM_STUDIES = 120
BUILD = f"""
import sys, time
from medtvt_rl.data import study_parts
from medtvt_rl.data.config import DataConfig, FilmConfig
from medtvt_rl.data.study_build import build_store
study_parts.ROWS_PER_PART = {ROWS_PER_PART}
def progress(done, total):
    time.sleep(0.05)
if __name__ == "__main__":
    config = DataConfig(root=sys.argv[1], film=FilmConfig(size=48), num_workers=int(sys.argv[2]), store=sys.argv[3])
    build_store(config, progress)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cohort = CohortConfig(num_train=NUM_STUDIES - 20, num_validation=10, num_test=10, seed=2, film_size=48)
    return write_cohort(cohort, tmp_path_factory.mktemp("resume") / "data")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_parts, "ROWS_PER_PART", ROWS_PER_PART)


def config_for(root: Path, store: Path, **changes: Any) -> DataConfig:
    return DataConfig(root=str(root), film=FilmConfig(size=48), num_workers=1, store=str(store), **changes)


def start_build(root: Path, store: Path, num_workers: int, tmp_path: Path) -> subprocess.Popen[bytes]:
    script = tmp_path / "build.py"
    script.write_text(BUILD)
    paths = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, str(script), str(root), str(num_workers), str(store)],
        env={**os.environ, "PYTHONPATH": paths},
        start_new_session=True,
    )


def wait_for_parts(process: subprocess.Popen[bytes], parts: Path, number: int) -> None:
    deadline = time.monotonic() + 120
    while len(list(parts.glob("*.arrow"))) < number:
        assert process.poll() is None and time.monotonic() < deadline, "the build ended too early, or never began"
        time.sleep(0.02)


def contents(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(store.iterdir())}


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_killed_build_goes_on_and_ends_in_the_same_store(root: Path, tmp_path: Path, num_workers: int) -> None:
    store, parts = tmp_path / "store", tmp_path / ".store.building" / "parts"
    process = start_build(root, store, num_workers, tmp_path)
    wait_for_parts(process, parts, 3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    assert not store.exists()
    finished = len(list(parts.glob("*.arrow")))
    calls: list[tuple[int, int]] = []
    build_store(config_for(root, store), lambda *done: calls.append(done))
    assert calls[0] == (finished * ROWS_PER_PART + 1, NUM_STUDIES) and calls[-1] == (NUM_STUDIES, NUM_STUDIES)
    whole = build_store(config_for(root, tmp_path / "whole"))
    assert contents(store) == contents(whole)
    assert not list(tmp_path.glob(".*"))


def test_parts_of_other_settings_and_spoilt_parts_are_made_again(root: Path, tmp_path: Path) -> None:
    store, parts = tmp_path / "store", tmp_path / ".store.building" / "parts"

    def cut(at: int) -> Any:
        def progress(done: int, total: int) -> None:
            if done == at:
                raise KeyboardInterrupt

        return progress

    with pytest.raises(KeyboardInterrupt):
        build_store(config_for(root, store), cut(35))
    assert len(list(parts.glob("*.arrow"))) == 3
    spoilt = parts / "00001.arrow"
    spoilt.write_bytes(spoilt.read_bytes()[:2000])
    calls: list[int] = []
    build_store(config_for(root, store), lambda done, total: calls.append(done))
    assert calls[0] == 21
    assert contents(store) == contents(build_store(config_for(root, tmp_path / "whole")))

    with pytest.raises(KeyboardInterrupt):
        build_store(config_for(root, tmp_path / "other", findings_csv=None), cut(35))
    calls.clear()
    build_store(config_for(root, tmp_path / "other"), lambda done, total: calls.append(done))
    assert calls[0] == 1


def test_questions_that_are_mended_need_no_film_again(root: Path, tmp_path: Path) -> None:
    calls: list[int] = []
    missing = config_for(root, tmp_path / "store", qa="qa/none_{kind}_{split}.json")
    with pytest.raises(DataError, match=r"data\.qa: qa/none_ecg_train\.json: no such file"):
        build_store(missing, lambda done, total: calls.append(done))
    assert calls == []
    (root / "empty.json").write_text(json.dumps([{}] * 100))
    with pytest.raises(DataError, match="question-answer entries are unusable"):
        build_store(config_for(root, tmp_path / "store", qa_files={"lab_train": "empty.json"}))
    store = build_store(config_for(root, tmp_path / "store"), lambda done, total: calls.append(done))
    assert calls == [] and len(StudyStore.open(store).study_ids("train")) == NUM_STUDIES - 20


def test_a_second_builder_has_a_folder_of_its_own(root: Path, tmp_path: Path) -> None:
    held = tmp_path / ".store.building"
    held.mkdir()
    (held / "parts").mkdir()
    descriptor = os.open(held, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        store = build_store(config_for(root, tmp_path / "store"))
    finally:
        os.close(descriptor)
    assert len(StudyStore.open(store).study_ids("train")) == NUM_STUDIES - 20
    assert [path.name for path in tmp_path.glob(".*")] == [held.name]


def die(item: int) -> int:
    if item == 40:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_a_reading_process_that_is_killed_ends_the_build_with_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_WORTH_A_POOL", 10)
    with pytest.raises(DataError, match=r"data\.num_workers: a reading process was killed.*fewer than 2"):
        list(ordered_map(die, range(100), num_workers=2))
    seen: list[tuple[int, int]] = []
    assert list(ordered_map(abs, range(100), 2, lambda *done: seen.append(done))) == list(range(100))
    assert seen == [(done, 100) for done in range(1, 101)]
