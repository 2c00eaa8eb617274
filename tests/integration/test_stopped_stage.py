"""A supervised stage that is stopped, and goes on by the same command."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from small_run import PROJECT, SMALL

from medtvt_rl.config import load_config
from medtvt_rl.data.simulate.cohort import write_cohort

# What trains encoders after their warm-up has more to keep than any other.
SETTINGS = [
    *(*SMALL, "cohort.num_train=48", "cohort.num_validation=8", "cohort.num_test=4"),
    *("encoders.ecg_steps=6", "encoders.cxr_steps=6", "encoders.lab_steps=6"),
    *("pretrain.epochs=2", "pretrain.train_encoders=true", "pretrain.batch_size=16", "pretrain.num_workers=2"),
]


class Run:
    """`pretrain` as a process of its own, as a user starts it."""

    def __init__(self, root: Path, name: str) -> None:
        self.folder, self._log = root / name, root / f"{name}.log"
        root.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "pipelines.pretrain", "-c", "configs/quickstart.yaml", f"run.root={root}"]
        with self._log.open("a") as log:
            self._said_from = log.tell()
            self._process = subprocess.Popen(
                [*command, *SETTINGS, f"run.name={name}"],
                cwd=PROJECT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
            )

    def after_epoch(self, number: int) -> None:
        """Returns when the checkpoint of an epoch is there."""
        place = self.folder / "stages" / "pretrain" / "checkpoint" / f"epoch_{number:06d}"
        deadline = time.monotonic() + 200
        while not place.is_dir():
            assert self._process.poll() is None and time.monotonic() < deadline, self.said[-3000:]
            time.sleep(0.01)

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def end(self) -> int:
        """Its exit code."""
        return self._process.wait(timeout=200)

    @property
    def said(self) -> str:
        return self._log.read_bytes()[self._said_from :].decode(errors="replace")


def rows(folder: Path) -> list[dict[str, Any]]:
    """The curves, without the time of each row."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "time"} for row in found]


@pytest.mark.long
@pytest.mark.cluster
def test_a_stage_that_is_stopped_ends_in_the_weights_and_curves_of_one_that_was_not(tmp_path: Path) -> None:
    config = load_config(PROJECT / "configs" / "quickstart.yaml", [f"run.root={tmp_path}", *SETTINGS])
    assert config.cohort is not None
    write_cohort(config.cohort, Path(config.data.root), lambda done, total: None)
    whole = Run(tmp_path, "whole")
    assert whole.end() == 0, whole.said[-3000:]
    stopped = Run(tmp_path, "struck")
    stopped.after_epoch(1)
    stopped.signal(signal.SIGTERM)
    assert stopped.end() == 143, stopped.said[-3000:]
    # A slow end may leave the checkpoint of the next epoch, too.
    assert re.search(r"medtvt-rl: SIGTERM: the same command goes on after epoch [12] of 2 of pretrain\n", stopped.said)
    last = Run(tmp_path, "struck")
    assert last.end() == 0, last.said[-3000:]
    assert re.search(r"pretrain: goes on after epoch [12] of 2\n", last.said) and "encoders" not in last.said
    summaries = []
    for run in (whole, last):
        stage = run.folder / "stages" / "pretrain"
        assert {path.name for path in stage.iterdir()} == {"start", "model", "finished.json"}
        found = json.loads((run.folder / "summary.json").read_text())["pretrain"]
        summaries.append({key: value for key, value in found.items() if key != "seconds"})
    assert summaries[0] == summaries[1] and summaries[0]["encoder_auc"]
    weights = [run.folder / "stages" / "pretrain" / "model" / "model.safetensors" for run in (whole, last)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert rows(whole.folder) == rows(last.folder)
