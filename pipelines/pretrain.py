"""The pretrain stage (PT): a fresh tri-modal model learns to explain each modality alone.

Owns: the study store, the tokenizer and the model that training starts from. Does not own: the training
(supervised.py).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from medtvt_rl.config import Config
from pipelines.cohort import build_store
from pipelines.reporter import Reporter
from pipelines.supervised import train


def run(config: Config, reporter: Reporter) -> dict[str, Any]:
    """Builds what is missing, trains, leaves stages/pretrain/model, and returns what the summary says of it."""
    start_folder, fresh_encoders = _start(config, reporter)
    encoders = config.encoders
    warm = fresh_encoders and encoders.ecg_steps + encoders.cxr_steps + encoders.lab_steps > 0
    result = train(config, "pretrain", start_folder, warm, reporter)
    return {"summary": {"pretrain": result}}


def finished(config: Config) -> None:
    """Removes the checkpoint of the last epoch, once the stage is marked as done."""
    from pipelines.stage_resume import checkpoints_of

    checkpoints_of(config, "pretrain").clear()


def _start(config: Config, reporter: Reporter) -> tuple[Path, bool]:
    """A folder with model and tokenizer to start from, and whether its encoders are fresh."""
    import torch

    from medtvt_rl.data.tokenizer import build_tokenizer
    from medtvt_rl.learner.process_group import prepare_environment
    from medtvt_rl.model.build import build_model
    from medtvt_rl.model.medtvt import MedTVTConfig
    from medtvt_rl.model.seal import seal

    prepare_environment(config.pretrain.num_threads)
    store = build_store(config, reporter)
    tokenizer = build_tokenizer(config, store)
    torch.manual_seed(config.run.seed)
    model = build_model(config.model, tokenizer)
    folder = config.stage_folder("pretrain") / "start"
    model.save(folder)
    tokenizer.save_pretrained(folder)
    seal(folder)
    goes_on = config.model.init is not None and isinstance(_config_of(config.model.init), MedTVTConfig)
    return folder, not goes_on


def _config_of(folder: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, trust_remote_code=False)


if __name__ == "__main__":
    from pipelines.cli import main

    sys.exit(main(["pretrain", *sys.argv[1:]]))
