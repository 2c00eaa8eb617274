"""The sft stage: the pre-trained model learns to reason over all three modalities and to name the diagnoses; one of
plain text learns the examples of its task.

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


def finished(config: Config) -> None:
    """Removes the checkpoint of the last epoch, once the stage is marked as done."""
    from pipelines.stage_resume import checkpoints_of

    checkpoints_of(config, "sft").clear()


def _start_folder(config: Config) -> Path:
    if config.model.init and "pretrain" not in config.run.stages and not is_finished("pretrain", config):
        return Path(config.model.init)
    if config.task.items is None:
        return _fresh_text_model(config)
    return trained_model("pretrain", config)


def _fresh_text_model(config: Config) -> Path:
    """A small Llama over single bytes, with random weights, where a text task names no model."""
    import torch

    from medtvt_rl.data.tokenizer import byte_tokenizer
    from medtvt_rl.learner.process_group import prepare_environment
    from medtvt_rl.model.build import build_text_model

    prepare_environment(config.sft.num_threads)
    tokenizer, folder = byte_tokenizer(), config.stage_folder("sft") / "start"
    torch.manual_seed(config.run.seed)
    build_text_model(config.model.backbone, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    from pipelines.cli import main

    sys.exit(main(["sft", *sys.argv[1:]]))
