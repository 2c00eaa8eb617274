"""The sft stage: the pre-trained model learns to reason over all three modalities and to name the diagnoses.

Owns: what it starts from. Does not own: the training (supervised.py).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from medtvt_rl.config import Config
from pipelines.stages import is_finished, trained_model
from pipelines.supervised import Reporter, train


def run(config: Config, reporter: Reporter) -> dict[str, Any]:
    """Trains from what pretrain left, leaves stages/sft/model, and returns what the summary says of it."""
    result = train(config, "sft", _start_folder(config), False, reporter)
    return {"summary": {"sft": result}}


def _start_folder(config: Config) -> Path:
    if config.model.init and "pretrain" not in config.run.stages and not is_finished("pretrain", config):
        return Path(config.model.init)
    return trained_model("pretrain", config)


if __name__ == "__main__":
    from pipelines.cli import main

    sys.exit(main(["sft", *sys.argv[1:]]))
