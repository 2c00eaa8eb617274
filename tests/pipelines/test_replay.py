"""Which steps can be repeated, and with which settings: those that they were learnt with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from stored_examples import a_config, write

from medtvt_rl.algorithm.losses import Denominators
from medtvt_rl.config import Config, to_yaml
from medtvt_rl.learner.step_record import STEPS_FOLDER, StepRecord, step_file, write_step
from pipelines.checkpoints import CheckpointStore
from pipelines.journal import Journal
from pipelines.replay import ReplayError, check
from pipelines.stages import prepare_run_folder

NOTHING = Denominators(num_sequences=1, num_tokens=1, max_new_tokens=1)


def live(root: Path, first: int, last: int, *overrides: str) -> Config:
    """One life of a GRPO stage: the steps first to last - 1 as the journal and the learners keep them."""
    config = a_config(root, *overrides)
    prepare_run_folder(config)
    folder = config.folder / "journal"
    tokenizer: Any = None
    with Journal(folder, tokenizer, first_step=first, settings=to_yaml(config)):
        pass
    for step in range(first, last):
        record = StepRecord(version=step, learning_rate=0.1, denominators=NOTHING, sequences=())
        for rank in range(config.learner.num_workers):
            write_step(step_file(folder / STEPS_FOLDER, step, rank), record)
        with (folder / "steps.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "skipped": False, "checksum": step}) + "\n")
    return config


def test_steps_are_repeated_with_their_own_settings_whatever_config_yaml_says_by_now(tmp_path: Path) -> None:
    run = live(tmp_path / "there", 0, 3, "grpo.loss.kind=dapo", "learner.num_workers=2", "learner.adam_betas=[0.8,0.9]")
    prepare_run_folder(a_config(tmp_path / "there"))  # as `evaluate` does
    moved = (tmp_path / "there").rename(tmp_path / "here") / run.run.name
    config, lines = check(moved, 0, None)
    assert (config.grpo.loss.kind, config.learner.num_workers, config.learner.adam_betas) == ("dapo", 2, [0.8, 0.9])
    assert [line["step"] for line in lines] == [0, 1, 2] and config.folder == moved.resolve()


def test_a_range_ends_where_a_run_went_on_with_other_settings_and_files_of_before_are_none_of_its_ranks(
    tmp_path: Path,
) -> None:
    run = live(tmp_path, 0, 5, "learner.num_workers=2").folder
    live(tmp_path, 2, 5, "learner.num_workers=1", "grpo.loss.clip_high=0.3")
    write(CheckpointStore.of(a_config(tmp_path)), 2)
    changed = r"from 2 on .*clip_high: 0.2 then, 0.3 now; learner.num_workers: 2 then, 1 now.* --to-step 2$"
    with pytest.raises(ValueError, match=changed):
        check(run, 0, None)
    assert check(run, 0, 2)[0].learner.num_workers == 2
    config, lines = check(run, 2, None)
    assert config.learner.num_workers == 1 and [line["step"] for line in lines] == [2, 3, 4]
    assert len([*(run / "journal" / STEPS_FOLDER).iterdir()]) == 2 * 2 + 3


def test_what_changes_no_weight_may_change(tmp_path: Path) -> None:
    run = live(tmp_path, 0, 4).folder
    live(tmp_path, 2, 4, "learner.spares=0", "grpo.max_staleness=2", "grpo.learning_rate=0.1", "rollout.max=1")
    assert len(check(run, 0, None)[1]) == 4


def test_what_cannot_be_repeated_is_told_before_any_start(tmp_path: Path) -> None:
    run = live(tmp_path, 0, 3).folder
    with pytest.raises(ReplayError, match=r"there are checkpoints of \[0\]"):
        check(run, 1, None)
    step_file(run / "journal" / STEPS_FOLDER, 1, 0).unlink()
    with pytest.raises(ReplayError, match=r"there is no .*000001_0\.npz; runs with grpo\.record_steps=true"):
        check(run, 0, None)
    live(tmp_path, 3, 5)
    (run / "journal" / "settings" / "000000.yaml").unlink()
    with pytest.raises(ValueError, match=r"settings step 0 .* earlier version, and can be repeated from step 3 on"):
        check(run, 0, 1)


def test_a_journal_may_begin_late_or_lack_a_line(tmp_path: Path) -> None:
    run = live(tmp_path, 2, 5).folder
    write(CheckpointStore.of(a_config(tmp_path)), 2)
    with pytest.raises(ReplayError, match="the journal has steps 2 to 5"):
        check(run, 0, None)
    assert [line["step"] for line in check(run, 2, 4)[1]] == [2, 3]
    steps = run / "journal" / "steps.jsonl"
    rows = steps.read_text().splitlines(keepends=True)
    steps.write_text(rows[0] + rows[1][:10] + "\n" + rows[2])
    with pytest.raises(ReplayError, match="no line of step 3; end with --to-step 3"):
        check(run, 2, None)
